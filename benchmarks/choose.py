"""Which optimizer to take? Settings are judged on the workload that did not choose."""

from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import optax
import tyro
from optax import contrib

import madax
from benchmarks.optimizers import FORMATS, OPTIMIZERS, UNTUNED, Optimizer, cosine
from benchmarks.profiles import TASKS, Options
from benchmarks.sweep import Sweep, run_all

EIGHT = madax.MomentFormat(8)


class Row(NamedTuple):
    """An optimizer, and the settings to choose from.

    Attributes:
      make: schedule to the transformation.
      rates: half a decade apart, the same number for all.
      bytes: kept a parameter, in weights and state.
      codes: whether matrices are stored in 8 bits.
    """

    make: Callable[[optax.Schedule], optax.GradientTransformation]
    rates: Sequence[float]
    bytes: int
    codes: bool = False

    @property
    def optimizer(self) -> Optimizer:
        """The row as the training loop takes it."""
        if not self.codes:
            return Optimizer(self.make, self.rates[2])
        return Optimizer(self.make, self.rates[2], _quantize)


def _quantize(params: optax.Params) -> optax.Params:
    return madax.quantize_params(params, FORMATS["symlog 8"])


def _adam8(rate: optax.Schedule) -> optax.GradientTransformation:
    """Adam with its state in 8 bits, of small leaves too: they are all there is."""
    state = madax.with_quantized_state(
        optax.adam(rate), EIGHT, where=lambda path, leaf: leaf.ndim > 0
    )
    return madax.with_quantized_params(state)


ADAM = (0.0003, 0.001, 0.003, 0.01, 0.03)
MADAM = (0.003, 0.01, 0.03, 0.1, 0.3)
ROWS = {
    "sgd momentum": Row(OPTIMIZERS["sgd momentum"].make, (0.01, 0.03, 0.1, 0.3, 1), 8),
    "adam": Row(optax.adam, ADAM, 12),
    "lion": Row(optax.lion, (3e-5, 0.0001, 0.0003, 0.001, 0.003), 8),
    "muon": Row(UNTUNED["muon"].make, (0.006, 0.02, 0.06, 0.2, 0.6), 8),
    "prodigy": Row(contrib.prodigy, (0.1, 0.3, 1, 3, 10), 20),
    "madam": Row(madax.madam, MADAM, 8),
    "madam, floor": Row(lambda rate: madax.madam(rate, floor=1.0), MADAM, 8),
    "madam, floor, b1": Row(
        lambda rate: madax.madam(rate, floor=1.0, b1=0.9), MADAM, 12
    ),
    "muon_madam, floor": Row(lambda rate: madax.muon_madam(rate, floor=1.0), MADAM, 8),
    "adam, 8 bits": Row(_adam8, ADAM, 3, codes=True),
    "madam, 8 bits": Row(
        lambda rate: madax.madam(rate, moment_format=EIGHT), MADAM, 2, codes=True
    ),
    "madam, b1, 8 bits": Row(
        lambda rate: madax.madam(rate, b1=0.9, moment_format=EIGHT),
        MADAM,
        3,
        codes=True,
    ),
    "muon_madam, 8 bits": Row(
        lambda rate: madax.muon_madam(rate, moment_format=EIGHT), MADAM, 2, codes=True
    ),
}


def choose(options: Annotated[Options, tyro.conf.arg(name="")]) -> None:
    """Choose each optimizer's rate on all workloads but one, and judge it on that one.

    Five rates each, half a decade apart, decayed by a cosine to zero, on every
    workload of the profile, with the same seeds; in float32, and with weights and
    state in 8 bits.
    """
    sweeps = [
        Sweep(name, row.optimizer, cosine(row.rates)) for name, row in ROWS.items()
    ]
    tasks = options.tasks(list(TASKS[options.profile]))
    run_all(options.folder / "choose.jsonl", options, tasks, sweeps)
