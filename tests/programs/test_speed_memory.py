"""The benchmarks of speed and memory: they run, count rightly, and can be rebuilt."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks import RESULTS
from benchmarks.lib import records
from benchmarks.models import decoder, gpt2
from benchmarks.systems import memory, ordinary, speed

FEW = ("adam", "native 8, 8-bit v")


@pytest.fixture
def few(monkeypatch):
    rows = {name: speed.TIMED[name] for name in FEW}
    monkeypatch.setattr(speed, "TIMED", rows)
    monkeypatch.setattr(memory, "TIMED", rows)
    monkeypatch.setattr(memory, "LAYERWISE", FEW)


@pytest.mark.parametrize(("size", "millions"), [("124M", 124.44), ("12M", 11.64)])
def test_the_tree_matches_gpt2(size, millions):
    shapes = jax.eval_shape(lambda: gpt2.init(gpt2.SIZES[size], jax.random.key(0)))
    leaves = jax.tree.leaves(shapes)
    assert len(leaves) == 148
    assert sum(x.size for x in leaves) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.nightly
def test_the_network_is_causal_and_starts_at_chance():
    size = gpt2.SIZES["tiny"]
    model = gpt2.GPT2(size, gpt2.nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 33), 0, size.vocabulary)
    first = model(tokens[:, :32])
    later = model(tokens[:, :32].at[:, 20:].set(0))
    np.testing.assert_allclose(first[:, :20], later[:, :20], atol=1e-5)
    assert not np.allclose(first[:, 20:], later[:, 20:])
    loss = gpt2.loss(size, gpt2.init(size, jax.random.key(0)), tokens)
    assert loss == pytest.approx(np.log(size.vocabulary), abs=1)


def test_an_unknown_optimizer_is_refused_and_records_are_kept(tmp_path):
    raw = tmp_path / records.device_name() / "speed.jsonl"
    raw.parent.mkdir()
    raw.write_text("kept")
    message = r"optimizers must be of \['adam', .*\], got \['unknown'\]"
    with pytest.raises(ValueError, match=message):
        speed.speed(tmp_path, optimizers=("adamw", "unknown"))
    assert raw.read_text() == "kept"


@pytest.mark.nightly
def test_the_command_speed_writes_its_records_and_table(few, tmp_path, capsys):
    speed.speed(tmp_path, profile="smoke", optimizers=(FEW[1],))
    (raw,) = tmp_path.rglob("speed.jsonl")
    runs = [json.loads(line) for line in raw.read_text().splitlines()]
    assert [run["leaves"] for run in runs] == [1, 4, 28, 28]
    for run in runs:
        assert run["optimizer"] == FEW[1]
        assert len(run["seconds"]) == len(run["baseline_seconds"]) == 3
        assert min(run["seconds"]) > 0
    # A byte of code and one of v, read and written, and two of gradient.
    assert runs[0]["bytes_per_parameter"] == pytest.approx(6, abs=0.01)
    assert runs[3]["bytes_per_parameter"] is None
    table = (raw.parent / "speed.md").read_text()
    assert table in capsys.readouterr().out
    assert (raw.parent / "speed.png").stat().st_size > 1000


@pytest.mark.nightly
def test_the_command_memory_writes_its_records_and_table(few, tmp_path, capsys):
    memory.memory(tmp_path, profile="smoke")
    (raw,) = tmp_path.rglob("memory.jsonl")
    runs = [json.loads(line) for line in raw.read_text().splitlines()]
    assert [run["layer by layer"] for run in runs] == [False, False, True, True]
    adam, native = runs[:2]
    size = sum(
        x.size
        for x in jax.tree.leaves(gpt2.init(gpt2.SIZES["tiny"], jax.random.key(0)))
    )
    assert adam["params"] == 4 * size
    assert adam["state"] == pytest.approx(8 * size, rel=1e-3)
    assert native["params"] + native["state"] < 2.5 * size
    for run in runs:
        assert run["peak"] >= run["arguments"] >= run["params"] + run["state"]
    assert (raw.parent / "memory.md").read_text() in capsys.readouterr().out


@pytest.mark.nightly
def test_layer_by_layer_no_more_than_a_layer_is_decoded():
    deep = dataclasses.replace(gpt2.SIZES["tiny"], layers=12, width=64)
    row = speed.TIMED["native 8, 8-bit v"]
    whole, by_layer = (
        memory.footprint(make(row, deep, 1, 16))["temporaries"]
        for make in (gpt2.whole_step, gpt2.layerwise_step)
    )
    assert by_layer < 0.7 * whole


@pytest.mark.nightly
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="drops barriers")
def test_an_ordinary_step_on_codes_takes_few_bytes():
    for name, least in (
        ("the same in bfloat16", False),
        ("madam, codes, 8-bit moments", True),
    ):
        used = ordinary.footprint(name, remat=True, least=least)
        assert used["peak"] <= 5 * decoder.count(ordinary.SIZE)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("speed", speed.speed_table),
        ("memory", memory.memory_table),
        ("ordinary", ordinary.ordinary_table),
    ],
)
def test_committed_tables_match_the_records(name, table):
    found = sorted(RESULTS.rglob(f"{name}.jsonl"))
    assert found
    for raw in found:
        written = raw.with_suffix(".md").read_text(encoding="utf-8")
        assert written == table(records.read(raw))
