"""The pages: examples run, links lead somewhere, and nothing is left out."""

import importlib
import inspect
import operator
import re
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import needs_flax_0_12, needs_hijax, run_examples

import madax

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(DOCS)): path.read_text(encoding="utf-8")
    for path in sorted(DOCS.rglob("*.md"))
}
EXAMPLES = [name for name, page in PAGES.items() if "```python" in page]
TRAINED = {
    "formats.md",
    "flax.md",
    "layerwise.md",
    "meshes.md",
    "trainers.md",
}  # Have tests of their own.
INCLUDED = {
    (DOCS / name).parent.joinpath(target).resolve()
    for name, page in PAGES.items()
    for target in re.findall(r"```{include} (\S+)", page)
}

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_plain_trees_train_on_two_bytes_a_weight():
    names = run_examples(PAGES["formats.md"])
    params = names["params"]
    assert isinstance(params["kernel"], madax.QuantizedArray)
    assert names["loss"](params, names["x"], names["y"]) < 0.9 * np.log(10)
    stored = sum(x.nbytes for x in jax.tree.leaves((params, names["state"])))
    assert stored < 2.2 * (64 * 10 + 10)


@needs_flax_0_12
def test_a_flax_model_trains_and_is_loaded():
    names = run_examples(PAGES["flax.md"])
    assert names["value"] < 0.9 * names["first"] and np.isfinite(names["linen_value"])
    names["model"].eval()
    assert np.array_equal(names["logits"], names["model"](names["x"]))


@needs_flax_0_12
def test_layers_train():
    names = run_examples(PAGES["layerwise.md"])
    assert names["value"] < 0.9 * np.log(16)


def test_sharded_weights_train():
    names = run_examples(PAGES["meshes.md"])
    assert names["losses"][-1] < 0.1 * names["losses"][0]
    cut = [x for x in jax.tree.leaves((names["params"], names["state"])) if x.ndim > 1]
    cut = [x for x in cut if x.size > 1]  # without scales
    assert len(cut) == 4 and {x.sharding for x in cut} == {names["cut"]}


@needs_hijax
def test_a_loop_of_others_trains():
    names = run_examples(PAGES["trainers.md"])
    assert names["value"] < 0.9 * np.log(4)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in TRAINED])
def test_other_examples_run(name):
    run_examples(PAGES[name])


def test_names_mentioned_exist():
    for name, page in PAGES.items():
        for found in re.findall(r"\bmadax\.(?!css)([A-Za-z][\w.]*\w)", page):
            # Names of hijax need a newer JAX than the oldest.
            found, _, listed = found.partition("hijax.")
            assert not listed or listed.split(".")[0] in madax.hijax.__all__, name
            found = found or "hijax"
            assert operator.attrgetter(found)(madax) is not None, f"{name}: {found}"


def test_the_table_of_defaults_is_right():
    table = (
        PAGES["choosing.md"].partition("Their defaults:\n\n")[2].partition("\n\n")[0]
    )
    head, _, *rows = (
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in table.splitlines()
    )
    assert len(head) == 4 and len(rows) > 5
    for name, *cells in rows:
        for maker, cell in zip(head[1:], cells, strict=True):
            found = inspect.signature(getattr(madax, maker)).parameters.get(name)
            written = "" if found is None else str(found.default).removesuffix(".0")
            assert cell.strip('"') == written, (name, maker)


def test_names_are_read_as_the_table_says():
    table = PAGES["choosing.md"].partition("| names |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) > 7
    for names, sizes, expected in rows:
        shape = tuple(map(int, sizes.split(", ")))
        for name in re.findall(r"`([^`]+)`", names):
            tree = {name: jax.ShapeDtypeStruct(shape, np.float32)}
            report = str(madax.diagnostics.matrices(tree))
            assert report.splitlines()[1].endswith(f"  {expected}"), report


def test_local_links_lead_somewhere():
    pages = PAGES | {
        "../CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    }
    for name, page in pages.items():
        for target in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", page):
            assert (DOCS / name).parent.joinpath(target).exists(), f"{name}: {target}"
    assert all(path.exists() for path in INCLUDED)


def test_every_page_is_in_the_contents():
    contents = set(re.findall(r"^([\w/-]+)$", PAGES["index.md"], re.MULTILINE))
    pages = {name.removesuffix(".md") for name in PAGES} - {"index"}
    books = {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert contents == pages | books


def test_every_public_name_is_on_an_api_page():
    api = "".join(page for name, page in PAGES.items() if name.startswith("api/"))
    named = re.findall(r"^\.\. auto\w+:: madax\.([\w.]+)$", api, re.MULTILINE)
    public = {name for name in madax.__all__ if not inspect.ismodule(vars(madax)[name])}
    for room in ("optimizers", "transforms", "papers", "wrappers", "formats"):
        for name in getattr(madax, room).__all__:
            if getattr(madax, name, None) is not getattr(getattr(madax, room), name):
                public.add(f"{room}.{name}")
    for room in ("diagnostics", "hijax", "trainers"):
        public |= {f"{room}.{name}" for name in getattr(madax, room).__all__}
    assert sorted(named) == sorted(public)


def test_every_room_is_on_the_map():
    _, rooms = PAGES["how-it-is-built.md"].split("## The rooms")
    paths = Path(madax.__file__).parent.iterdir()
    there = {path.stem for path in paths if path.is_dir() or path.suffix == ".py"}
    named = set(re.findall(r"^\| `(\w+)` \|", rooms, re.MULTILINE))
    assert named | {"__init__"} == there - {"__pycache__"}


def test_every_table_of_results_is_on_a_page():
    tables = (ROOT / "benchmarks" / "results").rglob("*.md")
    assert {path for path in tables if "smoke" not in path.parts} <= INCLUDED


def test_the_version_is_the_same_wherever_it_is_written():
    read = {
        "pyproject.toml": r'^version = "(.*)"$',
        "CITATION.cff": r"^version: (.*)$",
        "CHANGELOG.md": r"^## \[([\d.]+)\] - (.*)$",
    }
    found = {
        name: re.findall(pattern, (ROOT / name).read_text(encoding="utf-8"), re.M)[0]
        for name, pattern in read.items()
    }
    version, date = found["CHANGELOG.md"]
    assert found["pyproject.toml"] == found["CITATION.cff"] == version
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"date-released: {date}\n" in citation


def test_a_source_tree_that_is_not_installed_has_a_version(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    known = madax.__version__
    monkeypatch.setattr(metadata, "version", missing)
    assert importlib.reload(madax).__version__ == "0+unknown"
    monkeypatch.undo()
    assert importlib.reload(madax).__version__ == known
