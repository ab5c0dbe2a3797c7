"""Data sets as Hugging Face's library hands them out, in the schemas of the Hub's."""

import datasets
import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from benchmarks.data import cifar, idx, images
from benchmarks.data.text import text


def pictures(shape, examples=20):
    pixels = np.random.default_rng(0).integers(0, 256, (examples, *shape))
    return pixels.astype(np.uint8)


def hub(monkeypatch, expected, **columns):
    """Makes the library load these columns, as (values, type), under that name."""
    data = {name: values for name, (values, _) in columns.items()}
    types = Features({name: kind for name, (_, kind) in columns.items()})
    split = Dataset.from_dict(data, types)

    def load_dataset(*asked):
        assert asked == expected
        return DatasetDict({"train": split, "test": split})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def images_of(pixels):
    return [PIL.Image.fromarray(x) for x in pixels], Image()


def numbers(count, classes):
    return np.arange(count) % classes, ClassLabel(num_classes=classes)


def test_fashion_mnist(monkeypatch, tmp_path):
    monkeypatch.setattr(idx, "DEBIAN", tmp_path / "not there")
    pixels = pictures((28, 28))
    hub(
        monkeypatch,
        ("zalando-datasets/fashion_mnist",),
        image=images_of(pixels),
        label=numbers(20, 10),
    )
    arrays = idx.fashion_mnist(None)
    np.testing.assert_array_equal(arrays["train"][0], pixels[..., None])
    data = images("fashion-mnist")
    assert data.shape == (28, 28, 1) and data.classes == 10
    assert data.test[1].tolist() == [i % 10 for i in range(20)]


@pytest.mark.parametrize(
    ("name", "repository", "column"),
    [
        ("cifar-10", "uoft-cs/cifar10", "label"),
        ("cifar-100", "uoft-cs/cifar100", "fine_label"),
    ],
)
def test_cifar(monkeypatch, name, repository, column):
    pixels, labels = pictures((32, 32, 3)), numbers(20, 20)
    columns = {"img": images_of(pixels), column: labels}
    hub(monkeypatch, (repository,), **columns)
    found, classes = cifar.cifar(name, None)["test"]
    np.testing.assert_array_equal(found, pixels)
    assert classes.tolist() == list(range(20))


def test_wikitext(monkeypatch):
    lines = (["", " = Title = ", " the cat sat "], Value("string"))
    hub(monkeypatch, ("Salesforce/wikitext", "wikitext-2-v1"), text=lines)
    data = text("wikitext-2")
    # <eos>; = Title = <eos>; the cat sat <eos>
    assert data.train.tolist() == [0, 1, 2, 1, 0, 3, 4, 5, 0]
    assert data.vocabulary == 6 and data.token == "word"


def test_a_data_set_out_of_reach_is_named(monkeypatch, tmp_path):
    def load_dataset(*asked):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=r"no route .* pass the folder .*hub"):
        images("cifar-10")
