"""The contenders of ``llama``: how they are made, and the rates that are tried."""

import dataclasses
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import optax

import madax
from benchmarks.accuracy.llama_report import BASELINE, CLIPPED_BY, EXACT
from benchmarks.lib.contender import Contender
from benchmarks.lib.formats import FORMATS, MOMENTS_8, SYMLOG_8
from benchmarks.lib.optimizers import clipped, codes_adam, madam_8, muon, muon_madam_8

ADAM_RATES = (1e-3, 2e-3, 3e-3, 5e-3, 1e-2)
MADAM_RATES = (0.01, 0.015, 0.02, 0.03, 0.05)
MUON_RATES = (0.01, 0.02, 0.03)


_madam = partial(madam_8, b2=0.99)
_muon_madam = partial(muon_madam_8, b2=0.99)
_madax_muon = partial(madax.muon, weight_decay=0.1, moment_format=MOMENTS_8)


@dataclasses.dataclass(frozen=True)
class Row(Contender):
    """A contender with what else is tuned here.

    Attributes:
      others: rates to choose from for other leaves, after the rate, in short runs;
        longer ones take the first. None is the same rate.
      other: what the optimizer calls this rate.
      warm_up: fraction of the run in which rates rise.
      clip_by: of ``madax.layerwise``, to clip norms above 1; None for no clip.
    """

    others: tuple[float | None, ...] = (None,)
    other: str = "madam_learning_rate"
    warm_up: float = 0.1
    clip_by: str | None = None


def adamw(
    rate: optax.ScalarOrSchedule,
    *,
    b2: float = 0.999,
    weight_decay: float = 0.1,
    clips: bool = True,
) -> optax.GradientTransformation:
    """AdamW with the usual clipping."""
    tx = optax.adamw(rate, b2=b2, weight_decay=weight_decay)
    return clipped(tx) if clips else tx


_adamw_95 = partial(adamw, b2=0.95)


def clipped_muon(
    rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformation:
    """Muon with the decay of AdamW, and with AdamW for the rest."""
    decays = {"weight_decay": 0.1, "adam_weight_decay": 0.1}
    return clipped(muon(rate, adam_b2=0.95, **decays, **options))


def _muon_in_2_bytes(
    rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformation:
    tx = muon(rate, adam_b2=0.95, **options)
    return clipped(madax.with_quantized_params(tx, moment_format=MOMENTS_8))


def _adamw_by_layers(
    rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformation:
    adamw = optax.adamw(rate, weight_decay=0.1)
    return madax.with_quantized_params(adamw, moment_format=MOMENTS_8, **options)


def _adamw_in_3_bytes(
    rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformation:
    return clipped(_adamw_by_layers(rate, **options))


def flash_adamw(
    rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformation:
    """FlashAdamW as a transform of optax, with options of its package's."""
    import flashoptim_jax  # pyrefly: ignore[missing-import]

    # Its kernels are for GPUs; this is the same in plain JAX.
    flash = flashoptim_jax.flash_adamw(rate, fused=False, **options)

    def update(updates, state, params=None):
        after, state = flash.step(params, state, updates)
        return jax.tree.map(jnp.subtract, after, params), state

    return optax.GradientTransformation(flash.init, update)


def _flash_adamw(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return clipped(flash_adamw(rate, weight_decay=0.1))


# Of madax.layerwise, and how rows are named after them.
CLIPS = {"exact": EXACT, "last": "the last norm", "layer": "norms of layers"}
# Rates of other leaves, beside Muon.
_adam_others = {"others": (2e-3, 5e-3), "other": "adam_learning_rate"}
_madam_others = {"others": (0.02, 0.04)}
_muon_others = {"others": (0.02, 0.04), "other": "other_learning_rate"}
CONTENDERS = {
    BASELINE: Row(adamw, ADAM_RATES),
    f"{BASELINE}, b2=0.95": Row(_adamw_95, ADAM_RATES[1:4]),
    f"{BASELINE}, b2=0.95, no decay": Row(
        partial(_adamw_95, weight_decay=0.0), ADAM_RATES[1:3]
    ),
    f"{BASELINE}, b2=0.95, no clipping": Row(
        partial(_adamw_95, clips=False), ADAM_RATES[1:3]
    ),
    f"{BASELINE}, b2=0.95, short warm-up": Row(
        _adamw_95, ADAM_RATES[1:3], warm_up=0.02
    ),
    "Muon float32": Row(clipped_muon, MUON_RATES, **_adam_others),
    "Muon float32, no momentum": Row(
        partial(clipped_muon, beta=0.0), MUON_RATES, **_adam_others
    ),
    "Muon on 8 bits": Row(_muon_in_2_bytes, MUON_RATES, SYMLOG_8, **_adam_others),
    "madax.muon 8 bits": Row(
        _madax_muon,
        MADAM_RATES[:3],
        SYMLOG_8,
        **_muon_others,
    ),
    # A bound of ten times the first weights takes no accuracy from 16 bits.
    "madax.muon 16 bits, p_scale=10": Row(
        _madax_muon,
        MADAM_RATES[:3],
        madax.SymlogFormat(bits=16, linear_range=0.1),
        p_scale=10.0,
        **_muon_others,
    ),
    "madax.muon 8 bits, no momentum": Row(
        partial(_madax_muon, b1=None), MADAM_RATES, SYMLOG_8, **_muon_others
    ),
    "madam 8 bits": Row(_madam, MADAM_RATES, SYMLOG_8),
    "muon_madam 8 bits": Row(_muon_madam, MADAM_RATES[:3], SYMLOG_8, **_madam_others),
    "muon_madam 8 bits, scales of channels": Row(
        _muon_madam, MADAM_RATES[:3], SYMLOG_8, channel_axis=-1, **_madam_others
    ),
    "muon_madam 8 bits, no momentum": Row(
        partial(_muon_madam, b1=None), MADAM_RATES, SYMLOG_8, **_madam_others
    ),
    "madam 8 bits, b1": Row(partial(_madam, b1=0.9), MADAM_RATES[1:4], SYMLOG_8),
    "madam 16 bits": Row(_madam, MADAM_RATES[1:4], FORMATS["symlog 16"]),
    "adam on 8 bits": Row(codes_adam, ADAM_RATES[1:4], SYMLOG_8),
    "adam on 8 bits, p_scale=10": Row(
        codes_adam, ADAM_RATES[1:4], SYMLOG_8, p_scale=10.0
    ),
    "AdamW in 3 bytes": Row(_adamw_in_3_bytes, ADAM_RATES[1:4], SYMLOG_8),
    "AdamW in 3 bytes, error feedback": Row(
        partial(_adamw_in_3_bytes, error_feedback=True), ADAM_RATES[1:4], SYMLOG_8
    ),
    **{
        f"{CLIPPED_BY}{what}": Row(
            _adamw_by_layers, ADAM_RATES[1:2], SYMLOG_8, clip_by=by
        )
        for by, what in CLIPS.items()
    },
    "Adam float32, no clipping": Row(optax.adam, ADAM_RATES[1:4]),
    "AdamW bfloat16": Row(adamw, ADAM_RATES[1:4], params=jnp.bfloat16),
}
if find_spec("flashoptim_jax") is not None:
    CONTENDERS["FlashAdamW"] = Row(_flash_adamw, ADAM_RATES[1:4], params=jnp.bfloat16)
# These are trained as a whole, with the norm of all gradients to clip.
CLIPPED = ("AdamW in 3 bytes", "AdamW in 3 bytes, error feedback", "Muon on 8 bits")
LONG = (
    BASELINE,
    f"{BASELINE}, b2=0.95",
    "Muon float32",
    "madax.muon 8 bits",
    "madax.muon 16 bits, p_scale=10",
    "madax.muon 8 bits, no momentum",
    "madam 8 bits",
    "muon_madam 8 bits",
    "muon_madam 8 bits, no momentum",
    *CLIPPED,
)
