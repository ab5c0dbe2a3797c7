"""What lifted codes cannot do is an error, at once, that says what to do instead."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import needs_hijax, normal
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import madax

FMT = madax.SymlogFormat(8)


def codes():
    return madax.quantize_params({"w": normal(8, 8), "bias": jnp.ones(8)}, FMT)


@pytest.fixture
def params():
    return madax.hijax.lift(codes())


def refused(kind, *parts):
    return pytest.raises(kind, match="(?s)" + ".*".join(map(re.escape, parts)))


REMEDY = "codes8[8,8] (codes of madax.hijax: pass madax.hijax.decode(w)"


def on_mesh():
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("x",), axis_types=(auto,))
    return NamedSharding(mesh, P("x", None))


REFUSED = {
    "jax.lax": lambda w: jax.lax.mul(w, w),
    "jax.lax in jit": lambda w: jax.jit(lambda w: jax.lax.sin(w))(w),
    "jax.lax in grad": lambda w: jax.grad(lambda w: jax.lax.sin(w).sum())(w),
    "a layer of lax": lambda w: jax.jit(jax.nn.sigmoid)(w),
    "stop_gradient": lambda w: jax.jit(jax.lax.stop_gradient)(w),
    "with_sharding_constraint": lambda w: jax.jit(
        lambda w: jax.lax.with_sharding_constraint(w, on_mesh())
    )(w),
}


@needs_hijax
@pytest.mark.parametrize("name", REFUSED)
def test_functions_of_lax_name_decode(params, name):
    with refused((TypeError, ValueError, NotImplementedError), REMEDY):
        REFUSED[name](params["w"])


@needs_hijax
def test_device_put_names_put(params):
    kinds = (NotImplementedError, TypeError, ValueError)
    with refused(kinds, "codes of madax.hijax", "place w by madax.hijax.put"):
        jax.device_put(params["w"], on_mesh())


@needs_hijax
def test_shardings_of_jit_name_put_or_suit(params):
    """JAX 0.10 splits each part of codes as it is told, where it can."""
    for options in ({"in_shardings": on_mesh()}, {"out_shardings": on_mesh()}):
        message = "madax.hijax.put|divisible|partitioned"
        with pytest.raises((NotImplementedError, ValueError), match=message):
            jax.jit(lambda w: w, **options)(params["w"])


@needs_hijax
def test_shapes_of_codes_have_no_struct(params):
    with refused(NotImplementedError, "ShapeDtypeStruct.like"):
        jax.ShapeDtypeStruct.like(params["w"])


@needs_hijax
def test_scan_asks_for_its_length_and_maps_for_scales(params):
    with refused(ValueError, "must provide `length` to `scan`"):
        jax.lax.scan(lambda x, w: (x, None), 0.0, params["w"])
    for run in (
        lambda w: jax.lax.scan(lambda x, w: (x, None), 0.0, w, length=8),
        lambda w: jax.vmap(lambda w: w.sum())(w),
    ):
        with refused(ValueError, "shape (1, 1)", "pass channel_axis=0 to"):
            run(params["w"])


@needs_hijax
def test_shard_map_takes_lowered_codes(params):
    mesh = jax.make_mesh((8,), ("x",))
    run = jax.shard_map(lambda w: w.sum(), mesh=mesh, in_specs=P(), out_specs=P())
    with refused(TypeError, "jax.shard_map; pass madax.hijax.lower(params)"):
        run(params["w"])
    assert np.isfinite(run(madax.hijax.lower(params["w"])))


@needs_hijax
def test_there_is_no_derivative_of_codes_that_are_taken_apart(params):
    tx = madax.hijax.optimizer(madax.madam(0.1))
    steps = jnp.ones((8, 8), jnp.int32)
    for inside in (
        lambda p: jnp.sum(madax.hijax.lower(p)["w"].dequantize()),
        lambda p: jnp.sum(optax.apply_updates(p["w"], steps)),
        lambda p: jnp.sum(tx.update(p, tx.init(p), p)[0]["bias"]),
    ):
        for run in (jax.grad(inside), jax.jit(jax.grad(inside))):
            with refused(TypeError, "being differentiated, and has no derivative"):
                run(params)
        with refused(TypeError, "being differentiated"):
            jax.linearize(inside, params)
        with refused(TypeError, "being differentiated"):
            jax.jvp(inside, (params,), (madax.hijax.decode(params),))


FLOATS = {
    "a transform after it": lambda: optax.chain(
        madax.hijax.optimizer(madax.madam(0.1)), optax.scale(1.0)
    ),
    "adam": lambda: optax.adam(0.1),
    "a rescaling": lambda: optax.chain(
        madax.hijax.optimizer(madax.madam(0.1)), optax.add_decayed_weights(0.1)
    ),
}


@needs_hijax
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("compiled", [False, True])
def test_updates_of_floats_are_an_error_at_once(params, name, compiled):
    tx = FLOATS[name]()
    state, grads = tx.init(params), jax.tree.map(jnp.ones_like, params)

    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with refused(
        TypeError, "the update of codes8[8,8] is float32", "wrap the optimizer in"
    ):
        (jax.jit(step) if compiled else step)(params, state)


NOT_WRAPPED = {
    "init": lambda params: madax.madam(0.1).init(params),
    "compiled": lambda params: jax.jit(madax.madam(0.1).init)(params),
    "code_occupancy": madax.diagnostics.code_occupancy,
    "matrices": madax.diagnostics.matrices,
}


@needs_hijax
@pytest.mark.parametrize("name", NOT_WRAPPED)
def test_what_takes_codes_and_not_lifted_ones_says_so(name, params):
    with refused(
        TypeError,
        "params['w'] holds codes of madax.hijax",
        "wrap an optimizer in madax.hijax.optimizer, and pass madax.hijax.lower(tree)",
    ):
        NOT_WRAPPED[name](params)


@needs_hijax
def test_floats_are_added_to_weights_by_a_model(params):
    low_rank = normal(8, 8, seed=1)
    sums = params["w"] + low_rank, low_rank + params["w"]
    for total in sums:
        np.testing.assert_array_equal(total, jnp.asarray(params["w"]) + low_rank)


@needs_hijax
def test_an_optimizer_of_floats_is_an_error(params):
    tx = madax.hijax.optimizer(
        optax.GradientTransformation(lambda p: (), lambda u, s, p: (u, s))
    )
    grads = jax.tree.map(jnp.ones_like, params)
    with refused(
        TypeError, "updates['w'] is float32, but", "madax.with_quantized_params, inside"
    ):
        tx.update(grads, tx.init(params), params)
    with refused(TypeError, "tx must be an optax.GradientTransformation"):
        madax.hijax.optimizer("madam")


@needs_hijax
def test_a_tree_without_codes_is_an_error(params):
    tx = madax.hijax.optimizer(madax.madam(0.1))
    floats = {"w": jnp.ones((8, 8))}
    with refused(ValueError, "params hold no lifted codes; pass those that"):
        tx.init(floats)
    with refused(ValueError, "no codes to lift; call madax.quantize_params"):
        madax.hijax.lift(floats)
    with refused(TypeError, "dtype"):
        madax.hijax.lift(codes(), jnp.int8)


@needs_hijax
def test_a_gradient_that_a_filter_left_out_is_an_error(params):
    tx = madax.hijax.optimizer(madax.madam(0.1))
    grads = {"w": None, "bias": jnp.ones(8)}
    with refused(TypeError, "a gradient is None", "import Equinox before"):
        tx.update(grads, tx.init(params), params)


@needs_hijax
def test_codes_are_not_written_to(params):
    for write in (
        lambda w: w.__setitem__(0, 1.0),
        lambda w: jax.jit(lambda w: w.__setitem__(0, 1.0))(w),
    ):
        with refused(TypeError, "cannot be written to; use w.at[...].set(x)"):
            write(params["w"])


@needs_hijax
def test_steps_have_no_value_and_are_not_lifted(params):
    w = madax.hijax.lower(params["w"])
    steps = madax.QuantizedArray.steps(jnp.ones((8, 8), jnp.int32), FMT)
    with refused(TypeError, "was used as a number"):
        madax.hijax.lift(steps)
    assert w.format == FMT


def test_it_is_imported_when_it_is_used():
    code = (
        "import sys, madax; assert madax.hijax.__all__; "
        "assert 'madax.hijax._values' not in sys.modules; "
        "assert 'jax.experimental.hijax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_older_versions_of_jax_are_told(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 1))
    for name in madax.hijax.__all__:
        with refused(ImportError, "JAX 0.10.2 or newer, but this is", "update JAX"):
            getattr(madax.hijax, name)
    with refused(AttributeError, "'madax.hijax' has no attribute 'train'"):
        madax.hijax.train  # noqa: B018
