"""The sizes of models that are compared at scale, and the order of their runs."""

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np

from benchmarks.accuracy.scale_contenders import (
    CONTENDERS,
    MAIN,
    OTHERS,
    Values,
    best_trial,
    next_trial,
)
from benchmarks.lib.records import Record
from benchmarks.models import decoder

PARTS = 50  # Of a run: what is drawn, timed and kept at once.
SEEDS = 3
Find = Callable[..., list[Record]]


@dataclasses.dataclass(frozen=True)
class Model:
    """A network in the shape of Llama, and how it is trained.

    Attributes:
      layers: of the network.
      width: features of a token.
      heads: of queries, and as many of keys and values.
      vocabulary: number of tokens.
      batch: sequences in a step.
      length: tokens in a sequence.
      tuned_on: the size at which its contenders are tuned, the next smaller one.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    length: int
    tuned_on: str

    def size(self, *, fused: bool) -> decoder.Size:
        """The network."""
        hidden = -(-8 * self.width // 3 // 64) * 64
        shape = self.layers, self.width, hidden, self.heads, self.heads
        return decoder.Size(self.vocabulary, *shape, fused=fused)

    @property
    def parameters(self) -> int:
        """How many there are without the tables of tokens."""
        size = self.size(fused=False)
        return decoder.count(size) - 2 * self.vocabulary * self.width

    def steps(self, tokens_per_parameter: float) -> int:
        """Returns the number of steps, which ``PARTS`` divides."""
        tokens = tokens_per_parameter * self.parameters
        return PARTS * max(1, round(tokens / (self.batch * self.length * PARTS)))


# Named by their parameters without tables.
MODELS = {
    "smoke": Model(2, 32, 1, 256, 4, 32, "smoke"),
    "0.1M": Model(2, 64, 2, 1024, 8, 256, "0.1M"),
    "0.3M": Model(3, 96, 3, 1024, 16, 256, "0.1M"),
    "1M": Model(5, 128, 4, 1024, 16, 256, "0.3M"),
    "3M": Model(7, 192, 6, 1024, 32, 256, "1M"),
    "10M": Model(8, 320, 5, 8192, 64, 512, "3M"),
    "30M": Model(9, 512, 8, 8192, 128, 512, "10M"),
    "124M": Model(13, 896, 14, 16384, 256, 1024, "30M"),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One run.

    Attributes:
      size: key of ``MODELS``.
      name: key of ``CONTENDERS``.
      values: of its rate and knobs.
      seed: of the first parameters and of the order of the data.
      tuned_on: the size whose best trial the values are from; None of a trial.
    """

    size: str
    name: str
    values: Values
    seed: int = 0
    tuned_on: str | None = None


def arms(
    find: Find,
    sizes: Sequence[str],
    rows: Sequence[str] = (),
    tuned_on: str = "",
    seeds: int = SEEDS,
) -> Iterator[Arm]:
    """Yields the runs that are missing, what matters most first.

    This is the order, of each size: all of ``MAIN`` are tuned, on the next smaller
    size; then each is trained from the first seed, then from the second and so on, so
    that there is a whole comparison at any time; then all of ``OTHERS`` are tuned, and
    trained from one seed.

    Args:
      find: returns the records that have some settings; a run is in them when the next
        one is asked for.
      sizes: keys of ``MODELS``, in order.
      rows: names of contenders; all by default.
      tuned_on: another size to tune on, for all.
      seeds: of each of ``MAIN``.
    """
    for size in sizes:
        small = tuned_on or MODELS[size].tuned_on
        for group, count in ((MAIN, seeds), (OTHERS, 1)):
            best = {}
            for name in (name for name in group if name in (rows or CONTENDERS)):
                best[name] = yield from _trials(find, small, name)
            for seed in range(count):
                for name, values in best.items():
                    arm = Arm(size, name, values, seed, small)
                    if not find(**dataclasses.asdict(arm)):
                        yield arm


def _trials(find: Find, size: str, name: str) -> Generator[Arm, None, dict[str, float]]:
    """Yields the trials of a contender that are missing; returns the best of all."""
    tried: dict[tuple, float] = {}
    while (values := next_trial(CONTENDERS[name], tried)) is not None:
        arm = Arm(size, name, values)
        if not find(**dataclasses.asdict(arm)):
            yield arm
        # The loss of a run that diverged is null in the records.
        loss = find(**dataclasses.asdict(arm))[0]["loss"]
        tried[tuple(values.items())] = np.inf if loss is None else loss
    return best_trial(tried)
