"""Text and a decoder in the shape of Llama that predicts the next token."""

from functools import partial
from pathlib import Path

import jax

from benchmarks.data.text import text
from benchmarks.models import decoder
from benchmarks.workloads import Workload
from benchmarks.workloads.language import language


def llama(
    folder: Path | None = None,
    *,
    source: str = "pydoc",
    context: int,
    width: int,
    layers: int,
    heads: int,
    held_out: int,
) -> Workload:
    """Returns the workload.

    Args:
      folder: where the text is, see ``benchmarks.data.text``.
      source: name of the text.
      context: tokens that the network sees.
      width: of a token.
      layers: number of them, in one stack.
      heads: of queries, twice as many as of keys and values.
      held_out: windows of the held-out text to score on.
    """
    data = text(source, folder)
    hidden = 8 * width // 3 // 8 * 8
    size = decoder.Size(data.vocabulary, layers, width, hidden, heads, heads // 2)
    return language(
        "llama",
        jax.jit(partial(decoder.init, size)),
        partial(decoder.whole_loss, size),
        data,
        context=context,
        held_out=held_out,
    )
