"""The cost of a layer's orthogonal directions on a chip, and within a step."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import product
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import pandas as pd
from jax.extend import core
from jax.sharding import SingleDeviceSharding

from benchmarks.compilers import programs
from benchmarks.compilers.chips import CHIPS, ENVIRONMENT, compiler, footprint
from benchmarks.lib import records
from benchmarks.lib.style import Report, markdown
from benchmarks.models import decoder
from benchmarks.systems.fit import CONTENDERS, Way, functions
from madax._core.tracing import shape_of
from madax.transforms._orthogonal import newton_schulz as newton_schulz_steps

BATCH, LENGTH = 4, 2048  # Tokens of the step of which operations are counted.
DTYPES = ("float32", "bfloat16")


def newton_schulz(
    out: Path = Path("benchmarks/results/newton_schulz"),
    *,
    model: str = "Llama-2 7B",
    chips: tuple[str, ...] = ("TPU v5e", "H100"),
) -> None:
    """Compile the orthogonal directions of one layer for TPUs and GPUs; run nothing.

    Takes the compilers of TPUs and GPUs (``pip install '.[compilers]'``).

    Args:
        out: Folder for newton_schulz.jsonl and .md.
        model: Key of ``decoder.SIZES``.
        chips: Keys of ``chips.CHIPS``, or "CPU".
    """
    raw = records.file(out, "newton_schulz", fresh=True)
    command = [sys.executable, "-m", "benchmarks.compilers.newton_schulz", str(raw)]
    subprocess.run(
        [*command, json.dumps([model, chips])], env=os.environ | ENVIRONMENT, check=True
    )
    print(newton_schulz_report(out))


def compile_all(raw: Path, model: str, chips: tuple[str, ...]) -> None:
    """Compiles with products in each of ``DTYPES``, and appends the records."""
    size = decoder.SIZES[model]
    step, others = (operations(size, way) for way in ("one byte", "layerwise"))
    stack = jax.eval_shape(partial(decoder.init, size), jax.random.key(0))["layers"]
    # A wide matrix takes what a tall one takes.
    matrices = Counter(
        tuple(sorted(w.shape[1:])) for w in jax.tree.leaves(stack) if w.ndim > 2
    )
    for chip, (shape, count), dtype in product(chips, matrices.items(), DTYPES):
        device = jax.devices("cpu")[0] if chip == "CPU" else CHIPS[chip].devices()[0]
        g = jax.ShapeDtypeStruct(
            shape, jnp.bfloat16, sharding=SingleDeviceSharding(device)
        )
        direction = partial(newton_schulz_steps, dtype=dtype)
        program = (
            jax.jit(lambda g, f=direction: f(g).astype(g.dtype)).lower(g).compile()
        )
        result = {"model": model, "chip": chip, "compiler": compiler(chip)}
        result |= {"shape": shape, "count": count, "products": dtype}
        result |= {"layers": size.layers, "step_operations": step}
        result |= {"other_operations": others}
        counts = programs.count(program.as_text() or "")
        records.append(raw, result | dataclasses.asdict(counts) | footprint(program))


def operations(size: decoder.Size, way: Way) -> int:
    """Returns the operations of the matrix products of one train step."""
    contender = CONTENDERS[way]
    floats = jax.eval_shape(partial(decoder.init, size), jax.random.key(0))
    params = jax.eval_shape(contender.store_stack, floats)
    init, step = functions(size, way, contender.rate)
    batch = jax.ShapeDtypeStruct((BATCH, LENGTH + 1), jnp.int32)
    state = jax.eval_shape(init, params)
    return products(jax.make_jaxpr(step)(params, state, batch).jaxpr)


def products(jaxpr: core.Jaxpr) -> int:
    """Returns two for each number that is multiplied and added in matrix products."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape, out = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
            total += 2 * prod(out) * prod(shape[i] for i in contracted)
        inside = list(map(products, _inside(eqn)))
        # A branch is chosen by the chip, and all of them multiply the same matrices.
        once = max(inside) if eqn.primitive.name == "cond" else sum(inside)
        total += once * eqn.params.get("length", 1)
    return total


def _inside(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """Yields the jaxprs that an operation calls."""
    for value in jax.tree.leaves(
        list(eqn.params.values()),
        is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr),
    ):
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


def newton_schulz_table(runs: pd.DataFrame) -> str:
    """Returns what the directions of a layer take in Markdown, from the records."""
    first = runs.iloc[0]
    step, others = first["step_operations"], first["other_operations"]
    rows = []
    for run in runs.to_dict("records"):
        rows.append(
            {
                "chip": run["chip"],
                "matrix": "{} x {}".format(*run["shape"]),
                "of a layer": f"{run['count']}",
                "products": run["products"],
                "million cycles": f"{run['cycles'] / 1e6:.1f}" if run["cycles"] else "",
                "GB moved": f"{run['bytes'] / 1e9:.2f}",
                "temporaries MB": f"{run['temporaries'] / 1e6:.0f}",
                "peak MB": f"{run['peak'] / 1e6:.0f}",
            }
        )
    layers: Counter[str] = Counter()
    for run in runs[runs["cycles"] > 0].to_dict("records"):
        layers[f"{run['chip']}, {run['products']}"] += run["cycles"] * run["count"]
    cycles = ", ".join(f"{k}: {v / 1e6:.0f} million" for k, v in layers.items())
    return (
        f"The directions of the matrices of {first['model']}, from gradients in "
        "bfloat16: compiled for the chips, not run. In a step of "
        f"{BATCH} x {LENGTH} tokens matrix products take {step / 1e12:.0f} x 10^12 "
        f"operations, of which these directions take {1 - others / step:.0%}: "
        f"{(step - others) / first['layers'] / 1e12:.1f} x 10^12 in each of "
        f"{first['layers']} layers, in either dtype. Cycles of a layer, as the "
        f"compiler of a TPU estimates: {cycles or 'unknown'}.\n\n"
        f"{markdown(rows, numbers=True)}\n"
    )


newton_schulz_report = Report("newton_schulz", newton_schulz_table)


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]), *json.loads(sys.argv[2]))
