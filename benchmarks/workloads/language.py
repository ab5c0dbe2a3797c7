"""Shared code of the language models: windows of text, and the next token's loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.data.text import Text
from benchmarks.workloads import Workload, nats_per


def windows(tokens: Any, starts: Any, size: int) -> Any:
    """Returns the parts of a text that begin there, of shape (windows, size)."""
    return tokens[starts[:, None] + np.arange(size)]


def next_token_loss(
    apply: Callable[..., jax.Array], params: optax.Params, batch: jax.Array
) -> jax.Array:
    """Returns the mean loss of a network of tokens (batch, context) to logits."""
    logits = apply(params, batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def language(
    name: str,
    init: Callable[[jax.Array], optax.Params],
    loss: Callable[[optax.Params, jax.Array], jax.Array],
    data: Text,
    *,
    context: int,
    held_out: int,
) -> Workload:
    """Returns the workload of predicting the next token of a text.

    Args:
      name: as written in the records.
      init: random key to parameters, compiled.
      loss: parameters and windows of shape (batch, context + 1), int32, to the mean
        loss of their next tokens.
      data: the text.
      context: tokens that the network sees.
      held_out: windows of the held-out text to score on, spread evenly over it.
    """
    starts = np.linspace(0, len(data.test) - context - 1, held_out).astype(int)
    test = jnp.asarray(windows(data.test, starts, context + 1))
    measure = nats_per(data.token)

    def batch(train: jax.Array, indices: jax.Array, key: jax.Array) -> jax.Array:
        del key
        return windows(train, indices, context + 1).astype(jnp.int32)

    def metric(params: optax.Params, test: jax.Array) -> dict[str, jax.Array]:
        losses = jax.lax.map(
            lambda x: loss(params, x[None].astype(jnp.int32)), test, batch_size=64
        )
        return {measure.name: losses.mean()}

    return Workload(
        name,
        jnp.asarray(data.train),
        test,
        init,
        loss,
        metric,
        measure,
        batch,
        examples=len(data.train) - context,
        settings={"data": data.name, "held_out": test.size, "context": context},
    )
