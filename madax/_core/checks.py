"""Checks of user input: hyperparameters, parameter trees and their leaves."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

# A Python number or a scalar array, traced or not.
Number: TypeAlias = Any

# The warning about clipped weights; the names and fractions of leaves precede it.
CLIPPED = (
    "this fraction of the weights is beyond p_scale times the root mean square, and is "
    "clipped; leave p_scale at None for a bound that clips nothing, or make it larger."
)

# What rounding may take off a hyperparameter.
_ROUNDING = 1e-6


def type_error(name: str, wanted: str, value: object, remedy: str) -> TypeError:
    """Returns the error for an argument of the wrong type."""
    kind = type(value).__name__
    return TypeError(
        f"{name} must be {wanted}, got {value!r} of type {kind}; {remedy}."
    )


def check_copy(copy: bool | None) -> None:
    """Raises if NumPy asks for decoded values without a copy."""
    if copy is False:
        raise ValueError("decoded values are a new array; leave copy=False out.")


def is_float(x: ArrayLike | jax.ShapeDtypeStruct) -> bool:
    """Whether a leaf, or the shape of one, is real and floating."""
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def check_number(
    name: str,
    value: Number,
    ok: Callable[[Number], Number],
    condition: str,
    default: float | None,
) -> Number:
    """Raises unless ``value`` is a real scalar that satisfies ``ok``.

    Traced values (a rate under ``vmap``, ``optax.inject_hyperparams`` under ``jit``)
    have no value yet, so only their type and shape are checked. This function and the
    next ones return the value, but NaN for a traced value that does not satisfy ``ok``,
    so that the loss shows the mistake.
    """
    remedy = f"pass a number with {condition} (default: {default})"
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        # Unsigned numbers are refused, because a rate may be negated. JAX has no long
        # double.
        known = jnp.issubdtype(value.dtype, np.number) and not (
            jnp.issubdtype(value.dtype, np.unsignedinteger)
            or value.dtype in (np.longdouble, np.clongdouble)
        )
    else:
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known:
        raise type_error(name, "a number", value, remedy)
    if np.shape(value) != ():
        raise ValueError(
            f"{name} must be a scalar, got an array of shape {np.shape(value)}; "
            "use jax.vmap to train with many values at once."
        )
    if jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
        raise TypeError(f"{name} must be real, got {value!r}; {remedy}.")
    if isinstance(value, jax.core.Tracer):
        return _or_nan(value, ok)
    if isinstance(value, int) and abs(value) >= 2**31:  # JAX makes an int32 of it
        raise ValueError(
            f"{name} must be below 2**31 if it is an int, got {value}; {remedy}."
        )
    if 3.4e38 < abs(float(value)) < math.inf:
        raise ValueError(f"{name} must fit a float32, got {value}; {remedy}.")
    if math.isnan(value) or not ok(float(value)):
        raise ValueError(f"{name} must satisfy {condition}, got {value}; {remedy}.")
    return value


def _or_nan(value: Number, ok: Callable[[Number], Number]) -> Number:
    if isinstance(value, jax.Array):
        # XLA divides by the length of a linear schedule by its reciprocal, after which
        # a schedule that ends at 0 may end just below.
        value = jnp.where((value < 0) & (value > -_ROUNDING), 0, value)
        return jnp.where(ok(value), value, jnp.nan)
    return value if ok(value) else math.nan


def check_learning_rate(
    learning_rate: optax.ScalarOrSchedule,
    default: float | None,
    name: str = "learning_rate",
) -> optax.ScalarOrSchedule:
    """Raises unless ``learning_rate`` is a schedule or a finite number >= 0."""
    if callable(learning_rate):

        def checked(count):
            rate = learning_rate(count)
            if not isinstance(rate, (jax.Array, np.ndarray, np.generic, int, float)):
                raise type_error(f"{name}(count)", "a number", rate, "return the rate")
            if np.shape(rate) != ():
                raise ValueError(
                    f"{name}(count) must be a scalar, got an array of shape "
                    f"{np.shape(rate)}; return the rate of one step."
                )
            return _or_nan(rate, _is_non_negative)

        return checked
    condition = f"0 <= {name} < inf, or an optax schedule"
    return check_number(name, learning_rate, _is_non_negative, condition, default)


def check_decay(
    name: str, value: Number, default: float | None, *, or_none: bool = False
) -> Number:
    """Raises unless ``value`` is a decay rate in [0, 1), or None where that is fine."""
    or_none = or_none or default is None
    if or_none and value is None:
        return None
    dtype = getattr(value, "dtype", np.dtype(float))
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        raise TypeError(
            f"{name} has dtype {dtype}, in which a decay rate near 1 becomes 1; pass a "
            "float, and hyperparam_dtype=jnp.float32 to optax.inject_hyperparams, "
            "which otherwise takes the dtype of the parameters."
        )
    rule = f"0 <= {name} < 1" + (", or None" if or_none else "")
    return check_number(name, value, lambda x: (x >= 0) & (x < 1), rule, default)


def check_non_negative(name: str, value: Number, default: float) -> Number:
    """Raises unless ``value`` is a finite number that is not negative."""
    return check_number(name, value, _is_non_negative, f"0 <= {name} < inf", default)


def _is_non_negative(x: Number) -> Number:
    return (x >= 0) & (x < math.inf)


def check_positive(
    name: str, value: Number, default: float | None, *, finite: bool = False
) -> Number:
    """Raises unless ``value`` is positive, and ``finite`` if so."""
    rule = f"0 < {name} < inf" if finite else f"{name} > 0"
    return check_number(
        name, value, lambda x: (x > 0) & ((x < math.inf) | (not finite)), rule, default
    )


def check_choice(name: str, value: object, choices: Sequence[str], why: str) -> None:
    """Raises unless ``value`` is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}; {why}")


def check_function(name: str, value: object, remedy: str) -> None:
    """Raises unless ``value`` can be called."""
    if not callable(value):
        raise type_error(name, "a function", value, remedy)


def check_where(where: object, name: str = "where") -> None:
    """Raises unless ``where``, which chooses leaves, is None or a function."""
    if not (where is None or callable(where)):
        wanted = "a function of (path, leaf)"
        raise type_error(name, wanted, where, "pass one, or None for the default")


def check_float_dtype(dtype: DTypeLike | None) -> None:
    """Raises unless ``dtype`` is None or floating."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"dtype must be a floating dtype or None, got {dtype!r}; pass jnp.float32 "
            "or jnp.bfloat16."
        )


def leaf_name(tree_name: str, path: str) -> str:
    """Returns the name for messages: ``params['Dense_0/kernel']`` or ``params``."""
    return f"{tree_name}[{path!r}]" if path else tree_name


def warn_of_leaves(leaves: Sequence[str], amiss: str, *, stacklevel: int) -> None:
    """Warns of the named leaves, if any, from ``stacklevel`` calls above this one."""
    if leaves:
        warnings.warn(f"{listed(leaves)}: {amiss}", stacklevel=stacklevel + 1)


def in_percent(leaves: Iterable[tuple[str, Number]], above: float = 0.0) -> list[str]:
    """Returns names of leaves with fractions in per cent, where these are ``above``."""
    known = [(name, float(fraction)) for name, fraction in leaves]
    return [f"{name} ({100 * x:.3g} %)" for name, x in known if x > above]


def listed(items: Iterable[str], limit: int = 8) -> str:
    """Returns the first items as text, and the number of the others."""
    items = list(items)
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return ", ".join([*items[:limit], *more])


def is_lifted(leaf: object) -> bool:
    """Whether a leaf is codes of ``madax.hijax``, which is not imported for it."""
    return hasattr(getattr(leaf, "aval", None), "number_format")


def check_float_leaf(tree_name: str, path: str, leaf: object) -> None:
    """Raises unless ``leaf`` is a real floating-point array."""
    where = leaf_name(tree_name, path)
    if is_lifted(leaf):
        raise TypeError(
            f"{where} holds codes of madax.hijax, which are floats to JAX only; wrap "
            "an optimizer in madax.hijax.optimizer, and pass madax.hijax.lower(tree) "
            "to other functions of madax."
        )
    if not isinstance(
        leaf, (jax.Array, np.ndarray, np.generic, float, jax.ShapeDtypeStruct)
    ):
        remedy = "train only the arrays, with optax.masked or optax.partition"
        raise type_error(where, "a floating-point array", leaf, remedy)
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or jnp.issubdtype(dtype, np.number):  # refuses arrays of strings
        dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{where} is complex ({dtype}), but only real weights can be trained; "
            "split it into real and imaginary leaves (see "
            "optax.contrib.split_real_and_imaginary)."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{where} has dtype {dtype}, but only floating-point leaves can be "
            "trained; leave it out with optax.masked or optax.partition."
        )


def check_format_field(
    name: str, value: object, min: float, max: float, unit: str
) -> None:
    """Raises unless a static number of a format is a float in its range."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        remedy = (
            f"pass a float ({unit}), and name it in the static_args of "
            "optax.inject_hyperparams"
        )
        raise type_error(name, "a number known before tracing", value, remedy)
    # Messages print bounds with six digits, and a bound as printed is accepted.
    if not min * (1 - 1e-5) <= value <= max * (1 + 1e-5):
        raise ValueError(f"{name} must be in [{min:g}, {max:g}] ({unit}), got {value}.")


def check_bits(bits: object, min: int, max: int, reason: str) -> None:
    """Raises unless ``bits`` is an int in its range, for the ``reason`` given."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        remedy = f"formats are static, pass {min} to {max}"
        raise type_error("bits", "an int", bits, remedy)
    if not min <= bits <= max:
        raise ValueError(f"bits must be in {min} to {max}, got {bits}; {reason}.")


def check_format(name: str, value: object, kind: type, *, or_none: bool = True) -> None:
    """Raises unless ``value`` is a format of that kind, or None where allowed."""
    if not (isinstance(value, kind) or (or_none and value is None)):
        wanted = f"{'None or ' if or_none else ''}a {kind.__name__}"
        example = "LogFormat" if kind.__name__ == "Format" else kind.__name__
        raise type_error(name, wanted, value, f"pass for example madax.{example}(8)")


def check_transformation(name: str, value: object) -> None:
    """Raises unless ``value`` is a gradient transformation of optax."""
    if not isinstance(value, optax.GradientTransformation):
        remedy = (
            "pass for example optax.adam(1e-3), and of optax.MultiSteps(...) its "
            ".gradient_transformation()"
        )
        raise type_error(name, "an optax.GradientTransformation", value, remedy)


def check_seed(seed: object) -> None:
    """Raises unless ``seed`` is an integer scalar."""
    if (
        isinstance(seed, (bool, np.bool_))
        or not isinstance(seed, (int, np.integer, np.ndarray, jax.Array))
        or np.shape(seed) != ()
        or not jnp.issubdtype(jnp.result_type(seed), jnp.integer)
    ):
        remedy = "pass an int, not a jax.random key (default: 0)"
        raise type_error("seed", "an integer", seed, remedy)


def check_state(state: object, kind: type) -> None:
    """Raises unless ``state`` is of the type that ``init`` of a transform returns."""
    if not isinstance(state, kind):
        raise TypeError(
            f"state must be a {kind.__name__}, got {type(state).__name__}; pass what "
            "init returned; restore a checkpoint into that, with the version of madax "
            "that wrote it."
        )
