"""Random trees, layouts, formats and optimizers: a mesh trains as one device does.

To the last bit, as in test_meshes, of which the layouts, shapes and hyperparameters
are chosen to meet what is hard; here they are drawn, and shards come out of all sizes.
"""

import dataclasses
import math
import warnings

import jax
import numpy as np
import pytest
from drawn import (
    EXAMPLES,
    Leaf,
    gradients,
    optimizers,
    seeds,
)
from helpers import different
from helpers import step as step_of
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import enter, make_mesh, needs_explicit_axes, values

import madax
from madax import LogFormat, SymlogFormat, UniformFormat

pytestmark = pytest.mark.filterwarnings("ignore:.*beyond p_scale")

MESH = {"data": 2, "model": 4}
# Each example compiles again: to shrink one takes ten minutes.
PHASES = [phase for phase in Phase if phase is not Phase.shrink]


# --- what is drawn --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Placed:
    """A leaf, floats or codes, and the mesh axes that each of its axes lies on."""

    leaf: Leaf
    spec: tuple[tuple[str, ...], ...]

    def on(self, mesh):
        # An empty tuple means the same as None, but is not equal to it.
        return NamedSharding(mesh, P(*(axes or None for axes in self.spec)))


@st.composite
def formats(draw):
    kind = draw(st.sampled_from(["log", "symlog", "uniform"]))
    bits = draw(st.integers(4, 16))
    if kind == "log":
        return LogFormat.from_dynamic_range(bits, 10 ** draw(st.floats(1, 8)))
    if kind == "symlog":
        return SymlogFormat(bits, 10 ** draw(st.floats(-5, 2)))
    return UniformFormat(bits)


@st.composite
def placed_leaves(draw):
    """Each mesh axis lies on one of the leaf's axes, or none; both may on the same."""
    rank = draw(st.integers(1, 3))
    on = [()] * rank
    for name in draw(st.permutations(list(MESH))):
        i = draw(st.sampled_from([*range(rank), None]))
        if i is not None:
            on[i] = (*on[i], name)
    # Shards of a few elements, odd numbers of them, too; or whole vectors of them.
    factors = st.sampled_from([1, 2, 3, 5, 7, 8, 16])
    shape = tuple(math.prod(MESH[a] for a in axes) * draw(factors) for axes in on)
    kind = draw(st.sampled_from(["codes", "float"]))
    format = channel_axis = None
    sizes = ["any"] * 6 + ["largest"]
    if kind == "codes":
        format = draw(formats())
        channel_axis = draw(st.sampled_from([None, *range(rank)]))
    else:
        sizes += ["zeros"]
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    leaf = Leaf(
        kind,
        shape,
        dtype,
        draw(st.integers(0, 2**16)),
        draw(st.sampled_from(sizes)),
        True,
        format,
        channel_axis,
    )
    return Placed(leaf, tuple(on))


trees = st.lists(placed_leaves(), min_size=1, max_size=3)
# As many of each as there are arguments to vary.
ALIASES = ("madam", "madam", "bbit_madam", "lns_madam")


# --- training -------------------------------------------------------------------------


def train(tree, optimizer, seed, mesh=None):
    """The parameters and states of two steps from random weights: [(params, state)].

    On the mesh, or else on one device.
    """
    name, learning_rate, kw, _ = optimizer
    tx = getattr(madax if name == "madam" else madax.papers, name)(learning_rate, **kw)

    def put(xs):
        one = jax.devices()[0]
        places = [one if mesh is None else placed.on(mesh) for placed in tree]
        return list(map(jax.device_put, xs, places))

    floats = [np.asarray(p.leaf.weights(), p.leaf.dtype) for p in tree]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*zero_init_scale")
        params = quantized(tree, put(floats))
        run = [(params, tx.init(params))]
    step = jax.jit(lambda params, state, grads: step_of(tx, grads, state, params))
    for t in range(2):
        run.append(step(*run[-1], put(gradients(floats, seed, t))))
    return run


def quantized(tree, weights):
    @jax.jit
    def all_at_once(weights):
        every = lambda path, leaf: True
        return [
            w
            if p.leaf.format is None
            else madax.quantize_params(
                w, p.leaf.format, where=every, channel_axis=p.leaf.channel_axis
            )
            for p, w in zip(tree, weights, strict=True)
        ]

    return all_at_once(weights)


def moments(state):
    """The leaves of each of them, in the order of the parameters."""
    found = [jax.tree.leaves(x) for x in (state.direction.nu, state.direction.mu)]
    return [leaves for leaves in found if leaves]


def misplaced(leaves, tree, mesh):
    return [
        (i, x.sharding)
        for i, (x, placed) in enumerate(zip(leaves, tree, strict=True))
        if not x.sharding.is_equivalent_to(placed.on(mesh), x.ndim)
    ]


@pytest.mark.parametrize(
    "axis_type",
    [
        pytest.param("auto", marks=pytest.mark.nightly),
        pytest.param("explicit", marks=needs_explicit_axes),
    ],
)
@settings(max_examples=max(EXAMPLES // 25, 1), phases=PHASES)
@given(trees, optimizers(ALIASES), seeds)
def test_steps_and_layouts_match_one_device(axis_type, tree, optimizer, seed):
    event(optimizer[0])
    for placed in tree:
        event(type(placed.leaf.format or placed.leaf).__name__)
    mesh = make_mesh(axis_type)
    with enter(mesh):
        on_mesh = train(tree, optimizer, seed, mesh)
    assert different(on_mesh, train(tree, optimizer, seed)) == []
    for params, state in on_mesh:
        for leaves in (list(map(values, params)), *moments(state)):
            assert misplaced(leaves, tree, mesh) == []
