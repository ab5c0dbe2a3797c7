"""Words of a text from those around: embeddings with rows that are rarely seen."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.data.text import words as by_words
from benchmarks.workloads import Workload, functional, nats_per
from benchmarks.workloads.language import windows

BESIDE = 2  # Words that are seen on each side of the one to tell.
RARE = 10  # How often a word that is rare occurs in the text to train on, at most.


class BagOfWords(nnx.Module):
    """The mean embedding of some words, a hidden layer, logits of the word amid."""

    def __init__(self, vocabulary: int, rngs: nnx.Rngs, *, width: int):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.hidden = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, around: jax.Array) -> jax.Array:
        """Returns logits (batch, vocabulary) for words of shape (batch, 2 BESIDE)."""
        return self.head(nnx.relu(self.hidden(self.embed(around).mean(1))))


def words(
    folder: Path | None = None,
    *,
    source: str = "pydoc",
    vocabulary: int,
    width: int,
    held_out: int,
) -> Workload:
    """Returns the workload: continuous bags of words (arXiv:1301.3781), full softmax.

    Args:
      folder: where the text is, see ``benchmarks.data.text``.
      source: name of the text.
      vocabulary: number of words, one of them for all others.
      width: of a word.
      held_out: words of the held-out text to score on, spread evenly over it.
    """
    data = by_words(source, folder, vocabulary=vocabulary)
    init, apply = functional(lambda rngs: BagOfWords(vocabulary, rngs, width=width))
    size = 2 * BESIDE + 1
    starts = np.linspace(0, len(data.test) - size, held_out).astype(int)
    test = jnp.asarray(windows(data.test, starts, size))
    rare = is_rare(data.train, vocabulary)[test[:, BESIDE]]
    measure = nats_per(data.token)

    def losses(params: optax.Params, batch: jax.Array) -> jax.Array:
        around = jnp.delete(batch, BESIDE, axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(
            apply(params, around), batch[:, BESIDE]
        )

    def metric(params: optax.Params, test: tuple[jax.Array, jax.Array]):
        words, rare = test
        each = jax.lax.map(lambda x: losses(params, x[None])[0], words, batch_size=100)
        return {
            measure.name: each.mean(),
            f"{measure.name}, rare ones": jnp.mean(each, where=rare),
        }

    return Workload(
        "words",
        jnp.asarray(data.train),
        (test, jnp.asarray(rare)),
        init,
        lambda params, batch: losses(params, batch).mean(),
        metric,
        measure,
        lambda train, indices, key: windows(train, indices, size),
        examples=len(data.train) - size + 1,
        settings={"data": data.name, "held_out": held_out, "rare": int(rare.sum())},
    )


def is_rare(train: np.ndarray, vocabulary: int) -> np.ndarray:
    """Returns for each word of the vocabulary whether it is rare in the text."""
    return np.bincount(train, minlength=vocabulary) <= RARE
