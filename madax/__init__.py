"""Multiplicative weight updates for JAX, and training on weights of a few bits."""

from importlib import metadata as _metadata

from madax import diagnostics
from madax.codes._array import QuantizedArray
from madax.codes._grad import grad, value_and_grad
from madax.codes._quantize import dequantize_params, quantize_params
from madax.codes._saving import from_flat_dict, to_flat_dict
from madax.formats._base import Format
from madax.formats._log import LogFormat
from madax.formats._moment_format import MomentFormat
from madax.formats._moment_grid import MomentWindow
from madax.formats._symlog import SymlogFormat
from madax.formats._uniform import UniformFormat
from madax.layerwise._split import SplitLayers, split_layers
from madax.layerwise._step import Layerwise, layerwise
from madax.optimizers._madam import madam
from madax.optimizers._muon_madam import muon_madam
from madax.papers._bbit_madam import bbit_madam
from madax.papers._fake_quantize import fake_quantize
from madax.papers._lns_madam import lns_madam
from madax.transforms._clip import clip_log_weights
from madax.transforms._dequantized import with_dequantized_params
from madax.transforms._lns_quantize import LnsQuantizeState, lns_quantize
from madax.transforms._orthogonal import (
    MatrixDimensionNumbers,
    ScaleByOrthogonalMomentumState,
    scale_by_orthogonal_momentum,
)
from madax.transforms._second_moment import (
    ScaleBySecondMomentState,
    scale_by_second_moment,
)
from madax.transforms._sign_log import scale_by_sign_log
from madax.transforms._weight_decay import add_decayed_log_weights
from madax.wrappers._quantized_params import (
    WithQuantizedParamsState,
    with_quantized_params,
)
from madax.wrappers._quantized_state import (
    WithQuantizedStateState,
    with_quantized_state,
)

try:
    __version__ = _metadata.version("madax")
except _metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Format",
    "Layerwise",
    "LnsQuantizeState",
    "LogFormat",
    "MatrixDimensionNumbers",
    "MomentFormat",
    "MomentWindow",
    "QuantizedArray",
    "ScaleByOrthogonalMomentumState",
    "ScaleBySecondMomentState",
    "SplitLayers",
    "SymlogFormat",
    "UniformFormat",
    "WithQuantizedParamsState",
    "WithQuantizedStateState",
    "add_decayed_log_weights",
    "bbit_madam",
    "clip_log_weights",
    "dequantize_params",
    "diagnostics",
    "fake_quantize",
    "from_flat_dict",
    "grad",
    "layerwise",
    "lns_madam",
    "lns_quantize",
    "madam",
    "muon_madam",
    "quantize_params",
    "scale_by_orthogonal_momentum",
    "scale_by_second_moment",
    "scale_by_sign_log",
    "split_layers",
    "to_flat_dict",
    "value_and_grad",
    "with_dequantized_params",
    "with_quantized_params",
    "with_quantized_state",
]
