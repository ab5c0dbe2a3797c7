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
# Train a Flax network as with any optax optimizer; then train the same network on
# weights of 8 bits, by changing two lines; then save it, load it, and add adapters. The
# data are scikit-learn's digits, so nothing is downloaded. In a clone of madax,
# `pip install . flax scikit-learn matplotlib` is all it takes, and a minute on a CPU.

# %%
import io
import os

import jax
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
    """Two convolutions with batch norm, dropout, and a linear layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), strides=2, rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.linear = nnx.Linear(2 * 2 * 32, 10, rngs=rngs)

    def __call__(self, x):
        """Returns logits of images of shape (batch, 8, 8, 1)."""
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.linear(self.dropout(x.reshape(len(x), -1)))


def loss_fn(model, x, y):
    """Returns the mean cross-entropy, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def batches(seed=0, size=32):
    """Yields batches of digits, drawn at random."""
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        chosen = rng.integers(len(x_train), size=size)
        yield x_train[chosen], y_train[chosen]


def accuracy(model):
    """Returns the fraction of the test digits that are told apart, in percent."""
    model.eval()
    correct = nnx.jit(lambda model: (model(x_test).argmax(-1) == y_test).mean())(model)
    model.train()
    return 100 * float(correct)


# %% [markdown]
# ## Instead of Adam
#
# `madax.muon` is a gradient transformation of optax: Muon for matrices, and Adam with
# fewer moments for everything else. Start at 0.02, and let a schedule decay it. Clips
# of the gradient go before it in an `optax.chain`, as usual.

# %%
model = Net(nnx.Rngs(0))
tx = madax.muon(optax.cosine_decay_schedule(0.02, STEPS))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, x, y):
    """Takes one step; returns the loss."""
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return loss


losses = [train_step(model, optimizer, x, y) for x, y in batches()]
print(f"float32: {accuracy(model):.1f} % of the test digits")

# %% [markdown]
# ## The same on 8 bits: two lines
#
# `quantize_params` turns the weight matrices into integer codes, one byte each, and
# leaves biases, norms, statistics and random numbers alone. `madax.value_and_grad`
# takes the place of `nnx.value_and_grad`. Nothing else changes: a layer decodes its
# codes where it uses them, statistics and dropout work as before, and the same
# `muon` trains the codes. `moment_format` stores its moments in one byte each.

# %%
model8 = madax.quantize_params(Net(nnx.Rngs(0)), madax.SymlogFormat(bits=8))  # one
tx8 = madax.muon(
    optax.cosine_decay_schedule(0.02, STEPS),
    moment_format=madax.MomentFormat(bits=8),
)
optimizer8 = nnx.Optimizer(model8, tx8, wrt=nnx.Param)
nnx.state(model8)["conv2"]["kernel"]


# %%
@nnx.jit
def train_step8(model, optimizer, x, y):
    """Takes one step on codes; returns the loss."""
    loss, grads = madax.value_and_grad(loss_fn)(model, x, y)  # two
    optimizer.update(model, grads)
    return loss


losses8 = [train_step8(model8, optimizer8, x, y) for x, y in batches()]
print(f"8 bits: {accuracy(model8):.1f} % of the test digits")

# %% [markdown]
# What is kept between steps, weights and optimizer state together, in bytes per weight
# (Adam in float32 keeps 12):

# %%
weights = sum(w.size for w in jax.tree.leaves(nnx.state(model, nnx.Param)))
for name, kept in {
    "float32": (nnx.state(model, nnx.Param), nnx.state(optimizer)),
    "8 bits": (nnx.state(model8, nnx.Param), nnx.state(optimizer8)),
}.items():
    size = sum(getattr(x, "nbytes", 0) for x in jax.tree.leaves(kept))
    print(f"{name:8}{size / weights:6.2f}")

# %%
fig, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
smooth = np.ones(20) / 20
for name, values, line in (("float32", losses, "-"), ("8 bits", losses8, ":")):
    axes.plot(np.convolve(np.asarray(values), smooth, "valid"), line, label=name)
axes.set(xlabel="step", ylabel="training loss, mean of 20 steps", yscale="log")
axes.set_title("The loss on 8 bits falls as it does in float32")
axes.legend()
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## Saved, and loaded elsewhere
#
# A flat dictionary of arrays, with the format of codes in their names, goes into any
# kind of file. To load it, make a model of the same class and update its state.

# %%
file = io.BytesIO()  # or a path
np.savez(file, **madax.to_flat_dict(nnx.state(model8, (nnx.Param, nnx.BatchStat))))
print(f"{len(file.getvalue()) / 1000:.0f} kB")

loaded = Net(nnx.Rngs(1))
file.seek(0)
state = nnx.state(loaded, (nnx.Param, nnx.BatchStat))
nnx.update(loaded, madax.from_flat_dict(np.load(file), target=state))
print(f"loaded: {accuracy(loaded):.1f} % of the test digits")

# %% [markdown]
# ## Adapters on a base of 8 bits
#
# Frozen codes need no change to a loop: layers decode them. Here the digits are upside
# down, and a LoRA adapter in floats learns them.

# %%
adapted = nnx.clone(model8)
adapted.linear = nnx.LoRA(128, 4, 10, base_module=adapted.linear, rngs=nnx.Rngs(2))
adapted.eval()
adapters = nnx.Optimizer(adapted, optax.adam(0.01), wrt=nnx.LoRAParam)


@nnx.jit
def adapt_step(model, optimizer, x, y):
    """Takes one step of the adapter; returns the loss."""
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    loss, grads = nnx.value_and_grad(loss_fn, argnums=wrt)(model, x[:, ::-1], y)
    optimizer.update(model, grads)
    return loss


losses_adapted = [adapt_step(adapted, adapters, x, y) for x, y in batches(seed=1)]
before, after = np.mean(losses_adapted[:10]), np.mean(losses_adapted[-10:])
print(f"loss on digits upside down: {before:.2f} before, {after:.2f} after")
trained = sum(w.size for w in jax.tree.leaves(nnx.state(adapted, nnx.LoRAParam)))
print(f"{trained} weights were trained, of {weights + trained}")

# %% [markdown]
# ## What is going on inside
#
# `madax.diagnostics` answers two questions: how many codes are in use, and are weights
# at their bound? The notebook *inside the weights* goes further.

# %%
occupancy = madax.diagnostics.code_occupancy(nnx.state(model8, nnx.Param))
for name, counts in occupancy.items():
    at_bound = (counts[0] + counts[-1]) / counts.sum()
    print(
        f"{name}: {(counts > 0).sum()} of {counts.size} codes in use, "
        f"{100 * at_bound:.1f} % of weights at the bound"
    )
