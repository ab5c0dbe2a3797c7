"""Settings shared by all tests, and tests that need several devices."""

import os

import jax
import processes
import pytest
from hypothesis import settings

settings.register_profile("local", deadline=None, max_examples=100)
settings.register_profile("ci", deadline=None, max_examples=100, derandomize=True)
settings.register_profile("nightly", deadline=None, max_examples=2000, print_blob=True)
profile = "ci" if os.environ.get("CI") else "local"
settings.load_profile(os.environ.get("MADAX_FUZZ") or profile)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "devices(n): runs in a process of n CPU devices, beside this one"
    )


@pytest.fixture(autouse=True)
def outcome_elsewhere(request, tmp_path_factory):
    """How a test of several devices went in the process that has them, else None.

    A process has as many CPU devices as it started with. All such tests of a module
    run in one, which is this one where it has the devices.
    """
    marker = request.node.get_closest_marker("devices")
    if marker is None or jax.device_count() == marker.args[0]:
        return None
    module, (devices,) = request.node.path, marker.args
    tests = [
        item
        for item in request.session.items
        if item.path == module and item.get_closest_marker("devices") == marker
    ]
    report = processes.once(
        tmp_path_factory,
        f"{module.stem}_on_{devices}.xml",
        lambda path: processes.run_tests(tests, devices, path),
    )
    return processes.outcome(report, request.node.name)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    elsewhere = pyfuncitem.funcargs.get("outcome_elsewhere")
    if elsewhere is None:
        return None
    outcome, text = elsewhere
    if outcome == "skipped":
        pytest.skip(text)
    if outcome == "failed":
        pytest.fail(text, pytrace=False)
    return True
