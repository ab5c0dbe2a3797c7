"""What models of others do on codes: a table of what their tests found."""

import json
import re
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

import pandas as pd
import tyro

from benchmarks.lib import records
from benchmarks.lib.style import Report, markdown

# Tests, and the columns of the table.
COLUMNS = {
    "float_step": "float step",
    "codes": "codes, to the bit",
    "trainer": "its loop",
    "layerwise": "by layers",
    "checkpoint": "checkpoint",
}
ABSENT = "not here"  # How a test begins to say that a package is missing.


def others(
    found: Annotated[list[Path], tyro.conf.Positional],
    out: Path = Path("benchmarks/results/others"),
) -> None:
    """Make the table of models of others from what their tests found.

    Args:
        found: Files of pytest's --junitxml, of any environments. A model that they
            tested replaces its record; the other records stay.
        out: Folder: others.jsonl and .md.
    """
    raw = records.file(out, "others")
    for run in runs_in(found):
        records.remove(raw, lambda old, model=run["model"]: old["model"] == model)
        records.append(raw, run)
    print(others_report(out))


def runs_in(paths: list[Path]) -> list[records.Record]:
    """Returns a record for each model that the tests in some files of JUnit built."""
    runs: dict[str, records.Record] = {}
    for path in paths:
        for case in ElementTree.parse(path).iter("testcase"):
            named = re.fullmatch(r"test_(\w+)\[(.+)\]", case.get("name", ""))
            fault = next((x for x in case if x.tag in ("failure", "error")), None)
            skipped = case.find("skipped")
            why = "" if skipped is None else skipped.get("message", "")
            if named is None or why.startswith(ABSENT):
                continue
            run = runs.setdefault(named[2], {"model": named[2], "why": {}})
            run[named[1]] = "failed" if fault is not None else "no" if why else "yes"
            if why:
                run["why"][named[1]] = why
            for entry in case.iter("property"):
                run[entry.get("name")] = json.loads(entry.get("value", "null"))
    # A model that could not be built has no versions; make says that it failed.
    return [run for run in runs.values() if "versions" in run]


def others_table(runs: pd.DataFrame) -> str:
    """Returns a Markdown table of models, and below it why a cell is empty."""
    reasons: list[str] = []
    rows = []
    for run in runs.sort_values("model", key=_source_first).to_dict("records"):
        cells = {}
        for test, column in COLUMNS.items():
            cells[column] = run[test]
            if run[test] == "no":
                reason = run["why"][test]
                reasons += [reason] * (reason not in reasons)
                cells[column] = f"no ({reasons.index(reason) + 1})"
        right = run["leaves"] if run["axes"] == "yes" else "failed"
        rows.append(
            {
                "model": run["model"],
                "leaves with the axes of its program": f"{right}",
                "parameters in codes": f"{100 * run['fraction']:.1f} %",
                **cells,
            }
        )
    versions = sorted({x for run in runs["versions"] for x in run.items()})
    made = ", ".join(f"{name} {version}" for name, version in versions)
    notes = "".join(f"{i}. {reason}\n" for i, reason in enumerate(reasons, 1))
    return f"{markdown(rows)}\n\n{notes}\nWith {made}.\n"


def _source_first(models: pd.Series) -> pd.Series:
    return models.map(lambda name: tuple(reversed(name.split(" of "))))


others_report = Report("others", others_table)
