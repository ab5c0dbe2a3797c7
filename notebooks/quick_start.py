# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quick start
#
# Train a Flax network with Madam as with any optax optimizer; then train the same
# network on weights of 8 bits. Data: scikit-learn's digits, so nothing is downloaded.

# %%
import os
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import madax

# %matplotlib inline

SMOKE = bool(os.environ.get("MADAX_SMOKE"))
STEPS = 60 if SMOKE else 1000

pixels, digits = load_digits(return_X_y=True)
pixels = (pixels.reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)
x_train, x_test, y_train, y_test = train_test_split(
    pixels, digits, stratify=digits, random_state=0
)


# %%
class Net(nnx.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.linear = nnx.Linear(2 * 2 * 32, 10, rngs=rngs)

    def __call__(self, x):
        """Returns logits of images of shape (batch, 8, 8, 1)."""
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return self.linear(x.reshape(len(x), -1))


def loss_fn(model, x, y):
    """Returns the mean cross-entropy, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def batches(seed=0, size=32):
    """Yields batches of digits, drawn at random."""
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        chosen = rng.integers(len(x_train), size=size)
        yield x_train[chosen], y_train[chosen]


# %% [markdown]
# ## Madam in place of Adam
#
# `madax.madam` is an `optax.GradientTransformation`. Its learning rate is relative: at
# 0.01 a typical step changes a weight by 1 %. Start there, and decay it.

# %%
model = Net(nnx.Rngs(0))
tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    madax.madam(optax.cosine_decay_schedule(0.01, STEPS)),
)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, x, y):
    """Takes one step; returns the loss."""
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return loss


losses = [train_step(model, optimizer, x, y) for x, y in batches()]
accuracy = jnp.mean(model(x_test).argmax(-1) == y_test)
print(f"float32: {100 * accuracy:.1f} % of the test digits")

# %% [markdown]
# ## The same on 8 bits
#
# `quantize_params` turns the weight matrices into integer codes, one byte each, and
# the same `madam` trains the codes; `moment_format` stores its second moment in a byte
# as well. There is no float32 copy of a weight anywhere: what the forward pass decodes
# is gone after the backward pass.

# %%
graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
params = nnx.to_pure_dict(params)
codes = madax.quantize_params(
    params, madax.LogFormat.from_dynamic_range(bits=8, ratio=100)
)
tx8 = madax.madam(
    optax.cosine_decay_schedule(0.01, STEPS),
    moment_format=madax.MomentFormat(bits=8),
)
state = tx8.init(codes)
codes["conv2"]["kernel"]


# %%
def loss_of(params, x, y):
    """Returns the loss of decoded parameters."""
    return loss_fn(nnx.merge(graph, params, rest), x, y)


@partial(jax.jit, donate_argnums=(0, 1))
def native_step(codes, state, x, y):
    """Takes one step on codes; returns them, the state and the loss."""
    loss, grads = jax.value_and_grad(loss_of)(madax.dequantize_params(codes), x, y)
    updates, state = tx8.update(grads, state, codes)
    return optax.apply_updates(codes, updates), state, loss


losses8 = []
for x, y in batches():
    codes, state, loss = native_step(codes, state, x, y)
    losses8.append(loss)

model8 = nnx.merge(graph, madax.dequantize_params(codes), rest)
accuracy8 = jnp.mean(model8(x_test).argmax(-1) == y_test)
print(f"8 bits: {100 * accuracy8:.1f} % of the test digits")

# %% [markdown]
# What is kept between steps, weights and optimizer state together, in bytes a weight
# (Adam in float32 keeps 12):

# %%
weights = sum(w.size for w in jax.tree.leaves(params))
for name, kept in {
    "float32": (nnx.state(model, nnx.Param), nnx.state(optimizer)),
    "8 bits": (codes, state),
}.items():
    size = sum(getattr(x, "nbytes", 0) for x in jax.tree.leaves(kept))
    print(f"{name:8}{size / weights:6.2f}")

# %%
fig, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
smooth = np.ones(20) / 20
for name, values, line in (("float32", losses, "-"), ("8 bits", losses8, ":")):
    axes.plot(np.convolve(np.asarray(values), smooth, "valid"), line, label=name)
axes.set(xlabel="step", ylabel="training loss, mean of 20 steps", yscale="log")
axes.legend()
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## What is going on inside
#
# `madax.diagnostics` answers what one asks first: are weights at the bound, how many
# levels are in use? The notebook *inside the weights* goes further.

# %%
at_bound = madax.diagnostics.fraction_at_bound(codes, state)
occupancy = madax.diagnostics.code_occupancy(codes)
for name, counts in occupancy.items():
    print(
        f"{name}: {(counts > 0).sum()} of {counts.size} levels in use, "
        f"{100 * at_bound[name]:.1f} % of weights at the bound"
    )
