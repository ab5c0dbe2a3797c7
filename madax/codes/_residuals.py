"""A backward pass that decodes weights again, where the forward pass kept their values.

The derivative of a product needs the weights, so JAX keeps what they decoded to until
then: four bytes for each weight, of all layers at once. The codes are there anyway.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.extend import core

from madax._core.names import Tree
from madax._core.shards import barrier
from madax.codes._array import QuantizedArray
from madax.codes._probes import noting_decodes, primal


def value_and_gradient(
    loss: Callable[[list], Tree], probes: list, has_aux: bool
) -> tuple[Tree, list]:
    """``jax.value_and_grad(loss, has_aux=has_aux)(probes)``, but for what is kept."""
    # These traces raise the errors of JAX for arguments and results.
    jax.eval_shape(jax.grad(lambda probes: 0.0), probes)
    with noting_decodes() as decodes:
        value, pull, *aux = jax.vjp(loss, probes, has_aux=has_aux)
    jax.eval_shape(jax.grad(lambda value: value), value)
    kept, treedef = jax.tree.flatten(pull)
    again: dict[int, QuantizedArray] = {
        i: w.like(w.codes, w.scale)
        for i, x in enumerate(kept)
        for value, w in decodes
        if primal(value) is x
    }
    one = jnp.ones_like(value)
    # Outside of jit everything is computed at once, so nothing would be saved.
    if not again or not isinstance(value, jax.core.Tracer):
        (grads,) = pull(one)
    else:

        def back(ct, *decoded):
            new = dict(zip(again, decoded, strict=True))
            whole = [new.get(i, x) for i, x in enumerate(kept)]
            return treedef.unflatten(whole)(ct)[0]

        arrays = [kept[i] for i in again]
        closed, shape = jax.make_jaxpr(back, return_shape=True)(one, *arrays)
        # The value, and not a constant, is what decoding waits for at least.
        _, one = barrier((value, one))
        grads = jax.tree.unflatten(
            jax.tree.structure(shape), _evaluated(closed, one, list(again.values()))
        )
    return (value, *aux) if has_aux else value, grads


def _evaluated(
    closed: core.ClosedJaxpr, ct: jax.Array, weights: Sequence[QuantizedArray]
) -> list[jax.Array]:
    """The results of a jaxpr of ``ct`` and of decoded weights.

    A weight is decoded for each operation that takes it, and not before the other
    operands are there: else XLA may decode all weights first.
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
