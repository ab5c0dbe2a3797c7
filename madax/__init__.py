"""Multiplicative weight updates for JAX, and training on weights of a few bits."""

from importlib import metadata as _metadata
from typing import TYPE_CHECKING as _TYPE_CHECKING

from madax import diagnostics, formats, papers, transforms, wrappers
from madax import hijax as hijax
from madax import trainers as trainers
from madax.codes._array import QuantizedArray
from madax.codes._grad import grad, value_and_grad
from madax.codes._quantize import dequantize_params, quantize_params
from madax.codes._saving import from_flat_dict, to_flat_dict
from madax.formats import LogFormat, MomentFormat, SymlogFormat, UniformFormat
from madax.layerwise._split import split_layers
from madax.layerwise._step import layerwise
from madax.optimizers._madam import madam
from madax.optimizers._muon import muon
from madax.optimizers._muon_madam import muon_madam
from madax.transforms import (
    clip_log_weights,
    lns_quantize,
    scale_by_second_moment,
    scale_by_sign_log,
)
from madax.wrappers import with_quantized_params, with_quantized_state

try:
    __version__ = _metadata.version("madax")
except _metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "LogFormat",
    "MomentFormat",
    "QuantizedArray",
    "SymlogFormat",
    "UniformFormat",
    "clip_log_weights",
    "dequantize_params",
    "diagnostics",
    "from_flat_dict",
    "grad",
    "layerwise",
    "lns_quantize",
    "madam",
    "muon",
    "muon_madam",
    "papers",
    "quantize_params",
    "scale_by_second_moment",
    "scale_by_sign_log",
    "split_layers",
    "to_flat_dict",
    "transforms",
    "value_and_grad",
    "with_quantized_params",
    "with_quantized_state",
]


def __dir__() -> list[str]:
    # Completion finds the namespaces, too.
    rooms = ["formats", "hijax", "trainers", "wrappers"]
    return sorted([*__all__, "__version__", *rooms])


if not _TYPE_CHECKING:  # A type checker would accept any name.

    def __getattr__(name):
        states = ("AddDecayedLogWeights", "ClipLogWeights", "ScaleBySignLog")
        known = "Geometry" if name.removesuffix("State") in states else name
        for room in (transforms, papers, wrappers, formats):
            if known in room.__all__:
                place = f"{room.__name__}.{known}"
                raise AttributeError(f"madax.{name} is {place} since 0.3.")
        if name in ("Layerwise", "MomentWindow", "SplitLayers", "StateWindow"):
            raise AttributeError(
                f"madax.{name} is not public since 0.3; use the fields of the tuple "
                "that madax returns, without naming its type."
            )
        raise AttributeError(f"module 'madax' has no attribute {name!r}")
