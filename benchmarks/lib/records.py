"""Records of runs: JSON lines, appended or removed, read back as a table."""

import functools
import json
import math
import platform
import subprocess
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import pandas as pd

Record = dict[Any, Any]  # From names to what JSON can hold.


def file(folder: Path, name: str, *, fresh: bool = False) -> Path:
    """Returns the file of records of that name, its folder made if missing.

    Args:
      folder: where it is.
      name: without its suffix.
      fresh: whether to remove what is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    if fresh:
        path.unlink(missing_ok=True)
    return path


def device_name() -> str:
    """Returns the kind of the first device, fit for the name of a file."""
    return jax.devices()[0].device_kind.lower().replace(" ", "-")


def append(path: Path, *records: Record) -> None:
    """Appends runs to the file, with the environment they ran in.

    Args:
      path: file of JSON lines, made if missing.
      *records: what to keep, of JSON types; a float that is not finite becomes null.
    """
    lines = [
        json.dumps(_strict(record | {"environment": environment()}), allow_nan=False)
        for record in records
    ]
    _drop_torn_line(path)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))


def read(path: Path) -> pd.DataFrame:
    """Reads a file of runs, one row each; nested values stay dicts and lists."""
    return pd.DataFrame(_load(path))


def remove(path: Path, is_stale: Callable[[Record], bool]) -> None:
    """Removes the runs of which ``is_stale`` is true, to be made again."""
    kept = [run for run in _load(path) if not is_stale(run)]
    path.write_text("".join(f"{json.dumps(run)}\n" for run in kept), encoding="utf-8")


def _load(path: Path) -> list[Record]:
    """Returns the runs, without a last line that a killed process left unfinished."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _drop_torn_line(path: Path) -> None:
    """Cuts off what a killed process wrote of a line that it did not finish."""
    if path.exists():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            path.write_bytes(data[: data.rfind(b"\n") + 1])


@functools.cache
def environment() -> dict[str, str | None]:
    """Returns the versions, the device and the commit that this process runs."""
    packages = ("jax", "optax", "flax", "madax")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": jax.devices()[0].device_kind,
        "git": _git_sha(),
    }


def _git_sha() -> str | None:
    """Returns the commit, ``-dirty`` if files differ from it; None outside git."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command],
            cwd=Path(__file__).parent.parent,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    try:
        # Results are what a benchmark writes, and no part of what it runs.
        changed = git("status", "--porcelain", "-uno", "--", ":/", ":!results")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _strict(value: Any) -> Any:
    """Puts null for floats that JSON cannot write: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def find(path: Path, settings: Mapping[str, Any]) -> list[Record]:
    """Returns the runs in the file that have all these settings."""
    # Runs from before there was a choice of schedules do not name one.
    runs = [{"schedule": "cosine"} | run for run in _load(path)]
    return [run for run in runs if has(run, settings)]


def check_text(path: Path, settings: Mapping[str, Any], text: str) -> None:
    """Raises if a text that comes with Python is of another version in these runs.

    Args:
      path: the file of runs.
      settings: of the runs that are to be compared.
      text: its name.
    """
    here = platform.python_version()
    if not text.startswith(("pydoc", "stdlib")):
        return
    for run in find(path, settings):
        there = run["environment"]["python"]
        if there != here:
            raise ValueError(
                f"{path} has runs on {text} of Python {there}, whose text is not that "
                f"of Python {here}; run this by Python {there}, or pass another folder "
                "as --out. Nothing was changed."
            )


def has(run: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Returns whether a run, as read, has all these settings."""
    wanted = json.loads(json.dumps(dict(settings)))
    return wanted == {name: run.get(name) for name in wanted}
