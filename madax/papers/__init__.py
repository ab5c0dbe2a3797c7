"""Optimizers and quantisers of the papers, to reproduce them."""

from madax.papers._bbit_madam import bbit_madam
from madax.papers._fake_quantize import fake_quantize
from madax.papers._grid import QuantizeToGridState, quantize_to_grid
from madax.papers._lns_madam import lns_madam
from madax.papers._madam import madam

__all__ = [
    "QuantizeToGridState",
    "bbit_madam",
    "fake_quantize",
    "lns_madam",
    "madam",
    "quantize_to_grid",
]
