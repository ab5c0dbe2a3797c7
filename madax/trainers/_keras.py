"""Keras: codes in a model's variables, and an optimizer for ``compile``."""

from typing import Any

import optax

from madax._core.checks import check_transformation, type_error
from madax.formats._base import Format
from madax.trainers._shared import coder, imported


def keras(
    model: Any, tx: optax.GradientTransformation, format: Format, **options: Any
) -> Any:
    """Makes codes of a Keras model's weights, and an optimizer that trains them.

    The trainable variables of ``model`` hold codes afterwards, and refuse floats that
    are not values of their codes. The optimizer has the state of ``tx`` in variables of
    its own, so ``keras.callbacks.OrbaxCheckpoint`` saves both; files of HDF5 hold the
    values of codes. To ``tx`` and to ``where`` parameters are a dict by the path of a
    variable, so :func:`madax.muon` reads their names.

    The learning rate is the one of ``tx``, and reads as infinity. Callbacks that set
    it are errors. Call this function again after layers were frozen, unfrozen or added;
    codes stay as they are.

    Args:
      model: a ``keras.Model`` on the JAX backend, with its variables built.
      tx: an optimizer of lifted codes, ``madax.hijax.optimizer(...)``.
      format: the number format of the codes.
      options: other arguments of :func:`madax.quantize_params`, such as
        ``channel_axis=-1``.

    Returns:
      A ``keras.optimizers.Optimizer`` for ``model.compile``.

    Raises:
      ImportError: if Keras is not installed, or JAX is older than 0.10.2.
      TypeError: if ``model`` is no model of Keras, ``tx`` no optimizer, ``format`` no
        format, or an option none of ``quantize_params``.
      ValueError: if Keras has another backend or a distribution, or the model has no
        variables yet, or constraints of them.

    Example:
      .. code-block:: python

          tx = madax.hijax.optimizer(madax.muon(0.02))
          optimizer = madax.trainers.keras(model, tx, madax.SymlogFormat(bits=8))
          model.compile(optimizer, loss)
          model.fit(x, y)
    """
    package: Any = imported("keras", "keras")
    if not isinstance(model, package.Model):
        raise type_error("model", "a keras.Model", model, "pass one")
    check_transformation("tx", tx)
    made = coder(format, options)
    backend = package.backend.backend()
    if backend != "jax":
        raise ValueError(
            f"Keras has the backend {backend!r}, but codes need JAX; use "
            "KERAS_BACKEND=jax in the environment before Keras is imported."
        )
    variables = model.trainable_variables
    if not variables:
        raise ValueError(
            "model has no trainable variables yet; call model.build(input_shape) first."
        )
    for variable in variables:
        if variable.constraint is not None:
            raise ValueError(
                f"the variable {variable.path!r} has the constraint "
                f"{variable.constraint!r}, which would make floats of codes; leave "
                "constraints out of the model."
            )
    if package.distribution.distribution() is not None:
        raise ValueError(
            "keras.distribution has a distribution, by which Keras gives its step "
            "shardings of the weights, which codes do not have; train on one device, "
            "after keras.distribution.set_distribution(None)."
        )
    # This module has a subclass of Keras.
    from madax.trainers._keras_optimizer import Optax, named

    codes = made(named(variables, [v.value for v in variables]))
    # This one needs hijax, which a JAX that made codes has.
    from madax.trainers._keras_variables import hold

    for variable, value in zip(variables, codes.values(), strict=True):
        hold(variable, value)
    optimizer = Optax(tx)
    # Files of Keras restore the state of an optimizer only if it is there.
    optimizer.build(variables)
    return optimizer
