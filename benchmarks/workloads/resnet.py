"""Images and a residual network in the manner of ResNet-18.

As ResNet-18 for small images, but with group norm, which has no running averages.
"""

from pathlib import Path

import jax
from flax import nnx

from benchmarks.data import images
from benchmarks.workloads import Workload
from benchmarks.workloads.images import classification, conv_as_matmul


class Convolution(nnx.Module):
    """A convolution without bias, and group norm."""

    def __init__(self, channels: int, width: int, size: int, stride: int, rngs):
        self.conv = nnx.Conv(
            channels,
            width,
            (size, size),
            strides=stride,
            use_bias=False,
            conv_general_dilated=conv_as_matmul,
            rngs=rngs,
        )
        self.norm = nnx.GroupNorm(width, num_groups=None, group_size=4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the normalised channels of ``x``."""
        return self.norm(self.conv(x))


def _same(x: jax.Array) -> jax.Array:
    return x


class ResidualBlock(nnx.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int, rngs: nnx.Rngs):
        self.conv1 = Convolution(channels, width, 3, stride, rngs)
        self.conv2 = Convolution(width, width, 3, 1, rngs)
        same = channels == width and stride == 1
        way = _same if same else Convolution(channels, width, 1, stride, rngs)
        self.shortcut = nnx.Sequential(way)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the sum of both ways."""
        y = self.conv2(nnx.relu(self.conv1(x)))
        return nnx.relu(y + self.shortcut(x))


class ResNet(nnx.Module):
    """Stages of residual blocks, each half the size and twice the width of the last."""

    def __init__(
        self,
        channels: int,
        classes: int,
        rngs: nnx.Rngs,
        *,
        width: int,
        blocks: tuple[int, ...],
        stem: int,
    ):
        self.stem = Convolution(channels, width, 3, stem, rngs)
        residual, before = [], width
        for stage, repeats in enumerate(blocks):
            for i in range(repeats):
                stride = 2 if stage > 0 and i == 0 else 1
                after = width * 2**stage
                residual.append(ResidualBlock(before, after, stride, rngs))
                before = after
        self.blocks = nnx.Sequential(*residual)
        self.head = nnx.Linear(before, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the logits of images."""
        x = self.blocks(nnx.relu(self.stem(images)))
        return self.head(x.mean((1, 2)))


def resnet(
    folder: Path | None = None,
    *,
    source: str,
    width: int = 64,
    blocks: tuple[int, ...] = (2, 2, 2, 2),
    stem: int = 1,
    **options: int,
) -> Workload:
    """Returns the workload; by default a ResNet-18.

    Args:
      folder: where the data is, see ``benchmarks.data.images``.
      source: name of the data set.
      width: channels of the first stage.
      blocks: residual blocks in each stage.
      stem: stride of the first convolution.
      **options: more options of ``benchmarks.data.images``.
    """
    data = images(source, folder, **options)

    def make(rngs: nnx.Rngs) -> ResNet:
        channels = data.shape[-1]
        return ResNet(
            channels, data.classes, rngs, width=width, blocks=blocks, stem=stem
        )

    return classification("resnet", make, data)
