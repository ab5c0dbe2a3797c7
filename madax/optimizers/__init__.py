"""The optimizers: a direction, and multiplicative or additive steps along it."""

from madax.optimizers._chain import MadamState
from madax.optimizers._madam import madam
from madax.optimizers._muon import MuonState, muon
from madax.optimizers._muon_madam import muon_madam

__all__ = ["MadamState", "MuonState", "madam", "muon", "muon_madam"]
