"""Images and a class-conditional GAN, both players trained by one optimizer."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.data import Batch, Images, images
from benchmarks.workloads import Measure, Workload, functional
from benchmarks.workloads.images import MLP, classification

LATENT = 16
FRECHET = Measure(
    "Fréchet distance (own classifier)", "lower", lambda distance: distance
)


class Player(nnx.Module):
    """An MLP of two hidden layers that is told the class."""

    def __init__(
        self, inputs: int, outputs: int, classes: int, width: int, rngs: nnx.Rngs
    ):
        self.classes = classes
        self.linear1 = nnx.Linear(inputs + classes, width, rngs=rngs)
        self.linear2 = nnx.Linear(width, width, rngs=rngs)
        self.head = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, x: jax.Array, labels: jax.Array) -> jax.Array:
        """Returns the outputs for inputs of shape (batch, inputs)."""
        x = jnp.concatenate([x, jax.nn.one_hot(labels, self.classes)], -1)
        x = nnx.leaky_relu(self.linear1(x), 0.2)
        x = nnx.leaky_relu(self.linear2(x), 0.2)
        return self.head(x)


def gan(
    folder: Path | None = None, *, source: str, width: int, **options: int
) -> Workload:
    """Returns the workload: hinge loss, both players at the same rate at once.

    The score is the Fréchet distance between Gaussians fitted to generated and to
    held-out images, in the features of a small classifier that is trained here, so it
    is no FID and compares only with itself.

    Args:
      folder: where the data is, see ``benchmarks.data.images``.
      source: name of the data set.
      width: of the hidden layers of both players.
      **options: more options of ``benchmarks.data.images``.
    """
    data = images(source, folder, **options)
    pixels = data.train[0][0].size
    init_generator, generate = functional(
        lambda rngs: Player(LATENT, pixels, data.classes, width, rngs)
    )
    init_critic, judge = functional(
        lambda rngs: Player(pixels, 1, data.classes, width, rngs)
    )

    def init(key: jax.Array) -> optax.Params:
        generator, critic = jax.random.split(key)
        return {"critic": init_critic(critic), "generator": init_generator(generator)}

    def batch(train: Batch, indices: jax.Array, key: jax.Array) -> Any:
        real, labels = (x[indices] for x in train)
        latents = jax.random.normal(key, (len(indices), LATENT))
        return real.reshape(len(indices), -1), labels, latents

    def loss(params: Any, batch: Any) -> jax.Array:
        real, labels, latents = batch
        stop = jax.lax.stop_gradient
        fake = generate(params["generator"], latents, labels)
        # For each player the gradient of this sum is the gradient of its own loss.
        against = nnx.relu(1 + judge(params["critic"], stop(fake), labels))
        towards = nnx.relu(1 - judge(params["critic"], real, labels))
        fooled = -judge(stop(params["critic"]), fake, labels)
        return jnp.mean(against + towards + fooled)

    features = _features(data)

    def moments(flat: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = features(flat.reshape(-1, *data.shape))
        return x.mean(0), jnp.cov(x, rowvar=False)

    def metric(params: Any, test: Any) -> dict[str, jax.Array]:
        latents, labels, real = test
        fake = moments(generate(params["generator"], latents, labels))
        return {FRECHET.name: _frechet(*fake, *real)}

    held_out, labels = data.test
    latents = jax.random.normal(jax.random.key(0), (len(labels), LATENT))
    return Workload(
        "gan",
        data.train,
        (latents, labels, moments(held_out)),
        init,
        loss,
        metric,
        FRECHET,
        batch,
        settings={"data": data.name, "held_out": len(labels)},
    )


def _features(data: Images, *, steps: int = 500, batch_size: int = 128) -> Any:
    """Returns the last hidden layer of an MLP trained on the data by Adam, seed 0."""
    workload = classification(
        "features", lambda rngs: MLP(data.shape[0], rngs, width=32), data
    )
    tx = optax.adam(1e-3)
    params = workload.init(jax.random.key(0))

    @jax.jit
    def train(params: optax.Params, data: Batch) -> optax.Params:
        def step(carry, key):
            params, state = carry
            indices = jax.random.randint(key, (batch_size,), 0, len(workload))
            batch = workload.batch(data, indices, key)
            grads = jax.grad(workload.loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    trained: Any = train(params, data.train)

    def features(pixels: jax.Array) -> jax.Array:
        x = pixels.reshape(len(pixels), -1)
        for name in ("linear1", "linear2"):
            x = nnx.relu(x @ trained[name]["kernel"] + trained[name]["bias"])
        return x

    return features


def _frechet(
    mean1: jax.Array, cov1: jax.Array, mean2: jax.Array, cov2: jax.Array
) -> jax.Array:
    """Returns the squared Fréchet distance of two Gaussians."""
    values, vectors = jnp.linalg.eigh(cov1)
    root = (vectors * jnp.sqrt(jnp.maximum(values, 0))) @ vectors.T
    mixed = jnp.linalg.eigvalsh(root @ cov2 @ root)
    cross = jnp.sqrt(jnp.maximum(mixed, 0)).sum()
    apart = jnp.sum((mean1 - mean2) ** 2)
    return apart + jnp.trace(cov1) + jnp.trace(cov2) - 2 * cross
