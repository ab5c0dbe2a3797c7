"""A backward pass that decodes weights again instead of keeping their values.

The derivative of a product needs the weights, so JAX would keep the decoded weights of
all layers until the backward pass: four bytes per weight. The codes are kept anyway.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.extend import core

from madax._core.names import Tree
from madax._core.shards import barrier
from madax.codes._array import QuantizedArray
from madax.codes._probes import noting_decodes


def value_and_gradient(
    loss: Callable[[list], Tree], probes: list, has_aux: bool
) -> tuple[Tree, list]:
    """Like ``jax.value_and_grad(loss, has_aux=has_aux)(probes)``, in less memory."""
    # These traces raise JAX's errors about arguments and results.
    jax.eval_shape(jax.grad(lambda probes: 0.0), probes)
    with noting_decodes() as decodes:
        value, pull, *aux = jax.vjp(loss, probes, has_aux=has_aux)
    jax.eval_shape(jax.grad(lambda value: value), value)
    kept, treedef = jax.tree.flatten(pull)
    again: dict[int, QuantizedArray] = {
        i: codes
        for i, x in enumerate(kept)
        for decode in decodes
        if (codes := decode.codes_of(x)) is not None
    }
    one = jnp.ones_like(value)
    # Outside jit every operation runs at once, so this would save nothing.
    if not again or not isinstance(value, jax.core.Tracer):
        (grads,) = pull(one)
    else:

        def back(ct, *decoded):
            new = dict(zip(again, decoded, strict=True))
            whole = [new.get(i, x) for i, x in enumerate(kept)]
            return treedef.unflatten(whole)(ct)[0]

        arrays = [kept[i] for i in again]
        closed, shape = jax.make_jaxpr(back, return_shape=True)(one, *arrays)
        # Makes decoding wait at least for the value of the loss, and not for a
        # constant.
        _, one = barrier((value, one))
        grads = jax.tree.unflatten(
            jax.tree.structure(shape), _evaluated(closed, one, list(again.values()))
        )
    return (value, *aux) if has_aux else value, grads


def _evaluated(
    closed: core.ClosedJaxpr, ct: jax.Array, weights: Sequence[QuantizedArray]
) -> list[jax.Array]:
    """Evaluates a jaxpr of the cotangent ``ct`` and of decoded weights.

    A weight is decoded for each operation that uses it, after the other operands are
    computed. Otherwise XLA may decode all weights first.
    """
    jaxpr = closed.jaxpr
    codes = dict(zip(jaxpr.invars[1:], weights, strict=True))
    computed = {jaxpr.invars[0]: ct}
    known = dict(zip(jaxpr.constvars, closed.consts, strict=True))

    def value(x, after):
        if x in codes:
            codes_of_x, _ = barrier((codes[x], after))
            return codes_of_x.dequantize(x.aval.dtype)
        return computed[x] if x in computed else known[x]

    for eqn in jaxpr.eqns:
        names = list(
            dict.fromkeys(x for x in eqn.invars if not isinstance(x, core.Literal))
        )
        after = [computed[x] for x in names if x in computed] or [ct]
        one = jaxpr.replace(constvars=[], invars=names, outvars=eqn.outvars, eqns=[eqn])
        given = [value(x, after) for x in names]
        results = jax.core.eval_jaxpr(one, (), *given)
        computed |= zip(eqn.outvars, results, strict=True)
    return [
        x.val if isinstance(x, core.Literal) else value(x, [ct]) for x in jaxpr.outvars
    ]
