"""The time of a step by layers, against the ordinary step with the same work."""

import statistics
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from tqdm import tqdm

from benchmarks.lib import records
from benchmarks.lib.optimizers import OPTIMIZERS
from benchmarks.lib.style import Report, markdown
from benchmarks.models import decoder
from benchmarks.systems import fit
from benchmarks.systems.speed import Running, quantiles

# The network, sequences in a step, tokens in a sequence, and how often it is timed.
PROFILES = {
    "smoke": (decoder.SIZES["tiny"], 2, 32, 2),
    "quick": (decoder.Size(256, 6, 256, 680, 8, 4), 4, 128, 8),
    "full": (decoder.Size(32000, 16, 2048, 5504, 16, 16), 4, 1024, 8),
}
CONTENDERS = {
    "optax.adam float32": OPTIMIZERS["adam"],
    "madam float32": OPTIMIZERS["madam"],
    "madam 8 bits, 8-bit v": fit.CONTENDERS["layerwise"],
    "muon_madam 8 bits, 8-bit moments": fit.CONTENDERS["two bytes"],
    "muon_madam 8 bits, b1=None": fit.CONTENDERS["one byte"],
}
REFERENCE = "madam 8 bits, 8-bit v"


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def layerwise(
    out: Path = Path("benchmarks/results/layerwise"),
    *,
    profile: Literal["smoke", "quick", "full"] = "quick",
) -> None:
    """Time madax.layerwise against the ordinary step with the same rematerialisation.

    The two take turns, compiled, warm and on donated buffers, and so does the layerwise
    step of madam on 8 bits.

    Args:
        out: Folder of a folder for this device: layerwise.jsonl and .md.
        profile: smoke takes seconds, quick some minutes on two CPU cores, full is for a
            GPU.
    """
    raw = records.file(out / records.device_name(), "layerwise", fresh=True)
    for name in tqdm(CONTENDERS, desc="layerwise"):
        records.append(raw, {"optimizer": name} | compare(name, *PROFILES[profile]))
    print(layerwise_report(raw.parent))


def compare(
    name: str, size: decoder.Size, batch: int, length: int, rounds: int
) -> records.Record:
    """Times both ways of a row, and the reference, by turns; returns one record."""
    floats = jax.jit(partial(decoder.init, size))(jax.random.key(0))
    shape = (batch, length + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, size.vocabulary)
    running = []
    by_layers = partial(decoder.layerwise, dtype=jnp.float32)
    for contender, make in (
        (CONTENDERS[name], decoder.ordinary),
        (CONTENDERS[name], by_layers),
        (CONTENDERS[REFERENCE], by_layers),
    ):
        init, step = make(size, contender.tx)
        params = jax.jit(contender.store_stack)(floats)
        state = jax.jit(init)(params)
        program = jax.jit(lambda *x, step=step: step(*x)[:2], donate_argnums=(0, 1))
        compiled = program.lower(params, state, tokens).compile()
        running.append(Running(compiled, params, state, tokens, 0.0))
    times = np.array([[r.time() for r in running] for _ in range(rounds + 1)])[1:]
    return {
        "parameters": decoder.count(size),
        "layers": size.layers,
        "width": size.width,
        "batch": batch,
        "length": length,
        "seconds": times[:, 1].tolist(),
        "ordinary_seconds": times[:, 0].tolist(),
        "reference_seconds": times[:, 2].tolist(),
    }


def layerwise_table(runs: pd.DataFrame) -> str:
    """Returns the times in Markdown, from the records alone."""
    first = runs.iloc[0]
    rows = []
    for run in runs.to_dict("records"):
        low, mid, high = quantiles(run["seconds"], run["ordinary_seconds"])
        ordinary = statistics.median(run["ordinary_seconds"])
        rows.append(
            {
                "optimizer": run["optimizer"],
                "layerwise / ordinary": f"{mid:.2f}",
                "10 to 90 %": f"{low:.2f} to {high:.2f}",
                "ordinary ms": f"{1e3 * ordinary:.0f}",
            }
        )
        # The first rows were recorded without a reference.
        if isinstance(run.get("reference_seconds"), list):
            _, over, _ = quantiles(run["seconds"], run["reference_seconds"])
            rows[-1][f"over {REFERENCE}"] = f"{over:.2f}"
    table = markdown(rows, numbers=True)
    return (
        f"Whole train steps of {first['parameters'] / 1e6:.1f} M parameters, "
        f"{first['layers']} layers of {first['width']}, {first['batch']} x "
        f"{first['length']} tokens, in float32, layers computed again on the way back "
        f"in both; on {first['environment']['device']}.\n\n{table}\n"
    )


layerwise_report = Report("layerwise", layerwise_table)
