"""Functions with derivative rules that also hold inside differentiated loops.

When JAX differentiates a loop, it drops the rules of ``jax.custom_jvp`` functions in
its body. A second derivative would then differentiate operations on bits, and be zero.
A primitive keeps its rule.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_declared = Primitive("declared")
_Function = Callable[..., jax.Array]


def with_derivative(rule: _Function) -> Callable[[_Function], _Function]:
    """Decorates a function of floating arrays that returns an array.

    ``rule(tangents, ans, *args)`` is the tangent of its result ``ans``, given the
    tangents of all arguments. Higher orders differentiate the rule.
    """

    def decorate(function):
        # JAX traces the function once for each shape, and inlines the trace.
        function = jax.jit(function, inline=True)

        @functools.wraps(function)
        def declared(*args):
            return _declared.bind(*args, function=function, rule=rule)

        return declared

    return decorate


def _call(*args, function, rule):
    del rule
    return function(*args)


def _shape(*args, function, rule):
    del rule
    return jax.make_jaxpr(function)(*args).out_avals[0]


def _differentiate(primals, tangents, *, function, rule):
    ans = _declared.bind(*primals, function=function, rule=rule)
    return ans, rule(tuple(map(ad.instantiate_zeros, tangents)), ans, *primals)


def _map(args, axes, *, function, rule):
    function, rule = _mapped(function, axes), _mapped(rule, (axes, 0, *axes))
    return _declared.bind(*args, function=function, rule=rule), 0


# Cached, so that JAX finds the traces of a mapped function again.
_mapped = functools.cache(jax.vmap)


_declared.def_impl(_call)
_declared.def_abstract_eval(_shape)
ad.primitive_jvps[_declared] = _differentiate
batching.primitive_batchers[_declared] = _map
mlir.register_lowering(_declared, mlir.lower_fun(_call, multiple_results=False))
if jax.__version_info__ < (0, 7):  # whose shard_map needs rules of its own
    from jax.experimental import shard_map

    rules: Any = shard_map
    rules.register_standard_check(_declared)
    rules.register_standard_rewrite(_declared)
