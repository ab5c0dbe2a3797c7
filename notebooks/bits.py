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
# # Bits
#
# How few bits does a weight need if there is no other copy of it? A format is a grid of
# values, and a step smaller than the grid has to be rounded. Three things matter, in
# this order: how steps are rounded, the number of bits, and the grid.
#
# It reads the records of this repository, so run it in a clone. To copy from, take the
# notebook *quick_start*.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import Markdown

import madax
from benchmarks import RESULTS
from benchmarks.accuracy import bits
from benchmarks.accuracy.stall import stall_figure
from benchmarks.lib import records

# %matplotlib inline

SMOKE = bool(os.environ.get("MADAX_SMOKE"))

# %% [markdown]
# ## Three grids of 5 bits
#
# `LogFormat` has the same relative error everywhere, and nothing between zero and its
# smallest weight; `UniformFormat` has the same absolute error; `SymlogFormat` is
# uniform near zero and logarithmic far out.

# %%
formats = {
    "log": madax.LogFormat.from_dynamic_range(bits=5, ratio=30),
    "symlog": madax.SymlogFormat(bits=5, linear_range=1 / 3),
    "uniform": madax.UniformFormat(bits=5),
}
fig, axes = plt.subplots(figsize=(9, 2), layout="constrained")
for row, fmt in enumerate(formats.values()):
    codes = jnp.arange(-fmt.levels, fmt.levels + 1, dtype=jnp.int8)
    values = madax.QuantizedArray(codes, jnp.ones(()), fmt).dequantize()
    axes.plot(values, np.full(values.shape, -row), "|", ms=18, c="black")
axes.set_yticks([0, -1, -2], formats)
axes.set(xlabel="weight / scale", ylim=(-2.6, 0.6))
axes.set_title("The log grid leaves a gap at zero, which the others fill")
plt.show()

# %% [markdown]
# ## Steps that are smaller than the grid
#
# Ten steps along a constant gradient should shrink each weight by ten times the rate.
# With nearest rounding, as in bfloat16, small steps are lost. Stochastic rounding moves
# a whole code with the right probability, so that the mean is right at any rate.

# %%
stall_figure(records.read(RESULTS / "stall" / "stall.jsonl"))

# %% [markdown]
# An example: weights that should move by 0.3 codes per step, for 100 steps.

# %%
fmt = madax.LogFormat.from_dynamic_range(bits=8, ratio=100)
steps = 20 if SMOKE else 100
weights = jnp.full((1000,), 0.1)
fig, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for rounding, line in (("nearest", "--"), ("stochastic", "-")):
    params = madax.quantize_params(weights, fmt, where=lambda *_: True)
    tx = madax.madam(0.3 * fmt.base_step, rounding=rounding)
    state, path = tx.init(params), []
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(jnp.ones(1000), state, params)
        params = optax.apply_updates(params, updates)
        path.append(float(jnp.log(params.dequantize() / 0.1).mean()))
    axes.plot(path, line, label=f"{rounding}, mean of 1000 weights")
exact = -0.3 * fmt.base_step * np.arange(1, steps + 1)
axes.plot(exact, ":", c="black", label="exact")
axes.set(xlabel="step", ylabel="change of log weight, nats")
axes.set_title("Nearest rounding stands still, stochastic rounding does not")
axes.legend()
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## What it costs in accuracy
#
# `python -m benchmarks bits --profile full` trains on all of Fashion-MNIST without
# tuning, with the same formats, rounding and seeds for Madam and Adam.

# %%
runs = records.read(RESULTS / "bits" / "bits.jsonl")
print("On", runs["environment"].iloc[0]["device"])
bits.bits_figure(runs)

# %%
Markdown(bits.bits_table(runs))

# %% [markdown]
# Stochastic rounding matters most. With it, 16 bits lose nothing and 8 bits little,
# with either optimizer; without it, few bits hardly train. The logarithmic grid is
# natural for multiplicative steps, which are additions of integers there, but it is not
# the most accurate: at 4 and 6 bits uniform codes are better, and `SymlogFormat`, which
# can cross zero, is the best 8-bit format for Madam.
