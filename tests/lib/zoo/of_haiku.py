"""Networks that Haiku comes with."""

import jax

from zoo.loops import by_madax
from zoo.other import Other, images

SOURCE, PACKAGES = "Haiku", ("dm-haiku",)


def _mobilenet():
    import haiku as hk

    net = lambda x: hk.nets.MobileNetV1(
        channels=(8, 12, 16), strides=(1, 2, 1), num_classes=10
    )(x, is_training=True)
    model = hk.transform_with_state(net)
    params, state = model.init(jax.random.key(0), images(16))
    output = lambda params: model.apply(params, state, None, images(16))[0]
    return Other(params, output, "blocks of several shapes", by_madax, decode=True)


MODELS = {"MobileNet": _mobilenet}
