"""Images and a small vision Transformer."""

from pathlib import Path

import jax
from flax import nnx

from benchmarks.data import images
from benchmarks.workloads import Workload
from benchmarks.workloads.attention import Block
from benchmarks.workloads.images import classification


class ViT(nnx.Module):
    """Patches as tokens, Transformer blocks, and the mean of the tokens."""

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        rngs: nnx.Rngs,
        *,
        patch: int,
        width: int,
        layers: int,
        heads: int,
    ):
        self.patch = patch
        self.embed = nnx.Linear(patch**2 * shape[-1], width, rngs=rngs)
        places = (shape[0] // patch) ** 2, width
        self.places_embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), places))
        self.blocks = nnx.Sequential(
            *(Block(width, rngs, heads=heads, causal=False) for _ in range(layers))
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the logits of images."""
        n, size, _, channels = images.shape
        side = size // self.patch
        x = images.reshape(n, side, self.patch, side, self.patch, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, side**2, -1)
        x = self.blocks(self.embed(x) + self.places_embed[...])
        return self.head(self.norm(x).mean(1))


def vit(
    folder: Path | None = None,
    *,
    source: str,
    patch: int,
    width: int,
    layers: int,
    heads: int,
    **options: int,
) -> Workload:
    """Returns the workload.

    Args:
      folder: where the data is, see ``benchmarks.data.images``.
      source: name of the data set.
      patch: pixels on a side of a patch.
      width: of a token.
      layers: number of blocks.
      heads: of the attention.
      **options: more options of ``benchmarks.data.images``.
    """
    data = images(source, folder, **options)

    def make(rngs: nnx.Rngs) -> ViT:
        size = {"patch": patch, "width": width, "layers": layers, "heads": heads}
        return ViT(data.shape, data.classes, rngs, **size)

    return classification("vit", make, data)
