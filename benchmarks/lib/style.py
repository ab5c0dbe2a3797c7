"""How figures and tables look: lines told apart without colour, too, one legend."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lib import records

# Lines differ in dashes, marker and lightness.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#000000", "linestyle": ":", "marker": "s"},
    {"color": "#0072b2", "linestyle": "--", "marker": "^"},
    {"color": "#d55e00", "linestyle": "-", "marker": "o"},
    {"color": "#56b4e9", "linestyle": "-.", "marker": "v"},
    {"color": "#e69f00", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "D"},
    {"color": "#009e73", "linestyle": (0, (3, 1)), "marker": "P"},
    {"color": "#cc79a7", "linestyle": (0, (1, 1)), "marker": "X"},
    {"color": "#666666", "linestyle": "-", "marker": "*"},
    {"color": "#7b3294", "linestyle": (0, (5, 1)), "marker": "<"},
    {"color": "#8c510a", "linestyle": "-.", "marker": ">"},
    {"color": "#e41a1c", "linestyle": "-", "marker": "p"},
    {"color": "#80b1d3", "linestyle": ":", "marker": "h"},
)


def legend(
    fig: Figure,
    panels: Iterable[Axes] | None = None,
    *,
    columns: int | None = None,
    loc: Any = "outside lower center",
) -> None:
    """Puts one legend for several panels, what they share in it once.

    Args:
      fig: the figure.
      panels: those to name the lines of; None for all.
      columns: of the legend; None for all in one row.
      loc: where it is.
    """
    entries = {}
    for axes in fig.axes if panels is None else panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    fig.legend(
        entries.values(),
        entries.keys(),
        loc=loc,
        ncols=columns or len(entries),
    )


def save(fig: Figure, path: Path) -> None:
    """Writes a figure into an image file."""
    fig.savefig(path, dpi=150)


def report(
    folder: Path,
    name: str,
    table: Callable[[pd.DataFrame], str],
    figure: Callable[[pd.DataFrame], Figure] | None = None,
) -> str:
    """Writes the table and the figure of a folder's records; returns the table."""
    runs = records.read(folder / f"{name}.jsonl")
    text = f"{table(runs).rstrip()}\n"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    if figure is not None:
        save(figure(runs), folder / f"{name}.png")
    return text


def markdown(
    rows: Sequence[dict[str, Any]] | pd.DataFrame, *, numbers: bool = False
) -> str:
    """Returns rows of text as a Markdown table.

    Args:
      rows: cells by the names of their columns; what a row lacks stays empty.
      numbers: whether all columns but the first hold numbers, aligned on the right.
    """
    table = pd.DataFrame(rows).fillna("")
    others = "right" if numbers else "left"
    align = ["left"] + [others] * (table.shape[1] - 1)
    return table.to_markdown(
        index=False, colalign=align if numbers else None, disable_numparse=True
    )
