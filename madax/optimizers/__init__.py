"""Optimizers: multiplicative steps along a direction."""

from madax.optimizers._chain import MadamState
from madax.optimizers._madam import madam
from madax.optimizers._muon_madam import muon_madam

__all__ = ["MadamState", "madam", "muon_madam"]
