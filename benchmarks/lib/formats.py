"""The formats of weights and moments that are compared."""

import jax
import optax

import madax

# A narrower range is a finer grid, of less rounding noise: two decades of weights at
# 8 bits, and three, "wide", to see what the range costs.
FORMATS: dict[str, madax.formats.Format] = {
    "log 16": madax.LogFormat.from_dynamic_range(bits=16, ratio=1000),
    "log 8": madax.LogFormat.from_dynamic_range(bits=8, ratio=100),
    "wide log 8": madax.LogFormat.from_dynamic_range(bits=8, ratio=1000),
    "log 6": madax.LogFormat.from_dynamic_range(bits=6, ratio=100),
    "log 4": madax.LogFormat.from_dynamic_range(bits=4, ratio=30),
    "symlog 16": madax.SymlogFormat(bits=16, linear_range=1 / 3),
    "symlog 8": madax.SymlogFormat(bits=8, linear_range=1 / 3),
    "finer symlog 8": madax.SymlogFormat(bits=8, linear_range=0.15),
    "uniform 8": madax.UniformFormat(bits=8),
    "uniform 6": madax.UniformFormat(bits=6),
    "uniform 4": madax.UniformFormat(bits=4),
}
LOG_16, LOG_8, SYMLOG_8 = (FORMATS[name] for name in ("log 16", "log 8", "symlog 8"))
MOMENTS_8 = madax.MomentFormat(bits=8)


def has_axes(path: str, leaf: jax.ShapeDtypeStruct) -> bool:
    """Whether to store a leaf of a state: the leaves of workloads are small."""
    del path
    return leaf.ndim > 0


def eight_bit_state(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Stores all of a state but scalars in 8 bits."""
    return madax.with_quantized_state(tx, moment_format=MOMENTS_8, where=has_axes)
