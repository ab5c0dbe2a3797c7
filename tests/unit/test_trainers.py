"""Trainers of others are imported when they are asked for, and asked for when missed.

Each has a file in ``integration``, for an environment that has it.
"""

import subprocess
import sys

import pytest
from helpers import raises

import madax

# The modules that each function imports.
MODULES = {
    "easydel": "eformer",
    "kauldron": "kauldron",
    "keras": "keras",
    "maxtext": "maxtext",
}
FMT = madax.SymlogFormat(8)
CALLS = {
    "easydel": lambda: madax.trainers.easydel("four_bytes", lambda rate: None),
    "kauldron": lambda: madax.trainers.kauldron(None, FMT),
    "keras": lambda: madax.trainers.keras(None, madax.muon(0.02), FMT),
    "maxtext": lambda: madax.trainers.maxtext(madax.muon(0.02), FMT).__enter__(),
}


def test_there_is_a_function_for_each_trainer():
    assert madax.trainers.__all__ == dir(madax.trainers) == sorted(MODULES)
    assert CALLS.keys() == MODULES.keys()


def test_importing_madax_imports_no_trainer():
    names = set(MODULES) | set(MODULES.values())
    code = f"""
import sys

class Spy:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in {names}, name

sys.meta_path.insert(0, Spy())
import madax
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def package(monkeypatch, tmp_path, name):
    """A folder that Python takes for the package of a trainer."""
    for module in [m for m in sys.modules if m.split(".")[0] == MODULES[name]]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / MODULES[name]


@pytest.mark.parametrize("name", CALLS)
def test_a_package_that_is_missing_is_named(monkeypatch, package, name):
    monkeypatch.setattr(sys, "path", [])
    with raises(ImportError, f"madax.trainers.{name} needs", f"pip install {name}."):
        CALLS[name]()


@pytest.mark.parametrize("name", CALLS)
def test_what_a_trainer_misses_itself_is_not_hidden(package, name):
    package.mkdir()
    (package / "__init__.py").write_text("import a_package_that_is_nowhere")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_nowhere"):
        CALLS[name]()
