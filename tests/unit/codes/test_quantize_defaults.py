"""quantize_params on real trees: what it takes, what it leaves, and what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from helpers import different, is_quantized, mostly_nightly, normal, raises, same

import madax
from madax import LogFormat, QuantizedArray, SymlogFormat, UniformFormat
from madax.codes._leaves import flatten

pytestmark = pytest.mark.usefixtures("quick_compiles")

FMT = FORMATS["symlog8"]
NARROW = [FORMATS["log8"], FMT]


def seen_paths(tree):
    """Paths as ``where`` is given them."""
    paths = []
    where = lambda path, leaf: paths.append(path) or path.endswith("kernel")
    madax.quantize_params(tree, FMT, where=where)
    return sorted(paths)


def codes_of(tree):
    """What became codes, by path."""
    paths, leaves, _ = flatten(tree)
    return {path: w for path, w in zip(paths, leaves, strict=True) if is_quantized(w)}


def chosen(tree):
    return set(codes_of(tree))


def quantized_shapes(tree, **options):
    """What ``quantize_params`` would make of a tree, without doing so."""
    return jax.eval_shape(lambda t: madax.quantize_params(t, FMT, **options), tree)


# --- defaults of the formats ----------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 8, 9, 16])
def test_default_formats_match_explicit_values(bits):
    assert SymlogFormat(bits) == SymlogFormat(bits, 1 / 3)
    ratio = 100 if bits <= 8 else 10_000
    fmt, explicit = LogFormat(bits), LogFormat.from_dynamic_range(bits, ratio)
    assert fmt == explicit and hash(fmt) == hash(explicit)
    assert repr(fmt) == repr(explicit) and "None" not in repr(fmt)
    assert fmt.dynamic_range == pytest.approx(ratio)


def test_a_log_format_of_two_bits_has_no_range_to_default_to():
    assert LogFormat(2, 0.5).levels == 1
    with pytest.raises(ValueError, match="bits must be in 3 to 16, got 2"):
        LogFormat(2)


# --- which leaves ---------------------------------------------------------------------

WEIGHTS = [
    "Dense_0/kernel",
    "embed/embedding",
    "attn/value/kernel",
    "linear/w",
    "block/rescale_net/kernel",
    "lora_b",
    "bottleneck",
    "lnet/w",
    "lora/b",
    "PreNorm_0/fn/kernel",
    "NormFormer_0/fc/kernel",
    "norm1/linear/weight",
    "normalizing_flow/linear/w",
]
FLOATS = [
    "attention/query/bias",
    "layers/Dense_0/bias",
    "layers/LayerNorm_0/scale",
    "encoder_norm/weight",
    "RMSNorm_3/weight",
    "ln_1/weight",
    "ln/w",
    "bn2/w",
    "layer_scale",
    "biases",
    "logit_scale",
    "film/gamma",
    "film/beta",
    "out_bias",
    "mixer/A_log",
]


def test_names_tell_weights_from_other_leaves():
    tree = dict.fromkeys(WEIGHTS + FLOATS, jnp.ones((4, 8)))
    assert chosen(quantized_shapes(tree)) == set(WEIGHTS)


def test_a_leaf_called_b_is_a_bias_if_it_has_an_axis_less_than_its_kernel():
    shapes = {
        "layers": {"w": (3, 4, 8), "b": (3, 8)},
        "query": {"w": (16, 4, 8), "b": (4, 8)},
        "low_rank": {"a": (16, 2), "b": (2, 16)},
        "ssm": {"B": (8, 4, 2), "C": (4, 8, 2)},
    }
    is_shape = lambda x: isinstance(x, tuple)
    tree = jax.tree.map(jnp.ones, shapes, is_leaf=is_shape)
    expected = {"layers/w", "query/w", "low_rank/a", "low_rank/b", "ssm/B", "ssm/C"}
    assert chosen(quantized_shapes(tree)) == expected


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        return x + nn.Dense(16)(nn.Dense(32)(nn.LayerNorm()(x))), None


class Scanned(nn.Module):
    """Transformer blocks with a leading layer axis, as in large linen models."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(8, 16)(tokens)
        stack = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return nn.LayerNorm()(stack(name="layers")(x, None)[0])


def test_a_scanned_linen_transformer():
    tokens = jnp.zeros((2, 5), jnp.int32)
    params = jax.eval_shape(Scanned().init, jax.random.key(0), tokens)["params"]
    quantized = quantized_shapes(params, channel_axis=0)
    codes = codes_of(quantized)
    assert len(codes) == 1 + 4 + 2
    assert all(path.endswith(("kernel", "embedding")) for path in codes)
    query = codes["layers/MultiHeadDotProductAttention_0/query/kernel"]
    assert query.shape == (3, 16, 4, 4) and query.scale.shape == (3, 1, 1, 1)
    bias = quantized["layers"]["MultiHeadDotProductAttention_0"]["query"]["bias"]
    assert bias.shape == (3, 4, 4)  # 48 elements, of rank 3, and floats
    assert chosen(quantized_shapes(freeze(params))) == set(codes)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=16, decode=True, rngs=rngs
        )
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(16, 8, rngs=rngs)
        self.attention.init_cache((2, 3, 16))

    def __call__(self, x):
        return self.head(self.dropout(self.norm(x)))


@functools.cache
def first_net():
    return Net(nnx.Rngs(0))


def net():
    return nnx.clone(first_net())


KERNELS = {f"attention/{name}/kernel" for name in ("query", "key", "value", "out")}
KERNELS |= {"head/kernel"}


def test_paths_are_the_same_in_every_tree():
    state = nnx.state(net(), nnx.Param)
    pure = nnx.to_pure_dict(state)
    expected = seen_paths(pure)
    assert set(expected) >= KERNELS | {"attention/value/bias", "norm/scale"}
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), pure)
    for tree in (state, boxed, freeze(pure), freeze(boxed)):
        assert seen_paths(tree) == expected
        size = jax.eval_shape(madax.diagnostics.relative_update_size, tree, tree)
        assert sorted(size) == expected
        assert chosen(quantized_shapes(tree)) == KERNELS
    bad = jax.tree.map(lambda x: np.full(x.shape, np.nan), state)
    with pytest.raises(ValueError, match=r"params\['attention/key/bias'\] holds"):
        madax.madam().init(bad)
    with pytest.raises(ValueError, match=r"state\.nu\['attention/key/bias'\]"):
        tx = madax.scale_by_second_moment()
        tx.update(jax.tree.map(lambda x: x[..., None], state), tx.init(state))


def test_a_leaf_that_is_called_value_keeps_its_name():
    """Only an array that is alone in a box has no name of its own."""
    attention = {name: normal(4, 4) for name in ("query", "key", "value")}
    where = lambda path, leaf: path == "attention/value"
    quantized = madax.quantize_params({"attention": attention}, FMT, where=where)
    assert chosen(quantized) == {"attention/value"}
    triple = jax.tree_util.register_dataclass(Triple, ["query", "key", "value"], [])
    tree = {"attention": triple(**attention)}
    assert chosen(madax.quantize_params(tree, FMT, where=where)) == {"attention/value"}


class Triple:
    def __init__(self, query, key, value):
        self.query, self.key, self.value = query, key, value


def test_where_that_chooses_nothing_is_refused_with_the_paths():
    params = {
        f"Dense_{i}": {"kernel": normal(4, 4), "bias": normal(4)} for i in "abcde"
    }
    with pytest.raises(ValueError) as error:
        madax.quantize_params(params, FMT, where=lambda path, w: path == "Dense_a")
    message = str(error.value)
    assert message.startswith("where")
    assert "'Dense_a/bias', 'Dense_a/kernel'" in message and "and 2 more" in message
    with pytest.raises(ValueError, match=r"paths are 'b'.*pass a where"):
        madax.quantize_params({"b": normal(64)}, FMT)


# --- whole modules of nnx -------------------------------------------------------------


def test_a_whole_module_is_quantised_except_its_state():
    model = net()
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    coded = madax.quantize_params(model, FMT)
    assert type(coded) is Net and coded is not model
    same(nnx.state(model, nnx.Param), before)
    params, rest = nnx.state(coded, nnx.Param), nnx.state(coded, nnx.Not(nnx.Param))
    assert chosen(params) == KERNELS
    rest_before = nnx.state(model, nnx.Not(nnx.Param))
    # Rank 4 and floating, but no weights.
    assert any(x.ndim == 4 for x in jax.tree.leaves(rest))
    key_data = lambda x: (
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    )
    same(jax.tree.map(key_data, rest), jax.tree.map(key_data, rest_before))

    plain = madax.dequantize_params(coded)
    assert type(plain) is Net and chosen(nnx.state(coded, nnx.Param)) == KERNELS
    same(
        nnx.state(plain, nnx.Param),
        madax.dequantize_params(params),
    )
    x = normal(4, 16)
    plain.eval(), model.eval()
    np.testing.assert_allclose(plain(x), model(x), atol=0.05)
    # Each has its own statistics and counters.
    plain.train()
    plain(x)
    same(nnx.state(model, nnx.BatchStat), nnx.state(coded, nnx.BatchStat))
    assert np.any(plain.norm.mean[...] != model.norm.mean[...])


# --- zeros, and what is not finite ----------------------------------------------------


@pytest.mark.parametrize("channel_axis", [0, 1])
@pytest.mark.parametrize("fmt", NARROW, ids=repr)
def test_a_dead_channel_has_the_scale_of_the_others(fmt, channel_axis):
    w = normal(6, 8).at[2].set(0).at[:, 5].set(0)
    quantize = lambda w: madax.quantize_params(w, fmt, channel_axis=channel_axis)
    q = quantize(w)
    same(q, jax.jit(quantize)(w))
    dead = np.ravel(q.scale)[2 if channel_axis == 0 else 5]
    assert dead == np.max(q.scale) > np.min(q.scale) > 0
    np.testing.assert_array_equal(q.codes[2], 0)
    np.testing.assert_array_equal(q.codes[:, 5], 0)


MAKERS = {
    "madam": madax.madam(),
    "bbit_madam": madax.papers.bbit_madam(),
    "lns_madam": madax.papers.lns_madam(),
    "sign_log": madax.scale_by_sign_log(),
    "wrapped": madax.with_quantized_params(optax.adam(0.1)),
}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_init_reports_what_jit_cannot_know(bad):
    """Under jit no value is known: the scale is NaN, and so are the weights."""
    params = {"w": normal(4, 4), "bad": normal(4, 4).at[:, 1].set(bad)}
    quantize = lambda p: madax.quantize_params(p, FMT, channel_axis=1)
    quantized = jax.jit(quantize)(params)
    assert np.isnan(quantized["bad"].scale[0, 1])
    assert np.all(np.isnan(quantized["bad"].dequantize()[:, 1]))
    assert np.all(quantized["w"].scale > 0)
    for tx in MAKERS.values():
        with pytest.raises(
            ValueError, match=r"params\['bad'\] .*without a scale.*where"
        ):
            tx.init(quantized)
        tx.init({"w": quantized["w"]})
        jax.eval_shape(tx.init, quantized)
    with pytest.raises(ValueError, match=r"params\['bad'\] .*not finite"):
        quantize(params)


def test_shapes_instead_of_values_are_refused():
    """Floats, and codes of another format; what eval_shape makes of them it makes."""
    shapes = jax.eval_shape(lambda: {"w": jnp.ones((4, 4)), "b": jnp.ones(4)})
    for tree in (shapes, quantized_shapes(shapes)):
        with raises(TypeError, "params['w']", "jax.ShapeDtypeStruct", "jax.eval_shape"):
            madax.quantize_params(tree, LogFormat(8))
        assert chosen(quantized_shapes(tree)) == {"w"}


# --- scales have the rank of their codes ----------------------------------------------


@pytest.mark.parametrize("fmt", mostly_nightly(NARROW, NARROW[0]), ids=repr)
def test_a_stack_is_its_layers(fmt):
    """By channel_axis=0, by vmap, and one at a time: the same codes, which slice."""
    stack = jnp.stack([normal(4, 6, seed=i, scale=10.0**i) for i in range(3)])
    quantize = lambda w: madax.quantize_params(w, fmt)
    q = madax.quantize_params(stack, fmt, channel_axis=0)
    assert q.scale.shape == (3, 1, 1)
    same(q, jax.vmap(quantize)(stack))
    layers = [quantize(w) for w in stack]
    assert all(layer.scale.shape == (1, 1) for layer in layers)
    same(q, jax.tree.map(lambda *x: jnp.stack(x), *layers))
    _, values = jax.lax.scan(lambda c, q: (c, q.dequantize()), None, q)
    np.testing.assert_array_equal(values, q.dequantize())
    both = madax.quantize_params(stack, fmt, channel_axis=(0, -1))
    assert both.scale.shape == (3, 1, 6)
    by_channel = lambda w: madax.quantize_params(w, fmt, channel_axis=-1)
    same(both, jax.vmap(by_channel)(stack))


@pytest.mark.parametrize("axis", [(0.5,), (True,), [0], "01", (0, "1")], ids=repr)
def test_channel_axis_is_an_int_or_several(axis):
    with pytest.raises(TypeError, match="channel_axis must be None, an int or a tuple"):
        madax.quantize_params(normal(4, 4), FMT, channel_axis=axis)


def test_an_axis_of_several_that_is_not_there():
    with pytest.raises(ValueError, match=r"channel_axis is 2, but params\['w'\] has"):
        madax.quantize_params({"w": normal(4, 4)}, FMT, channel_axis=(0, 2))


@pytest.mark.parametrize("channel_axis", [None, 0, -1, (0, 1)])
def test_empty_leaves_are_neither_zero_nor_infinite(channel_axis):
    everything = lambda path, leaf: True
    q = madax.quantize_params(
        jnp.ones((0, 3)), FMT, where=everything, channel_axis=channel_axis
    )
    assert is_quantized(q) and q.dequantize().shape == (0, 3)
    madax.madam().init(q)


def test_scalar_scales_of_older_checkpoints_still_train():
    new = {"w": madax.quantize_params(normal(4, 4), FMT), "b": jnp.zeros(4)}
    old = new | {"w": QuantizedArray(new["w"].codes, new["w"].scale.reshape(()), FMT)}
    grads = {"w": normal(4, 4, seed=1), "b": jnp.ones(4)}
    for tx in (madax.madam(0.1), madax.with_quantized_params(optax.sgd(0.1))):
        after = []
        for params in (old, new):
            updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
            params = optax.apply_updates(params, updates)
            after.append(params["w"])
        np.testing.assert_array_equal(after[0].codes, after[1].codes)
        assert after[0].scale.shape == ()
    other = UniformFormat(8)
    same(*(madax.quantize_params(params, other) for params in (old, new)))


# --- from codes to codes --------------------------------------------------------------


@pytest.mark.parametrize("channel_axis", [None, -1])
@pytest.mark.parametrize("to", mostly_nightly(NARROW, FMT), ids=repr)
def test_codes_of_another_format_are_converted(to, channel_axis):
    q = madax.quantize_params(normal(8, 8), LogFormat(16), channel_axis=channel_axis)
    params = {"w": q, "zero": QuantizedArray(0 * q.codes, q.scale, q.format)}
    new = madax.quantize_params(params, to)
    assert new["w"].format == to and chosen(new) == {"w", "zero"}
    np.testing.assert_array_equal(new["w"].scale, q.scale)  # the bound is kept
    values = q.dequantize()
    fresh = madax.quantize_params(values, to, channel_axis=channel_axis)
    np.testing.assert_allclose(new["w"].dequantize(), fresh.dequantize(), rtol=0.03)
    assert not np.any(new["zero"].codes)
    # If it is asked for, a scale is computed from the values.
    narrow = madax.quantize_params(
        params, to, where=lambda path, w: path == "w", channel_axis=0
    )
    same(narrow["w"], madax.quantize_params(values, to, channel_axis=0))
    assert different(narrow["zero"], params["zero"]) == []


def test_codes_of_the_format_are_left_alone():
    params = {"w": madax.quantize_params(normal(8, 8), FMT), "v": normal(8, 8)}
    again = madax.quantize_params(params, SymlogFormat(8, 1 / 3))
    assert different(again["w"], params["w"]) == []
    assert is_quantized(again["v"])
    twice = madax.quantize_params(again, again["v"].format)
    assert different(twice["v"], again["v"]) == []


# --- speed, and devices ---------------------------------------------------------------


def test_leaves_of_one_shape_share_a_program_and_are_read_at_once(monkeypatch):
    """No leaf costs a compilation or a round trip to the host: all share one."""
    params = {f"layer_{i}": normal(12, 20, seed=i) for i in range(9)}
    reads = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: reads.append(x) or device_get(x))
    before = madax.codes._quantize._encode._cache_size()
    quantized = madax.quantize_params(params, FMT)
    assert madax.codes._quantize._encode._cache_size() == before + 1
    assert len(reads) == 1 and len(chosen(quantized)) == 9
