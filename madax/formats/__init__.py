"""Number formats of weights and of moments."""

from madax.formats._base import Format
from madax.formats._log import LogFormat
from madax.formats._moment_format import MomentFormat
from madax.formats._symlog import SymlogFormat
from madax.formats._uniform import UniformFormat

__all__ = ["Format", "LogFormat", "MomentFormat", "SymlogFormat", "UniformFormat"]
