"""From records to medians: what the tables and figures of all sweeps share."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

# The most that an error over the best counts; a run that diverged counts as much.
CAP = 10.0
REGRET = (
    "How much larger the error is than the least in all records of the workload, "
    "whatever the optimizer and its rate; the median over workloads, the geometric "
    f"mean and the worst. More than {CAP:g} times as large, or diverged, counts as "
    f"{CAP:g} times."
)
DEPTH = "coordinates, depth "


def workloads(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns the records of the workloads proper, without the runs of other depths."""
    return runs[~runs["workload"].str.startswith(DEPTH)]


def medians(
    runs: pd.DataFrame,
    by: Sequence[str],
    *,
    of: str = "error",
    diverged: float = np.inf,
) -> pd.DataFrame:
    """Summarises seeds.

    Args:
      runs: records, as read.
      by: columns that tell apart what is to be summarised, beside ``workload``.
      of: column to summarise.
      diverged: value that a diverged run counts with.

    Returns:
      Columns ``workload``, ``by``, ``median``, ``min`` and ``max``, ``diverged`` and
      ``seeds``, which are counts.
    """
    values = runs[of].astype(float).mask(runs["diverged"].astype(bool), diverged)
    runs = runs.assign(value=values.fillna(diverged))
    return runs.groupby(["workload", *by], sort=False, as_index=False).agg(
        median=("value", "median"),
        min=("value", "min"),
        max=("value", "max"),
        diverged=("diverged", "sum"),
        seeds=("seed", "count"),
    )


def at_best(cells: pd.DataFrame) -> pd.DataFrame:
    """Returns the cell of each workload and optimizer with the least median."""
    return cells.loc[cells.groupby(["workload", "optimizer"])["median"].idxmin()]


def best_errors(runs: pd.DataFrame) -> pd.Series:
    """Returns the least median error on each workload, over all records.

    Args:
      runs: records, as read.
    """
    cells = medians(runs, ["optimizer", "schedule", "rate"])
    return cells.groupby("workload", sort=False)["median"].min()


def ratios(cells: pd.DataFrame, best: pd.Series) -> pd.Series:
    """Returns errors over the best on their workload, ``CAP`` at most."""
    ratio = cells["median"] / cells["workload"].map(best).clip(lower=1e-9)
    return ratio.clip(upper=CAP)


def regrets(cells: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Judges settings that are the same on all workloads, the best first.

    Args:
      cells: with columns ``workload``, ``by`` and ``ratio``.
      by: what makes a setting.

    Returns:
      Columns ``by``; ``mean``, ``median`` and ``worst``, the geometric mean of ratios,
      their median and the largest, less 1; ``where``, the workload of the worst;
      ``workloads``, their number.
    """
    rows = []
    for key, group in cells.groupby(list(by), sort=False):
        rows.append(
            {
                **dict(zip(by, key, strict=True)),
                "mean": float(np.exp(np.log(group["ratio"]).mean()) - 1),
                "median": float(group["ratio"].median() - 1),
                "worst": float(group["ratio"].max() - 1),
                "where": group["workload"][group["ratio"].idxmax()],
                "workloads": len(group),
            }
        )
    return pd.DataFrame(rows).sort_values("mean", ignore_index=True)


def number(value: float) -> str:
    """Writes a number with three digits, or says that it diverged."""
    return f"{value:.3g}" if np.isfinite(value) else "diverged"


def spread(cell: pd.Series) -> str:
    """Writes a median with the least and the greatest."""
    return f"{number(cell['median'])} ({number(cell['min'])} to {number(cell['max'])})"


def change(cell: pd.Series, base: pd.Series, *, digits: int = 1) -> str:
    """Writes how much larger a median is than the median of a base, and the median."""
    percent = 100 * (cell["median"] / base["median"] - 1)
    return f"{percent:+.{digits}f} %: {spread(cell)}"


def edges_text(edges: Sequence[str]) -> str:
    """Says which best rates are on the edge of the grid, or that none is."""
    if not edges:
        return "No best rate is on the edge of the grid."
    head = "Best rates on the edge of the grid, so that a better one may lie beyond:"
    return "\n".join([head, "", *(f"- {edge}" for edge in edges)])
