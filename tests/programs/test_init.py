"""``init`` of many leaves, as in many layers: programs are shared by shape."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import madax

pytestmark = pytest.mark.usefixtures("quick_compiles")

MAKERS = {
    "madam": madax.madam().init,
    "clipped": madax.madam(p_scale=8.0, floor=1.0, weight_decay=0.1).init,
    "muon_madam": madax.muon_madam(moment_format=madax.MomentFormat(8)).init,
    "muon": madax.muon(moment_format=madax.MomentFormat(8)).init,
    "codes": lambda x: madax.quantize_params(x, madax.SymlogFormat(8)),
}


def leaves(count):
    rng = np.random.default_rng(0)
    shapes = [(17, 16) if i % 2 else (19,) for i in range(count)]
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def programs(jaxpr):
    """The operations in each program that is called, by its identity."""
    found = {}
    for eqn in jaxpr.eqns:
        for called in (x for x in eqn.params.values() if hasattr(x, "jaxpr")):
            found[id(called)] = len(called.jaxpr.eqns)
            found |= programs(called.jaxpr)
    return found


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_ten_times_the_leaves_of_two_shapes_need_no_more_programs(make):
    """As one program of all leaves a thousand took 112 seconds, and Adam 0.6."""
    few, many = (jax.make_jaxpr(make)(leaves(n)).jaxpr for n in (30, 300))
    assert sorted(programs(many).values()) == sorted(programs(few).values())
    assert len(many.eqns) < 7 * 300


def test_sizes_of_hundreds_of_leaves():
    params = leaves(300)
    exact = [np.sqrt(np.mean(np.square(np.float64(w)))) for w in params]
    rms0s = optax.tree.get_all_with_path(MAKERS["madam"](params), "rms0")
    for _, rms0 in rms0s:
        np.testing.assert_allclose(rms0, exact, rtol=1e-6)
    assert rms0s


def test_only_leaves_that_are_clipped_are_looked_at():
    params = {f"w{i}": jnp.ones(4) for i in range(3)}
    params["w1"] = jnp.array([1.0, 9.0, 1.0, 1.0])
    with pytest.warns(UserWarning, match=r"params\['w1'\] \(25 %\): this"):
        madax.madam(p_scale=1.5).init(params)
