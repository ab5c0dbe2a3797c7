"""The optimizers against optax.chain of the public transforms, and their one state."""

import inspect
import typing
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import different, is_quantized, mostly_nightly, normal

import madax
from madax import LogFormat, MomentFormat, SymlogFormat, optimizers, papers, transforms

pytestmark = pytest.mark.usefixtures("quick_compiles")


def mixed():
    """Floats of two dtypes, a vector, zeros, and codes of two formats."""
    params = {
        "w": normal(8, 6),
        "half": normal(8, 6, seed=1).astype(jnp.bfloat16),
        "bias": jnp.zeros(6),
        "log": normal(8, 6, seed=2),
        "symlog": normal(8, 6, seed=3),
    }
    for name, format in (("log", LogFormat(8)), ("symlog", SymlogFormat(8))):
        where = lambda path, leaf, name=name: path == name
        params = madax.quantize_params(params, format, where=where)
    return params


def gradients(params, seed):
    shape = lambda w: normal(*w.shape, seed=seed)
    return jax.tree.map(shape, params, is_leaf=is_quantized)


def chain(rate, *, floor=0.0, p_scale=None, weight_decay=None, mask=None, **direction):
    seed = direction.get("seed", 0)
    decay = []
    if weight_decay is not None:
        decay = [
            transforms.add_decayed_log_weights(weight_decay, mask=mask, floor=floor)
        ]
    return optax.chain(
        madax.scale_by_second_moment(**direction),
        optax.clip(10.0),
        *decay,
        optax.scale_by_learning_rate(rate),
        madax.scale_by_sign_log(floor=floor),
        madax.clip_log_weights(p_scale),
        madax.lns_quantize(seed=seed),
    )


matrices = lambda tree: jax.tree.map(lambda w: w.ndim > 1, tree, is_leaf=is_quantized)
OPTIONS = {
    "default": {},
    "all": {
        "b1": 0.9,
        "moment_format": MomentFormat(8),
        "floor": 0.5,
        "p_scale": 1.0,
        "weight_decay": 0.3,
        "mask": matrices,
        "seed": 7,
    },
}


def after_steps(tx, params, **extra_args):
    step = jax.jit(lambda g, s, p: tx.update(g, s, p, **extra_args))
    state = tx.init(params)
    for seed in range(3):
        updates, state = step(gradients(params, seed), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.filterwarnings("ignore:.*beyond p_scale")
@pytest.mark.parametrize("name", mostly_nightly(OPTIONS, "all"))
def test_madam_gives_the_bits_of_a_chain_of_the_transforms(name):
    rate = optax.linear_schedule(0.1, 0.01, 5)
    params = mixed()
    found, state = after_steps(madax.madam(rate, **OPTIONS[name]), params)
    expected, parts = after_steps(chain(rate, **OPTIONS[name]), params)
    assert different(found, expected) == []
    assert different((state.count, *state.direction), tuple(parts[0])) == []
    assert different(state.geometry, parts[-2]) == []
    assert any(np.any(np.asarray(found[k] != params[k])) for k in params)


def test_counts_and_sizes_are_in_the_state_once():
    params = mixed()
    state = madax.madam(0.1, b1=0.9, moment_format=MomentFormat(8)).init(params)
    leaves = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    names = [jax.tree_util.keystr(path, simple=True) for path in leaves]
    others = [x for x in names if "mu" not in x and "nu" not in x and "window" not in x]
    assert others == ["count", "geometryrms0", "geometrypeak0", "geometrybound"]
    assert state.geometry.bound.shape == (3,)


# --- extra arguments ------------------------------------------------------------------


def test_extra_arguments_of_other_transforms_change_nothing():
    params = mixed()
    for tx in (madax.madam(0.1), chain(0.1), madax.muon_madam(0.1), madax.muon(0.1)):
        plain = after_steps(tx, params)
        assert different(after_steps(tx, params, count=7, layer=3), plain) == []
        other, _ = after_steps(tx, params, madax_layer=3)
        assert np.any(other["log"].codes != plain[0]["log"].codes)


# --- arguments that do nothing --------------------------------------------------------


def codes_alone():
    params = mixed()
    return {name: params[name] for name in ("log", "symlog")}


MAKE = [madax.madam, madax.muon_madam, papers.bbit_madam, papers.madam]


@pytest.mark.parametrize("make", MAKE)
def test_a_warning_names_arguments_that_do_nothing_on_codes(make):
    known = {"p_scale": 2.0, "floor": 0.5, "zero_init_scale": 0.2}
    given = {k: v for k, v in known.items() if k in inspect.signature(make).parameters}
    with pytest.warns(UserWarning) as record:
        make(**given).init(codes_alone())
    (warning,) = record
    assert warning.filename == __file__
    names, text = str(warning.message).split(": ")[0], str(warning.message)
    assert set(names.split(", ")) == given.keys()
    assert "does nothing on codes" in text


def test_no_warning_where_they_do_something_or_are_defaults():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in MAKE:
            make().init(codes_alone())
        madax.muon_madam(floor=np.float32(1), zero_init_scale=0.1).init(codes_alone())
        madax.madam(floor=1.0).init(mixed())
        optax.inject_hyperparams(madax.muon_madam)().init(codes_alone())
        # The parts that layerwise shows.
        for part in ("ends", "layers"):
            madax.madam(floor=1.0).init({part: codes_alone()})
    with pytest.warns(UserWarning, match="floor: does nothing"):
        madax.madam(floor=1.0).init({"ends": codes_alone(), "layers": codes_alone()})


# --- signatures -----------------------------------------------------------------------

ROOMS = (optimizers, papers, transforms)
PUBLIC = {
    f"{room.__name__}.{x}": getattr(room, x) for room in ROOMS for x in room.__all__
}


@pytest.mark.parametrize("name", PUBLIC)
def test_hints_of_public_names_resolve(name):
    hints = typing.get_type_hints(PUBLIC[name])
    if inspect.isfunction(PUBLIC[name]):
        named = inspect.signature(PUBLIC[name]).parameters.keys()
        assert hints.keys() == named | {"return"}


def test_aliases_share_names_and_defaults():
    """All but the rate, floor and b1, which are of each rule."""
    order = """learning_rate madam_learning_rate b1 b2 p_scale g_bound direction
    matrices floor zero_init_scale weight_decay mask moment_format rounding
    seed""".split()  # noqa: SIM905
    madam, muon = (
        inspect.signature(make).parameters for make in (madax.madam, madax.muon_madam)
    )
    assert list(muon) == order
    of_matrices = {"madam_learning_rate", "direction", "matrices"}
    assert list(madam) == [name for name in order if name not in of_matrices]
    own = {"learning_rate", "b1", "floor"}
    assert all(madam[x].default == muon[x].default for x in madam.keys() - own)
    assert (muon["learning_rate"].default, muon["floor"].default) == (0.03, 1.0)
    for make in (madax.madam, madax.muon_madam, papers.bbit_madam, papers.lns_madam):
        first, *others = inspect.signature(make).parameters.values()
        assert first.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert all(x.kind is inspect.Parameter.KEYWORD_ONLY for x in others)
        assert first.annotation == optax.ScalarOrSchedule
