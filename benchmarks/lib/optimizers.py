"""The optimizers compared, and the learning rate each comes with."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import madax
from benchmarks.lib.contender import Contender, Schedule
from benchmarks.lib.formats import LOG_8, LOG_16, MOMENTS_8, SYMLOG_8
from benchmarks.lib.steps import Tree

# Madam as it is compared: its floor of 1, and moments of 8 bits with weights of 8 bits.
madam_floor = partial(madax.madam, floor=1.0)
madam_8 = partial(madax.madam, moment_format=MOMENTS_8)
muon_madam_floor = partial(madax.muon_madam, floor=1.0)
# The records are of floats beside the codes that have no floor.
muon_madam_8 = partial(madax.muon_madam, floor=0.0, moment_format=MOMENTS_8)
muon_8 = partial(madax.muon, moment_format=MOMENTS_8)


def codes_adam(
    rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformation:
    """Adam that trains codes, with options of ``madax.with_quantized_params``."""
    return madax.with_quantized_params(optax.adam(rate), **options)


def stored(
    name: Literal["madam", "adam"],
    format: madax.formats.Format | None,
    *,
    rounding: Literal["stochastic", "nearest"] = "stochastic",
    moment_bits: int = 32,
) -> Contender:
    """Returns Madam or Adam that trains weights stored in a format.

    Args:
      name: "madam", which trains them natively, or "adam".
      format: how weight matrices are stored; None for float32.
      rounding: of the steps of codes.
      moment_bits: bits of a moment of Madam.
    """
    moments = madax.MomentFormat(moment_bits) if moment_bits < 32 else None
    madam = partial(madax.madam, rounding=rounding, moment_format=moments)
    adam = optax.adam if format is None else partial(codes_adam, rounding=rounding)
    make = {"madam": madam, "adam": adam}[name]
    return replace(OPTIMIZERS[name], make=make, format=format)


def clipped(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Clips gradients by the norm of all of them, before an optimizer."""
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


def muon(rate: optax.ScalarOrSchedule, **options: Any) -> optax.GradientTransformation:
    """Muon, with options of ``optax.contrib.muon``: Adam for all but inner matrices."""

    def dimensions(
        path: jax.tree_util.KeyPath, x: jax.Array
    ) -> contrib.MuonDimensionNumbers | None:
        if x.ndim < 2 or any(
            n in jax.tree_util.keystr(path) for n in ("embed", "tokens", "head", "norm")
        ):
            return None
        if x.ndim == 4:  # The kernel of a convolution.
            return contrib.MuonDimensionNumbers((0, 1, 2), 3)
        return contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1)

    return contrib.muon(
        rate,
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(
            dimensions, params
        ),
        **options,
    )


def _muon(rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon as its author runs it, with Adam at 3e-4."""
    return muon(rate, adam_learning_rate=lambda count: 3e-4 / 0.02 * rate(count))


def _mechanic(rate: optax.Schedule) -> optax.GradientTransformation:
    return contrib.mechanize(optax.adamw(rate))


def _averaged(params: optax.Params, state: optax.OptState) -> optax.Params:
    return contrib.schedule_free_eval_params(state, params)


_BOTH: tuple[Schedule, ...] = ("cosine", "constant")
_PLAIN: tuple[Schedule, ...] = ("constant",)

# What the learning rate is swept for.
OPTIMIZERS = {
    "sgd momentum": Contender(partial(optax.sgd, momentum=0.9), (0.1,)),
    "adam": Contender(optax.adam, (1e-3,)),
    "madam": Contender(madax.madam, (0.01,)),
}
DEMO = OPTIMIZERS | {
    "8-bit adam": stored("adam", LOG_8),
    "8-bit madam": stored("madam", LOG_8, moment_bits=8),
}
# What runs at one setting everywhere. A learning-rate-free one has the schedules that
# its authors use.
UNTUNED = {
    **{name: replace(row, schedules=_BOTH) for name, row in OPTIMIZERS.items()},
    "adamw": Contender(optax.adamw, (1e-3,)),
    "lion": Contender(optax.lion, (1e-4,)),
    "muon": Contender(_muon, (0.02,)),
    "prodigy": Contender(contrib.prodigy, (1.0,), schedules=_BOTH),
    "d-adaptation adamw": Contender(contrib.dadapt_adamw, (1.0,), schedules=_BOTH),
    "mechanic adamw": Contender(_mechanic, (1.0,), schedules=_BOTH),
    "dowg": Contender(contrib.dowg, (1.0,), schedules=_PLAIN),
    "cocob": Contender(contrib.cocob, (1.0,), schedules=_PLAIN),
    "schedule-free adamw": Contender(
        contrib.schedule_free_adamw, (2.5e-3,), evaluated=_averaged, schedules=_PLAIN
    ),
    "madam b1": Contender(partial(madax.madam, b1=0.9), (0.01,)),
    "madam floor": Contender(madam_floor, (0.01,)),
    "madam floor b1": Contender(partial(madam_floor, b1=0.9), (0.01,)),
    **{
        f"{bits}-bit madam of the paper": Contender(
            partial(madax.papers.bbit_madam, bits=bits, base_step=precision), (0.01,)
        )
        for bits, precision in ((12, 0.001), (10, 0.005), (8, 0.01))
    },
}
# What the steps of are timed, weighed and compiled.
BASELINE = "adam"
_BF16 = {"params": jnp.bfloat16, "grads": jnp.bfloat16}


def _native(
    make: Callable[..., optax.GradientTransformation],
    rate: float,
    format: madax.formats.Format,
) -> Contender:
    return Contender(make, (rate,), format, grads=jnp.bfloat16)


def _adamw_8(rate: float) -> optax.GradientTransformation:
    return madax.with_quantized_state(optax.adamw(rate))


TIMED = {
    BASELINE: OPTIMIZERS["adam"],
    "adamw": UNTUNED["adamw"],
    "lion": UNTUNED["lion"],
    "sgd": Contender(optax.sgd, (0.1,)),
    "adafactor": Contender(optax.adafactor, (1e-3,)),
    "muon": Contender(contrib.muon, (0.02,)),
    "adam bfloat16": replace(OPTIMIZERS["adam"], **_BF16),
    "adamw, 8-bit state": Contender(_adamw_8, (1e-3,)),
    "adamw bfloat16, 8-bit state": Contender(_adamw_8, (1e-3,), **_BF16),
    "madam": OPTIMIZERS["madam"],
    "madam bfloat16": replace(OPTIMIZERS["madam"], **_BF16),
    "bbit_madam": Contender(madax.papers.bbit_madam, (0.01,)),
    "native 16": _native(madax.madam, 0.01, LOG_16),
    "native 16, 8-bit v": _native(madam_8, 0.01, LOG_16),
    "native 8": _native(madax.madam, 0.01, LOG_8),
    "native 8, 8-bit v": _native(madam_8, 0.01, LOG_8),
    "native 8 symlog, 8-bit v": _native(madam_8, 0.01, SYMLOG_8),
    "native 8 adam": _native(codes_adam, 1e-3, LOG_8),
    "native 8 adam, 8-bit state": _native(
        partial(codes_adam, moment_format=MOMENTS_8), 1e-3, LOG_8
    ),
    "madax.muon": Contender(madax.muon, (0.02,)),
    "native 8 muon, 2 bytes": _native(muon_8, 0.02, SYMLOG_8),
    "native 8 muon, 1 byte": _native(partial(muon_8, b1=None), 0.02, SYMLOG_8),
    "native 8 muon, factored, 1 byte": _native(
        partial(muon_8, b1=None, direction="factored"), 0.02, SYMLOG_8
    ),
}
# These need a package, and with Pallas a GPU.
RIVALS: dict[str, Contender] = {}
if find_spec("flashoptim_jax") is not None:
    from flashoptim_jax import flash_adamw  # pyrefly: ignore[missing-import]

    class _Flash(Contender):
        """An optimizer that is no transform of optax."""

        def step(self, params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
            """Returns parameters and state after a step of its own kind."""
            return self.tx.step(params, state, grads)  # pyrefly: ignore

    RIVALS = {
        "flash_adamw": _Flash(flash_adamw, (1e-3,), **_BF16),
        "flash_adamw, no Pallas": _Flash(
            partial(flash_adamw, fused=False), (1e-3,), **_BF16
        ),
    }
