"""Processes beside the one that pytest runs in: with more devices, or to be killed."""

import fcntl
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from xml.etree import ElementTree

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT = 600


def environment(devices: int = 1) -> dict[str, str]:
    """Variables for a process of that many CPU devices, at the root of the project."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={devices}"
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return {**own, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def start(*args: object, devices: int = 1) -> subprocess.Popen:
    """Starts Python with these arguments; its output, and errors, are pipes."""
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        env=environment(devices),
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


def run_tests(items, devices: int, report: pathlib.Path) -> None:
    """Runs tests under pytest in a process of that many devices."""
    command = ["-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
    child = start(*command, *(item.nodeid for item in items), devices=devices)
    out, err = child.communicate(timeout=TIMEOUT)
    # 1 is that some test failed, which each will report for itself.
    assert child.returncode in (0, 1), out + err


def outcome(report: pathlib.Path, name: str) -> tuple[str, str]:
    """How a test in a report went ("passed", "failed", "skipped"), and why."""
    for case in ElementTree.parse(report).iter("testcase"):
        if case.get("name") == name:
            if (skipped := case.find("skipped")) is not None:
                return "skipped", skipped.get("message", "")
            for bad in (*case.findall("failure"), *case.findall("error")):
                return "failed", bad.text or ""
            return "passed", ""
    return "failed", f"{name} did not run: {report.read_text()}"
