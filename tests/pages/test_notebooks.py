"""The notebooks are their scripts, run to the end, on the records as they are."""

from pathlib import Path

import jupytext
import pytest

from benchmarks import RESULTS

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.py"))
TABLES = {
    "bits": ["bits/bits.md"],
    "depth": ["quick/depth.md"],
    "learning_rate_sensitivity": ["quick/lr-sensitivity.md", "quick/no-tuning.md"],
}


def read(name):
    return jupytext.read(NOTEBOOKS / name)


def outputs(notebook):
    return [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]


def test_there_are_notebooks_and_each_has_its_script():
    assert len(NAMES) == 6
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_script(name):
    script, notebook = (
        [(cell.cell_type, cell.source) for cell in read(f"{name}{ending}").cells]
        for ending in (".py", ".ipynb")
    )
    assert notebook == script


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_was_run_from_its_first_cell_to_its_last(name):
    notebook = read(f"{name}.ipynb")
    counts = [c.execution_count for c in notebook.cells if c.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    found = outputs(notebook)
    assert not any(output.output_type == "error" for output in found)
    assert not any(output.get("name") == "stderr" for output in found)
    assert any("image/png" in output.get("data", {}) for output in found)


@pytest.mark.parametrize("name", TABLES)
def test_tables_in_notebooks_are_the_committed_ones(name):
    shown = [
        o.get("data", {}).get("text/markdown") for o in outputs(read(f"{name}.ipynb"))
    ]
    for table in TABLES[name]:
        assert (RESULTS / table).read_text(encoding="utf-8").strip() in [
            text.strip() for text in shown if text
        ]
