"""Records of runs: JSON lines, appended and never changed, read back as a table."""

import functools
import json
import math
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import pandas as pd


def append(path: Path, record: dict[str, Any]) -> None:
    """Appends one run to the file, with the environment it ran in.

    Args:
      path: file of JSON lines, made if missing.
      record: what to keep, of JSON types; a float that is not finite becomes null.
    """
    line = json.dumps(_strict(record | {"environment": environment()}), allow_nan=False)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read(path: Path) -> pd.DataFrame:
    """Reads a file of runs, one row each; nested values stay dicts and lists."""
    with path.open(encoding="utf-8") as file:
        return pd.DataFrame([json.loads(line) for line in file])


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
    # --exclude "*" hides tags, so that the answer is always a hash.
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _strict(value: Any) -> Any:
    """Puts null for floats that JSON cannot write: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def seeds(path: Path, settings: dict[str, Any]) -> set[int]:
    """Returns the seeds of the runs in the file that have all these settings."""
    if not path.exists():
        return set()
    runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    wanted = json.loads(json.dumps(settings))
    return {run["seed"] for run in runs if wanted == {k: run.get(k) for k in wanted}}
