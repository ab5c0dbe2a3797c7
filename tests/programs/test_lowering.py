"""Train steps, exported for the compilers of CPU, GPU and TPU.

Nothing here runs on a GPU or a TPU. The tests look at the program: one that
lowers for all of them, asks the host for nothing, needs no 64-bit arithmetic, and,
sent through bytes and back, is on a CPU the same to the last bit.
"""

import itertools
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPTIMIZERS, SOME
from helpers import enable_x64, is_quantized, mostly_nightly, step
from jax import export

import madax
from madax import QuantizedArray

pytestmark = pytest.mark.filterwarnings("ignore:.*beyond p_scale")

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

NAMES = (
    "madam",
    "floor_b1",
    "moments8",
    "moments12",
    "bbit_madam",
    "lns_madam",
    "wrapped_adam",
)


def floats(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(rng.standard_normal((6, 4)) / 2, dtype),
        "out": jnp.asarray(rng.standard_normal((4, 4)) / 2, dtype),
        "bias": jnp.zeros(4, dtype),
    }


TREES = (
    *("float32", "bfloat16", *SOME),
    *("log8_channels", "symlog8_channels", "mixed"),
)


@cache
def trees():
    codes = {name: madax.quantize_params(floats(), f) for name, f in SOME.items()}
    channels = {
        f"{name}_channels": madax.quantize_params(floats(), f, channel_axis=-1)
        for name, f in SOME.items()
        if name in ("log8", "symlog8")
    }
    dtypes = {dtype: floats(dtype) for dtype in ("float32", "bfloat16")}
    # A leaf of every kind: what runs, runs on this one.
    kinds = dtypes | codes | {"channels": channels["log8_channels"]}
    mixed = {k: v["kernel"] for k, v in kinds.items()} | {"zeros": jnp.zeros(4)}
    made = dtypes | codes | channels | {"mixed": mixed}
    assert tuple(made) == TREES
    return made


def gradients(params, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda w: jnp.asarray(
            rng.standard_normal(w.shape),
            jnp.float32 if is_quantized(w) else w.dtype,
        ),
        params,
        is_leaf=is_quantized,
    )


def loss(params, x):
    params = madax.dequantize_params(params)
    hidden = jnp.tanh(x.astype(params["bias"].dtype) @ params["kernel"])
    return jnp.mean((hidden @ params["out"] + params["bias"] - 1) ** 2)


def update_step(tx, params, state, grads):
    return step(tx, grads, state, params)


def model_step(tx, params, state, x):
    grads = jax.grad(loss)(madax.dequantize_params(params), x)
    return step(tx, grads, state, params)


def on_leaves(step, args):
    """The step as a function of arrays alone, and these arrays: only they serialise."""
    flat, treedef = jax.tree.flatten(args)
    return lambda *flat: jax.tree.leaves(step(*treedef.unflatten(flat))), flat


def exported(step, args, platforms=PLATFORMS, donate=0):
    """The export, with the first ``donate`` arrays donated."""
    function, flat = on_leaves(step, args)
    jitted = jax.jit(function, donate_argnums=range(donate))
    return export.export(jitted, platforms=platforms)(*flat)


def wide_types(text):
    return set(re.findall(r"[<x](f64|u?i64)>", text))


def check_program(text):
    """No call out of the program, to the host or to a library; no 64-bit arrays."""
    assert "stablehlo" in text
    assert "custom_call" not in text
    assert not wide_types(text)
    for effect in ("infeed", "outfeed", "stablehlo.send", "stablehlo.recv"):
        assert effect not in text


@pytest.mark.parametrize(
    ("optimizer", "tree"),
    mostly_nightly(
        itertools.product(NAMES, TREES),
        ("moments8", "mixed"),
        ("bbit_madam", "mixed"),
        ("wrapped_adam", "mixed"),
    ),
)
def test_every_step_lowers_for_every_platform(optimizer, tree):
    params = trees()[tree]
    tx = OPTIMIZERS[optimizer]
    args = (params, tx.init(params), gradients(params))
    together = exported(partial(update_step, tx), args)
    assert together.platforms == PLATFORMS
    check_program(together.mlir_module())
    wanted = [(x.shape, x.dtype) for x in jax.tree.leaves(args[:2])]
    assert [(x.shape, x.dtype) for x in together.out_avals] == wanted


@pytest.mark.parametrize(
    ("optimizer", "tree"),
    mostly_nightly(
        itertools.product(NAMES, ["bfloat16", "log8_channels"]),
        ("moments8", "log8_channels"),
    ),
)
def test_steps_of_a_model_lower_with_buffers_donated(optimizer, tree):
    params = trees()[tree]
    tx = OPTIMIZERS[optimizer]
    carry = (params, tx.init(params))
    donate = len(jax.tree.leaves(carry))
    args = (*carry, jnp.ones((3, 6)))
    for platforms in (("cuda",), ("tpu",), PLATFORMS):
        program = exported(partial(model_step, tx), args, platforms, donate)
        assert program.platforms == platforms
        check_program(program.mlir_module())
    # In place: all of weights, codes and moments is overwritten by its successor.
    reused = re.findall("tf.aliasing_output|jax.buffer_donor", program.mlir_module())
    # The bounds of the last step are for diagnostics: no step of madam reads them.
    unread = optimizer not in ("bbit_madam", "lns_madam", "wrapped_adam")
    assert len(reused) == donate - unread


@pytest.mark.nightly
@pytest.mark.parametrize("optimizer", mostly_nightly(NAMES, "moments8"))
def test_a_step_runs_the_same_after_a_round_trip_through_bytes(optimizer):
    pytest.importorskip("flatbuffers")  # what jax.export serialises with
    params = trees()["mixed"]
    tx = OPTIMIZERS[optimizer]
    args = (params, tx.init(params), gradients(params))
    step = partial(update_step, tx)
    program = exported(step, args)
    again = export.deserialize(program.serialize())
    assert again.platforms == PLATFORMS
    assert again.mlir_module() == program.mlir_module()
    function, flat = on_leaves(step, args)
    jitted, call = jax.jit(function), jax.jit(again.call)
    carry = len(jax.tree.leaves(args[:2]))
    ours, theirs = flat, flat
    for seed in range(3):
        grads = jax.tree.leaves(gradients(params, seed))
        ours = jitted(*ours[:carry], *grads)
        theirs = call(*theirs[:carry], *grads)
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    moved = [
        np.any(np.asarray(new != old)) for new, old in zip(ours, flat, strict=False)
    ]
    # All kinds of leaves have moved, scales aside, so there was something to compare.
    names = jax.tree.leaves(
        jax.tree.map(
            lambda w: (
                QuantizedArray(True, False, w.format) if is_quantized(w) else True
            ),
            params,
            is_leaf=is_quantized,
        )
    )
    assert moved[: len(names)] == names


@pytest.mark.parametrize("tree", ["symlog8_channels"])
def test_codes_are_arguments_and_results_of_an_export(tree):
    """Within a process an export takes and returns the trees themselves."""
    params = trees()[tree]
    tx = OPTIMIZERS["moments8"]
    args = (params, tx.init(params), gradients(params))
    step = jax.jit(partial(update_step, tx))
    program = export.export(step, platforms=PLATFORMS)(*args)
    theirs, ours = program.call(*args), step(*args)
    assert jax.tree.structure(theirs) == jax.tree.structure(ours)
    jax.tree.map(np.testing.assert_array_equal, theirs, ours)
    assert is_quantized(theirs[0]["kernel"])
    # Codes of one format are no arguments of a program made for another.
    other = trees()["uniform8"]
    with pytest.raises((ValueError, TypeError)):
        program.call(other, tx.init(other), args[2])


# --- that the checks above would see it -----------------------------------------------


def test_the_check_sees_a_call_of_the_host():
    def step(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), jnp.float32), x)

    text = jax.jit(step).lower(jnp.float32(1)).as_text()
    with pytest.raises(AssertionError):
        check_program(text)


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64"])
def test_the_check_sees_wide_arrays(dtype):
    with enable_x64():
        x = jnp.ones(3, dtype)
        assert x.dtype == dtype
        text = exported(lambda x: x[:1] + 1, (x,)).mlir_module()
    with pytest.raises(AssertionError):
        check_program(text)


@pytest.mark.parametrize("fmt", mostly_nightly(SOME.values(), SOME["log8"]), ids=SOME)
def test_functions_of_quantized_params_can_be_serialized(fmt):
    pytest.importorskip("flatbuffers")
    params = madax.quantize_params(floats(), fmt)
    x = jnp.ones((2, 6))
    program = export.export(jax.jit(loss))(params, x)
    again = export.deserialize(program.serialize())
    np.testing.assert_array_equal(again.call(params, x), jax.jit(loss)(params, x))
