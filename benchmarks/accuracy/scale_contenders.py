"""The contenders at scale, what is tuned for each, and the trials."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import optax

import madax
from benchmarks.accuracy.llama_contenders import flash_adamw
from benchmarks.lib.contender import Contender
from benchmarks.lib.formats import MOMENTS_8, SYMLOG_8
from benchmarks.lib.optimizers import clipped, muon
from benchmarks.lib.steps import Tree

TRIALS = 8  # Of every contender.
ADAMW, MUON = "AdamW float32", "Muon float32"
ON_CODES = "Muon on codes, 2 bytes"
TWO_BYTES, TWIN = "madax.muon 2 bytes", "madax.muon float32"
MUON_MADAM_8, MUON_MADAM = "muon_madam 2 bytes", "muon_madam float32"
MATRICES = ("q", "k", "v", "o", "up", "down", "gate")  # Of decoder's layers.
Values = Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Contender):
    """A contender, and what is tuned of it.

    Attributes:
      rates: the one that the search begins with.
      knobs: values of its other arguments; the search begins with the first of each.
      clips: whether it clips by the norm of all gradients, which are then there at
        once; otherwise codes are trained a layer at a time.
    """

    knobs: Mapping[str, tuple[float, ...]]
    clips: bool = False


def next_trial(row: Row, losses: Mapping[tuple, float]) -> Values | None:
    """Returns what to try next; None after ``TRIALS`` of them.

    First the rate, by factors of two until the best is between two others, then between
    the best and the better one beside it; then each knob, the others at the best so
    far.

    Args:
      row: what is tuned.
      losses: of what was tried, by ``tuple(values.items())``.
    """
    start = {"rate": row.rate} | {name: row.knobs[name][0] for name in row.knobs}
    if not losses:
        return start
    if len(losses) >= TRIALS:
        return None
    others = [(name, x) for name, values in row.knobs.items() for x in values[1:]]
    left = TRIALS - len(losses)
    if left > len(others):
        return start | {"rate": next_rate({dict(k)["rate"]: losses[k] for k in losses})}
    name, value = others[-left]
    return best_trial(losses) | {name: value}


def best_trial(losses: Mapping[tuple, float]) -> dict[str, float]:
    """Returns what had the least loss."""
    return dict(min(losses, key=lambda values: losses[values]))


def next_rate(losses: Mapping[float, float], factor: float = 2) -> float:
    """Returns the rate to try next: beside the best, or else between two others.

    Args:
      losses: of the rates that were tried.
      factor: from one rate to the next, until the best is between two others.
    """
    rates = sorted(losses)
    best = min(rates, key=lambda rate: losses[rate])
    at = rates.index(best)
    if best == rates[-1]:
        rate = factor * best
    elif best == rates[0]:
        rate = best / factor
    else:
        beside = min(rates[at - 1], rates[at + 1], key=lambda rate: losses[rate])
        rate = (best * beside) ** 0.5
    return float(f"{rate:.3g}")


# --- how they are made ----------------------------------------------------------------


def _adamw(
    rate: optax.Schedule,
    *,
    b2: float,
    weight_decay: float,
    wrap: Callable | None = None,
) -> optax.GradientTransformation:
    tx = optax.adamw(rate, b2=b2, weight_decay=weight_decay)
    return clipped(tx if wrap is None else wrap(tx))


def _flash_adamw(rate: optax.Schedule, **options: Any) -> optax.GradientTransformation:
    return clipped(flash_adamw(rate, **options))


def times(ratio: float, rate: optax.Schedule) -> optax.Schedule:
    """Returns a rate that is in a fixed ratio to another."""
    return lambda count: ratio * rate(count)


def _muon(
    rate: optax.Schedule, *, other: float, beta: float, weight_decay: float
) -> optax.GradientTransformation:
    """Muon with steps of AdamW's size, and AdamW at a rate of its own for the rest."""
    return muon(
        rate,
        beta=beta,
        weight_decay=weight_decay,
        consistent_rms=0.2,
        adam_b2=0.99,
        adam_weight_decay=weight_decay,
        adam_learning_rate=times(other, rate),
    )


def _muon_on_codes(
    rate: optax.Schedule, **options: Any
) -> optax.GradientTransformation:
    tx = _muon(rate, **options)
    return madax.with_quantized_params(tx, moment_format=MOMENTS_8)


def _sinkgd(
    rate: optax.Schedule, *, other: float, weight_decay: float
) -> optax.GradientTransformation:
    """SinkGD (arXiv 2502.06742) for matrices, without a state; AdamW for the rest."""

    def axes(_: str, x: jax.Array) -> madax.transforms.MatrixDimensionNumbers:
        return madax.transforms.MatrixDimensionNumbers(x.ndim - 2, x.ndim - 1)

    def labels(tree: Tree) -> Tree:
        def label(path: jax.tree_util.KeyPath, _: jax.Array) -> str:
            name = getattr(path[-1], "key", None)
            return "matrix" if name in MATRICES else "other"

        return jax.tree_util.tree_map_with_path(label, tree)

    matrix = optax.chain(
        madax.transforms.scale_by_sinkhorn(matrices=axes),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    rest = optax.adamw(times(other, rate), b2=0.99, weight_decay=weight_decay)
    return optax.partition({"matrix": matrix, "other": rest}, labels)


def _madax_muon(
    rate: optax.Schedule, *, other: float, **options: Any
) -> optax.GradientTransformation:
    return madax.muon(rate, other_learning_rate=times(other, rate), **options)


def _muon_madam(
    rate: optax.Schedule, *, other: float, **options: Any
) -> optax.GradientTransformation:
    return madax.muon_madam(rate, madam_learning_rate=times(other, rate), **options)


_ADAMW = {"b2": (0.99, 0.95, 0.999), "weight_decay": (0.1, 0.3)}
_MUON = {"other": (1.0, 0.5, 2.0), "beta": (0.95, 0.9), "weight_decay": (0.1, 0.3)}
_MADAX_MUON = {"other": _MUON["other"], "b1": (0.95, 0.9), "weight_decay": (0.1, 0.3)}
_MUON_MADAM = _MADAX_MUON | {"weight_decay": (0.0, 0.03)}
_MADAM = {"b2": (0.99, 0.999), "weight_decay": (0.0, 0.03)}


def _in_one_byte(make: Callable, knobs: Mapping[str, tuple[float, ...]]) -> Row:
    b2 = {name: knobs[name] for name in knobs if name != "b1"} | {"b2": (0.99, 0.999)}
    make = partial(make, b1=None, moment_format=MOMENTS_8)
    return Row(make=make, rates=(0.02,), knobs=b2, format=SYMLOG_8)


_IN_3_BYTES = partial(
    madax.with_quantized_params, moment_format=MOMENTS_8, error_feedback=True
)

# What the claim is about: from three seeds, in this order.
MAIN = {
    ADAMW: Row(make=_adamw, rates=(0.004,), knobs=_ADAMW, clips=True),
    TWO_BYTES: Row(
        make=partial(_madax_muon, moment_format=MOMENTS_8),
        rates=(0.03,),
        knobs=_MADAX_MUON,
        format=SYMLOG_8,
    ),
    MUON: Row(make=_muon, rates=(0.004,), knobs=_MUON),
    TWIN: Row(make=_madax_muon, rates=(0.03,), knobs=_MADAX_MUON),
    MUON_MADAM_8: Row(
        make=partial(_muon_madam, b2=0.99, moment_format=MOMENTS_8),
        rates=(0.02,),
        knobs=_MUON_MADAM,
        format=SYMLOG_8,
    ),
    "madax.muon 1 byte": _in_one_byte(_madax_muon, _MADAX_MUON),
    ON_CODES: Row(make=_muon_on_codes, rates=(0.004,), knobs=_MUON, format=SYMLOG_8),
    MUON_MADAM: Row(
        make=partial(_muon_madam, b2=0.99), rates=(0.02,), knobs=_MUON_MADAM
    ),
    "muon_madam 1 byte": _in_one_byte(_muon_madam, _MUON_MADAM),
}
# From one seed, and marked so.
OTHERS = {
    "madam 2 bytes": Row(
        make=partial(madax.madam, moment_format=MOMENTS_8),
        rates=(0.02,),
        knobs=_MADAM,
        format=SYMLOG_8,
    ),
    "AdamW in 3 bytes, error feedback": Row(
        make=partial(_adamw, wrap=_IN_3_BYTES),
        rates=(0.004,),
        knobs=_ADAMW,
        format=SYMLOG_8,
        clips=True,
    ),
    "SinkGD bfloat16": Row(
        make=_sinkgd,
        rates=(0.001,),
        knobs={"other": (1.0, 0.5, 2.0), "weight_decay": (0.0, 0.1)},
        params=jnp.bfloat16,
    ),
}
if find_spec("flashoptim_jax") is not None:
    OTHERS["FlashAdamW"] = Row(
        # Its package asks Python whether the decay is zero, so that is no knob.
        make=partial(_flash_adamw, weight_decay=0.1),
        rates=(0.004,),
        knobs={"b2": _ADAMW["b2"]},
        params=jnp.bfloat16,
        clips=True,
    )
CONTENDERS = MAIN | OTHERS
