"""jnp functions and methods of arrays, on codes: bare, in linen, in nnx variables."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import mostly_nightly, normal, raises, same

import madax
from madax import SymlogFormat

pytestmark = pytest.mark.usefixtures("quick_compiles")

X = normal(4, 4)
# Of codes without a probe, so that derivatives are by all of it.
W = madax.quantize_params(normal(4, 4, seed=1), SymlogFormat(8), channel_axis=-1)

# JAX 0.6.0 lets some functions see what they are given as it is. With Flax before 0.11
# variables are constants, to JAX.
OLD_JAX = jax.__version_info__ < (0, 6, 1)
OLD_FLAX = jax.tree_util.all_leaves([nnx.Variable(None)])
NEED_ARRAYS = (
    "sum mean max min prod std var abs sign isfinite diag triu swapaxes softmax"
)

FUNCTIONS = {
    "dot": lambda w: jnp.dot(X, w),
    "dot from the left": lambda w: jnp.dot(w, X),
    "matmul": lambda w: jnp.matmul(X, w),
    "vdot": lambda w: jnp.vdot(X, w),
    "inner": lambda w: jnp.inner(X, w),
    "outer": lambda w: jnp.outer(w, X),
    "tensordot": lambda w: jnp.tensordot(X, w, 1),
    "einsum": lambda w: jnp.einsum("ab,bc->ac", X, w),
    "take": lambda w: jnp.take(w, jnp.array([2, 1]), axis=0),
    "take_along_axis": lambda w: jnp.take_along_axis(w, jnp.ones((4, 1), int), 1),
    "concatenate": lambda w: jnp.concatenate([w, X]),
    "stack": lambda w: jnp.stack([X, w]),
    "transpose": jnp.transpose,
    "swapaxes": lambda w: jnp.swapaxes(w, 0, 1),
    "moveaxis": lambda w: jnp.moveaxis(w, 0, 1),
    "reshape": lambda w: jnp.reshape(w, (2, 8)),
    "ravel": jnp.ravel,
    "squeeze": jnp.squeeze,
    "expand_dims": lambda w: jnp.expand_dims(w, 0),
    "broadcast_to": lambda w: jnp.broadcast_to(w, (2, 4, 4)),
    "tile": lambda w: jnp.tile(w, 2),
    "repeat": lambda w: jnp.repeat(w, 2, axis=0),
    "flip": jnp.flip,
    "roll": lambda w: jnp.roll(w, 1),
    "pad": lambda w: jnp.pad(w, 1),
    "split": lambda w: jnp.split(w, 2),
    "sum": jnp.sum,
    "mean": lambda w: jnp.mean(w, axis=0),
    "max": jnp.max,
    "min": jnp.min,
    "prod": jnp.prod,
    "std": jnp.std,
    "var": lambda w: jnp.var(w, axis=1),
    "argmax": jnp.argmax,
    "cumsum": jnp.cumsum,
    "sort": jnp.sort,
    "abs": jnp.abs,
    "sign": jnp.sign,
    "square": jnp.square,
    "exp": jnp.exp,
    "add": lambda w: jnp.add(w, X),
    "maximum": lambda w: jnp.maximum(w, 0),
    "clip": lambda w: jnp.clip(w, -0.1, 0.1),
    "where": lambda w: jnp.where(X > 0, w, 0),
    "isfinite": jnp.isfinite,
    "asarray": jnp.asarray,
    "diag": jnp.diag,
    "triu": jnp.triu,
    "norm": jnp.linalg.norm,
    "solve": lambda w: jnp.linalg.solve(w, X),
    "inv": jnp.linalg.inv,
    "relu": jax.nn.relu,
    "softmax": jax.nn.softmax,
    "logsumexp": jax.nn.logsumexp,
}


class Linen(nn.Module):
    """A user's own module, whose weight goes through every function."""

    functions: tuple

    @nn.compact
    def __call__(self):
        w = self.param("w", nn.initializers.normal(), (4, 4))
        return {name: FUNCTIONS[name](w) for name in self.functions}


def bare(w, names):
    return {name: FUNCTIONS[name](w) for name in names}


def linen(w, names):
    return Linen(tuple(names)).apply({"params": {"w": w}})


def variable(w, names):
    """That of a user, who makes it of codes."""
    return bare(nnx.Param(w), names)


def taken_by(kind):
    """The functions that take codes, with old versions of JAX."""
    arrays = NEED_ARRAYS.split() if OLD_JAX and kind is not variable else ()
    return [name for name in FUNCTIONS if name not in arrays]


@pytest.mark.parametrize(
    "kind", mostly_nightly([bare, linen, variable], bare, variable)
)
def test_functions_take_codes_as_their_values(kind):
    names = taken_by(kind)
    run = lambda w: kind(w, names)
    wrap = (lambda f: f) if OLD_FLAX and kind is variable else jax.jit
    same(wrap(run)(W), wrap(lambda w: bare(w, names))(W.dequantize()))


@pytest.mark.skipif(OLD_FLAX, reason="refused: see below")
@pytest.mark.parametrize("kind", mostly_nightly([bare, linen, variable], variable))
def test_functions_of_codes_have_the_derivatives_of_their_values(kind):
    # The rule of relu compares what it is given with 0, which no variable can be.
    names = [name for name in taken_by(kind) if (kind, name) != (variable, "relu")]

    def total(kind):
        return lambda w: sum(
            jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(kind(w, names))
        )

    got = jax.jit(madax.grad(total(kind)))(W)
    expected = jax.jit(jax.grad(total(bare)))(W.dequantize())
    assert np.all(np.abs(expected) > 0.1)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.skipif(not OLD_FLAX, reason="for Flax before 0.11")
def test_old_flax_loses_no_derivative_in_silence():
    with raises(NotImplementedError, "Param of codes", "self.w[...]"):
        madax.grad(lambda w: jnp.sum(jnp.dot(X, nnx.Param(w))))(W)
    got = madax.grad(lambda w: jnp.sum(jnp.einsum("ab,bc->ac", X, nnx.Param(w))))(W)
    np.testing.assert_allclose(got, jnp.tile(X.sum(0)[:, None], 4), rtol=1e-6)


class Own(nnx.Module):
    def __init__(self, w):
        self.w = nnx.Param(w)

    def __call__(self, x):
        return jnp.tanh(jnp.dot(x, self.w)) + jnp.sum(self.w)


@pytest.mark.skipif(
    OLD_FLAX, reason="such a module trains in floats with 0.11 or newer"
)
def test_a_module_with_functions_of_jnp_trains():
    model = madax.quantize_params(Own(normal(4, 4, seed=1)), SymlogFormat(8))
    loss = lambda model: jnp.sum(model(X) ** 2)
    value, grads = madax.value_and_grad(loss)(model)
    floats = madax.dequantize_params(model)
    expected, of_floats = nnx.value_and_grad(loss)(floats)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grads["w"][...], of_floats["w"][...], rtol=1e-5)
    assert type(model.w) is nnx.Param


ARGUMENTS = {
    "astype": (np.float16,),
    "clip": (-0.1, 0.1),
    "dot": (np.asarray(X),),
    "repeat": (2,),
    "reshape": (2, 8),
    "swapaxes": (0, 1),
    "take": (np.array([1, 2]),),
    "transpose": (1, 0),
}


METHODS = """
all any argmax argmin argsort astype clip conj cumprod cumsum diagonal dot flatten max
mean min nonzero prod ravel repeat reshape round squeeze std sum swapaxes take
tolist trace transpose var
"""


@pytest.mark.parametrize("wrap", [lambda w: w, nnx.Param], ids=["bare", "variable"])
def test_methods_and_attributes_of_arrays(wrap):
    w, values = wrap(W), np.asarray(W.dequantize())
    for name in METHODS.split():
        args = ARGUMENTS.get(name, ())
        got, expected = getattr(w, name)(*args), getattr(values, name)(*args)
        np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=name)
    assert (w.itemsize, w.sharding, w.devices()) == (4, X.sharding, X.devices())
    assert w.at[0, 1].set(7.0)[0, 1] == 7 and w.at[0, 1].get() == values[0, 1]
    for name in ("T", "mT", "real"):
        np.testing.assert_array_equal(getattr(w, name), getattr(values, name))
    one = wrap(jax.tree.map(lambda x: x[0, 0], W))
    assert one.item() == values[0, 0] and int(100 * one) == int(100 * values[0, 0])


def test_a_copy_has_buffers_of_its_own():
    w = W.copy()
    assert w.block_until_ready() is not None and w.format == W.format
    jax.jit(lambda w: w, donate_argnums=0)(w)
    jax.tree.map(lambda x: x.delete(), w)
    assert w.is_deleted() and not W.is_deleted()


def test_what_codes_do_not_have_is_an_error_that_says_what_to_do():
    with raises(
        TypeError, "cannot be written to", "w.at[...].set(x)", "quantize_params"
    ):
        W[0] = 1.0
    with raises(TypeError, "cannot be written to", "by its set_value"):
        nnx.Param(W)[...] = jnp.ones((4, 4))
    with raises(AttributeError, "a QuantizedArray has no 'frobnicate'", "w[...]"):
        _ = W.frobnicate
    steps = madax.QuantizedArray.steps(jnp.ones((4, 4), jnp.int32), W.format)
    with raises(TypeError, "was used as a number"):
        steps.sum()
