"""Every workload at its smoke size; the data sets, whole and damaged."""

import functools
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_nightly

from benchmarks.data import cifar, idx, images
from benchmarks.data.photo import photo
from benchmarks.data.text import text
from benchmarks.lib.contender import points
from benchmarks.lib.optimizers import OPTIMIZERS
from benchmarks.lib.profiles import TASKS
from benchmarks.lib.train import Budget, train
from benchmarks.workloads.gan import _frechet


@functools.cache
def smoke(name):
    return TASKS["smoke"][name].make(None)


@pytest.mark.parametrize("name", mostly_nightly(TASKS["smoke"], "mlp"))
def test_every_workload_learns(name):
    task = TASKS["smoke"][name]
    workload = smoke(name)
    batch = task.budget.batch_size
    budget = Budget(steps=60, evaluations=2, batch_size=batch, seeds=1)
    still, run = train(
        workload, OPTIMIZERS["adam"], points([0.0, 0.03]), budget, label=name
    )
    score = workload.measure.name
    assert run["curve"][score][-1] == run[score]
    assert run["error"] == workload.measure.error(run[score])
    assert run["error"] < 0.95 * still["error"]
    # The loss of two players, and of a policy at other states each time, may rise.
    if name not in ("gan", "policy"):
        assert run["curve"]["loss"][-1] < run["curve"]["loss"][0]
    sign = 1 if workload.measure.better == "higher" else -1
    assert sign * run[score] > sign * still[score]


def test_a_deep_task_is_the_coordinate_workload():
    workload = smoke("coordinates")
    assert len(workload) == 1
    features, colours = workload.train
    assert features.shape == (128, 128) and colours.shape == (128, 3)
    held_out, _ = workload.test[0]
    assert not (held_out[:, None] == features[None]).all(-1).any()


def test_frechet_distance_of_known_gaussians():
    mean1, mean2 = jnp.zeros(3), jnp.array([1.0, 2.0, 2.0])
    cov = jnp.diag(jnp.array([1.0, 4.0, 9.0]))
    assert _frechet(mean1, cov, mean1, cov) == pytest.approx(0, abs=1e-4)
    assert _frechet(mean1, cov, mean2, cov) == pytest.approx(9, rel=1e-4)
    # Of diagonal ones, the squared distance of the standard deviations.
    assert _frechet(mean1, cov, mean1, 4 * cov) == pytest.approx(14, rel=1e-4)
    assert _frechet(mean1, 4 * cov, mean2, cov) == pytest.approx(23, rel=1e-4)


def test_digits_are_shrunk_and_standardised():
    data = images("digits", shrink=2, held_out=100)
    assert data.shape == (4, 4, 1) and data.classes == 10
    assert data.name == "digits 4x4" and len(data.test[0]) == 100
    assert abs(float(data.train[0].mean())) < 1e-4
    with pytest.raises(ValueError, match=r"shrink must divide .* 8x8, got 3"):
        images("digits", shrink=3)


def test_text_of_pydoc_is_held_out_by_position():
    data = text("pydoc")
    assert data.vocabulary == 256 and data.token == "byte"
    assert len(data.train) > 300_000
    assert len(data.test) == pytest.approx(len(data.train) / 9, rel=1e-3)


def test_wikitext_from_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"wiki\.train\.tokens is missing"):
        text("wikitext-2", tmp_path)
    (tmp_path / "wiki.train.tokens").write_text(" a b \n a c \n", encoding="utf-8")
    (tmp_path / "wiki.test.tokens").write_text("c a\n", encoding="utf-8")
    data = text("wikitext-2", tmp_path)
    assert data.train.tolist() == [0, 1, 2, 0, 3, 2] and data.test.tolist() == [3, 0, 2]
    assert data.vocabulary == 4


def test_the_photo_is_the_middle_of_the_picture():
    places, colours = photo("china.jpg", 16, shrink=4)
    assert places.shape == (16, 16, 2) and colours.shape == (16, 16, 3)
    assert places.min() == -1 and places.max() == 1
    assert 0 <= colours.min() < colours.max() <= 1
    with pytest.raises(ValueError, match="has only"):
        photo("china.jpg", 500)


def write_cifar(folder, name, examples=5):
    """Writes the data set with recognisable pixels; returns the labels of a file."""
    train, test, labels = cifar.FILES[name]
    numbers = np.arange(examples) % 10
    for file in train + test:
        rows = np.zeros((examples, labels + cifar.PIXELS), np.uint8)
        rows[:, labels - 1] = numbers
        rows[:, labels : labels + 1024] = 200  # Red.
        rows[:, labels] = 7  # The first pixel.
        (folder / file).write_bytes(rows.tobytes())
    return numbers


@pytest.mark.parametrize("name", cifar.FILES)
def test_cifar_from_files(tmp_path, name):
    (tmp_path / name).mkdir()
    numbers = write_cifar(tmp_path / name, name)
    files = len(cifar.FILES[name][0])
    arrays = cifar.cifar(name, tmp_path / name)
    pixels, labels = arrays["train"]
    assert pixels.shape == (5 * files, 32, 32, 3) and pixels.dtype == np.uint8
    assert labels.tolist() == numbers.tolist() * files
    assert pixels[0, 0, 0].tolist() == [7, 0, 0]
    assert pixels[0, 31, 31].tolist() == [200, 0, 0]
    data = images(name, tmp_path)
    assert data.shape == (32, 32, 3) and len(data.test[0]) == 5


DAMAGED = {
    "empty": (b"", "has 0 bytes, not a whole number"),
    "cut short": (bytes(3072), "has 3072 bytes, not a whole number of images of 3073"),
    "html": (b"<html>404</html>", "has 16 bytes"),
    "labels": (bytes([10]) + bytes(3072), "has the label 10, but there are 10 classes"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_cifar_files_are_named_with_their_fault(tmp_path, name):
    content, message = DAMAGED[name]
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data_batch_1\.bin {message}"):
        cifar.read_cifar(path, 1)


def test_missing_cifar_says_how_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"data_batch_1\.bin is missing.*https"):
        images("cifar-10", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match=r"cifar-100 is not here .*https"):
        images("cifar-100")
    with pytest.raises(FileNotFoundError, match=r"WikiText-2 .*wiki\.train\.tokens"):
        text("wikitext-2")
    with pytest.raises(ValueError, match="must be one of"):
        images("cifar-11")


@pytest.mark.skipif(
    not idx.DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed"
)
def test_fashion_mnist_of_debian_shrunk():
    data = images("fashion-mnist", shrink=2, held_out=500)
    assert data.shape == (14, 14, 1) and len(data.train[0]) == 60_000
    assert np.bincount(data.train[1]).tolist() == [6000] * 10
    # The mean of squares of 2 by 2 pixels.
    raw, _ = idx.fashion_mnist(None)["test"]
    squares = raw[:500, ..., 0].reshape(500, 14, 2, 14, 2).mean((2, 4))
    correlation = np.corrcoef(squares.ravel(), np.asarray(data.test[0]).ravel())
    assert correlation[0, 1] == pytest.approx(1, abs=1e-6)


def test_truncated_idx_in_a_folder(tmp_path):
    (tmp_path / "fashion-mnist").mkdir()
    header = struct.pack(">HBBIII", 0, 8, 3, 10, 28, 28)
    path = tmp_path / "fashion-mnist" / "train-images-idx3-ubyte"
    path.write_bytes(header + bytes(100))
    with pytest.raises(ValueError, match="holds 100 values"):
        images("fashion-mnist", tmp_path)


@pytest.mark.nightly
def test_batches_are_noise_of_the_step_and_seed():
    workload = smoke("gan")
    draws = [
        workload.batch(workload.train, jnp.arange(4), jax.random.key(i))[2]
        for i in (0, 1, 0)
    ]
    assert (draws[0] == draws[2]).all() and (draws[0] != draws[1]).any()
