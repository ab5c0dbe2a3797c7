"""The benchmarks beside the demo: data files, resuming, tables from records."""

import gzip
import json
import struct

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.accuracy import bits
from benchmarks.data import idx as idx_files
from benchmarks.lib import records
from benchmarks.workloads.fashion_mnist import fashion_mnist


def idx(array):
    header = struct.pack(">HBB", 0, 8, array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    """A data set in the form of Fashion-MNIST, of squares in ten places."""
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 256), ("t10k", 64)):
        labels = rng.integers(0, 10, n).astype(np.uint8)
        images = rng.integers(0, 30, (n, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 6, 4:24] = 200
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        with gzip.open(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(idx(labels))
    return tmp_path


def test_idx_files_are_read_plain_and_gzipped(folder):
    images = idx_files.read_idx(folder / "train-images-idx3-ubyte")
    assert images.shape == (256, 28, 28) and images.dtype == np.uint8
    labels = idx_files.read_idx(folder / "t10k-labels-idx1-ubyte.gz")
    assert labels.shape == (64,) and labels.max() == 9
    (x, y) = fashion_mnist("mlp", folder).train
    assert x.shape == (256, 28, 28, 1) and abs(float(x.mean())) < 1e-3
    assert y.shape == (256,)


GOOD = idx(np.arange(12, dtype=np.uint8).reshape(3, 4))
DAMAGED = {
    "empty": (b"", "not an IDX file"),
    "html": (b"<html>not found", "not an IDX file"),
    "floats": (b"\0\0\x0d\x01" + b"\0" * 8, "not an IDX file"),
    "no shape": (GOOD[:7], "not an IDX file"),
    "cut short": (GOOD[:-1], r"holds 11 values, but its header says \(3, 4\)"),
    "too long": (GOOD + b"\0", r"holds 13 values"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named_with_their_fault(tmp_path, name):
    data, message = DAMAGED[name]
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte.*{message}"):
        idx_files.read_idx(path)


def test_truncated_gzip(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(GOOD)[:-9])
    with pytest.raises(ValueError, match=r"x\.gz is damaged"):
        idx_files.read_idx(path)


def test_missing_data_says_how_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist"):
        fashion_mnist("mlp", tmp_path)
    monkeypatch.setattr(idx_files, "DEBIAN", tmp_path / "nowhere")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist"):
        fashion_mnist("mlp")


@pytest.mark.skipif(
    not idx_files.DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed"
)
def test_files_of_debian_are_found():
    workload = fashion_mnist("cnn")
    assert workload.train[0].shape == (60_000, 28, 28, 1)
    assert np.bincount(workload.train[1]).tolist() == [6000] * 10


@pytest.mark.nightly
def test_bits_resumes_and_its_table_matches_the_records(
    folder, tmp_path, monkeypatch, capsys
):
    rows = [bits.Storage("float32", "-"), bits.Storage("log 8", "stochastic")]
    monkeypatch.setattr(bits, "STORAGES", rows)
    out = tmp_path / "out"
    command = ["bits", "--profile", "smoke", "--data", str(folder), "--out", str(out)]
    main(command)
    raw = out / "bits.jsonl"
    lines = raw.read_text().splitlines()
    assert len(lines) == 4
    assert {json.loads(line)["grid"] for line in lines} == {
        "None",
        repr(bits.FORMATS["log 8"]),
    }

    # What a kill leaves behind: the records so far. Only the rest is run.
    raw.write_text("\n".join(lines[:3]) + "\n")
    main(command)
    resumed = raw.read_text().splitlines()
    assert resumed[:3] == lines[:3] and len(resumed) == 4
    assert json.loads(resumed[3])["accuracy"] == json.loads(lines[3])["accuracy"]

    table = (out / "bits.md").read_text()
    assert table.strip() == bits.bits_table(records.read(raw))
    median = 100 * json.loads(lines[0])["accuracy"]
    assert f"{median:.2f}" in table
    assert (out / "bits.png").stat().st_size > 10_000


def test_a_row_cut_short_is_completed_by_seed(tmp_path):
    raw, settings = tmp_path / "runs.jsonl", {"optimizer": "madam", "grid": None}
    assert records.find(raw, settings) == []
    for seed in (0, 2):
        records.append(raw, settings | {"seed": seed})
    records.append(raw, settings | {"seed": 1, "optimizer": "adam"})
    assert [run["seed"] for run in records.find(raw, settings)] == [0, 2]
    raw.write_text(raw.read_text() + '{"torn":')
    records.remove(raw, lambda run: run["seed"] in (0, 1))
    assert records.read(raw)["seed"].to_list() == [2]
    records.remove(tmp_path / "missing.jsonl", lambda run: True)


@pytest.mark.nightly
def test_stall_and_lns_run_from_the_command_line(tmp_path, capsys):
    main(["stall", "--out", str(tmp_path)])
    runs = records.read(tmp_path / "stall.jsonl").set_index(["storage", "rate"])
    share = runs["share"].unstack("storage")
    assert (share.pop("bfloat16, nearest")[share.index < 1e-3] == 0).all()
    np.testing.assert_allclose(share, 1, atol=0.05)
    main(["lns", "--smoke", "--out", str(tmp_path)])
    accuracy = records.read(tmp_path / "lns.jsonl").groupby("arithmetic")["accuracy"]
    assert accuracy.median()["8-bit LNS"] > 0.8
