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
# # Learning-rate sensitivity
#
# A step of Madam multiplies a weight by $e^{\pm\eta}$, whatever the scale of weights
# and gradients. So one rate should suit very different networks. Does it? The records
# of `python -m benchmarks lr-sensitivity` and `no-tuning` answer for eight networks,
# and a small sweep below explains the answer.
#
# It reads the records of this repository, so run it in a clone. To copy from, take the
# notebook *quick_start*.

# %%
import os
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import Markdown

from benchmarks import RESULTS
from benchmarks.accuracy import lr_sensitivity, no_tuning
from benchmarks.lib import records
from benchmarks.lib.optimizers import OPTIMIZERS
from benchmarks.workloads.images import mlp

# %matplotlib inline

SMOKE = bool(os.environ.get("MADAX_SMOKE"))
runs = records.read(RESULTS / "quick" / "runs.jsonl")
device = runs["environment"].iloc[-1]["device"]
print(f"{len(runs)} runs, on {device}; workloads:", *runs["workload"].unique()[:8])

# %% [markdown]
# ## Error against the rate
#
# The height of a line is the best error of any optimizer on that network over the error
# at this rate: 1 is best, 0 is useless. Every network has the same budget and seeds for
# all three optimizers. The last row shows the numbers of the Madam paper, for ResNets,
# a GAN and a Transformer trained for many epochs.

# %%
cells = lr_sensitivity.rate_cells(runs)
lr_sensitivity.lr_sensitivity_figure(cells)

# %%
Markdown(lr_sensitivity.lr_sensitivity_table(cells))

# %% [markdown]
# ## One setting for everything
#
# What does it cost not to tune at all? The figure compares each optimizer at its one
# default with the min error of any optimizer at any rate, on each network.

# %%
cells = no_tuning.default_cells(runs)
no_tuning.no_tuning_figure(cells)

# %%
Markdown(no_tuning.no_tuning_table(cells))

# %% [markdown]
# ## Where it comes from
#
# The size of a step relative to the weights decides whether training is slow, stable or
# diverges. Multiply the input of a network by 100, and divide its first kernel by 100:
# the function is the same. But gradients of the kernel are 100 times larger, so SGD
# needs another rate, and Adam's steps are too large. Madam's steps scale with the
# weights.

# %%
STEPS = 20 if SMOKE else 400
workload = mlp(source="digits", width=32)
pixels, labels = workload.train
rates = jnp.logspace(-4, 0, 9)


def final_loss(make, scale, rate):
    """Trains on inputs multiplied by ``scale``; returns the loss at the end."""
    params = workload.init(jax.random.key(0))
    params["linear1"]["kernel"] /= scale
    tx = make(rate)

    def step(carry, key):
        params, state = carry
        chosen = jax.random.randint(key, (32,), 0, len(labels))
        batch = scale * pixels[chosen], labels[chosen]
        grads = jax.grad(workload.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), STEPS)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    return workload.loss(params, (scale * pixels, labels))


fig, panels = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
for axes, name in zip(panels, OPTIMIZERS, strict=True):
    for scale, line in ((0.01, ":"), (1.0, "-"), (100.0, "--")):
        sweep = jax.jit(jax.vmap(partial(final_loss, OPTIMIZERS[name].make, scale)))
        losses = np.nan_to_num(np.asarray(sweep(rates)), nan=1e3, posinf=1e3)
        axes.plot(rates, losses, line, marker="o", ms=3, label=f"inputs * {scale:g}")
    axes.set(xscale="log", yscale="log", ylim=(1e-4, 1e2), title=name)
    axes.set_xlabel("learning rate")
    axes.grid(alpha=0.3)
panels[0].set_ylabel("training loss at the end")
panels[0].legend(fontsize=8)
fig.suptitle("Madam does not notice the scale of a layer; SGD and Adam do")
plt.show()

# %% [markdown]
# The three lines of Madam coincide: it is invariant to the scale of a layer. The lines
# of SGD and Adam move with the scale. The best rate of Madam still depends on the
# length of the run: in few steps, larger rates win.
