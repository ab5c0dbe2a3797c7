"""Processes beside the one that pytest runs in: with more of them, or to be killed."""

import fcntl
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT = 600


def start(*args: object, devices: int = 1) -> subprocess.Popen:
    """Starts Python on that many CPU devices; its output, and errors, are pipes."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    jax = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        env=own | jax | path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*children: subprocess.Popen) -> list[str]:
    """Waits for processes that are to succeed; what each wrote to its output."""
    try:
        written = [child.communicate(timeout=TIMEOUT) for child in children]
    finally:
        for child in children:
            child.kill()
    for child, (out, err) in zip(children, written, strict=True):
        assert child.returncode == 0, out + err
    return [out for out, _ in written]


def once(tmp_path_factory, name: str, make: Callable[[pathlib.Path], None]):
    """The file that ``make`` writes, in the first of pytest's workers to want it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    path = shared / name
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = shared / f"{name}.partial"
            make(partial)
            partial.rename(path)
    return path


def address():
    """A port at which nobody listens."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return f"localhost:{server.getsockname()[1]}"
