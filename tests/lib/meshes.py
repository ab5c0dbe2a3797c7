"""Meshes of eight devices, how leaves lie on them, and a training on one of them."""

import functools

import jax
import numpy as np
import optax
import pytest
from cases import FORMATS, OPTIMIZERS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import madax
from madax import QuantizedArray

STEPS = 50


CHANNEL_AXES = {"log16": -1}


# Some shards are of odd sizes, or a single row or column.
SHAPES = {
    "bias": (8,),
    "conv": (3, 3, 8, 4),
    "log16": (8, 36),
    "log8": (24, 20),
    "symlog8": (16, 4),
    "uniform8": (16, 12),
}


# How the last two axes of a matrix, and the axis of a vector, lie on a 2 x 4 mesh.
LAYOUTS = {
    "data_parallel": (None, None, None),
    "fsdp": (("data", "model"), None, ("data", "model")),
    "tensor_parallel": (None, "model", "model"),
}


# On axes of explicit types each leaf lies in another of the layouts.
needs_explicit_axes = pytest.mark.skipif(
    jax.__version_info__ < (0, 7, 2), reason="sharding in types was not whole yet"
)


EXPLICIT = pytest.param("explicit", "mixed", marks=needs_explicit_axes)


@functools.cache
def make_mesh(axis_type):
    kind = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[axis_type]
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


def enter(mesh):
    return jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh


def spec(layout, leaf):
    """How a leaf of that name lies on the mesh."""
    if layout == "mixed":
        layout = list(LAYOUTS)[list(SHAPES).index(leaf) % len(LAYOUTS)]
    rows, columns, vector = LAYOUTS[layout]
    ndim = len(SHAPES[leaf])
    if ndim < 2:
        return P(vector) if ndim else P()
    return P(*[None] * (ndim - 2), rows, columns)


def random_weights():
    rng = np.random.default_rng(0)
    weights = {k: np.float32(rng.normal(size=s) / 8) for k, s in SHAPES.items()}
    return weights | {"bias": np.zeros(SHAPES["bias"], np.float32)}


def random_grads():
    """A stack of gradients for each leaf, of many sizes, the first without some."""
    rng = np.random.default_rng(1)
    sizes = np.exp(rng.normal(size=STEPS))
    grads = {
        k: np.float32(rng.normal(size=(*s, STEPS)) * sizes) for k, s in SHAPES.items()
    }
    grads["conv"][..., 0] = grads["log8"][..., :3] = 0
    return {k: np.moveaxis(g, -1, 0) for k, g in grads.items()}


@jax.jit
def quantized(weights):
    def quantize(k, w):
        axis = CHANNEL_AXES.get(k)
        return madax.quantize_params(w, FORMATS[k], channel_axis=axis)

    return {k: quantize(k, w) if k in FORMATS else w for k, w in weights.items()}


class Run:
    """Training from ``init`` on, by one compiled program."""

    def __init__(self, name, params, grads, init=None, steps=range(STEPS)):
        tx = OPTIMIZERS[name]

        def step(params, state, grads, i):
            grads = {k: g[i] for k, g in grads.items()}
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.state0 = (init or tx.init)(params)
        carry = params, self.state0
        step = jax.jit(step).lower(*carry, grads, np.int32(0)).compile()
        self.program = step.as_text()
        for i in steps:
            # Devices of a CPU share threads, in which programs that are under way at
            # once would wait for each other's collectives.
            carry = jax.block_until_ready(step(*carry, grads, np.int32(i)))
        self.params, self.state = carry


def place(x, leaf, axis_type, layout, stacked=False):
    if axis_type is None:
        return jax.device_put(x, jax.local_devices(backend="cpu")[0])
    on_mesh = spec(layout, leaf)
    if stacked:
        on_mesh = P(None, *on_mesh)
    return jax.device_put(x, NamedSharding(make_mesh(axis_type), on_mesh))


@functools.cache
def start_all(axis_type=None, layout=None):
    """All weights, quantised where they lie, and their gradients."""
    where = axis_type, layout
    weights = {k: place(w, k, *where) for k, w in random_weights().items()}
    grads = {k: place(g, k, *where, stacked=True) for k, g in random_grads().items()}
    return quantized(weights), grads


def start(leaves, axis_type=None, layout=None):
    return [{k: x[k] for k in leaves} for x in start_all(axis_type, layout)]


def values(w):
    """The array of a leaf that has its shape."""
    return w.codes if isinstance(w, QuantizedArray) else w
