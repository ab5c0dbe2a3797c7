"""What the optimizers share: everything after the direction."""

from __future__ import annotations

from typing import Any

import jax
import optax

from madax._core.checks import check_learning_rate, check_positive
from madax._core.rounding import Rounding
from madax.transforms._clip import clip_log_weights
from madax.transforms._lns_quantize import lns_quantize
from madax.transforms._sign_log import sign_log
from madax.transforms._weight_decay import add_decayed_log_weights


def from_direction(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    p_scale: jax.typing.ArrayLike | None,
    g_bound: jax.typing.ArrayLike,
    *,
    floor: jax.typing.ArrayLike,
    zero_init_scale: jax.typing.ArrayLike,
    weight_decay: jax.typing.ArrayLike | None,
    mask: Any,
    rounding: Rounding,
    seed: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of multiplicative steps in a direction; arguments as for madam."""
    learning_rate = check_learning_rate(learning_rate, 0.01)
    g_bound = check_positive("g_bound", g_bound, 10.0)
    geometry = {"floor": floor, "zero_init_scale": zero_init_scale}
    decay = (
        []
        if weight_decay is None
        else [add_decayed_log_weights(weight_decay, mask, **geometry)]
    )
    return optax.chain(
        direction,
        optax.clip(g_bound),
        *decay,
        optax.scale_by_learning_rate(learning_rate),
        sign_log(**geometry, skips=False),
        clip_log_weights(p_scale, zero_init_scale=zero_init_scale),
        lns_quantize(rounding=rounding, seed=seed),
    )
