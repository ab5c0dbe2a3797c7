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
# # Inside the weights
#
# A multiplicative step is an addition to $\log|w|$. The sum of many small, nearly
# independent numbers has a bell curve, so weights become log-normal, like the sizes of
# synapses. This notebook shows what Madam does to weights, in float32 and on codes of 8
# bits, beside Adam.
#
# It takes its data and network from this repository's `benchmarks`, so run it in a
# clone. To copy from, take the notebook *quick_start*.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pandas as pd

import madax
from benchmarks.workloads.images import mlp

# %matplotlib inline

SMOKE = bool(os.environ.get("MADAX_SMOKE"))
STEPS = 30 if SMOKE else 3000
workload = mlp(source="digits", width=256)
pixels, labels = workload.train
start = workload.init(jax.random.key(0))


def train(tx, params):
    """Trains on batches of 64; returns parameters and state."""

    def step(carry, key):
        params, state = carry
        chosen = jax.random.randint(key, (64,), 0, len(labels))
        weights = madax.dequantize_params(params)
        grads = jax.grad(workload.loss)(weights, (pixels[chosen], labels[chosen]))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), STEPS)
    carry, _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))((params, tx.init(params)))
    return carry


def decayed(rate):
    """Returns a cosine schedule to zero."""
    return optax.cosine_decay_schedule(rate, STEPS)


FORMAT = madax.LogFormat.from_dynamic_range(bits=8, ratio=1000)
RUNS = {
    "adam": (optax.adam(decayed(0.001)), start),
    "madam": (madax.madam(decayed(0.01)), start),
    "madam, floor and b1": (madax.madam(decayed(0.01), b1=0.9, floor=1.0), start),
    "madam, 8 bits": (
        madax.madam(decayed(0.01), moment_format=madax.MomentFormat(bits=8)),
        madax.quantize_params(start, FORMAT),
    ),
}
trained = {name: train(tx, params) for name, (tx, params) in RUNS.items()}
pd.DataFrame(
    {
        name: {
            score: f"{value:.3f}"
            for score, value in workload.metric(
                madax.dequantize_params(params), workload.test
            ).items()
        }
        for name, (params, _) in trained.items()
    }
)

# %% [markdown]
# ## log|w| against a log-normal
#
# Grey shows the weights before training; the dotted line is the normal distribution
# with the mean and spread of the trained $\log|w|$. At init weights are normal, so
# small weights are far more common than in a log-normal: a long tail to the left. Madam
# spreads $\log|w|$. Its bound stops weights at three times their initial size, which is
# the peak on the right.

# %%
KERNEL = "linear2/kernel"


def log_weights(params):
    """Returns log|w| of the middle layer over its initial size, zeros left out."""
    values = np.asarray(madax.dequantize_params(params)["linear2"]["kernel"]).ravel()
    size = np.sqrt(np.mean(np.square(start["linear2"]["kernel"])))
    return np.log(np.abs(values[values != 0]) / size)


def skew(x):
    """Returns the skewness: 0 for a normal distribution."""
    return np.mean(((x - x.mean()) / x.std()) ** 3)


# Two codes of the 8-bit format to a bin.
bins = np.log(3) + FORMAT.base_step * np.arange(-148.5, 17, 2)
fig, panels = plt.subplots(1, 4, figsize=(13, 3.2), sharey=True, layout="constrained")
before = log_weights(start)
label = f"before, skewness {skew(before):.2f}"
for axes, (name, (params, _)) in zip(panels, trained.items(), strict=True):
    after = log_weights(params)
    axes.hist(before, bins, density=True, color="0.8", label=label)
    axes.hist(
        after, bins, density=True, histtype="step", color="#d55e00", label="after"
    )
    bell = np.exp(-(((bins - after.mean()) / after.std()) ** 2) / 2)
    axes.plot(bins, bell / after.std() / np.sqrt(2 * np.pi), "k:", label="log-normal")
    axes.set(title=f"{name}\nspread {after.std():.2f} nats, skewness {skew(after):.2f}")
    axes.set_xlabel("log (|w| / initial size), nats")
panels[0].set_ylabel("density")
panels[0].legend(fontsize=8)
fig.suptitle("Madam moves log|w| towards a bell curve, and Adam leaves it as it was")
plt.show()

# %% [markdown]
# It is only a push towards a bell curve: in a run of this length the skewness of
# Madam's weights moves towards 0, and the skewness of Adam's stays.

# %% [markdown]
# ## Signs
#
# The paper's rule never changes the sign of a weight: a network learns with the signs
# that it has at init. A floor lets small weights cross zero.

# %%
pd.DataFrame(
    {
        name: {
            layer: f"{100 * float(share):.1f} %"
            for layer, share in madax.diagnostics.fraction_sign_changed(
                start, madax.dequantize_params(params)
            ).items()
            if layer.endswith("kernel")
        }
        for name, (params, _) in trained.items()
    }
)

# %% [markdown]
# ## How many levels a weight uses
#
# Codes of 8 bits have 127 levels per sign. How many are in use, and how much
# information do they hold? The entropy of a layer's codes is the number of bits per
# weight that a perfect compression needs, sign included.

# %%
codes, state = trained["madam, 8 bits"]
occupancy = madax.diagnostics.code_occupancy(codes)


def entropy(counts):
    """Returns the entropy of counts, in bits."""
    p = np.asarray(counts)[np.asarray(counts) > 0] / np.sum(counts)
    return -np.sum(p * np.log2(p))


rows = {}
for name, counts in occupancy.items():
    levels = counts.shape[0] // 2
    sizes = counts[levels + 1 :] + counts[:levels][::-1]
    rows[name] = {
        "levels in use, of 127": int((sizes > 0).sum()),
        "bits a weight, with sign": f"{entropy(counts):.2f}",
        "bits of its size": f"{entropy(sizes):.2f}",
        "at the bound": f"{100 * float(sizes[-1] / counts.sum()):.1f} %",
    }
pd.DataFrame(rows)

# %%
fig, axes = plt.subplots(figsize=(9, 3), layout="constrained")
counts = occupancy[KERNEL]
levels = counts.shape[0] // 2
axes.bar(np.arange(-levels, levels + 1), counts, width=1, color="#d55e00")
axes.set(xlabel="code", ylabel="weights")
axes.set_title(f"{KERNEL} in LogFormat(8): few weights have codes near zero")
plt.show()

# %% [markdown]
# ## Synapses
#
# Bartol et al. (2015) measured pairs of synapses between the same two cells, which have
# the same history and should have the same strength. Their differences show that at
# least 26 strengths can be told apart: $\log_2 26 \approx 4.7$ bits per synapse. The
# sizes are log-normal, as after multiplicative learning. So if the grid of a trained
# network is made coarser, when does it fail?

# %%
weights = madax.dequantize_params(trained["madam"][0])
rows = []
for sizes in (3, 7, 15, 26, 63, 127):
    # So many sizes a sign, over a range of 1000.
    step = float(np.log(1000) / (sizes - 1))
    size = np.sqrt(np.mean(np.square(start["linear2"]["kernel"])))

    def snap(w, step=step, sizes=sizes):
        """Rounds log|w| to the grid; what is below it becomes its smallest size."""
        if w.ndim < 2:
            return w
        top = jnp.log(jnp.abs(w).max())
        code = jnp.clip(jnp.round((top - jnp.log(jnp.abs(w))) / step), 0, sizes - 1)
        return jnp.sign(w) * jnp.exp(top - step * code)

    snapped = jax.tree.map(snap, weights)
    accuracy = float(workload.metric(snapped, workload.test)["accuracy"])
    rows.append((sizes, f"{np.log2(sizes):.1f}", f"{100 * accuracy:.1f} %"))
pd.DataFrame(rows, columns=["sizes", "bits", "accuracy of the trained network"])

# %% [markdown]
# The number of sizes of a synapse is enough to *store* what Madam learned. To *learn*
# on such a coarse grid takes stochastic rounding: see the notebook *bits*.
#
# Bartol et al., [Nanoconnectomic upper bound on the variability of synaptic
# plasticity](https://doi.org/10.7554/eLife.10778), eLife 2015.
