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
    assert isinstance(names["model"].hidden.kernel.get_value(), madax.QuantizedArray)
    assert names["nnx_loss"](names["model"], names["x"], names["y"]) < 0.9 * np.log(10)
    assert np.isfinite(names["value"])


def claims():
    """Rows of the table of results, and items of its list: pages and what is said."""
    results = README.partition("## Results")[2].partition("\n## ")[0]
    items = re.findall(r"^- (.*(?:\n  .*)*)", results, re.MULTILINE)
    for text in [*items, *re.findall(r"^\| (.*)\|$", results, re.MULTILINE)]:
        pages = re.findall(r"\]\((docs/results/[\w-]+\.md)", text)
        if pages:
            # Of a row, the cells after the first.
            yield pages, text.partition("|")[2] or text


def test_results_match_the_records():
    root = Path(__file__).parents[2]
    found = list(claims())
    assert len(found) >= 5
    for pages, text in found:
        tables = "".join(
            (root / page).parent.joinpath(table).read_text(encoding="utf-8")
            for page in pages
            for table in re.findall(
                r"```{include} (\S+)", (root / page).read_text(encoding="utf-8")
            )
        )
        numbers = [float(number) for number in re.findall(r"\d+\.?\d*", tables)]
        text = re.sub(r"\]\(.*?\)|`.*?`|\d+(?= (bits|steps)\b)", "", text)
        for number in re.findall(r"(?<![\w-])\d+\.?\d*", text):
            digits = len(number.partition(".")[2])
            rounded = {f"{x:.{digits}f}" for x in numbers}
            assert number in rounded, f"README has {number}, and {pages} do not"


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
