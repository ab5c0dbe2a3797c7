"""The transforms that :func:`madax.madam` and :func:`madax.muon_madam` consist of."""

from madax.transforms._clip import clip_log_weights
from madax.transforms._dequantized import with_dequantized_params
from madax.transforms._factored import (
    ScaleByFactoredSecondMomentState,
    scale_by_factored_second_moment,
)
from madax.transforms._geometry import Geometry
from madax.transforms._lns_quantize import LnsQuantizeState, lns_quantize
from madax.transforms._matrices import MatrixDimensionNumbers
from madax.transforms._matrix_direction import (
    ScaleByOrthogonalMomentumState,
    scale_by_column_norm,
    scale_by_orthogonal_momentum,
    scale_by_sinkhorn,
)
from madax.transforms._second_moment import (
    ScaleBySecondMomentState,
    scale_by_second_moment,
)
from madax.transforms._sign_log import scale_by_sign_log
from madax.transforms._weight_decay import add_decayed_log_weights

__all__ = [
    "Geometry",
    "LnsQuantizeState",
    "MatrixDimensionNumbers",
    "ScaleByFactoredSecondMomentState",
    "ScaleByOrthogonalMomentumState",
    "ScaleBySecondMomentState",
    "add_decayed_log_weights",
    "clip_log_weights",
    "lns_quantize",
    "scale_by_column_norm",
    "scale_by_factored_second_moment",
    "scale_by_orthogonal_momentum",
    "scale_by_second_moment",
    "scale_by_sign_log",
    "scale_by_sinkhorn",
    "with_dequantized_params",
]
