"""The demo at its smoke size, through the command line; and what feeds it."""

import contextlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.__main__ import main
from benchmarks.accuracy.demo import MULTIPLIERS, SMOKE, demo_figure, demo_table
from benchmarks.lib import records
from benchmarks.lib.contender import Contender, points
from benchmarks.lib.optimizers import DEMO, OPTIMIZERS
from benchmarks.lib.train import Budget, train
from benchmarks.workloads import Workload
from benchmarks.workloads.digits import digits
from benchmarks.workloads.images import conv_as_matmul


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmarks") / "demo"


@pytest.fixture(scope="module")
def printed(out):
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        main(["demo", "--smoke", "--out", str(out)])
    return stdout.getvalue()


@pytest.fixture(scope="module")
def runs(out, printed):
    return records.read(out / "demo.jsonl")


@pytest.mark.nightly
def test_records_hold_every_run(runs):
    keys = ["optimizer", "multiplier", "seed"]
    assert not runs.duplicated(keys).any()
    assert len(runs) == len(DEMO) * len(MULTIPLIERS) * SMOKE.seeds
    for run in runs.itertuples():
        assert run.rate == DEMO[run.optimizer].rate * run.multiplier
        assert run.curve["step"] == [20, 40, 60, 80]
        assert run.curve["accuracy"][-1] == run.accuracy
        assert run.settings["steps"] == SMOKE.steps
        assert {"jax", "optax", "flax", "madax", "python"} <= run.environment.keys()
    assert (runs[["step_us", "bytes_per_weight"]] > 0).all(axis=None)


@pytest.mark.nightly
def test_table_and_figure_agree_with_records(out, printed, runs):
    for name in DEMO:
        chosen = (runs["optimizer"] == name) & (runs["multiplier"] == 1)
        accuracy = 100 * runs[chosen]["accuracy"]
        row = next(line for line in printed.splitlines() if f"| {name} " in line)
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[3] == f"{accuracy.median():.1f}"
        assert cells[4] == f"{accuracy.min():.1f} to {accuracy.max():.1f}"
    assert str(out / "demo.png") in printed
    assert str(out / "demo.jsonl") in printed
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.nightly
def test_madam_learns_at_its_default_rate(runs):
    chosen = runs[(runs["optimizer"] == "madam") & (runs["multiplier"] == 1)]
    assert chosen["accuracy"].min() > 0.5  # Chance is 0.1.
    for curve in chosen["curve"]:
        assert curve["loss"][-1] < curve["loss"][0]


@pytest.mark.nightly
def test_madam_state_is_one_moment(runs):
    stored = runs.groupby("optimizer")["bytes_per_weight"].first()
    assert stored["madam"] == pytest.approx(8, rel=0.01)
    assert stored["adam"] == pytest.approx(12, rel=0.01)


@pytest.mark.nightly
def test_seeds_and_rates_change_runs(runs):
    curves = [json.dumps(curve["loss"]) for curve in runs["curve"]]
    assert len(set(curves)) == len(runs)


def test_diverged_runs_stay_and_are_marked(tmp_path):
    budget = Budget(steps=40, evaluations=2, batch_size=4, seeds=3)
    sgd = OPTIMIZERS["sgd momentum"]
    rates = [sgd.rate * multiplier for multiplier in (0.1, 1, 1e4)]
    raw = tmp_path / "runs.jsonl"
    cost = {"step_us": 1.0, "bytes_per_weight": 8.0}
    for run in train(parabola(), sgd, points(rates), budget, label="sgd"):
        # The table wants a multiplier of 10; the rate to diverge is far beyond.
        place = {
            "optimizer": "sgd",
            "multiplier": (0.1, 1, 10)[rates.index(run["rate"])],
        }
        records.append(raw, place | run | cost)
    runs = records.read(raw)
    far = runs["multiplier"] == 10
    assert runs[far]["diverged"].all() and not runs[~far]["diverged"].any()
    assert np.isnan(runs[far]["curve"].iloc[0]["loss"][-1] or np.nan)
    assert "NaN" not in raw.read_text()
    assert "(3 of 3 diverged)" in demo_table(runs)
    demo_figure(runs).savefig(tmp_path / "demo.png")


def test_all_runs_may_diverge():
    budget = Budget(steps=40, evaluations=1, batch_size=4, seeds=2)
    runs = train(
        parabola(), OPTIMIZERS["sgd momentum"], points([1e4]), budget, label="sgd"
    )
    assert all(run["diverged"] for run in runs)


def test_same_seed_same_run_whatever_the_rates():
    budget = Budget(steps=10, evaluations=1, batch_size=4, seeds=2)
    sgd = OPTIMIZERS["sgd momentum"]
    alone = train(parabola(), sgd, points([0.01]), budget, label="")
    among = train(parabola(), sgd, points([0.1, 0.01]), budget, label="")
    for a, b in zip(alone, among[1::2], strict=True):
        assert (a["seed"], a["rate"]) == (b["seed"], b["rate"])
        np.testing.assert_allclose(a["curve"]["loss"], b["curve"]["loss"], rtol=1e-5)


def test_rate_decays_by_a_cosine_to_zero():
    # The gradient is 1, so the weight falls by the sum of the rates.
    falling = Workload(
        "falling",
        train=(jnp.zeros(8), jnp.zeros(8)),
        test=None,
        init=lambda key: jnp.zeros(()),
        loss=lambda weight, batch: weight,
        metric=lambda weight, test: {"accuracy": -weight},
    )
    budget = Budget(steps=4, evaluations=4, batch_size=4, seeds=1)
    (run,) = train(
        falling, Contender(optax.sgd, (1.0,)), points([2.0]), budget, label=""
    )
    rates = np.diff(run["curve"]["accuracy"], prepend=0)
    np.testing.assert_allclose(rates, 1 + np.cos(np.pi * np.arange(4) / 4), rtol=1e-5)


def test_budget_rejects_uneven_evaluations():
    with pytest.raises(ValueError, match="evaluations must divide steps"):
        Budget(steps=10, evaluations=3)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_convolution_matches_lax(padding, strides):
    keys = jax.random.split(jax.random.key(0))
    images = jax.random.normal(keys[0], (2, 8, 7, 3))
    kernel = jax.random.normal(keys[1], (3, 2, 3, 5))
    expected = jax.lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    actual = conv_as_matmul(images, kernel, strides, padding)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_digits_are_standardised_and_balanced():
    images, labels = digits().train
    assert images.shape == (1347, 8, 8, 1)
    assert abs(images.mean()) < 1e-5 and images.std() == pytest.approx(1, abs=1e-4)
    assert np.ptp(np.bincount(labels)) <= 10


def parabola():
    """Fits a line; the accuracy is whether the slope is near."""
    x = jnp.linspace(-1, 1, 8)

    def loss(params, batch):
        x, y = batch
        return jnp.mean((params["slope"] * x - y) ** 2)

    return Workload(
        "parabola",
        (x, 2 * x),
        jnp.array([2.0]),
        jax.jit(lambda key: {"slope": jax.random.normal(key)}),
        loss,
        lambda params, test: {"accuracy": (abs(params["slope"] - test) < 0.1).mean()},
    )
