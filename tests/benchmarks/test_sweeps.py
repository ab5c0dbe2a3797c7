"""Sweeps: resuming after a kill, torn records, and reports from records alone."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optax
import pandas as pd
import pytest
from matplotlib.figure import Figure

from benchmarks import RESULTS
from benchmarks.__main__ import main
from benchmarks.accuracy import lr_sensitivity
from benchmarks.lib import analysis, records
from benchmarks.lib.contender import grid
from benchmarks.lib.optimizers import OPTIMIZERS, UNTUNED
from benchmarks.lib.profiles import TASKS
from benchmarks.lib.train import train

COMMAND = ["lr-sensitivity", "--profile", "smoke", "--workloads", "mlp", "--out"]
RUNS = len(OPTIMIZERS) * 2 * 11 * TASKS["smoke"]["mlp"].budget.seeds


def keys(raw):
    lines = [json.loads(line) for line in raw.read_text().splitlines()]
    return [
        (run["optimizer"], run["schedule"], run["rate"], run["seed"]) for run in lines
    ]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A sweep that was killed after its first optimizer, with a line torn."""
    out = tmp_path_factory.mktemp("killed")
    raw = out / "runs.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *COMMAND, str(out)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (raw.exists() and "\n" in raw.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = raw.read_text()
    with raw.open("a") as file:
        file.write(before.splitlines()[0][:100])
    return raw, before


@pytest.fixture(scope="module")
def resumed(killed):
    raw, before = killed
    main([*COMMAND, str(raw.parent)])
    return raw, before


@pytest.mark.nightly
def test_a_killed_sweep_resumes_and_loses_nothing(resumed):
    raw, before = resumed
    done = before.count("\n")
    assert 0 < done < RUNS
    assert raw.read_text().startswith(before)
    found = keys(raw)
    assert len(found) == len(set(found)) == RUNS


@pytest.mark.nightly
def test_nothing_is_run_twice(resumed, monkeypatch):
    raw, _ = resumed
    content = raw.read_bytes()
    monkeypatch.setattr("benchmarks.lib.sweep.train", None)
    main([*COMMAND, str(raw.parent)])
    assert raw.read_bytes() == content


@pytest.mark.nightly
def test_a_single_missing_run_is_run_again(resumed, tmp_path):
    raw, _ = resumed
    lines = raw.read_text().splitlines(keepends=True)
    lost = json.loads(lines.pop(7))
    (tmp_path / "runs.jsonl").write_text("".join(lines))
    main([*COMMAND, str(tmp_path)])
    again = records.read(tmp_path / "runs.jsonl").iloc[-1]
    assert len(keys(tmp_path / "runs.jsonl")) == RUNS
    assert (again["rate"], again["seed"]) == (lost["rate"], lost["seed"])
    assert again["error"] == pytest.approx(lost["error"], abs=0.02)


@pytest.mark.nightly
def test_records_say_what_ran(resumed):
    runs = records.read(resumed[0])
    run = runs.iloc[0]
    assert run["settings"]["model"]["width"] == 16
    assert run["settings"]["data"] == "digits 8x8"
    assert run["settings"]["steps"] == 30
    assert {"jax", "device", "git"} <= run["environment"].keys()
    assert run["wall_s"] > 0 and run["metric"] == "accuracy"


def test_what_a_benchmark_writes_makes_no_commit_dirty(tmp_path, monkeypatch):
    """A table recorded again was "-dirty", as its records were removed first."""
    folder = tmp_path / "benchmarks"
    (folder / "results").mkdir(parents=True)
    code, raw = folder / "code.py", folder / "results" / "runs.jsonl"
    code.write_text("old")
    raw.write_text("old")
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(records, "__file__", str(folder / "lib" / "records.py"))
    raw.unlink()
    commit = records._git_sha()
    assert commit is not None and len(commit) == 40
    code.write_text("new")
    assert records._git_sha() == f"{commit}-dirty"


@pytest.mark.nightly
def test_reports_match_the_records_to_the_digit(resumed, tmp_path, capsys):
    raw, _ = resumed
    (tmp_path / "runs.jsonl").write_bytes(raw.read_bytes())
    main(["report", "--out", str(tmp_path)])
    for name in ("lr-sensitivity.md", "no-tuning.md"):
        assert (tmp_path / name).exists()
    first = (raw.parent / "lr-sensitivity.md").read_text()
    assert (tmp_path / "lr-sensitivity.md").read_text() == first
    assert (tmp_path / "lr-sensitivity.png").stat().st_size > 10_000
    runs = records.read(raw)
    line = runs[(runs["optimizer"] == "madam") & (runs["schedule"] == "cosine")]
    best = line.groupby("rate")["error"].median()
    assert f"{best.min():.3g} (" in first and f"at {best.idxmin():g} |" in first


def test_committed_tables_match_the_committed_records(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda *args, **options: None)  # Is slow.
    for raw in RESULTS.rglob("*.jsonl"):
        folder = tmp_path / raw.parent.relative_to(RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / raw.name).write_bytes(raw.read_bytes())
    main(["report", "--out", str(tmp_path)])
    tables = sorted(RESULTS.rglob("*.md"))
    assert tables
    for table in tables:
        again = tmp_path / table.relative_to(RESULTS)
        assert again.read_text() == table.read_text()


@pytest.mark.parametrize("name", ["lr-sensitivity", "depth"])
def test_no_committed_best_rate_is_on_the_edge_of_its_grid(name):
    text = (RESULTS / "quick" / f"{name}.md").read_text(encoding="utf-8")
    assert "No best rate is on the edge of the grid." in text


def test_text_of_another_python_is_not_compared(tmp_path, monkeypatch):
    raw = tmp_path / "runs.jsonl"
    records.append(raw, {"source": "pydoc, 2000 words"}, {"source": "wikitext-2"})
    for name in ("pydoc, 2000 words", "wikitext-2"):
        records.check_text(raw, {"source": name}, name)
    monkeypatch.setattr(records.platform, "python_version", lambda: "3.0.0")
    records.check_text(raw, {"source": "wikitext-2"}, "wikitext-2")
    with pytest.raises(ValueError, match=r"not that of Python 3\.0\.0.*--out"):
        records.check_text(raw, {}, "pydoc, 2000 words")


def test_torn_lines_are_dropped(tmp_path):
    raw = tmp_path / "runs.jsonl"
    records.append(raw, {"seed": 0}, {"seed": 1})
    whole = raw.read_text()
    raw.write_text(whole[:-5])
    assert records.read(raw)["seed"].tolist() == [0]
    assert len(records.find(raw, {})) == 1
    records.append(raw, {"seed": 2})
    assert records.read(raw)["seed"].tolist() == [0, 2]
    assert raw.read_text().startswith(whole.splitlines()[0])


def test_grids_go_from_three_decades_below_the_default_rate_to_two_above():
    for row in OPTIMIZERS.values():
        rates = grid(row.rate)
        assert len(rates) == 11 and rates[6] == row.rate
        assert rates[0] == pytest.approx(row.rate / 1000)
        assert rates[-1] == pytest.approx(100 * row.rate)


def cells(*rows):
    names = ["workload", "optimizer", "schedule", "rate", "median"]
    table = pd.DataFrame(rows, columns=names)
    table = table.assign(min=table["median"], max=table["median"])
    best = table.groupby("workload")["median"].min()
    return table.assign(ratio=analysis.ratios(table, best))


def test_best_decades_and_edges():
    table = cells(
        *[("a", "madam", "cosine", r, e) for r, e in ((0.1, 3), (0.01, 2), (0.001, 4))],
        *[("b", "madam", "cosine", r, e) for r, e in ((0.1, 1), (0.01, 2), (0.001, 4))],
        *[("c", "madam", "cosine", r, e) for r, e in ((0.1, 3), (0.01, 2), (0.001, 4))],
        ("c", "madam", "cosine", 0.0316, 1),
    )
    # Half decades do not count as decades.
    best = lr_sensitivity.best_decades(table)
    assert best.to_dict() == {"a": 0.01, "b": 0.1, "c": 0.01}
    text = lr_sensitivity.lr_sensitivity_table(table)
    row = next(line for line in text.splitlines() if "2 of 3 workloads" in line)
    assert [cell.strip() for cell in row.split("|")][3:6] == [
        "0.01",
        "2 of 3 workloads",
        "2 of 3",
    ]
    assert "- b, madam, cosine: 0.1" in text and "- a, madam" not in text


def test_the_papers_numbers_have_madams_optimum_at_one_rate():
    paper = lr_sensitivity.paper_cells()
    madam = lr_sensitivity.best_decades(paper[paper["optimizer"] == "madam"])
    assert madam.to_dict() == dict.fromkeys(lr_sensitivity.PAPER["madam"], 0.01)


def test_regret_is_a_geometric_mean_and_diverged_counts_as_the_cap():
    table = cells(
        ("a", "x", "cosine", 1, 1.0),
        ("a", "y", "cosine", 1, 4.0),
        ("b", "x", "cosine", 1, np.inf),
        ("b", "y", "cosine", 1, 0.5),
    )
    first, second = analysis.regrets(table, ["optimizer"]).to_dict("records")
    assert (first["optimizer"], first["where"]) == ("y", "a")
    assert first["mean"] == pytest.approx(1) and first["worst"] == pytest.approx(3)
    assert first["median"] == pytest.approx(1.5)
    assert second["mean"] == pytest.approx(np.sqrt(analysis.CAP) - 1)


needs_optax_0_2_6 = pytest.mark.skipif(
    "adam_learning_rate" not in inspect.signature(optax.contrib.muon).parameters,
    reason="optax.contrib.muon had one rate for all",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("schedule-free adamw", marks=pytest.mark.nightly),
        pytest.param("muon", marks=(needs_optax_0_2_6, pytest.mark.nightly)),
        pytest.param("cocob", marks=pytest.mark.nightly),
        pytest.param("mechanic adamw", marks=pytest.mark.nightly),
    ],
)
def test_untuned_optimizers_take_steps(name):
    task = TASKS["smoke"]["coordinates"]
    assert len(UNTUNED) == 18
    row = UNTUNED[name]
    points = [{"rate": row.rate, "schedule": s} for s in row.schedules]
    for run in train(task.make(None), row, points, task.budget, label=name):
        assert not run["diverged"]
        assert run["curve"]["loss"][-1] < run["curve"]["loss"][0]
