"""What the searches draw: trees of leaves, their gradients, and optimizers."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import is_quantized
from hypothesis import settings
from hypothesis import strategies as st

import madax
from madax import LogFormat, MomentFormat, SymlogFormat, UniformFormat

EXAMPLES = settings.default.max_examples


def f64(x):
    return np.asarray(x).astype(np.float64)


class Pair(NamedTuple):
    first: Any
    second: Any


# Few shapes, of every rank up to 4: eager JAX compiles each operation for each.
SHAPES = [(), (0,), (5,), (2, 3), (4, 4), (3, 0, 2), (1, 2, 1, 3)]


GRIDS = [
    LogFormat.from_dynamic_range(8, 100),
    LogFormat.from_dynamic_range(16, 1e4),
    LogFormat(4, 0.5),
    LogFormat(12, 1e-3),
    LogFormat(2, 1.0),
    SymlogFormat(8, 0.3),
    SymlogFormat(16, 1e-3),
    SymlogFormat(3, 100.0),
    UniformFormat(8),
    UniformFormat(2),
    UniformFormat(16),
]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A recipe for a leaf, which stands in the tree until the leaf is made."""

    kind: str  # "float", "codes" or "python"
    shape: tuple[int, ...]
    dtype: str
    seed: int
    values: str  # "any", "zeros", or "largest" or "tiny" of the dtype
    numpy: bool
    format: Any = None
    channel_axis: int | None = None

    def weights(self):
        """Signed numbers over some orders of magnitude, a few of them zero."""
        w = self.usual_weights()
        if self.values in ("largest", "tiny") and np.any(w):
            w /= np.max(np.abs(w))
            info, ends = jnp.finfo(self.dtype), np.random.default_rng(self.seed)
            if self.values == "tiny":  # but for a root mean square that is normal
                return w * float(info.tiny) * ends.uniform(16, 1000)
            # A scale of codes, three times that, must be finite, too.
            room = 0.25 if self.kind == "codes" else 1.0
            return w * float(info.max) * room * ends.choice([1, ends.uniform(0.1, 1)])
        return w

    def usual_weights(self):
        rng = np.random.default_rng(self.seed)
        size = math.exp(rng.uniform(-5, 3))
        w = rng.standard_normal(self.shape) * size
        w = np.where(rng.random(self.shape) < 0.1, 0.0, w)
        if self.values == "zeros":
            w = np.zeros(self.shape)
        elif self.kind == "codes" or not np.any(w):
            w = np.where(w == 0, size, w)  # a scale is wanted in every channel
        return w

    def make(self):
        w = self.weights()
        if self.kind == "python":
            return float(w)
        w = np.asarray(w, self.dtype) if self.numpy else jnp.asarray(w, self.dtype)
        if self.kind == "float":
            return w
        every = lambda path, leaf: True
        return madax.quantize_params(
            w, self.format, where=every, channel_axis=self.channel_axis
        )


@st.composite
def leaf(draw, dtypes, ends):
    kind = draw(st.sampled_from(["float"] * 5 + ["codes"] * 5 + ["python"]))
    shape = () if kind == "python" else draw(st.sampled_from(SHAPES))
    format = channel_axis = None
    if kind == "codes":
        format = draw(st.sampled_from(GRIDS))
        axes = list(range(-len(shape), len(shape)))
        channel_axis = draw(st.sampled_from([None, None, *axes]))
    values = ["any"] * 6 + (["largest"] if ends else [])
    if kind != "codes":  # which want a scale, and one that is normal
        values += ["zeros"] + (["tiny"] if ends else [])
    return Leaf(
        kind,
        shape,
        draw(st.sampled_from(dtypes)),
        draw(st.integers(0, 2**16)),
        draw(st.sampled_from(values)),
        draw(st.booleans()),
        format,
        channel_axis,
    )


def trees(dtypes, ends=False):
    """Of leaves of these dtypes; with ``ends`` now and then near the ends of them."""

    def containers(node):
        keys = st.sampled_from(["a", "w", "kernel", "c/d"])
        return st.one_of(
            st.dictionaries(keys, node, max_size=3),
            st.lists(node, max_size=3),
            st.lists(node, max_size=3).map(tuple),
            st.tuples(node, node).map(lambda pair: Pair(*pair)),
        )

    nothing = st.sampled_from([None, {}, (), []])
    a_leaf = leaf(dtypes, ends)
    nodes = st.recursive(
        st.one_of(a_leaf, a_leaf, a_leaf, nothing), containers, max_leaves=5
    )
    # None for all parameters is a mistake, and said to be one.
    return nodes.filter(lambda t: t is not None and len(jax.tree.leaves(t)) <= 5)


def gradients(params, seed, t=0, bad=True):
    """Of the leaves' dtype or float32, over orders of magnitude, some of them bad.

    The dtypes are the same at every step ``t``: of others a step compiles again.
    """
    rng, dtype_rng = np.random.default_rng([seed, t]), np.random.default_rng(seed)

    def like(w):
        shape = np.shape(w)
        dtype = jnp.float32 if is_quantized(w) or dtype_rng.random() < 0.3 else w
        dtype = jnp.result_type(dtype)
        orders = 4 if dtype == np.float16 else 6
        # Sometimes each element has a size of its own.
        sizes = shape if rng.random() < 0.25 else ()
        g = rng.standard_normal(shape) * 10.0 ** rng.uniform(-orders, orders, sizes)
        g = np.where(rng.random(shape) < 0.1, 0.0, g)
        if bad:
            poison = rng.choice([np.nan, np.inf, -np.inf, 1e25], shape)
            g = np.where(rng.random(shape) < 0.05, poison, g)
        with np.errstate(all="ignore"):
            g = g.astype(dtype)
        return g if rng.random() < 0.5 else jnp.asarray(g)

    return jax.tree.map(like, params, is_leaf=is_quantized)


class Rule(NamedTuple):
    """An optimizer as numbers; ``rate`` in nats, a function of the count."""

    rate: Any
    b1: float | None = None
    b2: float = 0.999
    p_scale: float | None = None
    g_bound: float = 10.0
    floor: float = 0.0
    zero_init_scale: float = 0.1
    moment_bits: int | None = None
    rounding: str = "stochastic"
    grid: Any = None  # the format that float leaves are kept on


as_number = st.sampled_from([float, float, np.float32, jnp.float32, np.array])


@st.composite
def numbers(draw, low, high):
    """A number in some type; a float32, so that it is the same in all of them."""
    return draw(as_number)(float(np.float32(draw(st.floats(low, high)))))


@st.composite
def optimizers(draw, names=("madam",) * 6 + ("bbit_madam", "lns_madam")):
    """A madax optimizer, its rule, and its arguments to show."""
    name = draw(st.sampled_from(names))
    kw = {}

    def some(key, strategy):
        if draw(st.booleans()):
            kw[key] = draw(strategy)

    rate = draw(
        st.one_of(
            numbers(1e-4, 0.5), numbers(0, 3), st.sampled_from([0.0, 1, 1e-6, 20.0])
        )
    )
    some("b2", numbers(0, 0.9999))
    some("p_scale", numbers(0.125, 20))
    some("g_bound", st.one_of(numbers(0.125, 20), st.just(math.inf)))
    some("zero_init_scale", st.one_of(numbers(0.0078125, 2), st.just(0)))
    nats, rounding, grid, moment_bits = 1.0, "nearest", None, None
    if name == "madam":
        rounding = draw(st.sampled_from(["stochastic", "nearest"]))
        if draw(st.booleans()):
            moment_bits = draw(st.sampled_from([8, 8, 9, 12, 16]))
            kw["moment_format"] = MomentFormat(moment_bits)
        some("b1", st.one_of(numbers(0, 0.99), st.none()))
        some("floor", numbers(0, 3))
        some("seed", st.integers(-(2**40), 2**40))
        if draw(st.sampled_from([False] * 5 + [True])):
            kw["p_scale"] = math.inf
        kw["rounding"] = rounding
    elif name == "bbit_madam":
        some("bits", st.sampled_from([1, 4, 12]))
        some("base_step", st.sampled_from([1e-3, 5e-3, 0.01]))
        spacing = kw.get("base_step", 1e-3)
        grid = LogFormat(kw.get("bits", 12) + 1, spacing)
        # Ties are told apart by no rounding: whole codes, and a bit.
        rate = spacing * (draw(st.integers(0, 300)) + draw(st.floats(-0.4, 0.4)))
        rate = max(rate, 0.0)
    else:
        some("format", st.sampled_from(GRIDS))
        grid = kw.get("format", LogFormat.from_gamma(16, 2048))
        nats = math.log(2)
    value = float(rate)

    def nat_rate(count, decay=1.0):
        now = value * decay**count
        if name == "bbit_madam":
            whole = np.rint(now / spacing)
            return spacing * max(whole, np.sign(now))
        return nats * now

    schedule = name != "bbit_madam" and draw(st.sampled_from([False] * 3 + [True]))
    learning_rate = rate
    rule_rate = nat_rate
    if schedule:
        learning_rate = lambda count: value * 0.5**count
        rule_rate = lambda count: nat_rate(count, 0.5)
    rule = Rule(
        rule_rate,
        None if kw.get("b1") is None else float(kw["b1"]),
        float(kw.get("b2", 0.999)),
        None if kw.get("p_scale") is None else float(kw["p_scale"]),
        float(kw.get("g_bound", 10.0)),
        float(kw.get("floor", 0.0)),
        float(kw.get("zero_init_scale", 0.1)),
        moment_bits,
        rounding,
        grid,
    )
    return name, learning_rate, kw, rule


DTYPES = ["float32", "float32", "bfloat16", "float16"]


seeds = st.integers(0, 2**20)
