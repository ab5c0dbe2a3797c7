"""SmolLM2-135M, a language model that others trained, trained further in few bytes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

import madax
from benchmarks.accuracy.scale_contenders import CONTENDERS, next_rate
from benchmarks.accuracy.smollm import FLOATS, held_out, losses_of, quantized
from benchmarks.data.corpus import SMOLLM, Corpus, language_reference, read_corpus
from benchmarks.lib import records
from benchmarks.lib.choices import check_choices
from benchmarks.lib.formats import MOMENTS_8
from benchmarks.lib.steps import Functions, Tree, nbytes
from benchmarks.lib.style import STYLES, Report, legend, markdown
from benchmarks.models import decoder
from benchmarks.models.smollm import smollm as load

TRIALS, FACTOR = 4, 3  # Rates of every contender, and from one to the next.
B2 = 0.95  # Of every second moment, as there are few steps.
ADAMW, AS_IT_IS = "AdamW float32", "as it is"


class Row(NamedTuple):
    """A contender.

    Attributes:
      make: a schedule of the rate to the optimizer.
      rate: the first rate of the search.
      weights: key of ``smollm.FORMATS``, with one scale per channel, or float32.
    """

    make: Callable[[optax.Schedule], optax.GradientTransformation]
    rate: float
    weights: str = "symlog 8"


_MADAM = partial(madax.madam, b2=B2, moment_format=MOMENTS_8)
_MUON_MADAM = partial(madax.muon_madam, b2=B2, moment_format=MOMENTS_8)
_MUON = partial(madax.muon, b2=B2, moment_format=MOMENTS_8)
_MUON_ON_CODES = partial(
    CONTENDERS["Muon on codes, 2 bytes"].make, other=1.0, beta=0.95, weight_decay=0.0
)
# In the order in which they run. Newton-Schulz steps take most of the time of a step.
ROWS = {
    ADAMW: Row(partial(optax.adamw, b2=B2), 1e-4, FLOATS),
    "madam, 2 bytes": Row(_MADAM, 1e-3),
    "factored, weights of 16 bits, 2 bytes": Row(
        partial(_MUON_MADAM, b1=None, direction="factored"), 3e-4, "symlog 16"
    ),
    "factored, 1 byte": Row(partial(_MUON_MADAM, b1=None, direction="factored"), 3e-4),
    "madax.muon, factored, 1 byte": Row(
        partial(_MUON, b1=None, direction="factored"), 3e-4
    ),
    "muon_madam, 2 bytes": Row(_MUON_MADAM, 3e-4),
    "madax.muon, 2 bytes": Row(_MUON, 3e-4),
    "Muon on codes, 2 bytes": Row(_MUON_ON_CODES, 3e-4),
    "madam, 3 bytes, weights of 16 bits": Row(_MADAM, 1e-3, "symlog 16"),
    "muon_madam, 1 byte": Row(partial(_MUON_MADAM, b1=None), 3e-4),
}


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def finetune(
    out: Path = Path("benchmarks/results/smollm"),
    *,
    corpus: Path | None = None,
    rows: tuple[str, ...] = (),
    steps: int = 48,
    length: int = 128,
    sequences: int = 32,
    seeds: int = 3,
) -> None:
    """Train all weights of SmolLM2-135M on a text, as codes of few bytes and as floats.

    All begin with the same weights, and have the same batches of one sequence. Each has
    four trials of its rate, with seed 0, by factors of three until the best is between
    two others; the best is run with the other seeds. What the records have is not run
    again. On one CPU core a run takes three minutes, and one with Muon's direction
    twenty.

    Args:
        out: Folder for finetune.jsonl, .md and .png.
        corpus: Folder of the text, as for the command smollm; by default the language
            reference that comes with Python.
        rows: Names of optimizers; by default all, in the order of ROWS.
        steps: How long to train.
        length: Of a sequence, in tokens.
        sequences: How many to measure the loss on, held out.
        seeds: Of the batches.
    """
    check_choices("rows", rows, ROWS)
    data = language_reference() if corpus is None else read_corpus(corpus, SMOLLM)
    tokens = held_out(data, sequences, length)
    fixed = {"text": data.facts, "sequences": len(tokens), "length": length}
    fixed |= {"steps": steps}
    raw = records.file(out, "finetune")
    if len(records.find(raw, fixed)) < len(records.read(raw)):
        raise ValueError(
            f"{raw} has runs of another text or length, and not of {fixed}; pass "
            "another folder as --out, or the arguments of those. Nothing was changed."
        )
    size, params = load()
    losses = losses_of(size, tokens)
    if not records.find(raw, fixed | {"optimizer": AS_IT_IS}):
        records.append(raw, fixed | {"optimizer": AS_IT_IS, "losses": losses(params)})
    for name in rows or ROWS:
        row, of = ROWS[name], fixed | {"optimizer": name}
        train = None
        while trial := next_trial(row, records.find(raw, of), seeds):
            train = train or _trained(size, params, row, steps)
            order = batches(data, steps, length, trial["seed"])
            weights, run = train(trial["rate"], tqdm(order, desc=f"{name}, {trial}"))
            run |= {"weights": row.weights, "losses": losses(weights)}
            records.append(raw, of | trial | run)
    print(finetune_report(out))


def next_trial(
    row: Row, runs: Sequence[records.Record], seeds: int
) -> records.Record | None:
    """Returns the rate and the seed of the next run; None if there is none.

    All trials of rates come first; then the best rate has other seeds.

    Args:
      row: what is tuned.
      runs: of it.
      seeds: how many.
    """
    tried = {run["rate"]: loss(run) for run in runs if run["seed"] == 0}
    if not tried:
        return {"rate": row.rate, "seed": 0}
    if len(tried) < TRIALS:
        return {"rate": next_rate(tried, FACTOR), "seed": 0}
    best = min(tried, key=lambda rate: tried[rate])
    done = {run["seed"] for run in runs if run["rate"] == best}
    left = [seed for seed in range(seeds) if seed not in done]
    return {"rate": best, "seed": left[0]} if left else None


def loss(run: Mapping[Any, Any]) -> float:
    """Returns the mean held-out loss of a run; infinite if it diverged."""
    found = np.mean([np.inf if x is None else x for x in run["losses"]])
    return float(np.nan_to_num(found, nan=np.inf))


def batches(data: Corpus, steps: int, length: int, seed: int) -> np.ndarray:
    """Returns sequences in a random order, of shape (steps, 1, length)."""
    every = data.train[: len(data.train) // length * length].reshape(-1, 1, length)
    return every[np.random.default_rng(seed).permutation(len(every))[:steps]]


def _trained(
    size: decoder.Size, params: decoder.Params, row: Row, steps: int
) -> Callable[..., tuple[Tree, records.Record]]:
    """Returns a function that trains parameters at a rate, to values and facts."""

    def functions(rate: jax.typing.ArrayLike) -> Functions:
        tx = row.make(lambda count: rate * (1 - count / steps))
        return decoder.layerwise(size, tx)

    def stored() -> Tree:
        if row.weights == FLOATS:
            return jax.tree.map(jnp.copy, params)  # What is donated is lost.
        return quantized(params, row.weights, "a channel")

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Tree, state: Tree, batch: jax.Array, rate: jax.Array) -> tuple:
        return functions(rate)[1](params, state, batch)

    def train(rate: float, order: tqdm) -> tuple[Tree, records.Record]:
        codes = stored()
        state = jax.jit(functions(rate)[0])(codes)
        kept, curve = nbytes((codes, state)) / decoder.count(size), []
        for batch in order:
            tokens = jnp.asarray(batch, jnp.int32)
            codes, state, value = step(codes, state, tokens, rate)
            curve.append(float(value))
        facts = {"curve": curve, "bytes_per_parameter": kept}
        return jax.jit(madax.dequantize_params)(codes), facts

    return train


def finetune_table(runs: pd.DataFrame) -> str:
    """Returns falls of the held-out loss in Markdown, the least first, and trials."""
    base, groups = _parts(runs)
    start, rows = np.array(base["losses"]), []
    falls = {name: start - _after(best) for name, (best, _) in groups.items()}
    for name in sorted(falls, key=lambda name: falls[name].mean()):
        best, trials = groups[name]
        row = {
            "optimizer": name,
            "bytes a parameter": f"{best[0]['bytes_per_parameter']:.2f}",
            "seeds": f"{len(best)}",
            "nats a token": f"{start.mean() - falls[name].mean():.4f}",
            "fall": f"{100 * falls[name].mean() / start.mean():.2f} %",
        }
        if ADAMW in falls and name != ADAMW:
            # By sequence, as all were measured on the same.
            gaps, of = falls[name] - falls[ADAMW], falls[ADAMW].mean() / 100
            error = gaps.std(ddof=1) / len(gaps) ** 0.5 / of
            row[f"of the fall of {ADAMW}"] = (
                f"{100 + gaps.mean() / of:.1f} ± {error:.1f} %"
            )
        tried = sorted(trials.items())
        row["after, by rate"] = ", ".join(f"{rate:g}: {x:.3f}" for rate, x in tried)
        rows.append(row)
    return (
        f"SmolLM2-135M-Instruct, all its weights trained for {base['steps']} steps of "
        f"{base['length']} tokens of {base['text']['name']}, at rates that fall to "
        f"zero; as it is, {start.mean():.4f} nats a token on {len(start)} sequences "
        "that are held out. The fall is from there, so that of codes pays for their "
        "rounding, too. The error is a standard error over sequences.\n\n"
        f"{markdown(rows, numbers=True)}\n"
    )


def finetune_figure(runs: pd.DataFrame) -> Figure:
    """Draws the held-out loss after training against the rate."""
    base, groups = _parts(runs)
    fig = Figure(figsize=(6, 4), layout="constrained")
    axes = fig.subplots()
    for (name, (_, trials)), style in zip(groups.items(), STYLES, strict=False):
        axes.plot(*zip(*sorted(trials.items()), strict=True), label=name, **style)
    axes.axhline(loss(base), color="#999999", linewidth=1, label=AS_IT_IS)
    axes.set(xscale="log", xlabel="rate", ylabel="held-out nats a token")
    axes.grid(alpha=0.3)
    legend(fig, columns=2)
    return fig


def _parts(runs: pd.DataFrame) -> tuple[records.Record, dict[str, Any]]:
    """Returns the record of no training; runs at the best rate, and losses by rate."""
    base, groups = runs[runs["optimizer"] == AS_IT_IS].iloc[0].to_dict(), {}
    trained = runs[runs["optimizer"] != AS_IT_IS]
    for name, group in trained.groupby("optimizer", sort=False):
        every = group.to_dict("records")
        trials = {run["rate"]: loss(run) for run in every if run["seed"] == 0}
        best = min(trials, key=lambda rate: trials[rate])
        groups[name] = [run for run in every if run["rate"] == best], trials
    return base, groups


def _after(runs: Sequence[records.Record]) -> np.ndarray:
    """Returns the loss of each sequence, the mean over seeds."""
    return np.mean([run["losses"] for run in runs], axis=0)


finetune_report = Report("finetune", finetune_table, finetune_figure)
