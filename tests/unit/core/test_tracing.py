"""What the reader of jaxprs finds: which outputs depend on which inputs, and how."""

import jax
import jax.numpy as jnp
import pytest

from madax._core.tracing import dependences, depends_on

X = jnp.zeros(3)


def added(a, b):
    return jnp.cumsum(a + b)


def chosen(a, b):
    return jax.lax.cond(b[0] > 0, jnp.sin, lambda x: 2 * x, a)


def scanned(a, b):
    def one(carry, x):
        return carry + x, carry

    return jax.lax.scan(one, jnp.sum(b), a)


def ends_by(a, b):
    return jax.lax.while_loop(lambda x: x[0] < b[0], lambda x: x + 1, a)


def nested(a, b):
    return jax.jit(jax.checkpoint(lambda a, b: (jnp.sin(a), b)))(a, b)


@jax.custom_jvp
def twice(x):
    return 2 * x


twice.defjvp(lambda primals, tangents: (2 * primals[0], 2 * tangents[0]))


# For each output, the inputs it depends on, and whether element by element.
CASES = {
    "elements": (lambda a, b: a * jnp.exp(b), [{0: True, 1: True}]),
    "a sum": (added, [{0: False, 1: False}]),
    "broadcast": (lambda a, b: a + b[:1], [{0: True, 1: False}]),
    "cond": (chosen, [{0: True, 1: False}]),
    "scan": (scanned, [{0: False, 1: False}, {0: False, 1: False}]),
    "while": (ends_by, [{0: False, 1: False}]),
    "nested": (nested, [{0: True}, {1: True}]),
    "custom": (lambda a, b: twice(b), [{1: True}]),
    "barrier": (
        lambda a, b: jax.lax.optimization_barrier((b, a)),
        [{1: True}, {0: True}],
    ),
    "nothing": (lambda a, b: jnp.zeros_like(a), [{}]),
}


@pytest.mark.parametrize(("fn", "expected"), CASES.values(), ids=CASES)
def test_dependences_are_found(fn, expected):
    assert dependences(fn, X, X) == expected
    assert depends_on(fn, X, X) == [0 in found for found in expected]


def test_a_carry_that_a_loop_leaves_alone_depends_on_itself_only():
    def fn(a, b):
        return jax.lax.fori_loop(0, 3, lambda i, x: (x[0] + 1, x[1] * x[0]), (a, b))

    assert [set(x) for x in dependences(fn, X, X)] == [{0}, {0, 1}]
    assert depends_on(lambda _, b: fn(b, b), (), X) == [False] * 2
