"""Language models in the shape of Llama from scratch, at one or two bytes."""

import dataclasses
import time
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm import tqdm

import madax
from benchmarks.accuracy.llama_contenders import CLIPPED, CONTENDERS, LONG
from benchmarks.accuracy.llama_report import best_runs, clip_report, llama_report
from benchmarks.data.text import Text, text
from benchmarks.lib import records
from benchmarks.lib.choices import check_choices
from benchmarks.lib.steps import Functions, Tree, apply, nbytes
from benchmarks.models import decoder


@dataclasses.dataclass(frozen=True)
class Budget:
    """A model to train, and the length of training.

    Attributes:
      layers: of the network.
      width: features of a token.
      steps: of the optimizer; the first tenth is a warm-up.
      evaluations: how often to measure the held-out loss; divides ``steps``.
      batch: sequences in a step.
      length: tokens in a sequence.
      seeds: of the best rate of each row; the others have one.
      rates: of each row, how many to try at most, the middle ones; unless it is one,
        others follow until the best is between two.
      dtype: of weights in the network.
    """

    layers: int
    width: int
    steps: int
    evaluations: int
    batch: int
    length: int
    seeds: int
    rates: int = 5
    dtype: str = "float32"

    @property
    def size(self) -> decoder.Size:
        """The network: heads of 32 features, half as many of keys and values."""
        heads = max(2, self.width // 32)
        hidden = 8 * self.width // 3 // 8 * 8
        return decoder.Size(
            256, self.layers, self.width, hidden, heads, heads // 2, tied=False
        )


PROFILES = {
    "smoke": Budget(2, 32, 20, 2, 4, 32, seeds=1, rates=1),
    "quick": Budget(4, 128, 300, 6, 4, 128, seeds=3),
    "long": Budget(4, 128, 2000, 10, 4, 128, seeds=3, rates=2),
    "full": Budget(12, 512, 2000, 10, 32, 512, seeds=3, rates=2, dtype="bfloat16"),
}


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def llama(
    out: Path | None = None,
    *,
    profile: Literal["smoke", "quick", "long", "full"] = "quick",
    text: tuple[str, ...] = ("pydoc",),
    rows: tuple[str, ...] = (),
    seeds: int | None = None,
) -> None:
    """Train Llama-shaped language models of bytes from scratch, by several optimizers.

    Each has a warm-up and a cosine; its best rate is trained from more seeds. Prints a
    table and what the models write; draws the held-out loss over steps, and over bytes
    a parameter. What the records have is not run again.

    Args:
        out: Folder for llama.jsonl, .md and .png; by default
            benchmarks/results/llama/ and the profile.
        profile: smoke takes a minute; quick half an hour a text on one CPU core, long
            three hours, of twelve rows; full is for a GPU, of the same rows.
        text: Texts to train on: pydoc and stdlib, which come with CPython, or paths of
            files.
        rows: Names of optimizers; by default all, FlashAdamW where its package is
            there (``pip install '.[rivals]'``); twelve of the long and full profiles.
        seeds: How many of the best rate; by default as many as the profile has.
    """
    check_choices("rows", rows, CONTENDERS)
    folder = out or Path("benchmarks/results/llama") / profile
    raw, budget = records.file(folder, "llama"), PROFILES[profile]
    for source in text:
        for name in rows or (LONG if profile in ("long", "full") else CONTENDERS):
            for settings in _tuning(raw, source, name, budget, seeds):
                records.check_text(raw, {"source": source}, source)
                records.append(raw, settings | train(**settings))
    print(llama_report(folder), clip_report(folder))
    for run in best_runs(records.read(raw)).to_dict("records"):
        print(f"\n--- {run['name']}, {run['source']}\n{run['sample']}")


def _tuning(
    raw: Path, source: str, name: str, budget: Budget, seeds: int | None = None
) -> Iterator[dict]:
    """Yields the missing runs: first of all rates, then other seeds of the best."""
    row = CONTENDERS[name]
    fixed: records.Record = {"source": source, "name": name, "other": row.others[0]}
    fixed["budget"], rates = dataclasses.asdict(budget), row.rates
    count = min(budget.rates, len(rates))
    first = (len(rates) - count) // 2
    last = first + count - 1
    while True:
        losses = {}
        for rate in rates[first : last + 1]:
            losses[rate] = yield from _tried(raw, fixed | {"rate": rate, "seed": 0})
        best = min(losses, key=lambda rate: losses[rate])
        if budget.rates > 1 and best == rates[first] and first > 0:
            first -= 1
        elif budget.rates > 1 and best == rates[last] and last < len(rates) - 1:
            last += 1
        else:
            break
    fixed["rate"], losses = best, {}
    for other in row.others if budget.rates > 2 else row.others[:1]:
        losses[other] = yield from _tried(raw, fixed | {"other": other, "seed": 0})
    fixed["other"] = min(losses, key=lambda other: losses[other])
    for seed in range(1, seeds or budget.seeds):
        yield from _tried(raw, fixed | {"seed": seed})


def _tried(raw: Path, settings: dict) -> Generator[dict, None, float]:
    """Yields a run if it is missing, and returns its loss."""
    if not records.find(raw, settings):
        yield settings
    # A loss that is not finite is null in the records.
    loss = records.find(raw, settings)[0]["loss"]
    return np.inf if loss is None else loss


def train(
    source: str,
    name: str,
    budget: records.Record,
    rate: float,
    seed: int,
    other: float | None = None,
) -> records.Record:
    """Trains once; returns the held-out nats per byte, their curve and a sample."""
    begin = time.perf_counter()
    chosen, data = Budget(**budget), text(source)
    params, init, step = _start(chosen, name, rate, seed, other)
    state = jax.jit(init)(params)
    kept = nbytes((params, state))
    count = decoder.count(chosen.size)
    train_tokens, tests = jnp.asarray(data.train), jnp.asarray(_tests(data, chosen))

    @partial(jax.jit, donate_argnums=0)
    def advance(carry, starts):
        def one(carry, starts):
            window = starts[:, None] + jnp.arange(chosen.length + 1)
            *carry, loss = step(*carry, train_tokens[window].astype(jnp.int32))
            return tuple(carry), loss

        return jax.lax.scan(one, carry, starts)

    @jax.jit
    def evaluate(params):
        weights = madax.dequantize_params(params, chosen.dtype)
        measure = partial(decoder.whole_loss, chosen.size, weights)
        return jax.lax.map(measure, tests).mean()

    rng = np.random.default_rng(seed)
    last = len(data.train) - chosen.length - 1
    shape = (chosen.evaluations, chosen.steps // chosen.evaluations, chosen.batch)
    carry, curve = (params, state), {"step": [], "train": [], "loss": []}
    with tqdm(total=chosen.steps, desc=f"{name}, {rate:g}", unit="step") as bar:
        for starts in rng.integers(0, last, shape):
            carry, losses = advance(carry, starts)
            curve["step"].append(bar.n + len(starts))
            curve["train"].append(float(losses.mean()))
            curve["loss"].append(float(evaluate(carry[0])))
            bar.set_postfix(loss=f"{curve['loss'][-1]:.3f}", refresh=False)
            bar.update(len(starts))
    return {
        "text": data.name,
        "parameters": count,
        "bytes_per_parameter": kept / count,
        "loss": curve["loss"][-1],
        "curve": curve,
        "sample": _sample(chosen, carry[0], data),
        "wall_s": round(time.perf_counter() - begin, 1),
    }


def _start(
    budget: Budget, name: str, rate: float, seed: int, other: float | None = None
) -> tuple[Tree, *Functions]:
    """Returns parameters, and the functions that start and take a step."""
    contender = CONTENDERS[name]

    def schedule(rate):
        warm_up = round(contender.warm_up * budget.steps)
        return optax.warmup_cosine_decay_schedule(0.0, rate, warm_up, budget.steps)

    options = {} if other is None else {contender.other: schedule(other)}
    tx = contender.make(schedule(rate), **options)
    floats = jax.jit(partial(decoder.init, budget.size))(jax.random.key(seed))
    params = jax.jit(contender.store_stack)(floats)
    if contender.format is None or name in CLIPPED:
        return params, tx.init, partial(_ordinary, budget, tx)
    dtype = jnp.dtype(budget.dtype)
    clip = {"max_norm": 1.0, "clip_by": contender.clip_by} if contender.clip_by else {}
    return params, *decoder.layerwise(budget.size, tx, dtype=dtype, **clip)


def _ordinary(
    budget: Budget,
    tx: optax.GradientTransformation,
    params: Tree,
    state: Tree,
    batch: jax.Array,
) -> tuple[Tree, Tree, jax.Array]:
    def loss(params):
        # Mixed precision as usual: float32 parameters, cast for the network.
        weights = madax.dequantize_params(params, jnp.dtype(budget.dtype))
        return decoder.whole_loss(budget.size, weights, batch)

    value, grads = madax.value_and_grad(loss)(params)
    return *apply(tx, params, state, grads), value


def _tests(data: Text, budget: Budget) -> np.ndarray:
    """Returns what is held out, 64 batches at most: (batches, batch, length + 1)."""
    room = budget.batch * (budget.length + 1)
    batches = min(64, len(data.test) // room)
    tokens = data.test[: batches * room].reshape(batches, budget.batch, -1)
    return tokens.astype(np.int32)


def _sample(budget: Budget, params: Tree, data: Text, count: int = 160) -> str:
    """Returns how a model goes on with the text that is held out."""
    weights = madax.dequantize_params(params, jnp.float32)

    def write(window, key):
        scores = decoder.logits(budget.size, weights, window[None])[0]
        token = jax.random.categorical(key, scores / 0.8)
        return jnp.append(window[1:], token), token

    window = jnp.asarray(data.test[: budget.length], jnp.int32)
    keys = jax.random.split(jax.random.key(0), count)
    _, tokens = jax.jit(partial(jax.lax.scan, write))(window, keys)
    return bytes(np.asarray(tokens, np.uint8)).decode("utf-8", errors="replace")
