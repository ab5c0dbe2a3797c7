"""The benchmarks of whole models: sizes, shape and loss of the network, what fits."""

import dataclasses
import json
from math import prod

import jax
import numpy as np
import optax
import pandas as pd
import pytest

import madax
from benchmarks import RESULTS
from benchmarks.__main__ import main
from benchmarks.accuracy import llama, llama_contenders, llama_report, smollm
from benchmarks.compilers import chips, newton_schulz
from benchmarks.data.text import text
from benchmarks.lib import records
from benchmarks.models import decoder
from benchmarks.systems import fit, large, layerwise

pytestmark = pytest.mark.usefixtures("quick_compiles")


def tokens(size, batch=2, length=24):
    shape = (batch, length + 1)
    return jax.random.randint(jax.random.key(1), shape, 0, size.vocabulary)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Llama-2 7B", 6_738_415_616),
        ("Llama-3 8B", 8_030_261_248),
        ("Llama-2 13B", 13_015_864_320),
        ("CodeLlama 34B", 33_743_970_304),
        ("Llama-2 70B", 68_976_648_192),
    ],
)
def test_models_have_the_parameters_of_those_published(name, count):
    assert decoder.count(decoder.SIZES[name]) == count


@pytest.mark.nightly
def test_pieces_of_attention_and_of_the_vocabulary_are_the_whole(monkeypatch):
    size = decoder.SIZES["tiny"]
    params = decoder.init(size, jax.random.key(0))
    batch = tokens(size)

    def value_and_grads():
        return jax.jit(
            jax.value_and_grad(lambda p: decoder.whole_loss(size, p, batch))
        )(params)

    whole = value_and_grads()
    assert whole[0] == pytest.approx(np.log(size.vocabulary), abs=1)
    monkeypatch.setattr(decoder, "QUERIES", 8)
    monkeypatch.setattr(decoder, "LOGITS", 48 * 64)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        value_and_grads(),
        whole,
    )

    x = decoder.embed(params["ends"], batch)
    for i in range(size.layers):
        x = decoder.layer(size, jax.tree.map(lambda w: w[i], params["layers"]), x)  # noqa: B023
    logits = decoder._normalised(x, params["ends"]["norm"]) @ params["ends"]["head"].T
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    assert whole[0] == pytest.approx(float(expected.mean()), rel=1e-5)
    np.testing.assert_allclose(
        decoder.logits(size, params, batch[:, :-1]), logits[:, -1], atol=1e-4
    )


@pytest.mark.nightly
def test_the_network_is_causal():
    size = decoder.SIZES["tiny"]
    w = jax.tree.map(lambda w: w[0], decoder.init(size, jax.random.key(0))["layers"])
    x = jax.random.normal(jax.random.key(2), (1, 24, size.width))
    changed = decoder.layer(size, w, x.at[:, 20:].set(0))
    first = decoder.layer(size, w, x)
    np.testing.assert_allclose(changed[:, :20], first[:, :20], atol=1e-5)
    assert not np.allclose(changed[:, 20:], first[:, 20:])


def test_rates_are_tried_until_the_best_is_between_two(tmp_path, monkeypatch):
    raw = tmp_path / "llama.jsonl"
    row = llama_contenders.Row(
        llama_contenders.adamw, (0.001, 0.002, 0.003, 0.004, 0.005)
    )
    monkeypatch.setattr(llama, "CONTENDERS", {"row": row})

    def runs(best, rates):
        budget = dataclasses.replace(llama.PROFILES["long"], rates=rates)
        source = f"{best}, {rates}"
        for settings in llama._tuning(raw, source, "row", budget):
            # As of a run that diverged: no loss.
            loss = None if settings["rate"] == 0.005 else abs(settings["rate"] - best)
            records.append(raw, settings | {"loss": loss})
            yield settings["rate"], settings["seed"]

    seeds = lambda rate: [(rate, 1), (rate, 2)]
    down = [(0.002, 0), (0.003, 0), (0.001, 0)]
    assert list(runs(0.001, 2)) == down + seeds(0.001)
    assert list(runs(0.002, 2)) == down + seeds(0.002)
    up = [(0.002, 0), (0.003, 0), (0.004, 0), (0.005, 0)]
    assert list(runs(0.004, 2)) == up + seeds(0.004)
    assert list(runs(0.004, 1)) == [(0.003, 0), *seeds(0.003)]
    assert not list(runs(0.004, 2))


def test_what_is_no_matrix_has_a_rate_that_is_tried_last(tmp_path, monkeypatch):
    raw, best = tmp_path / "llama.jsonl", {"rate": 0.002, "other": 0.02}
    row = llama_contenders.Row(
        llama_contenders.clipped_muon, (0.001, 0.002, 0.003), others=(0.01, 0.02)
    )
    monkeypatch.setattr(llama, "CONTENDERS", {"row": row})
    budget = dataclasses.replace(llama.PROFILES["quick"], rates=3)
    found = []
    for settings in llama._tuning(raw, "text", "row", budget):
        loss = sum(abs(settings[k] / best[k] - 1) for k in best)
        records.append(raw, settings | {"loss": loss})
        found.append((settings["rate"], settings["other"], settings["seed"]))
    rates = [(rate, 0.01, 0) for rate in row.rates]
    assert found == [*rates, (0.002, 0.02, 0), (0.002, 0.02, 1), (0.002, 0.02, 2)]


def test_losses_are_compared_seed_by_seed():
    """Which seeds are hard is no matter. The baseline is AdamW at its best."""
    losses = {
        llama_report.BASELINE: [1.5, 2.5, 4.5],
        f"{llama_report.BASELINE}, b2": [1.0, 2.0, 4.0],
    }
    losses |= {"Muon on 8 bits": [1.0, 1.0, 1.0], "row": [1.01, 2.02, 4.04]}
    run = {"source": "text", "rate": 0.1, "parameters": 1, "bytes_per_parameter": 2}
    run["other"] = None
    run["budget"] = dataclasses.asdict(llama.PROFILES["quick"])
    table = llama_report.llama_table(
        pd.DataFrame(
            [
                run | {"name": name, "seed": seed, "loss": loss}
                for name in losses
                for seed, loss in enumerate(losses[name])
            ]
        )
    )
    row = next(line for line in table.splitlines() if line.startswith("| row"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[5:10] == ["2.0200", "1.0100 to 4.0400", "3", "+1.0 %", "+102.0 %"]


def test_clips_are_compared_with_the_exact_one_seed_by_seed():
    losses = {"the exact norm": [1.0, 2.0], "the last norm": [1.0, 2.016]}
    losses["norms of layers"] = [1.02, 2.04]
    run = {"source": "text", "rate": 0.002, "parameters": 1}
    run["budget"] = dataclasses.asdict(llama.PROFILES["quick"])
    runs = [
        run | {"name": f"{llama_report.CLIPPED_BY}{name}", "seed": seed, "loss": loss}
        for name in losses
        for seed, loss in enumerate(losses[name])
    ]
    *_, exact, last, layer = llama_report.clip_table(pd.DataFrame(runs)).splitlines()
    assert exact.split("|")[5].strip() == ""
    assert [x.strip() for x in last.split("|")[5:7]] == ["+0.40 ± 0.40 %", "met"]
    assert [x.strip() for x in layer.split("|")[5:7]] == ["+2.00 ± 0.00 %", "missed"]


def test_texts_are_bytes_of_which_the_last_tenth_is_held_out(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(range(100)))
    for source, least in (("pydoc", 300_000), ("stdlib", 3_000_000), (str(file), 100)):
        data = text(source)
        assert len(data.train) + len(data.test) >= least
        assert len(data.test) == pytest.approx(len(data.train) / 9, abs=1)
    assert list(data.test) == list(range(90, 100))
    with pytest.raises(ValueError, match=r"'pydoc', 'stdlib'.*got 'bible'"):
        text("bible")


@pytest.mark.nightly
def test_flash_adamw_takes_the_steps_of_its_package():
    flashoptim = pytest.importorskip("flashoptim_jax")
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (64, 40)).astype(jax.numpy.bfloat16)}
    tx = llama_contenders._flash_adamw(0.01)
    flash = flashoptim.flash_adamw(0.01, weight_decay=0.1, fused=False)
    state, expected, kept = tx.init(params), params, flash.init(params)
    for _ in range(3):
        grads = jax.tree.map(lambda w: w / 100, expected)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        expected, kept = flash.step(expected, kept, grads)
        np.testing.assert_array_equal(*map(np.asarray, (params["w"], expected["w"])))


@pytest.mark.nightly
def test_llama_runs_resumes_and_learns(tmp_path, monkeypatch, capsys):
    names = ("AdamW float32", "madam 8 bits")
    monkeypatch.setattr(
        llama, "CONTENDERS", {name: llama.CONTENDERS[name] for name in names}
    )
    file = tmp_path / "text"
    file.write_bytes(b"to be or not to be, that is the question. " * 200)
    run = lambda: llama.llama(tmp_path, profile="smoke", text=(str(file),))
    run()
    raw = tmp_path / "llama.jsonl"
    lines = raw.read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    assert [r["name"] for r in runs] == list(names)
    assert runs[0]["bytes_per_parameter"] == pytest.approx(12, abs=0.1)
    assert runs[1]["bytes_per_parameter"] < 2.1
    assert runs[1]["loss"] < np.log(256) - 1
    assert len(runs[1]["sample"]) > 20
    raw.write_text(lines[0] + "\n")
    monkeypatch.setattr(llama, "train", lambda **settings: runs[1])
    run()
    again = [json.loads(line) for line in raw.read_text().splitlines()]
    assert again[0] == runs[0] and again[1]["loss"] == runs[1]["loss"]
    assert len(again) == 2
    assert (tmp_path / "llama.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "llama.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="rows must be of"):
        llama.llama(tmp_path, rows=("adam",))


@pytest.mark.nightly
def test_layerwise_is_timed_against_the_ordinary_step(tmp_path, monkeypatch):
    names = ("optax.adam float32", layerwise.REFERENCE)
    monkeypatch.setattr(
        layerwise, "CONTENDERS", {name: layerwise.CONTENDERS[name] for name in names}
    )
    layerwise.layerwise(tmp_path, profile="smoke")
    (raw,) = tmp_path.rglob("layerwise.jsonl")
    runs = [json.loads(line) for line in raw.read_text().splitlines()]
    assert [run["optimizer"] for run in runs] == list(names)
    for timed in ("seconds", "ordinary_seconds", "reference_seconds"):
        assert [len(run[timed]) for run in runs] == [2, 2]
    assert names[0] in (raw.parent / "layerwise.md").read_text()


# --- which model fits -----------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("way", ["one byte", "two bytes", "layerwise", "adam"])
def test_train_steps_of_fit_are_as_named(way):
    """On the devices at hand; other chips need the packages of ``compilers``."""
    job = fit.Job("tiny", "H100", way, length=32, chips=2)
    step, args = fit.train_step(job, jax.devices())
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()
    used = chips.footprint(compiled)
    size = decoder.SIZES["tiny"]
    count = decoder.count(size)
    # Tables have moments anyway.
    tables = 2 * size.vocabulary * size.width / count
    kept = {"adam": 12, "one byte": 1 + tables}.get(way, 2)
    assert 2 * used["arguments"] / count == pytest.approx(kept, rel=0.1)
    assert used["peak"] >= used["arguments"]
    if way != "adam":
        sent = chips.gathered(compiled.as_text())
        assert sent["s8"] >= 256 * 64 and sent.get("bf16", 0) == 0


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("chip", "way", "most"),
    [("H100", "one byte", 80.0e9), ("H200", "two bytes", 2.2 * 68_976_648_192)],
)
def test_seventy_billion_parameters_fit_one_gpu(tmp_path, chip, way, most):
    if chips.compiler(chip) is None:
        pytest.skip(f"no compiler for {chip}: pip install '.[compilers]'")
    raw = tmp_path / "fit.jsonl"
    fit._in_its_own_process(fit.Job("Llama-2 70B", chip, way, 2048), raw)
    (run,) = records.read(raw).to_dict("records")
    # Nothing is copied, such as a stack of codes, which would be 19 GB.
    assert run["peak"] <= most
    kept = {"one byte": 1.06, "two bytes": 2.01}[way]
    assert run["arguments"] <= kept * run["parameters"]


def test_what_does_not_fit_is_read_off_the_error():
    error = RuntimeError(
        "Ran out of memory. Used 20.50G of 15.75G hbm. Exceeded by ..."
    )
    assert chips.needed(error) == int(20.5 * 2**30)
    assert chips.needed(RuntimeError("Used up")) is None


def test_a_row_has_the_peaks_of_all_chips():
    run = {"model": "tiny", "way": "one byte", "length": 64, "chips": 1}
    run |= {"parameters": 1000, "bytes_per_parameter": 1.2, "fits": True}
    run |= {"arguments": 1100}
    runs = [
        run | {"chip": "H100", "memory": 8e10, "peak": 2e9},
        run | {"chip": "TPU v5e", "memory": 1.6e10, "peak": 1.7e10, "fits": False},
        run | {"chip": "H100", "memory": 8e10, "peak": 4e9, "way": "two bytes"},
    ]
    lines = fit.fit_table(pd.DataFrame(runs)).splitlines()
    cells = [[c.strip() for c in x.split("|")[1:-1]] for x in lines if "| tiny" in x]
    assert [row[1:] for row in cells] == [
        [fit.WAYS["one byte"], "1 x 64", "1.10", "1.20", "17.00: too many", "2.00"],
        [fit.WAYS["two bytes"], "1 x 64", "1.10", "1.20", "", "4.00"],
    ]
    (head,) = (x for x in lines if x.startswith("| model"))
    assert head.index("TPU v5e, 16.0") < head.index("H100, 80.0")
    assert all(any(name in x for x in lines) for name, *_ in fit.PAPERS)


def test_longer_sequences_than_one_that_does_not_fit_are_left_out(tmp_path):
    raw = tmp_path / "fit.jsonl"
    job = {"model": "tiny", "chip": "H100", "way": "two bytes", "chips": 1}
    records.append(raw, job | {"length": 64, "fits": True})
    records.append(raw, job | {"length": 128, "fits": False})
    too_long = lambda n: fit._is_too_long(raw, fit.Job("tiny", "H100", length=n))
    assert [too_long(n) for n in (64, 128, 256)] == [False, False, True]


# --- the orthogonal directions --------------------------------------------------------


def test_operations_of_directions_are_those_of_the_formula():
    size = decoder.SIZES["tiny"]
    wide, kv = size.width, size.kv_heads * (size.width // size.heads)
    matrices = [(wide, wide)] * 2 + [(kv, wide)] * 2 + [(wide, size.hidden)] * 3
    # Of each step the Gram matrix, its square, and the product with the matrix.
    once = [4 * m**2 * n + 2 * m**3 for m, n in matrices]
    found = [newton_schulz.operations(size, way) for way in ("one byte", "layerwise")]
    assert found[0] - found[1] == 5 * size.layers * sum(once)


@pytest.mark.nightly
def test_a_gpu_keeps_one_narrow_matrix_between_steps(tmp_path):
    if chips.compiler("H100") is None:
        pytest.skip("no compiler for H100: pip install '.[compilers]'")
    newton_schulz.newton_schulz(tmp_path, model="GPT-2 124M", chips=("H100",))
    runs = records.read(tmp_path / "newton_schulz.jsonl")
    assert runs["shape"].map(tuple).to_list() == [(768, 768)] * 2 + [(768, 3072)] * 2
    assert runs["count"].to_list() == [4, 4, 2, 2]
    pairs = runs.to_dict("records")
    for wide, narrow in zip(pairs[::2], pairs[1::2], strict=True):
        assert narrow["bytes"] <= 0.6 * wide["bytes"]
        assert narrow["temporaries"] <= 0.55 * wide["temporaries"]
        # Two bytes for each element of two matrices, and of two Gram matrices.
        assert narrow["temporaries"] <= 2.1 * (2 * prod(narrow["shape"]) + 2 * 768**2)


# --- large models ---------------------------------------------------------------------


@pytest.mark.nightly
def test_codes_made_a_layer_at_a_time_match_the_whole():
    """Other random numbers, but the same shapes and sizes, different in each layer."""
    size, key = decoder.SIZES["tiny"], jax.random.key(0)
    made = jax.jit(lambda key: large._parameters(size, "layerwise", key))(key)
    store = fit.CONTENDERS["layerwise"].store_stack
    whole = jax.jit(lambda key: store(decoder.init(size, key)))(key)
    assert jax.tree.structure(made) == jax.tree.structure(whole)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(whole), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    made, whole = (madax.dequantize_params(t) for t in (made, whole))
    for name, w in made["layers"].items():
        rms = [np.sqrt(np.mean(np.square(t["layers"][name]))) for t in (made, whole)]
        assert rms[0] == pytest.approx(rms[1], rel=0.05)
        assert "norm" in name or not np.array_equal(w[0], w[1])


@pytest.mark.nightly
def test_large_runs_each_way_once(tmp_path, capfd):
    command = ["large", "--profile", "smoke", "--out", str(tmp_path)]
    main(command)
    (raw,) = tmp_path.rglob("large.jsonl")
    runs = records.read(raw)
    assert runs["way"].to_list() == list(fit.WAYS)
    # The first loss is the loss of a network before training.
    for losses in runs["losses"]:
        assert losses[0] == pytest.approx(np.log(256), abs=1)
        assert np.isfinite(losses).all()
    assert (raw.parent / "large.png").stat().st_size > 1000
    before = raw.read_text()
    main(command)
    assert raw.read_text() == before
    assert "optax.adamw mixed precision" in capfd.readouterr().out


def test_committed_tables_match_the_records():
    tables = {
        "fit": fit.fit_table,
        "large": large.large_table,
        "layerwise": layerwise.layerwise_table,
        "newton_schulz": newton_schulz.newton_schulz_table,
        "llama": llama_report.llama_table,
        "smollm": smollm.smollm_table,
    }
    for name, table in tables.items():
        found = sorted((RESULTS / name).rglob(f"{name}.jsonl"))
        assert found
        for raw in found:
            if raw.parent.name == "clip":
                continue
            written = raw.with_suffix(".md").read_text(encoding="utf-8")
            assert written == table(records.read(raw))
    clips = RESULTS / "llama" / "clip"
    table = llama_report.clip_table(records.read(clips / "llama.jsonl"))
    assert (clips / "clip.md").read_text(encoding="utf-8") == table
