"""Models at scale: trials, the order of runs, the rule, and runs that are cut short."""

import dataclasses
import itertools
import json
import signal
import subprocess
import sys
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from benchmarks.__main__ import main
from benchmarks.accuracy import scale, scale_arms, scale_contenders, scale_report
from benchmarks.accuracy.scale_arms import MODELS
from benchmarks.accuracy.scale_contenders import ADAMW, CONTENDERS, MUON, TRIALS
from benchmarks.data.corpus import Corpus, corpus
from benchmarks.lib import checkpoint, records

pytestmark = pytest.mark.usefixtures("quick_compiles")


def trials(row, loss):
    """What is tried where a function has the losses."""
    tried = {}
    while (values := scale_contenders.next_trial(row, tried)) is not None:
        tried[tuple(values.items())] = loss(**values)
    return list(tried), scale_contenders.best_trial(tried)


@pytest.mark.parametrize("best", [1e-5, 0.0101, 30.0])
@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_has_as_many_trials(name, best):
    row = CONTENDERS[name]
    last = {knob: values[-1] for knob, values in row.knobs.items()}

    def loss(rate, **others):
        away = sum(others[knob] != last[knob] for knob in others)
        return np.log(rate / best) ** 2 + away / 10

    tried, found = trials(row, loss)
    assert len(tried) == len(set(tried)) == TRIALS
    assert {knob: found[knob] for knob in last} == last
    # Each knob has all its values, the others at the best so far.
    for knob, values in row.knobs.items():
        assert {dict(t)[knob] for t in tried} == set(values)


def test_rates_are_doubled_until_the_best_is_between_two():
    row = dataclasses.replace(CONTENDERS[ADAMW], rates=(0.004,), knobs={})
    rates = lambda best: [
        dict(t)["rate"] for t in trials(row, lambda rate: abs(np.log(rate / best)))[0]
    ]
    assert rates(0.0041)[:5] == [0.004, 0.008, 0.002, 0.00566, 0.00476]
    assert rates(0.03)[:6] == [0.004, 0.008, 0.016, 0.032, 0.064, 0.0226]
    # One that diverges has an infinite loss.
    inf = lambda rate: np.inf if rate > 0.001 else -rate
    tried = [dict(t)["rate"] for t in trials(row, inf)[0]]
    assert tried[:5] == [0.004, 0.008, 0.002, 0.001, 0.0005]


@pytest.mark.nightly
@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_takes_a_step_in_its_bytes(name):
    """At a width at which the state of rows and columns is small; tables count."""
    facts = scale._lowered("3M", name, scale_arms.PARTS, False, "float32")[-1]
    expected = {
        ADAMW: 12.0,
        MUON: 8.5,
        "Muon on codes, 2 bytes": 2.1,
        scale_report.TWIN: 8.0,
        "muon_madam float32": 8.0,
        "madax.muon 1 byte": 1.2,
        "muon_madam 1 byte": 1.2,
        "AdamW in 3 bytes, error feedback": 3.0,
        "SinkGD bfloat16": 2.5,
        "FlashAdamW": 5.0,
    }
    found = facts["bytes_per_parameter"]
    assert found == pytest.approx(expected.get(name, 2.0), abs=0.1)


class Records(list):
    """Runs, and what finds them."""

    def find(self, **settings):
        return [run for run in self if settings.items() <= run.items()]


def test_arms_come_in_the_order_that_is_written_down():
    done = Records()

    def some(count):
        found = scale_arms.arms(done.find, ["1M"])
        for arm in itertools.islice(found, count):
            done.append(dataclasses.asdict(arm) | {"loss": arm.values["rate"]})
            yield arm

    first = list(some(3))
    order = [*first, *some(40), *some(10_000)]  # In three sessions.
    assert not list(some(1))
    main, others = scale_contenders.MAIN, scale_contenders.OTHERS
    trial = lambda names: [("0.3M", n, 0) for n in names for _ in range(TRIALS)]
    assert [(a.size, a.name, a.seed) for a in order] == [
        *trial(main),
        *(("1M", name, seed) for seed in range(3) for name in main),
        *trial(others),
        *(("1M", name, 0) for name in others),
    ]
    assert [a.tuned_on for a in order] == [
        None if a.size == "0.3M" else "0.3M" for a in order
    ]
    more = list(scale_arms.arms(done.find, ["1M"], seeds=4))
    assert [(a.name, a.seed) for a in more] == [(name, 3) for name in main]
    # The best trial is judged: here the one with the min rate.
    for arm in order:
        if arm.tuned_on:
            tried = [t.values["rate"] for t in order if t.name == arm.name]
            assert arm.values["rate"] == min(tried)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("0.1M", 0.1e6),
        ("0.3M", 0.3e6),
        ("1M", 1e6),
        ("3M", 3e6),
        ("10M", 10e6),
        ("30M", 30e6),
    ],
)
def test_sizes_are_those_without_tables(name, parameters):
    model = MODELS[name]
    assert model.parameters == pytest.approx(parameters, rel=0.12)
    steps = model.steps(20)
    tokens = steps * model.batch * model.length
    assert steps % scale_arms.PARTS == 0
    assert tokens == pytest.approx(20 * model.parameters, rel=0.03)


def test_a_difference_counts_if_it_is_three_standard_errors():
    base = np.array([2.0, 2.1, 2.2])  # The variance is .01.
    error = (0.02 / 3) ** 0.5
    for gap, counts in ((3.1 * error, True), (-3.1 * error, True), (0.2, False)):
        found = scale_report.difference(base + gap, base)
        assert found.counts == counts
        assert found.percent == pytest.approx(100 * gap / 2.1)
        assert found.error == pytest.approx(100 * error / 2.1)
    assert str(scale_report.difference(base + 0.2, base)).endswith("no difference")
    two = scale_report.difference(base[:2] + 9, base)
    assert not two.counts and str(two).endswith("n = 2")
    assert str(scale_report.difference(base[:1], base)) == "-4.76 %, n = 1"
    assert not scale_report.difference(base, base * np.nan).counts


def run(size, name, seed, loss, tuned_on="0.3M"):
    facts = {"name": "text", "train": 100, "held-out": 10, "held-out bytes": 30}
    return {
        "size": size,
        "name": name,
        "seed": seed,
        "tuned_on": tuned_on,
        "values": {"rate": 0.1 * (seed + 1)},
        "tokens_per_parameter": 20.0,
        "config": dataclasses.asdict(MODELS[size]) | {"dtype": "b", "corpus": facts},
        "parameters": 1e6,
        "bytes_per_parameter": 2.0,
        "peak": 1e6,
        "steps": 50,
        "loss": loss,
        "environment": {"device": "cpu"},
    }


def test_what_loses_is_first(tmp_path):
    two = scale_report.TWO_BYTES
    means = {ADAMW: 2.0, MUON: 1.9, two: 1.95, "madam 2 bytes": 2.1}
    runs = [
        run("0.3M", name, s, loss + s, None)
        for name, loss in means.items()
        for s in (0, 1)
    ]
    assert scale_report._if_judged(pd.DataFrame(runs)).empty
    for size in ("1M", "3M"):
        runs += [
            run(size, name, seed, loss + seed / 1000)
            for name, loss in means.items()
            for seed in range(1 if name == "madam 2 bytes" else 3)
        ]
    runs += [run("3M", "Muon on codes, 2 bytes", 0, None)]
    records.append(tmp_path / "scale.jsonl", *runs)
    table = scale_report.scale_report(tmp_path)
    assert table == (tmp_path / "scale.md").read_text()
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()]
    bars = [row for row in rows if row and row[0].startswith(f"{two} against")]
    assert [(row[0], row[5]) for row in bars] == [
        *[(f"{two} against {MUON}", "missed")] * 2,
        *[(f"{two} against {ADAMW}", "met")] * 2,
    ]
    assert bars[0][3] == "+2.63 ± 0.04 %" and bars[2][3] == "-2.50 ± 0.04 %"
    # A seed that moves both alike hardly moves their ratio.
    assert bars[0][4] == "+2.63 ± 0.00 %" and bars[2][4] == "-2.50 ± 0.00 %"
    last = table[table.index("**3M**") :]
    names = [line.split("|")[1].strip() for line in last.splitlines() if "|" in line]
    lost = ["Muon on codes, 2 bytes", "madam 2 bytes", ADAMW, two, MUON]
    assert names[2:7] == lost
    assert "n = 1" in last and "diverged" in last


def test_a_row_without_the_one_it_is_compared_with_is_reported(tmp_path):
    runs = [run("1M", MUON, seed, 2.0 + seed) for seed in range(3)]
    records.append(tmp_path / "scale.jsonl", *runs)
    assert "3.0000" in scale_report.scale_report(tmp_path)


# --- runs -----------------------------------------------------------------------------


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    tree = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": jnp.array([1.5, -2.0], jnp.bfloat16),
        "c": np.int32(7),
    }
    path = tmp_path / "folder" / "run.npz"
    assert checkpoint.load(path, tree) is None
    checkpoint.save(path, tree, {"parts": 3})
    path.with_suffix(".part").write_bytes(b"torn")
    found, facts = checkpoint.load(path, tree)
    assert facts == {"parts": 3}
    for name, x in tree.items():
        assert found[name].dtype == x.dtype
        np.testing.assert_array_equal(found[name], x)


def test_every_sequence_comes_once_before_one_comes_again():
    model, steps = MODELS["smoke"], scale_arms.PARTS
    count = 90
    train = np.arange(count * model.length + 5, dtype=np.uint16)
    part = scale._batches(Corpus(train, train, {}), model, steps, seed=1)
    drawn = np.concatenate([part(i) for i in range(steps)]).reshape(
        -1, model.length + 1
    )
    assert (np.diff(drawn.astype(int), axis=1) == 1).all()
    firsts = drawn[:, 0].tolist()
    assert set(Counter(firsts[:count]).values()) == {1}
    assert set(Counter(firsts[count : 2 * count]).values()) == {1}
    assert firsts[:count] != firsts[count : 2 * count]
    with pytest.raises(ValueError, match="31 tokens to train on, too few"):
        scale._batches(Corpus(train[:31], train, {}), model, steps, seed=1)
    with pytest.raises(ValueError, match="31 tokens held out, fewer than a batch"):
        scale._tests(Corpus(train, train[:31], {}), model)


KILLED = """
import os, pathlib, signal
from benchmarks.__main__ import main
from benchmarks.accuracy import scale
from benchmarks.lib import checkpoint

scale.KEPT_EVERY, save = 0, checkpoint.save

def save_or_die(path, tree, facts):
    if facts["parts"] == 20:  # Killed as it writes.
        path.with_suffix(".part").write_bytes(b"torn")
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, tree, facts)

checkpoint.save = save_or_die
main({command!r})
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(400):
        (texts / f"{i}.txt").write_text(f"{i} to be or not to be, that is it. " * 2)
    corpus(str(texts), tmp_path, vocabulary=(256,))

    def command(out, *more):
        return [
            *("scale", "--out", str(tmp_path / out), "--sizes", "smoke"),
            *("--corpus", str(texts), "--tokens-per-parameter", "0.1"),
            *("--rows", ADAMW, *more),
        ]

    killed = subprocess.run(
        [sys.executable, "-c", KILLED.format(command=command("out"))],
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    raw = tmp_path / "out" / "scale.jsonl"
    assert not raw.exists()
    (kept,) = (tmp_path / "out" / "checkpoints").glob("*.npz")

    # The next session takes it up, and one that is not interrupted agrees.
    begun = []
    train = scale.train

    def one(arm, *args):
        begun.append(arm)
        if len(begun) % 2 == 0:
            return None
        return train(arm, *args)

    monkeypatch.setattr(scale, "train", one)
    for out in ("out", "whole"):
        main(command(out))
    assert not kept.exists()
    resumed, whole = (
        json.loads((tmp_path / out / "scale.jsonl").read_text())
        for out in ("out", "whole")
    )
    assert begun[0] == begun[2] and begun[1] == begun[3]
    assert (
        resumed["curve"]["step"] == whole["curve"]["step"]
        and len(whole["curve"]["loss"]) == 5
    )
    np.testing.assert_allclose(
        resumed["curve"]["loss"], whole["curve"]["loss"], rtol=1e-4
    )
    assert whole["loss"] < np.log(256) - 0.1
    assert whole["bytes_per_parameter"] == pytest.approx(12, abs=0.1)
    assert "the next run begins with Arm(size='smoke'" in capsys.readouterr().out

    # Other tokens are another configuration.
    before = raw.read_text()
    corpus(str(texts), tmp_path, vocabulary=(256,), megabytes=0.02)
    with pytest.raises(ValueError, match=r"runs of smoke whose corpus is.*Nothing was"):
        main(command("out"))
    assert raw.read_text() == before
