"""Language models at twenty tokens a parameter, by tuned optimizers of few bytes."""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm import tqdm

import madax
from benchmarks.accuracy.scale_arms import MODELS, PARTS, SEEDS, Arm, Model, arms
from benchmarks.accuracy.scale_contenders import CONTENDERS, Row
from benchmarks.accuracy.scale_report import scale_report
from benchmarks.compilers.chips import footprint
from benchmarks.data.corpus import TOKENS, Corpus, read_corpus
from benchmarks.lib import checkpoint, records
from benchmarks.lib.choices import check_choices
from benchmarks.lib.steps import Functions, Tree, apply, nbytes
from benchmarks.models import decoder

EVALUATED = PARTS // 5  # Parts from one held-out loss to the next.
KEPT_EVERY = 60.0  # Seconds from one checkpoint to the next.
Stop = Callable[[], bool]


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def scale(
    out: Path = Path("benchmarks/results/scale"),
    *,
    corpus: Path = Path("build/corpus/linux-source-6.1"),
    sizes: tuple[str, ...] = ("1M",),
    tokens_per_parameter: float = 20.0,
    rows: tuple[str, ...] = (),
    tuned_on: str = "",
    seeds: int = SEEDS,
    minutes: float | None = None,
) -> None:
    """Train Llama-shaped models of 0.1 to 124 M parameters, 20 tokens a parameter.

    Each optimizer is tuned by the same number of trials on the next smaller size. What
    the records have is not run again; a run that was cut short goes on where its
    checkpoint was. Runs have the order of `arms` in accuracy/scale_arms.py. On one
    CPU core a run of the size 1M takes a hundred minutes, one of 0.3M thirteen, one of
    0.1M two.

    Args:
        out: Folder for scale.jsonl, .md and .png, and for checkpoints.
        corpus: Folder of a text, made by the command corpus.
        sizes: Models, the smallest first: 0.1M, 0.3M, 1M, 3M, 10M, 30M, 124M, named by
            their parameters without tables of tokens; or smoke.
        tokens_per_parameter: How long to train.
        rows: Names of optimizers; by default all, FlashAdamW where its package is
            there (``pip install '.[rivals]'``).
        tuned_on: The size to tune on; by default the next smaller one.
        seeds: How many of each optimizer; those outside of the claim have one.
        minutes: When to stop, between two parts of a run; None to go on to the end.
    """
    begin = time.monotonic()
    check_choices("sizes", sizes, MODELS)
    check_choices("rows", rows, CONTENDERS)
    check_choices("tuned_on", (tuned_on,) if tuned_on else (), MODELS)
    raw = records.file(out, "scale")
    find = partial(_find, raw, tokens_per_parameter)

    def stop() -> bool:
        return minutes is not None and time.monotonic() - begin > 60 * minutes

    for arm in arms(find, sizes, rows, tuned_on, seeds):
        data = read_corpus(corpus, MODELS[arm.size].vocabulary)
        config = configuration(arm.size, data)
        _check_alike(raw, arm.size, config)
        settings = dataclasses.asdict(arm)
        settings |= {"tokens_per_parameter": tokens_per_parameter, "config": config}
        run = None
        if not stop():
            run = train(arm, settings, data, out / "checkpoints", stop)
        if run is None:
            print(f"The time is up; the next run begins with {arm}.")
            break
        records.append(raw, settings | run)
        _file(out / "checkpoints", settings).unlink(missing_ok=True)
    if raw.exists():
        print(scale_report(out))


def _find(
    raw: Path, tokens_per_parameter: float, **settings: Any
) -> list[records.Record]:
    settings |= {"tokens_per_parameter": tokens_per_parameter}
    return records.find(raw, settings)


def configuration(size: str, data: Corpus) -> records.Record:
    """Returns what all runs of a size must share, on this machine."""
    on_chip = jax.devices()[0].platform != "cpu"
    return dataclasses.asdict(MODELS[size]) | {
        "corpus": data.facts,
        "dtype": "bfloat16" if on_chip else "float32",
        "fused": on_chip and decoder.can_fuse(),
    }


def _check_alike(raw: Path, size: str, config: records.Record) -> None:
    """Raises if the records have runs of this size that cannot be compared."""
    for run in records.find(raw, {"size": size}):
        old = run["config"]
        differs = [name for name in config if config[name] != old.get(name)]
        if differs:
            name = differs[0]
            raise ValueError(
                f"{raw} has runs of {size} whose {name} is {old.get(name)!r}, and not "
                f"{config[name]!r} as here; pass another folder as --out, or go on "
                "where those were made. Nothing was changed."
            )


class Programs(NamedTuple):
    """Functions that train one contender at one size, for any hyperparameters.

    Attributes:
      start: a seed and values to parameters and state.
      advance: those, batches and values to those, and losses.
      evaluate: parameters and held-out batches to a loss.
      facts: what it takes, for records.
    """

    start: Callable[..., Tree]
    advance: Callable[..., tuple[Tree, jax.Array]]
    evaluate: Callable[[Tree, jax.Array], jax.Array]
    facts: records.Record


def train(
    arm: Arm, settings: records.Record, data: Corpus, folder: Path, stop: Stop
) -> records.Record | None:
    """Trains once, from a checkpoint if there is one.

    Args:
      arm: what to train.
      settings: of the run, as in the records.
      data: tokens.
      folder: of checkpoints.
      stop: whether to stop, asked after each part.

    Returns:
      The held-out nats a token, their curve, and what it takes of memory and time; None
      if it was stopped, and is kept.
    """
    model, config, began = MODELS[arm.size], settings["config"], time.monotonic()
    steps = model.steps(settings["tokens_per_parameter"])
    fused, dtype = config["fused"], config["dtype"]
    made = _programs(arm.size, arm.name, steps, fused, dtype)
    values = {name: jnp.float32(value) for name, value in arm.values.items()}
    file, batches = _file(folder, settings), _batches(data, model, steps, arm.seed)
    shapes = jax.eval_shape(made.start, arm.seed, values)
    kept = checkpoint.load(file, shapes)
    facts: records.Record = {"parts": 0, "seconds": 0.0}
    facts["curve"] = {"step": [], "train": [], "loss": []}
    carry, facts = kept or (made.start(arm.seed, values), facts)
    curve, tests = facts["curve"], _tests(data, model)
    before, saved = facts["seconds"], time.monotonic()

    def save() -> None:
        facts["seconds"] = before + time.monotonic() - began
        checkpoint.save(file, carry, facts)

    label = f"{arm.size}, {arm.name}, {arm.values}, {arm.seed}"
    with tqdm(total=steps, initial=steps // PARTS * facts["parts"], desc=label) as bar:
        while facts["parts"] < PARTS:
            carry, losses = made.advance(carry, batches(facts["parts"]), values)
            facts["parts"] += 1
            loss = float(losses.mean())
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(steps // PARTS)
            if facts["parts"] % EVALUATED == 0:
                curve["step"].append(bar.n)
                curve["train"].append(loss)
                curve["loss"].append(float(made.evaluate(carry[0], tests)))
            if not np.isfinite(loss):
                break
            if stop() and facts["parts"] < PARTS:
                save()
                return None
            if time.monotonic() - saved > KEPT_EVERY:
                save()
                saved = time.monotonic()
    finished = facts["parts"] == PARTS
    return {
        **made.facts,
        "steps": steps,
        "loss": curve["loss"][-1] if finished else None,
        "curve": curve,
        "wall_s": round(before + time.monotonic() - began, 1),
    }


def _file(folder: Path, settings: records.Record) -> Path:
    """Returns the checkpoint of a run; each configuration has its own."""
    text = json.dumps(settings, sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"


@functools.cache
def _programs(size: str, name: str, steps: int, fused: bool, dtype: str) -> Programs:
    """Compiles what all values and seeds of a contender share."""
    start, lowered, evaluate, facts = _lowered(size, name, steps, fused, dtype)
    compiled = lowered.compile()
    batches = MODELS[size].batch * (MODELS[size].length + 1) * (steps // PARTS)
    peak = footprint(compiled)["peak"] - TOKENS.itemsize * batches
    return Programs(jax.jit(start), compiled, evaluate, facts | {"peak": peak})


def _lowered(
    size: str, name: str, steps: int, fused: bool, dtype: str
) -> tuple[Callable, jax.stages.Lowered, Callable, records.Record]:
    """Returns what ``Programs`` has, and that is not compiled yet."""
    model, row = MODELS[size], CONTENDERS[name]
    shape = model.size(fused=fused)
    rise_and_fall = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)

    def functions(values: Tree) -> Functions:
        tx = row.make(
            lambda count: values["rate"] * rise_and_fall(count),
            **{name: values[name] for name in row.knobs},
        )
        return _step(shape, row, tx, dtype)

    def start(seed: jax.typing.ArrayLike, values: Tree) -> Tree:
        params = row.store_stack(decoder.init(shape, jax.random.key(seed)))
        return params, functions(values)[0](params)

    def advance(carry: Tree, batches: jax.Array, values: Tree) -> tuple:
        def one(carry, batch):
            step = functions(values)[1]
            *carry, loss = step(*carry, batch.astype(jnp.int32))
            return tuple(carry), loss

        return jax.lax.scan(one, carry, batches)

    @jax.jit
    def evaluate(params: Tree, tests: jax.Array) -> jax.Array:
        weights = madax.dequantize_params(params, dtype)
        measure = partial(decoder.whole_loss, shape, weights)
        return jax.lax.map(lambda batch: measure(batch.astype(jnp.int32)), tests).mean()

    values = dict.fromkeys(("rate", *row.knobs), jax.ShapeDtypeStruct((), jnp.float32))
    carry = jax.eval_shape(start, 0, values)
    shapes = (steps // PARTS, model.batch, model.length + 1)
    batches = jax.ShapeDtypeStruct(shapes, TOKENS)
    lowered = jax.jit(advance, donate_argnums=0).lower(carry, batches, values)
    count = decoder.count(shape)
    facts = {"parameters": count, "bytes_per_parameter": nbytes(carry) / count}
    return start, lowered, evaluate, facts


def _step(
    size: decoder.Size, row: Row, tx: optax.GradientTransformation, dtype: str
) -> Functions:
    """Returns what makes a state, and a step: codes are trained a layer at a time."""
    if row.format is not None and not row.clips:
        return decoder.layerwise(size, tx, dtype=jnp.dtype(dtype))

    def step(params: Tree, state: Tree, batch: jax.Array) -> tuple:
        def loss(params: Tree) -> jax.Array:
            weights = madax.dequantize_params(params, jnp.dtype(dtype))
            return decoder.whole_loss(size, weights, batch)

        value, grads = madax.value_and_grad(loss)(params)
        return *apply(tx, params, state, grads), value

    return tx.init, step


def _batches(
    data: Corpus, model: Model, steps: int, seed: int
) -> Callable[[int], np.ndarray]:
    """Returns a function from a part of the run to its batches, uint16.

    Every sequence of the corpus comes once, in a random order, before one comes again.
    """
    count = (len(data.train) - 1) // model.length
    each = steps // PARTS * model.batch
    if count < 1:
        raise ValueError(
            f"corpus has {len(data.train)} tokens to train on, too few for a sequence "
            f"of {model.length}; make a larger one."
        )

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(count)

    def part(i: int) -> np.ndarray:
        places = range(i * each, (i + 1) * each)
        starts = [order(k // count)[k % count] * model.length for k in places]
        tokens = data.train[np.array(starts)[:, None] + np.arange(model.length + 1)]
        return tokens.reshape(steps // PARTS, model.batch, -1)

    return part


def _tests(data: Corpus, model: Model) -> jax.Array:
    """Returns what is held out, 64 batches at most: (batches, batch, length + 1)."""
    room = model.batch * (model.length + 1)
    batches = min(64, len(data.held_out) // room)
    if batches < 1:
        raise ValueError(
            f"corpus has {len(data.held_out)} tokens held out, fewer than a batch of "
            f"{room}; make a larger one."
        )
    tokens = data.held_out[: batches * room].reshape(batches, model.batch, -1)
    return jnp.asarray(tokens)
