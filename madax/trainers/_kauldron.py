"""Kauldron: a trainer whose state holds codes from its init on."""

import dataclasses
from functools import cached_property, partial
from typing import Any

import jax

from madax import hijax
from madax._core.checks import type_error
from madax.formats._base import Format
from madax.trainers._shared import coder, imported


def kauldron(trainer: Any, format: Format, **options: Any) -> Any:
    """Lets a trainer of Kauldron train codes.

    Its train step makes codes of the parameters, after a pretrained checkpoint is
    loaded by its ``init_transform``, and before its optimizer is initialised. So a run
    that is resumed restores codes into codes. The classes of the trainer and of its
    train step stay, as bases of new ones. Specs of the state have the type of codes in
    place of a ``jax.ShapeDtypeStruct``, and no shardings.

    Codes stay on the devices on which ``sharding.params`` puts the floats.

    Args:
      trainer: a ``kd.train.Trainer``, whose optimizer is an optimizer of lifted codes:
        ``madax.hijax.optimizer(...)``, or ``optax.MultiSteps`` around it.
      format: the number format of the codes.
      options: other arguments of :func:`madax.quantize_params`, such as
        ``channel_axis=-1``.

    Returns:
      A copy of the trainer, which trains codes.

    Raises:
      ImportError: if Kauldron is not installed, or JAX is older than 0.10.2.
      TypeError: if ``trainer`` is no trainer of Kauldron, ``format`` no format, or an
        option none of ``quantize_params``.

    Example:
      .. code-block:: python

          trainer = kd.train.Trainer(
              optimizer=madax.hijax.optimizer(madax.muon(0.02)), ...
          )
          trainer = madax.trainers.kauldron(trainer, madax.SymlogFormat(bits=8))
          trainer.train()
    """
    kd: Any = imported("kauldron.kd", "kauldron")
    if not isinstance(trainer, kd.train.Trainer):
        raise type_error("trainer", "a kd.train.Trainer", trainer, "pass one")
    made = coder(format, options)
    data: Any = imported("kauldron.data.utils", "kauldron")
    where = trainer.sharding.params
    step, aux = type(trainer.trainstep), type(trainer.trainstep.aux)

    def coded(state):
        params = kd.sharding.with_sharding_constraint(state.params, where)
        return state.replace(params=made(params))

    def update_context(self, context):
        # Metrics of the parameters check that they are arrays.
        return aux.update_context(
            self, context.replace(params=hijax.decode(context.params))
        )

    def init(self, *args, skip_transforms=False, skip_optimizer=False, **kwargs):
        if not skip_transforms:  # _init_transform makes the codes.
            return step.init(self, *args, skip_optimizer=skip_optimizer, **kwargs)
        # A checkpoint is restored into this state.
        kwargs |= {"skip_transforms": True, "skip_optimizer": True}
        state = coded(step.init(self, *args, **kwargs))
        if skip_optimizer or self.optimizer is None:
            return state
        return self._init_optimizer(state)

    def _init_transform(self, state):
        return coded(step._init_transform(self, state))

    def state_specs(self):
        _ = self.train_ds.element_spec  # Data may need random keys that are not traced.
        return jax.eval_shape(partial(self.init_state, skip_transforms=True))

    def context_specs(self):
        spec = self.train_ds.element_spec
        batch = data.mock_batch_from_elem_spec(spec, self.sharding.batch)

        def context(batch):  # Specs of codes are no arguments, so it makes its state.
            state = self.init_state(skip_transforms=True)
            return self.trainstep._step(state, batch)[1]

        return jax.eval_shape(context, batch)

    return dataclasses.replace(
        _subclassed(
            trainer,
            state_specs=cached_property(state_specs),
            context_specs=cached_property(context_specs),
        ),
        trainstep=dataclasses.replace(
            _subclassed(trainer.trainstep, init=init, _init_transform=_init_transform),
            aux=_subclassed(trainer.trainstep.aux, update_context=update_context),
        ),
        # JAX takes no shardings of codes: steps keep them where they lie.
        sharding=dataclasses.replace(trainer.sharding, params=None),
    )


def _subclassed(thing: Any, **methods: Any) -> Any:
    """Returns a copy of a dataclass whose class has other methods or properties."""
    kind = type(thing)
    fields = [field.name for field in dataclasses.fields(thing) if field.init]
    new = type(kind.__name__, (kind,), methods)
    return new(**{name: getattr(thing, name) for name in fields})
