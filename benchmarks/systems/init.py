"""The cost of a process's first ``init``, in CPU time and compiled programs."""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pandas as pd
import tyro
from tqdm import tqdm

import madax
from benchmarks.lib import records
from benchmarks.lib.formats import MOMENTS_8, SYMLOG_8
from benchmarks.lib.optimizers import BASELINE, TIMED
from benchmarks.lib.steps import Tree
from benchmarks.lib.style import Report, markdown
from benchmarks.models import decoder, gpt2

# JAX reports this once for each program that XLA compiles.
_COMPILED = "/jax/core/compile/backend_compile_duration"
MAKERS: dict[str, Callable[[Tree], Tree]] = {
    BASELINE: TIMED[BASELINE].tx.init,
    "madam": TIMED["madam"].tx.init,
    "madam, in jax.jit": jax.jit(TIMED["madam"].tx.init),
    "muon_madam, 8-bit moments": madax.muon_madam(moment_format=MOMENTS_8).init,
    "quantize_params": partial(madax.quantize_params, format=SYMLOG_8),
    "adamw, 8-bit state": TIMED["adamw, 8-bit state"].tx.init,
}


def listed(size: decoder.Size) -> Tree:
    """Returns shapes of a decoder whose layers are a list, nine leaves each."""
    shapes = jax.eval_shape(partial(decoder.init, size), jax.random.key(0))
    layer = jax.tree.map(
        lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), shapes["layers"]
    )
    return {"ends": shapes["ends"], "layers": [layer] * size.layers}


def _deep(layers: int) -> Tree:
    return listed(dataclasses.replace(decoder.SIZES["tiny"], layers=layers))


def _gpt2() -> Tree:
    return jax.eval_shape(partial(gpt2.init, gpt2.SIZES["124M"], jax.random.key(0)))


# Trees with values, and with shapes alone.
VALUES: dict[str, Callable[[], Tree]] = {
    "decoder, 11 layers": partial(_deep, 11),
    "decoder, 33 layers": partial(_deep, 33),
    "decoder, 111 layers": partial(_deep, 111),
    "GPT-2 124M": _gpt2,
}
SHAPES: dict[str, Callable[[], Tree]] = {
    "Llama-2 7B": partial(listed, decoder.SIZES["Llama-2 7B"]),
}
# Trees, and the processes for each of them and each row.
PROFILES = {"smoke": (("decoder, 11 layers",), 1), "full": ((*VALUES, *SHAPES), 2)}


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def init(
    out: Path = Path("benchmarks/results/init"),
    *,
    profile: Literal["smoke", "full"] = "full",
) -> None:
    """Measure the first init of trees of 100 to 1000 leaves, against optax.adam.

    Each is measured in a fresh process, which has compiled nothing. Rows take turns.

    Args:
        out: Folder of a folder for this device: init.jsonl and .md.
        profile: smoke takes half a minute, full ten minutes on two CPU cores.
    """
    raw = records.file(out / records.device_name(), "init", fresh=True)
    trees, repeats = PROFILES[profile]
    jobs = [(t, row) for t in trees for _ in range(repeats) for row in MAKERS]
    for job in tqdm(jobs, desc="init"):
        command = [sys.executable, "-m", "benchmarks.systems.init", str(raw), *job]
        subprocess.run(command, check=True)
    print(init_report(raw.parent))


def measure(tree: str, row: str) -> records.Record:
    """Makes a tree, then measures one call.

    Args:
      tree: key of ``VALUES`` or ``SHAPES``.
      row: key of ``MAKERS``.

    Returns:
      Numbers of ``leaves`` and ``parameters``; ``cpu_s``, processor seconds of the call
      until all values are there; ``programs``, how many XLA compiled in that time.
    """
    shapes, make = (VALUES | SHAPES)[tree](), MAKERS[row]
    params = shapes
    if tree in SHAPES:
        make = partial(jax.eval_shape, make)
    else:
        rng = np.random.default_rng(0)
        # Nothing is compiled to make them.
        params = jax.tree.map(
            lambda w: jax.device_put(0.02 * rng.standard_normal(w.shape, np.float32)),
            shapes,
        )
    programs = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: programs.append(event) if event == _COMPILED else None
    )
    begin = time.process_time()
    made = make(params)
    if tree in VALUES:
        jax.block_until_ready(made)
    seconds = time.process_time() - begin
    leaves = jax.tree.leaves(shapes)
    return {
        "leaves": len(leaves),
        "parameters": sum(w.size for w in leaves),
        "cpu_s": round(seconds, 3),
        "programs": len(programs),
    }


def init_table(runs: pd.DataFrame) -> str:
    """Returns a Markdown table for each tree, from the records alone."""
    sections = []
    for tree, group in runs.groupby("tree", sort=False):
        # Other work on the machine only adds to processor seconds.
        least = group.groupby("optimizer", sort=False)["cpu_s"].idxmin()
        best = group.loc[least].to_dict("records")
        adam = next(run for run in best if run["optimizer"] == BASELINE)
        rows = [
            {
                "first init": run["optimizer"],
                "CPU s": f"{run['cpu_s']:.2f}",
                "/ adam": f"{run['cpu_s'] / adam['cpu_s']:.1f}",
                "programs": str(run["programs"]),
            }
            for run in best
        ]
        how = ", by jax.eval_shape" if tree in SHAPES else ""
        sections.append(
            f"**{tree}{how}**: {adam['parameters'] / 1e6:.1f} M parameters in "
            f"{adam['leaves']} leaves.\n\n{markdown(rows, numbers=True)}\n"
        )
    return "\n".join(sections)


init_report = Report("init", init_table)


if __name__ == "__main__":
    raw, *job = sys.argv[1:]
    names = dict(zip(("tree", "optimizer"), job, strict=True))
    records.append(Path(raw), names | measure(*job))
