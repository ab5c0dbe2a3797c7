"""Multiplicative weight updates for JAX, and training on weights of a few bits."""

from importlib import metadata as _metadata

from madax import diagnostics
from madax._aliases import bbit_madam, lns_madam, madam
from madax._clip import ClipLogWeightsState, clip_log_weights
from madax._fake_quantize import fake_quantize
from madax._format import Format
from madax._formats import LogFormat, SymlogFormat, UniformFormat
from madax._grad import grad, value_and_grad
from madax._layerwise import Layerwise, layerwise
from madax._lns_quantize import LnsQuantizeState, lns_quantize
from madax._moments import MomentFormat, MomentWindow
from madax._muon_madam import muon_madam
from madax._orthogonal import (
    MatrixDimensionNumbers,
    ScaleByOrthogonalMomentumState,
    scale_by_orthogonal_momentum,
)
from madax._quantize_params import dequantize_params, quantize_params
from madax._quantized_array import QuantizedArray
from madax._saving import from_flat_dict, to_flat_dict
from madax._second_moment import ScaleBySecondMomentState, scale_by_second_moment
from madax._sign_log import ScaleBySignLogState, scale_by_sign_log
from madax._split_layers import SplitLayers, split_layers
from madax._state_codes import StateWindow
from madax._weight_decay import AddDecayedLogWeightsState, add_decayed_log_weights
from madax._with_quantized_params import (
    WithQuantizedParamsState,
    with_dequantized_params,
    with_quantized_params,
)
from madax._with_quantized_state import (
    WithQuantizedStateState,
    with_quantized_state,
)

try:
    __version__ = _metadata.version("madax")
except _metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AddDecayedLogWeightsState",
    "ClipLogWeightsState",
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
    "ScaleBySignLogState",
    "SplitLayers",
    "StateWindow",
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
