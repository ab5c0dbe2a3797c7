"""Models of Equimo, which are written in Equinox."""

import jax

from zoo.loops import by_equinox
from zoo.other import Other, images

SOURCE, PACKAGES = "Equimo", ("equimo", "equinox")


def _output(model):
    one = lambda x: model(x, key=jax.random.key(0), inference=True)
    return jax.vmap(one)(images(16).transpose(0, 3, 1, 2))


def _vit():
    from equimo.vision.models import VisionTransformer

    model = VisionTransformer(
        img_size=16,
        in_channels=3,
        dim=32,
        patch_size=4,
        num_heads=4,
        depths=[2],
        mlp_ratio=1.5,
        num_classes=10,
        key=jax.random.key(0),
    )
    why = "split_layers is for Flax; write the stack by hand"
    return Other(model, _output, why, by_equinox, decode=True)


MODELS = {"ViT": _vit}
