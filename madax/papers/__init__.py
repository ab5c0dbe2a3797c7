"""Optimizers and quantisers of the papers, to reproduce them."""

from madax.papers._bbit_madam import bbit_madam
from madax.papers._fake_quantize import fake_quantize
from madax.papers._lns_madam import lns_madam

__all__ = ["bbit_madam", "fake_quantize", "lns_madam"]
