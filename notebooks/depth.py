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
# # Depth
#
# A plain MLP, without normalisation or skip connections, learns a photograph: from
# Fourier features of a place to its colour. Deep MLPs are hard to train: if each of 75
# layers changes by 1 %, the output changes by up to $1.01^{75} - 1 = 111$ %, so the
# size of a step *relative* to the weights counts.
#
# It takes its records, photograph and network from this repository's `benchmarks`, so
# run it in a clone. To copy from, take the notebook *quick_start*.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import Markdown

from benchmarks import RESULTS
from benchmarks.accuracy import depth
from benchmarks.data.photo import photo
from benchmarks.lib import records
from benchmarks.lib.optimizers import UNTUNED
from benchmarks.workloads import functional
from benchmarks.workloads.coordinates import CoordinateMLP, fourier_features

# %matplotlib inline

SMOKE = bool(os.environ.get("MADAX_SMOKE"))

# %% [markdown]
# ## The records
#
# In `python -m benchmarks depth`, at each depth, all optimizers have the same number of
# rates to choose from, five, a decade apart around their default, and the same seeds.

# %%
runs = records.read(RESULTS / "quick" / "runs.jsonl")
print("On", runs["environment"].iloc[-1]["device"])
cells = depth.depth_cells(runs)
depth.depth_figure(cells)

# %%
Markdown(depth.depth_table(cells))

# %% [markdown]
# ## What it looks like
#
# Here networks of each depth paint the photograph, with each optimizer at its default
# rate.

# %%
DEPTHS, WIDTH, SIZE, STEPS = (5, 20, 75), 64, 48, 400
if SMOKE:
    DEPTHS, WIDTH, SIZE, STEPS = (3, 5), 16, 16, 20

places, colours = photo("china.jpg", SIZE, shrink=4)
features = fourier_features(places).reshape(SIZE * SIZE, -1)
target = jnp.asarray(colours.reshape(SIZE * SIZE, 3))


def paint(name, layers):
    """Trains on all pixels; returns the picture and its PSNR in dB."""
    init, apply = functional(
        lambda rngs: CoordinateMLP(features.shape[-1], rngs, depth=layers, width=WIDTH)
    )
    row = UNTUNED[name]
    tx = row.make(optax.cosine_decay_schedule(row.rate, STEPS))

    def loss(params):
        return jnp.mean((apply(params, features) - target) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params):
        carry, _ = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
        return carry[0]

    params = train(init(jax.random.key(0)))
    picture = apply(params, features).reshape(SIZE, SIZE, 3)
    return np.clip(picture, 0, 1), -10 * float(jnp.log10(loss(params)))


fig, panels = plt.subplots(
    len(DEPTHS),
    1 + len(depth.NAMES),
    figsize=(10, 2.2 * len(DEPTHS)),
    squeeze=False,
    layout="constrained",
)
for across, layers in zip(panels, DEPTHS, strict=True):
    across[0].imshow(colours)
    across[0].set_title("the photograph", fontsize=9)
    across[0].set_ylabel(f"{layers} layers")
    for axes, name in zip(across[1:], depth.NAMES, strict=True):
        picture, psnr = paint(name, layers)
        axes.imshow(picture)
        axes.set_title(f"{name}, {psnr:.1f} dB", fontsize=9)
    for axes in across:
        axes.set(xticks=[], yticks=[])
plt.show()
