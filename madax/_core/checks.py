"""Checks of what users pass in: hyperparameters, parameter trees and their leaves."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

# The warning about leaves with outliers, without their names and shares.
CLIPPED = (
    "this share of the weights is beyond p_scale times the root mean square, and is "
    "clipped; leave p_scale at None for a bound that clips nothing, or make it larger."
)


def check_number(
    name: str, value: Any, ok: Callable[[Any], Any], condition: str, default: Any
) -> Any:
    """Raises unless ``value`` is a real scalar that satisfies ``ok``.

    Traced values (a rate under ``vmap``, ``optax.inject_hyperparams`` under
    ``jit``) have a type but no value yet: only their type and shape are checked.

    Returns:
      The value; a traced one becomes NaN where it does not satisfy ``ok``.
    """
    remedy = f"pass a number with {condition} (default: {default})"
    is_array = isinstance(value, (np.ndarray, np.generic, jax.Array))
    # Unsigned numbers are refused, as a rate may be negated. JAX has no long double.
    if isinstance(value, bool) or not (
        jnp.issubdtype(value.dtype, np.number)
        and not jnp.issubdtype(value.dtype, np.unsignedinteger)
        and value.dtype not in (np.longdouble, np.clongdouble)
        if is_array
        else isinstance(value, (int, float))
    ):
        raise TypeError(
            f"{name} must be a number, got {value!r} of type "
            f"{type(value).__name__}; {remedy}."
        )
    if np.shape(value) != ():
        raise ValueError(
            f"{name} must be a scalar, got an array of shape {np.shape(value)}; "
            "use jax.vmap to train with many values at once."
        )
    if jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
        raise TypeError(f"{name} must be real, got {value!r}; {remedy}.")
    if isinstance(value, jax.core.Tracer):
        return _or_nan(value, ok)
    if isinstance(value, int) and abs(value) >= 2**31:  # which JAX makes an int32
        raise ValueError(f"{name} must be a float if so large, got {value}; {remedy}.")
    if 3.4e38 < abs(float(value)) < math.inf:
        raise ValueError(f"{name} must fit a float32, got {value}; {remedy}.")
    if math.isnan(value) or not ok(float(value)):
        raise ValueError(f"{name} must satisfy {condition}, got {value}; {remedy}.")
    return value


def _or_nan(value: Any, ok: Callable[[Any], Any]) -> Any:
    """The value, or NaN where it is not ``ok``, so that the loss shows the mistake."""
    if isinstance(value, jax.Array):
        return jnp.where(ok(value), value, jnp.nan)
    return value if ok(value) else math.nan


# The functions below return what :func:`check_number` returns.


def check_learning_rate(learning_rate: Any, default: float) -> Any:
    """Raises unless ``learning_rate`` is a schedule or a finite number >= 0."""
    if callable(learning_rate):
        return lambda count: _or_nan(learning_rate(count), _is_non_negative)
    condition = "0 <= learning_rate < inf, or an optax schedule"
    return check_number(
        "learning_rate", learning_rate, _is_non_negative, condition, default
    )


def check_b1(b1: Any) -> Any:
    """Raises unless ``b1`` is None or a decay rate in [0, 1)."""
    return None if b1 is None else check_decay("b1", b1, None)


def check_decay(name: str, value: Any, default: float | None) -> Any:
    """Raises unless ``value`` is the decay rate of a moment, in [0, 1)."""
    dtype = getattr(value, "dtype", np.dtype(float))
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        raise TypeError(
            f"{name} has dtype {dtype}, in which a decay rate near 1 becomes 1; pass a "
            "float, and hyperparam_dtype=jnp.float32 to optax.inject_hyperparams, "
            "which otherwise takes the dtype of the parameters."
        )
    rule = f"0 <= {name} < 1" + (", or None" if default is None else "")
    return check_number(name, value, lambda x: (x >= 0) & (x < 1), rule, default)


def check_non_negative(name: str, value: Any, default: float) -> Any:
    """Raises unless ``value`` is a finite number that is not negative."""
    return check_number(name, value, _is_non_negative, f"0 <= {name} < inf", default)


def _is_non_negative(x: Any) -> Any:
    return (x >= 0) & (x < math.inf)


def check_positive(
    name: str, value: Any, default: float | None, *, finite: bool = False
) -> Any:
    """Raises unless ``value`` is positive; ``inf`` stands for no bound at all.

    A grid must be ``finite``: it has a largest value.
    """
    if finite:
        valid, rule = lambda x: (x > 0) & (x < math.inf), f"0 < {name} < inf"
    else:
        valid, rule = lambda x: x > 0, f"{name} > 0"
    return check_number(name, value, valid, rule, default)


def leaf_name(tree_name: str, path: str) -> str:
    """How messages call a leaf: ``params['Dense_0/kernel']``, or ``params``."""
    return f"{tree_name}[{path!r}]" if path else tree_name


def warn_of_leaves(leaves: Sequence[str], amiss: str, *, stacklevel: int) -> None:
    """Warns, once, of leaves with something amiss, if there are any.

    Args:
      leaves: what they are called.
      amiss: what is amiss, and what to do.
      stacklevel: how many calls above this one the user's is.
    """
    if leaves:
        text = f"{listed(leaves)}: {amiss}"
        warnings.warn(text, UserWarning, stacklevel=stacklevel + 1)


def shares(leaves: Iterable[tuple[str, Any]], least: float = 0.0) -> list[str]:
    """Names of leaves with their shares in per cent, if above the least."""
    known = [(name, float(share)) for name, share in leaves]
    return [f"{name} ({100 * x:.3g} %)" for name, x in known if x > least]


def listed(items: Iterable[str], most: int = 8) -> str:
    """The first items, and how many more there are."""
    items = list(items)
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return ", ".join([*items[:most], *more])


def check_float_leaf(tree_name: str, path: str, leaf: Any) -> None:
    """Raises unless ``leaf`` is a real floating-point array."""
    where = leaf_name(tree_name, path)
    if not isinstance(
        leaf, (jax.Array, np.ndarray, np.generic, float, jax.ShapeDtypeStruct)
    ):
        raise TypeError(
            f"{where} must be a floating-point array, got {leaf!r} of type "
            f"{type(leaf).__name__}; train only the arrays, with optax.masked or "
            "optax.partition."
        )
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or jnp.issubdtype(dtype, np.number):  # not an array of strings
        dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{where} is complex ({dtype}): a multiplicative update needs the sign "
            "of a real weight; split it into real and imaginary leaves (see "
            "optax.contrib.split_real_and_imaginary)."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{where} has dtype {dtype}, but only floating-point leaves can be "
            "trained; leave it out with optax.masked or optax.partition."
        )


def check_format_field(
    name: str, value: Any, lowest: float, highest: float, unit: str
) -> None:
    """Raises unless a static number of a format is a float in its range."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(
            f"{name} must be a number known before tracing, got {value!r} of type "
            f"{type(value).__name__}; pass a float ({unit}), and name it in the "
            "static_args of optax.inject_hyperparams."
        )
    # Messages print bounds with six digits, and a bound as printed is accepted.
    if not lowest * (1 - 1e-5) <= value <= highest * (1 + 1e-5):
        raise ValueError(
            f"{name} must be in [{lowest:g}, {highest:g}] ({unit}), got {value}."
        )


def check_bits(bits: Any, lowest: int, highest: int, beyond: str) -> None:
    """Raises unless ``bits`` is an int in its range; ``beyond`` says why that is so."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(
            f"bits must be an int, got {bits!r} of type {type(bits).__name__}; "
            f"formats are static, pass {lowest} to {highest}."
        )
    if not lowest <= bits <= highest:
        raise ValueError(
            f"bits must be in {lowest} to {highest}, got {bits}; {beyond}."
        )


def check_instance(name: str, value: Any, kind: type, *, or_none: bool = True) -> None:
    """Raises unless ``value`` is an instance of ``kind``, or None where allowed."""
    if not (isinstance(value, kind) or (or_none and value is None)):
        none = "None or " if or_none else ""
        raise TypeError(
            f"{name} must be {none}a madax.{kind.__name__}, got {value!r} of type "
            f"{type(value).__name__}."
        )


def check_transformation(name: str, value: Any) -> None:
    """Raises unless ``value`` is a gradient transformation of optax."""
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, got {value!r} of type "
            f"{type(value).__name__}; pass for example optax.adam(1e-3), and of "
            "optax.MultiSteps(...) its .gradient_transformation()."
        )


def check_seed(seed: Any) -> None:
    """Raises unless ``seed`` is an integer scalar."""
    if (
        isinstance(seed, (bool, np.bool_))
        or not isinstance(seed, (int, np.integer, np.ndarray, jax.Array))
        or np.shape(seed) != ()
        or not jnp.issubdtype(jnp.result_type(seed), jnp.integer)
    ):
        raise TypeError(
            f"seed must be an integer, got {seed!r} of type {type(seed).__name__}; "
            "pass an int, not a jax.random key (default: 0)."
        )


def check_state(state: Any, kind: type) -> None:
    """Raises unless a state was made by ``init`` of this transform and version."""
    if not isinstance(state, kind):
        raise TypeError(
            f"state must be a {kind.__name__}, got {type(state).__name__}; pass what "
            "init returned; restore a checkpoint into that, with the version of madax "
            "that wrote it."
        )
