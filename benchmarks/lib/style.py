"""The style of figures and tables: lines that differ without colour, one legend."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

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
    {"color": "#1b4d1b", "linestyle": "--", "marker": "d"},
    {"color": "#f781bf", "linestyle": "-.", "marker": "8"},
    {"color": "#4d004b", "linestyle": (0, (3, 1, 1, 1)), "marker": (4, 1, 0)},
    {"color": "#a6a600", "linestyle": "-", "marker": (3, 1, 0)},
)


# The width of a figure, in inches: about the width of the text on a page.
WIDTH = 7.5
_SHOWN, _LEGIBLE = 7.67, 8  # inches of text at 1280 pixels; points


def legend(
    fig: Figure,
    panels: Iterable[Axes] | None = None,
    *,
    columns: int | None = None,
    loc: Literal[
        "outside lower center", "outside upper center"
    ] = "outside lower center",
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


@dataclasses.dataclass(frozen=True)
class Report:
    """Writes the table and the figure of a folder's records, from those alone.

    Attributes:
      name: of the files; ``name.md`` and ``name.png`` are written.
      table: what is read to the table, in Markdown.
      figure: what is read to the figure.
      source: name of the file of records; None for ``name``.
      cells: records to what the table and the figure are made of.
    """

    name: str
    table: Callable[[pd.DataFrame], str] | None = None
    figure: Callable[[pd.DataFrame], Figure] | None = None
    source: str | None = None
    cells: Callable[[pd.DataFrame], pd.DataFrame] | None = None

    def __call__(self, folder: Path) -> str:
        """Returns the table; nothing is written where there are no cells for it."""
        runs = records.read(folder / f"{self.source or self.name}.jsonl")
        if self.cells is not None:
            runs = self.cells(runs)
            if runs.empty:
                return ""
        text = ""
        if self.table is not None:
            text = f"{self.table(runs).rstrip()}\n"
            (folder / f"{self.name}.md").write_text(text, encoding="utf-8")
        if self.figure is not None:
            fig = self.figure(runs)
            check_legible(fig)
            fig.savefig(folder / f"{self.name}.png", dpi=150)
        return text


def check_legible(fig: Figure) -> None:
    """Raises ValueError if a page of 1280 pixels shows some text below 8 points."""
    points = min(float(text.get_fontsize()) for text in fig.findobj(Text))
    width = fig.get_figwidth()
    if points * min(1, _SHOWN / width) < _LEGIBLE:
        raise ValueError(
            f"a page shows text of {points:g} points too small in a figure {width:g} "
            f"inches wide; make the figure {WIDTH:g} inches wide, or the text larger."
        )


def markdown(
    rows: Sequence[records.Record] | pd.DataFrame, *, numbers: bool = False
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
