"""The floor plan: which module may import which, in madax and in its tests."""

import ast
import collections
import pathlib
import re

import pytest

import madax

MADAX = pathlib.Path(madax.__file__).parent
TESTS = pathlib.Path(__file__).parents[1]
# The lowest first; each imports from itself and from those before it.
ROOMS = [
    "_core",
    "formats",
    "codes",
    "transforms",
    "wrappers",
    "layerwise",
    "optimizers",
    "papers",
    "hijax",
    "trainers",
    "diagnostics",
    "__init__",
]
SOURCES = {
    ".".join(("madax", *path.relative_to(MADAX).with_suffix("").parts)): path
    for path in sorted(MADAX.rglob("*.py"))
}
MODULES = {name.removesuffix(".__init__"): path for name, path in SOURCES.items()}


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_by(name, path, tree=None):
    """The modules of madax that one imports, wherever in it."""
    found = set()
    for node in ast.walk(tree or parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            package = name.split(".")
            if path.stem != "__init__":
                package = package[:-1]
            above = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            # A name of a package is a module, or comes from the package itself.
            names = {f"{origin}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) or {origin}
    return found & MODULES.keys() - {name}


IMPORTS = {name: imported_by(name, path) for name, path in MODULES.items()}


def room_of(name):
    parts = name.split(".")
    return ROOMS.index(parts[1] if len(parts) > 1 else "__init__")


def test_every_room_is_on_the_plan():
    there = {path.stem for path in MADAX.iterdir() if path.suffix in ("", ".py")}
    assert there - {"__pycache__"} == set(ROOMS)


def test_a_module_imports_from_its_own_room_and_from_those_below():
    upwards = [
        (name, other)
        for name, others in IMPORTS.items()
        for other in others
        if room_of(other) > room_of(name)
    ]
    assert upwards == []


def test_no_modules_import_one_another():
    """What imports nothing that is left is taken away, until nothing is left."""
    left = {
        # A package's __init__ gathers its modules, which do not wait for it.
        name: {o for o in others if MODULES[o].stem != "__init__"}
        for name, others in IMPORTS.items()
    }
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    assert left == {}


def test_imports_are_seen_also_within_functions():
    assert "madax.formats._base" in IMPORTS["madax.codes._array"]
    tree = ast.parse("def f():\n    from .._core import checks")
    path = MADAX / "codes" / "_array.py"
    assert imported_by("madax.codes._array", path, tree) == {"madax._core.checks"}


# --- the tests ------------------------------------------------------------------------

FILES = sorted(TESTS.rglob("*.py"))


def test_no_test_file_imports_another():
    for path in FILES:
        for node in ast.walk(parsed(path)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(re.match("test_|conftest", n) for n in names), path


def test_the_oracle_imports_numpy_alone():
    oracle = parsed(TESTS / "lib" / "oracle.py")
    imports = [
        n for n in ast.walk(oracle) if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    assert [ast.unparse(n) for n in imports] == ["import numpy as np"]


def test_nothing_of_any_length_is_written_twice():
    """Functions, classes and constants of two files differ in more than their name."""
    found = collections.defaultdict(list)
    for path in FILES:
        for node in parsed(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                what, name = ast.dump(ast.Module(node.body, [])), node.name
            elif isinstance(node, ast.Assign):
                what, name = ast.dump(node.value), ast.unparse(node.targets[0])
            else:
                continue
            if len(what) > 250 and name != "pytestmark":
                found[what].append(f"{path.name}: {name}")
    assert [places for places in found.values() if len(places) > 1] == []


@pytest.mark.parametrize("name", ["FORMATS", "OPTIMIZERS", "EXACT_ADAM"])
def test_what_is_tested_is_named_in_one_place(name):
    defined = re.compile(rf"^{name}\b.* =", re.MULTILINE)
    places = [path for path in FILES if defined.search(path.read_text("utf-8"))]
    assert len(places) == 1, places


# --- how much there is of it ----------------------------------------------------------


def test_types_are_seldom_left_open():
    sources = [path.read_text(encoding="utf-8") for path in MODULES.values()]
    assert sum(len(re.findall(r"\bAny\b", source)) for source in sources) <= 100
