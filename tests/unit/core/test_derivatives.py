"""Derivatives through an update are right: of rates, decays, weights and gradients.

Finite differences in float64 are the judge: what is learned through an optimizer
(hypergradients, meta-learning) needs what ``jax.grad`` says of it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FORMATS
from helpers import enable_x64, mostly_nightly, normal
from jax.test_util import check_grads

import madax
from madax import MomentFormat
from madax._core.numerics import (
    arcsinh,
    exp,
    expm1,
    log,
    log1p,
    over_root,
    rounded,
    sinh,
)
from madax.codes._scales import root_mean_square

pytestmark = pytest.mark.usefixtures("quick_compiles")

FUNCTIONS = {
    # name: (ours, NumPy's, its derivative, its second derivative)
    "expm1": (expm1, np.expm1, np.exp, np.exp),
    "exp": (exp, np.exp, np.exp, np.exp),
    "log": (log, np.log, lambda x: 1 / x, lambda x: -1 / x**2),
    "log1p": (log1p, np.log1p, lambda x: 1 / (1 + x), lambda x: -1 / (1 + x) ** 2),
    "sinh": (sinh, np.sinh, np.cosh, np.sinh),
    "arcsinh": (
        arcsinh,
        np.arcsinh,
        lambda x: (1 + x**2) ** -0.5,
        lambda x: -x * (1 + x**2) ** -1.5,
    ),
    "rounded": (rounded, np.positive, np.ones_like, np.zeros_like),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_their_derivatives(name):
    """First and second order, forward and reverse; the float32 ones are our own."""
    ours, value, first, second = FUNCTIONS[name]
    x = np.float32([0.01, 0.3, 1.0, 2.0, 7.0])
    x = x if name == "log" else np.concatenate([-0.1 * x, x])
    for d1 in (jax.grad(ours), jax.jacfwd(ours)):
        np.testing.assert_allclose(jax.vmap(d1)(x), first(x), rtol=1e-5)
        for d2 in (jax.grad(d1), jax.jacfwd(d1)):
            np.testing.assert_allclose(jax.vmap(d2)(x), second(x), rtol=1e-5)
    np.testing.assert_allclose(ours(x), value(x), rtol=1e-6, atol=1e-7)


def test_quotients_by_roots_have_their_derivatives():
    with enable_x64():
        args = jnp.array([0.3, -2.0, 1e3]), jnp.array([0.5, 7.0, 2.0])
        check_grads(over_root, args, 2, eps=1e-5)
    for x, v in ((0.0, 0.0), (1e-30, 0.0), (1e-25, 1e-38)):
        slopes = jax.grad(over_root, (0, 1))(jnp.float32(x), jnp.float32(v))
        assert np.all(np.isfinite(slopes))


rng = np.random.default_rng(0)
W = {"w": rng.normal(size=(4, 4)), "b": np.zeros(3)}
GRADS = [{k: rng.normal(size=w.shape) for k, w in W.items()} for _ in range(3)]
HYPER = {"learning_rate": 0.03, "b2": 0.9}
ALIASES = {
    "madam": madax.madam,
    "floor_b1": lambda **kw: madax.madam(floor=1.0, b1=0.5, **kw),
    # A grid has no derivative, so this is the derivative of the step before rounding.
    "bbit_madam": madax.papers.bbit_madam,
    "lns_madam": madax.papers.lns_madam,
}


def trained(make, hyper, w, grads=GRADS, codes=None):
    """A number that depends on all weights after three steps."""
    tx, params = make(**hyper), dict(w)
    if codes is not None:
        params["codes"] = codes
        grads = [g | {"codes": jnp.ones(codes.shape)} for g in grads]
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
        # Not optax.apply_updates: it would move the codes, which have no derivative.
        params = params | {k: params[k] + updates[k] for k in w}
    return sum(jnp.sum(jnp.sin((1 + i) * params[k])) for i, k in enumerate(w))


@pytest.mark.parametrize(
    ("name", "order"), mostly_nightly([("madam", 1), ("floor_b1", 2)], ("madam", 1))
)
def test_derivatives_of_updates_are_finite_differences(name, order):
    """Of the rate, the decay and the weights, forward and reverse."""
    with enable_x64():
        # Not of the zeros, which are trained otherwise if they are almost zeros.
        f = jax.jit(
            lambda hyper, w: trained(ALIASES[name], hyper, W | {"w": w}, GRADS[:2])
        )
        args = jax.tree.map(jnp.float64, (HYPER, W["w"]))
        check_grads(f, args, order, modes=("fwd", "rev"), eps=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("codes", [None, "log8", "symlog8", "uniform8"])
@pytest.mark.parametrize("bits", [None, 16])
def test_float_parts_of_native_trees_have_derivatives(codes, bits):
    """Derivatives beside stored moments and codes are near those of floats alone."""
    if codes is not None:
        codes = madax.quantize_params(jnp.asarray(W["w"], jnp.float32), FORMATS[codes])
    moments = None if bits is None else MomentFormat(bits)
    make = lambda **kw: madax.madam(moment_format=moments, **kw)
    w, hyper = jax.tree.map(jnp.float32, (W, HYPER))
    grad = jax.jit(jax.grad(lambda h: trained(make, h, w, codes=codes)))(hyper)
    with enable_x64():
        exact = lambda h: trained(madax.madam, h, jax.tree.map(jnp.float64, W))
        want = jax.grad(exact)(jax.tree.map(jnp.float64, HYPER))
    # Only the last step of the moments' history is differentiated.
    rtol = 1e-4 if bits is None else 0.02
    np.testing.assert_allclose(grad["learning_rate"], want["learning_rate"], rtol=rtol)
    if bits is None:
        np.testing.assert_allclose(grad["b2"], want["b2"], rtol=1e-3)


@pytest.mark.parametrize("name", ["bbit_madam", "lns_madam"])
def test_on_a_grid_the_derivative_matches_the_step_before_rounding(name):
    w = {"w": jnp.asarray(W["w"], jnp.float32)}
    grads = [{"w": jnp.asarray(GRADS[0]["w"], jnp.float32)}]
    if name == "lns_madam":
        rate, plain = 0.03 / np.log(2), lambda h: {"learning_rate": h * np.log(2)}
        f = lambda h: trained(madax.papers.lns_madam, {"learning_rate": h}, w, grads)
    else:  # whose rates are whole numbers of codes: the weights' part
        rate, plain = 0.03, lambda h: {"learning_rate": 0.03, "b2": h}
        f = lambda h: trained(madax.papers.bbit_madam, {"b2": h}, w, grads)
        rate = 0.9
    exact = lambda h: trained(madax.madam, plain(h), w, grads)
    got, want = (jax.jit(jax.grad(g))(rate) for g in (f, exact))
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("backward", [False, True])
def test_fake_quantize_has_second_derivatives(backward):
    fmt = madax.LogFormat(bits=16, base_step=1e-3)
    backward_format = fmt if backward else None
    q = lambda x: madax.papers.fake_quantize(x, fmt, backward_format=backward_format)
    f, x = lambda x: jnp.sum(q(x) ** 3), jnp.array([1.0, 0.5, 0.3])
    hessian = jax.jacrev(jax.jacrev(f)) if backward else jax.hessian(f)
    np.testing.assert_allclose(hessian(x), np.diag(6 * x), rtol=2e-3)
    if backward:
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(f, (x,), (jnp.ones(3),))
    else:
        _, slope = jax.jvp(f, (x,), (jnp.ones(3),))
        np.testing.assert_allclose(slope, np.sum(3 * x**2), rtol=2e-3)


# --- in loops -------------------------------------------------------------------------


def repeat(f, x, count, how):
    """``f(f(x, 0), 1)`` and so on: unrolled, or in a loop of JAX's."""
    if how == "unrolled":
        for i in range(count):
            x = f(x, i)
        return x
    step = lambda x, i: (f(x, i), None)
    if how == "remat":
        step = jax.checkpoint(step)
    if how == "fori":
        return jax.lax.fori_loop(0, count, lambda i, x: f(x, i), x)
    return jax.lax.scan(step, x, jnp.arange(count))[0]


def second_derivatives(f, x):
    """Each order of both directions, as the derivatives of one number by one."""
    return [d(e(f))(x) for d in (jax.grad, jax.jacfwd) for e in (jax.grad, jax.jacfwd)]


@pytest.mark.parametrize("name", [*FUNCTIONS, "over_root", "root_mean_square"])
def test_functions_have_their_second_derivatives_in_loops(name):
    """By finite differences of the function in NumPy."""
    ours, exact = {
        "over_root": (lambda x: over_root(x, 1 + x * x), lambda x: x / np.hypot(1, x)),
        "root_mean_square": (
            lambda x: root_mean_square(jnp.stack([x, x * x])),
            lambda x: np.sqrt((x**2 + x**4) / 2),
        ),
    }.get(name) or FUNCTIONS[name][:2]
    twice = lambda f, x: f(0.5 * f(x) + 1)
    in_loop = lambda x: repeat(lambda x, i: ours((1 - 0.5 * i) * x + i), x, 2, "scan")
    x, h = 0.4, 1e-4
    want = sum(c * twice(exact, x + k * h) for k, c in ((-1, 1), (0, -2), (1, 1)))
    got = jax.jit(partial(second_derivatives, in_loop))(x)
    np.testing.assert_allclose(got, want / h**2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", mostly_nightly(["scan", "remat", "fori"], "scan"))
def test_fake_quantize_has_second_derivatives_in_loops(how):
    """Hessian-vector products, and those of the norm of a gradient, of the unrolled."""
    fmt, x = madax.LogFormat(8), jnp.array([0.3, 0.7, 1.1])
    f = lambda x, i: 2 * jnp.sin(madax.papers.fake_quantize(x, fmt))

    def products(how):
        loss = lambda x: jnp.sum(repeat(f, x, 3, how))
        forward = jax.jvp(jax.jacfwd(loss), (x,), (jnp.ones(3),))[1]
        if how == "fori":  # which has no reverse mode but for a known count
            return [forward] * 3
        hessian_vector = jax.jvp(jax.grad(loss), (x,), (jnp.ones(3),))[1]
        norm = jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2))(x)
        return [forward, hessian_vector, norm]

    products = jax.jit(products, static_argnums=0)
    got, want = products(how), products("unrolled")
    assert np.all(np.abs(want[2]) > 0.1)
    for g, w in zip(got[: 1 if how == "fori" else 3], want, strict=False):
        np.testing.assert_allclose(g, w, rtol=1e-5)


def test_a_gradient_penalty_of_a_scanned_stack_of_codes_is_right():
    """By finite differences in NumPy."""
    ws = madax.quantize_params(normal(3, 4, 4), madax.SymlogFormat(8), channel_axis=0)
    x, layer = normal(4, seed=1), lambda h, w: (h + jnp.tanh(h @ w), None)

    def penalty(ws, x):
        net = lambda x: jnp.sum(jax.lax.scan(layer, x, ws)[0])
        return jnp.sum(jax.grad(net)(x) ** 2)

    got = jax.jit(madax.grad(penalty))(ws, x)
    w, x = np.float64(ws.dequantize()), np.float64(x)

    def exact_penalty(w):
        rows = np.concatenate([x + 1e-5 * np.eye(4), x - 1e-5 * np.eye(4)])
        for one in w:
            rows = rows + np.tanh(rows @ one)
        above, below = rows.sum(axis=1).reshape(2, 4)
        return np.sum(np.square((above - below) / 2e-5))

    want = np.zeros_like(w)
    for i in np.ndindex(*w.shape):
        e = np.zeros_like(w)
        e[i] = 1e-4
        want[i] = (exact_penalty(w + e) - exact_penalty(w - e)) / 2e-4
    assert np.max(np.abs(want)) > 1
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ALIASES)
def test_second_derivatives_by_the_rate_match_unrolled_steps(name):
    grads = jax.tree.map(lambda *g: jnp.float32(jnp.stack(g)), *GRADS)
    w = jax.tree.map(jnp.float32, W)

    def trained_in(how, rate):
        tx = ALIASES[name](learning_rate=rate)

        def step(carry, i):
            params, state = carry
            g = jax.tree.map(lambda g: g[i], grads)
            updates, state = tx.update(g, state, params)
            return optax.apply_updates(params, updates), state

        params, _ = repeat(step, (w, tx.init(w)), 2, how)
        return jnp.sum(jnp.sin(params["w"])) + jnp.sum(jnp.sin(params["b"]))

    # A rate of bbit_madam is a whole number of codes, which has no derivative.
    got = jax.jit(partial(second_derivatives, partial(trained_in, "scan")))(0.03)
    unrolled = partial(trained_in, "unrolled")
    want = jax.jit(jax.jacfwd(jax.jacfwd(unrolled)))(0.03)
    np.testing.assert_allclose(got, [want] * len(got), rtol=1e-3)
    assert name == "bbit_madam" or np.all(np.abs(want) > 0.1)
