"""Multiplicative weight updates for JAX: Madam as optax transforms."""

from importlib.metadata import version as _version

from madax import diagnostics
from madax._aliases import madam
from madax._clip import ClipLogWeightsState, clip_log_weights
from madax._second_moment import ScaleBySecondMomentState, scale_by_second_moment
from madax._sign_log import ScaleBySignLogState, scale_by_sign_log

__version__ = _version("madax")

__all__ = [
    "ClipLogWeightsState",
    "ScaleBySecondMomentState",
    "ScaleBySignLogState",
    "clip_log_weights",
    "diagnostics",
    "madam",
    "scale_by_second_moment",
    "scale_by_sign_log",
]
