"""The README's examples run, and the names in it exist."""

import inspect
import operator
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import needs_flax_0_12, run_examples

import madax

pytestmark = pytest.mark.usefixtures("quick_compiles")

NAMESPACES = ("transforms", "papers", "wrappers", "formats", "diagnostics")
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@needs_flax_0_12
def test_examples_run_and_train():
    names = run_examples(README)
    assert names["loss"](names["params"]) < 1e-3
    assert isinstance(names["model"].hidden.kernel.get_value(), madax.QuantizedArray)
    assert names["nnx_loss"](names["model"], names["x"], names["y"]) < 0.9 * np.log(10)
    assert np.isfinite(names["value"])


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_results_match_the_records():
    root = Path(__file__).parents[2]
    rows = re.findall(
        r"^\| .*\]\((docs/results/.*?)\).*? (\|.*)\|$", README, re.MULTILINE
    )
    assert len(rows) >= 7
    for target, cells in rows:
        page = root / target
        tables = re.findall(r"```{include} (\S+)", page.read_text(encoding="utf-8"))
        text = "".join((page.parent / t).read_text(encoding="utf-8") for t in tables)
        found = [float(number) for number in re.findall(r"\d+\.?\d*", text)]
        for number in re.findall(r"(?<![\w-])\d+\.?\d*", cells):
            digits = len(number.partition(".")[2])
            rounded = {f"{x:.{digits}f}" for x in found}
            assert number in rounded, f"README has {number}, and {target} does not"


def test_names_mentioned_exist():
    for name in re.findall(r"madax\.([\w.]*\w)", README):
        assert operator.attrgetter(name)(madax) is not None, name


def test_every_public_name_is_documented_with_an_example():
    spaces = (madax, *(getattr(madax, name) for name in NAMESPACES))
    for space, name in [(room, name) for room in spaces for name in room.__all__]:
        documented = getattr(space, name)
        is_tuple = hasattr(documented, "_fields")  # of states, and of what is returned
        assert documented.__doc__
        exempt = is_tuple or inspect.ismodule(documented) or name == "Format"
        assert exempt or ">>>" in documented.__doc__, name


def test_local_links_lead_somewhere():
    root = Path(__file__).parents[2]
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / target).exists(), target
