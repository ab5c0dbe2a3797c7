"""Settings are judged on the workload that did not choose them; factors, moments."""

import itertools

import numpy as np
import pandas as pd
import pytest
from helpers import mostly_nightly

from benchmarks.__main__ import main
from benchmarks.accuracy import bounds, choose, moments
from benchmarks.lib.contender import Contender, hyperparameters


def cells(errors):
    """Of {(workload, optimizer, rate): ratio}."""
    rows = [(*key, ratio) for key, ratio in errors.items()]
    return pd.DataFrame(rows, columns=["workload", *choose.SETTING, "ratio"])


def test_a_setting_is_chosen_without_the_workload_that_judges_it():
    # The first and second workload are each better at what the other two want less.
    errors = {("a", 1): 1.0, ("a", 2): 2.0, ("b", 1): 9.0, ("b", 2): 1.0}
    errors |= {("c", 1): 2.0, ("c", 2): 1.5}
    table = cells({(w, "x", rate): ratio for (w, rate), ratio in errors.items()})
    found = choose.left_out(table, {"x": [("x", 1), ("x", 2)], "one": [("x", 1)]})
    found = found.set_index(["group", "workload"])
    assert found.loc["x", "rate"].to_dict() == {"a": 2, "b": 1, "c": 2}
    assert found.loc["x", "ratio"].to_dict() == pytest.approx(
        {"a": 2, "b": 9, "c": 1.5}
    )
    assert found.loc["one", "ratio"].to_dict() == pytest.approx(
        {"a": 1, "b": 9, "c": 2}
    )


def test_settings_without_some_workload_are_not_chosen():
    table = cells({("a", "x", 1): 1.0, ("a", "x", 2): 5.0, ("b", "x", 2): 5.0})
    assert choose.left_out(table, {"x": [("x", 1), ("x", 2)]})["rate"].tolist() == [
        2,
        2,
    ]


def test_groups_of_optimizers_and_the_table():
    """Optimizer i is at every rate i + 1 times off, but Adam's default is perfect."""
    runs = [
        {"workload": workload, "optimizer": name, "rate": rate, "seed": seed}
        | {"error": (1 if (name, rate) == ("adam", 0.001) else i + 1) * scale}
        | {"diverged": False}
        for (workload, scale), (i, (name, row)), seed in itertools.product(
            {"a": 1.0, "b": 7.0}.items(), enumerate(choose.CONTENDERS.items()), range(3)
        )
        for rate in row.rates
    ]
    _, chosen = choose.judged(pd.DataFrame(runs))
    mean = choose.means(chosen)
    ours = [i for i, name in enumerate(choose.CONTENDERS) if "madam" in name]
    assert mean["any of madax, float32"] == pytest.approx(ours[0] + 1)
    assert mean["adam"] == mean["adam, not tuned"] == mean["any other, float32"] == 1
    text = choose.choose_table(pd.DataFrame(runs))
    assert "| adam                  | 12      | 0.001 (2 of 2) " in text
    assert len({len(row.rates) for row in choose.CONTENDERS.values()}) == 1


def test_the_interval_matches_a_normal_mean():
    rng = np.random.default_rng(1)
    logs = rng.normal(size=400)
    low, high = np.log(choose.interval(np.exp(logs)))
    width = 1.96 * logs.std() / 20
    assert [low, high] == pytest.approx([logs.mean() - width, logs.mean() + width], 0.1)


def test_a_warm_up_is_of_a_tenth_and_then_a_cosine():
    rates = {}
    row = Contender(lambda rate: rates.setdefault("it", rate))
    for schedule in ("warm-up", "cosine", "constant"):
        rates.clear()
        row.transform(hyperparameters({"rate": 2.0, "schedule": schedule}), 100)
        found = [float(rates["it"](count)) for count in (0, 4, 9, 50, 100)]
        cosine = [1 + np.cos(np.pi * count / 100) for count in (0, 4, 9, 50, 100)]
        want = {
            "warm-up": np.multiply(cosine, [0.1, 0.5, 1, 1, 1]),
            "cosine": cosine,
            "constant": [2.0] * 5,
        }[schedule]
        np.testing.assert_allclose(found, want, atol=1e-6)


def test_a_lifted_bound_is_compared_with_the_bound_on_all():
    errors = {"all bounded": 2.0, "matrices bounded": 1.5, "none bounded": np.inf}
    errors |= {"8 bits, all bounded": 4.0, "8 bits, matrices bounded": 5.0}
    runs = [
        {"workload": "a", "optimizer": name, "rate": 0.01, "seed": seed}
        | {"error": error, "diverged": bool(np.isinf(error))}
        for (name, error), seed in itertools.product(errors.items(), range(3))
    ]
    table = bounds.bounds_table(pd.DataFrame(runs))
    row = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    assert row[2:4] == ["2 (2 to 2)", "-25.0 %: 1.5 (1.5 to 1.5)"]
    assert row[4].startswith("diverged")
    assert row[5:] == ["4 (4 to 4)", "+25.0 %: 5 (5 to 5)"]


@pytest.mark.parametrize("name", mostly_nightly(moments.HARD, "one constant gradient"))
def test_moments_of_sixteen_bits_are_hardly_off(name):
    found = moments.off(name, 16, 1000)
    before = slice(0, 25)  # Behind a jump directions differ for some steps.
    np.testing.assert_allclose(found["mean"][before], 1, atol=2e-3)
    assert max(found["spread"][before]) < 0.01


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("command", "workloads", "files"),
    [
        ("choose", ("mlp", "gru"), ("choose.jsonl", "choose.md", "choose.png")),
        ("why", ("mlp",), ("why.jsonl", "why.md")),
        ("bounds", ("mlp",), ("bounds.jsonl", "bounds.md")),
        ("moments", ("mlp", "gru"), ("hard.md", "hard.png", "moments.md")),
    ],
)
def test_from_the_command_line(tmp_path, command, workloads, files):
    options = ["--profile", "smoke", "--workloads", *workloads]
    main([command, *options, "--out", str(tmp_path)])
    for name in files:
        assert (tmp_path / name).stat().st_size > 100
