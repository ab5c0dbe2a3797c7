"""Muon and muon_madam on six tasks: factors, trials, tables."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from helpers import normal

import madax
from benchmarks.__main__ import main
from benchmarks.accuracy import muons
from benchmarks.accuracy.muons_report import AS_IT_IS, NAMES, muons_table
from benchmarks.accuracy.scale_contenders import (
    MUON,
    MUON_MADAM,
    MUON_MADAM_8,
    ON_CODES,
)
from benchmarks.lib import candidates
from benchmarks.lib.formats import SYMLOG_8
from benchmarks.lib.optimizers import muon
from benchmarks.lib.profiles import TASKS

PARAMS = {
    "hidden": {"kernel": normal(6, 4, scale=0.3), "bias": jnp.zeros(4)},
    "head": {"kernel": normal(4, 3, seed=1, scale=0.5)},
}


def trained(tx, steps=3):
    params, state = PARAMS, tx.init(PARAMS)
    for k in range(steps):
        grads = jax.tree.map(lambda w, k=k: jnp.sin(3 * w + k), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", muons.SIX)
def test_muon_and_muon_madam_read_the_same_matrices(name):
    init = TASKS["smoke"][name].make(None).init
    params = jax.eval_shape(init, jax.random.key(0))
    state = jax.eval_shape(muon(0.1).init, params).inner_states["muon"]
    kept = [x.shape for x in jax.tree.leaves(state.inner_state[0].mu)]
    named = zip(
        jax.tree.leaves(muons.labels(params)), jax.tree.leaves(params), strict=True
    )
    assert kept and kept == [x.shape for label, x in named if label == "matrix"]


def test_the_parts_together_are_muon_madam():
    parts = muons.mixed(
        lambda _: 0.1, other=3.0, matrix=muons._steps(), rest=muons._madam
    )
    whole = muons.ROWS[MUON_MADAM].make(lambda _: 0.1, other=3.0)
    for a, b in zip(
        *(jax.tree.leaves(trained(t)) for t in (parts, whole)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_adam_for_the_rest_leaves_codes_of_matrices_to_muon_madam():
    params = madax.quantize_params(PARAMS, SYMLOG_8)
    grads = jax.tree.map(jnp.sin, PARAMS)
    after = []
    for name in ("Adam for the rest", AS_IT_IS):
        tx = muons.FACTORS[MUON_MADAM_8][name].make(lambda _: 0.1, other=1.0)
        updates, _ = tx.update(grads, tx.init(params), params)
        after.append(optax.apply_updates(params, updates))
    adams, ours = (jax.tree.map(np.asarray, x) for x in after)
    np.testing.assert_array_equal(*(x["hidden"]["kernel"].codes for x in (adams, ours)))
    assert (adams["head"]["kernel"] != ours["head"]["kernel"]).any()


def test_steps_add_below_a_floor_and_keep_their_size():
    w = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    d = jnp.array([[0.3, -0.1], [0.2, -0.4]])
    tx = candidates.floored_steps(optax.identity(), lambda _: 0.1, floor=100.0)
    update, _ = tx.update({"w": d}, tx.init({"w": w}), {"w": w})
    rms = np.sqrt(np.mean(np.square(w)))
    np.testing.assert_allclose(update["w"], -0.1 * rms * d, rtol=1e-6)


def test_muons_rms_is_one_at_full_rank_alone():
    sizes = []
    for rank in (1, 4):
        g = {"w": normal(6, rank) @ normal(rank, 4, seed=2)}
        tx = muons._muons()
        direction, _ = tx.update(g, tx.init(g), g)
        sizes.append(float(jnp.sqrt(jnp.mean(direction["w"] ** 2))))
    assert sizes[0] == pytest.approx(0.5, rel=0.35)
    assert sizes[1] == pytest.approx(1.0, rel=0.35)


@pytest.mark.parametrize(("best", "rates"), [(0.02, 5), (0.16, 7), (0.002, 7)])
def test_trials_go_on_until_the_best_rate_is_inside(monkeypatch, best, rates):
    tried = []

    def run(self, name, row, points, seeds):
        assert seeds == (0,)
        tried.extend(x for x in points if x not in tried)
        losses = [
            np.log(x["rate"] / best) ** 2 + np.log(x["other"] / 0.3) ** 2
            for x in points
        ]
        return losses

    monkeypatch.setattr(muons.Bench, "run", run)
    found = muons.Bench(None, None, None).tuned(MUON, muons.ROWS[MUON])
    assert found["rate"] == pytest.approx(best, rel=0.5) and found["other"] == 0.3
    assert len(tried) == rates + 6
    inside = sorted(x["rate"] for x in tried)
    assert inside[0] < found["rate"] < inside[-1]


def record(task, name, seed, rate, score):
    point = {"rate": rate, "other": 1.0, "seed": seed}
    score = {"metric": "MSE", "MSE": score, "diverged": False}
    return {"workload": task, "optimizer": name} | point | score


def test_the_table_says_what_missed_first():
    means = {"a": (1, 1, 2, 1.005, 1, 1.1), "b": (1, 1, 2, 1.2, 1, 1.1)}
    runs = [
        record(task, name, seed, rate, mean + 0.001 * seed + 3 * (seed == 0))
        for task, found in means.items()
        for (name, mean), seed in itertools.product(
            zip(NAMES, found, strict=True), range(10)
        )
        for rate in ((0.1, 0.2, 0.4) if seed == 0 else (0.2,))
    ]
    runs += [
        record("a", f"{MUON_MADAM}: {change}", seed, rate, factor * rate * (1 + seed))
        for change, factor in ((AS_IT_IS, 1.0), ("decay", 1.5))
        for seed, rate in itertools.product((1, 2), (0.2, 0.1))
    ]
    lines = muons_table(pd.DataFrame(runs)).splitlines()
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert [row[::2] for row in rows[2:4]] == [["b", "the best"], ["a", "the best"]]
    assert rows[2][1].startswith("+19.90 ± ") and rows[2][1].endswith(": missed")
    assert rows[3][1].startswith("+0.50 ± ") and rows[3][1].endswith(": met")
    assert [MUON_MADAM, "decay", "+50.0 ± 0.0 %"] in rows
    assert any("0.2, 1 (3 trials)" in cell for row in rows for cell in row)


@pytest.mark.nightly
def test_from_the_command_line(tmp_path, monkeypatch):
    changes = ("steps add, Adam for the rest", AS_IT_IS)
    few = {MUON_MADAM: {name: muons.FACTORS[MUON_MADAM][name] for name in changes}}
    few[ON_CODES] = {
        "Madam for the rest": muons.FACTORS[ON_CODES]["Madam for the rest"]
    }
    monkeypatch.setattr(muons, "FACTORS", few)
    main(["muons", "--profile", "smoke", "--out", str(tmp_path)])
    table = (tmp_path / "muons.md").read_text()
    assert "steps add, Adam for the rest" in table
    assert (tmp_path / "muons.png").stat().st_size > 10_000
