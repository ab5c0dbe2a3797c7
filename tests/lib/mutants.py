"""Mistakes put into madax one at a time: the tests must fail of each.

::

    python tests/lib/mutants.py --list transforms           # what there is in a room
    python tests/lib/mutants.py transforms/_clip            # all of a module
    python tests/lib/mutants.py --sample 60 --seed 1        # some of all, for a night
    python tests/lib/mutants.py codes/_array:dequantize:120:call rounded

A mutant changes one node of the syntax tree of one function. Its name says which, as
``room/module:function:line:kind``; names of one commit are always the same. Each is
tried on a copy of the tree, by the tests of its room in ``tests/unit``, those named
like the module first. What is then alive is tried by all others, or by none with
``--unit``. The exit status is 1 if one is alive.
"""

import argparse
import ast
import collections
import dataclasses
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from processes import ROOT

MADAX = ROOT / "madax"
TIMEOUT = 1800  # seconds: a loop that never ends is a mutant killed, too

COMPARISONS = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ENDS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
}
# Keywords that change nothing of what is right; and ** has none.
SAFEGUARDS = {None, "strict", "stacklevel"}
# Functions of one array and options, of which the array may be taken as it is.
UNWRAPPED = {
    *("abs", "barrier", "ceil", "clip", "exp", "expm1", "floor", "isfinite", "log"),
    *("log1p", "max", "maximum", "min", "minimum", "nearest", "optimization_barrier"),
    *("plus_product", "round", "round_to_int", "rounded", "safe_increment", "sign"),
    *("sorted", "sqrt", "square", "stop_gradient", "tuple", "widen", "within"),
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A text in place of what stands between two offsets of a file."""

    name: str
    path: pathlib.Path
    start: int
    end: int
    text: str

    def source(self) -> str:
        """The file with the mistake in it."""
        old = self.path.read_bytes()
        return (old[: self.start] + self.text.encode() + old[self.end :]).decode()

    def __str__(self) -> str:
        old = self.path.read_bytes()[self.start : self.end].decode()
        change = f"{old!r} -> {self.text!r}"
        return f"{self.name}  {change if len(change) < 140 else change[:140] + '...'}"


# --- what can go wrong with a node ----------------------------------------------------


def changed(node: ast.AST, **fields: object) -> str:
    """The source of a node like that one, but for some fields."""
    old = {name: getattr(node, name) for name in node._fields}
    return ast.unparse(type(node)(**{**old, **fields}))


def name_of(function: ast.expr) -> str:
    """``where`` of ``jnp.where``."""
    return getattr(function, "attr", getattr(function, "id", ""))


def comparisons(node: ast.Compare) -> Iterator[tuple[str, str]]:
    for i, op in enumerate(node.ops):
        for kind, table in (("flipped", COMPARISONS), ("end", ENDS)):
            if type(op) in table:
                ops = [*node.ops[:i], table[type(op)](), *node.ops[i + 1 :]]
                yield kind, f"({changed(node, ops=ops)})"


def constants(node: ast.Constant) -> Iterator[tuple[str, str]]:
    value = node.value
    if isinstance(value, bool):
        yield "constant", repr(not value)
    elif isinstance(value, int):
        yield "constant", repr(value + 1)
        if value not in (0, 1):
            yield "less", repr(value - 1)
    elif isinstance(value, float):
        yield "constant", repr(2 * value if value else 1.0)


def operators(node: ast.BinOp) -> Iterator[tuple[str, str]]:
    if type(node.op) in OPERATORS:
        yield "operator", f"({changed(node, op=OPERATORS[type(node.op)]())})"
    yield "left", f"({ast.unparse(node.left)})"
    if isinstance(node.op, ast.BitAnd | ast.BitOr):
        yield "right", f"({ast.unparse(node.right)})"


def choices(node: ast.BoolOp) -> Iterator[tuple[str, str]]:
    for i in range(len(node.values)):
        rest = node.values[:i] + node.values[i + 1 :]
        text = changed(node, values=rest) if len(rest) > 1 else ast.unparse(rest[0])
        yield f"without {i}", f"({text})"


def calls(node: ast.Call) -> Iterator[tuple[str, str]]:
    args, name = node.args, name_of(node.func)
    for keyword in node.keywords:
        if keyword.arg not in SAFEGUARDS:
            rest = [k for k in node.keywords if k is not keyword]
            yield f"no {keyword.arg}", changed(node, keywords=rest)
    if name == "where" and len(args) == 3:
        condition, one, other = args
        yield "swapped", changed(node, args=[condition, other, one])
        yield "then", f"({ast.unparse(one)})"
        yield "else", f"({ast.unparse(other)})"
    elif name in UNWRAPPED and args and not isinstance(args[0], ast.Starred):
        yield f"call {name}", f"({ast.unparse(args[0])})"
    elif name in UNWRAPPED and isinstance(node.func, ast.Attribute):
        yield f"call {name}", f"({ast.unparse(node.func.value)})"
    elif isinstance(node.func, ast.Attribute) and len(args) > 1:
        yield "argument", changed(node, args=args[:-1])


def conditions(node: ast.If | ast.IfExp | ast.While) -> Iterator[tuple[str, str]]:
    if not isinstance(node.test, ast.Compare):  # which are flipped
        yield "negated", f"not ({ast.unparse(node.test)})"
    yield "never", "False"
    if isinstance(node, ast.If | ast.IfExp):
        yield "always", "True"


def statements(node: ast.stmt) -> Iterator[tuple[str, str]]:
    """Those without which the rest has a meaning."""
    if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
        yield "statement", "pass"
    if isinstance(node, ast.AugAssign | ast.Raise):
        yield "statement", "pass"
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        used = {x.id for x in ast.walk(node.value) if isinstance(x, ast.Name)}
        if node.targets[0].id in used:
            yield "statement", "pass"


def mistakes(node: ast.AST) -> Iterator[tuple[ast.AST, str, str]]:
    """What is replaced, the kind of the mistake, and the source of it."""
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        for kind, text in conditions(node):
            yield node.test, kind, text
    if isinstance(node, ast.comprehension):
        for condition in node.ifs:
            yield condition, "all", "True"
    table = {
        ast.Compare: comparisons,
        ast.Constant: constants,
        ast.BinOp: operators,
        ast.BoolOp: choices,
        ast.Call: calls,
    }
    made = table.get(type(node))
    if isinstance(node, ast.stmt):
        made = statements
    if isinstance(node, ast.UnaryOp):
        made = lambda node: [("unary", f"({ast.unparse(node.operand)})")]
    for kind, text in made(node) if made else ():
        yield node, kind, text


def visited(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but annotations, docstrings, decorators and the texts of errors."""
    if isinstance(node, ast.JoinedStr):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        if isinstance(node, ast.Raise) or getattr(node, "arg", "") in SAFEGUARDS:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from visited(child)


# --- all mutants of a module ----------------------------------------------------------


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Functions and methods by name, then what a module does outside of them."""
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        for part in inner:
            owner = f"{node.name}." if part is not node else ""
            yield f"{owner}{getattr(part, 'name', 'module')}", part


def mutants_of(path: pathlib.Path) -> list[Mutant]:
    """In the order of the file; none that leaves the syntax tree as it was."""
    source = path.read_text(encoding="utf-8")
    tree, found = ast.parse(source), []
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    module = path.relative_to(MADAX).with_suffix("").as_posix()
    numbers = collections.Counter()
    for function, part in functions(tree):
        if isinstance(part, ast.Import | ast.ImportFrom):
            continue
        for node in visited(part):
            for place, kind, text in mistakes(node):
                name = f"{module}:{function}:{place.lineno}:{kind}"
                numbers[name] += 1
                if numbers[name] > 1:
                    name += f" ({numbers[name]})"
                start = starts[place.lineno - 1] + place.col_offset
                end = starts[place.end_lineno - 1] + place.end_col_offset
                if is_another(place, text):
                    found.append(Mutant(name, path, start, end, text))
    return found


def is_another(node: ast.AST, text: str) -> bool:
    return isinstance(node, ast.stmt) or ast.dump(node) != ast.dump(
        ast.parse(text, mode="eval").body
    )


def every_mutant() -> list[Mutant]:
    return [m for path in sorted(MADAX.rglob("*.py")) for m in mutants_of(path)]


def chosen(mutants: list[Mutant], words: list[str]) -> list[Mutant]:
    """Those of a room, a module, a function, or a name."""
    if not words:
        return mutants
    begins = lambda m, w: m.name == w or re.match(re.escape(w) + r"[/:]", m.name)
    return [m for m in mutants if any(begins(m, word) for word in words)]


# --- trying them ----------------------------------------------------------------------


def tests_of(path: pathlib.Path) -> list[str]:
    """The tests of its room, those whose names share a word with its own first."""
    module, unit = path.relative_to(MADAX), ROOT / "tests" / "unit"
    room = unit / module.parent.name.strip("_")
    if len(module.parts) == 1:
        files = sorted(unit.glob("test_*.py"))
    else:
        files = sorted(room.glob("test_*.py"))
    words = set(module.stem.strip("_").rstrip("s").split("_"))

    def others(file: pathlib.Path) -> int:
        own = {word.rstrip("s") for word in file.stem.split("_")}
        return -len(words & own)

    files.sort(key=others)
    return [str(file.relative_to(ROOT)) for file in files]


def first_failure(mutant: Mutant, *arguments: str) -> str | None:
    """What fails of a copy with the mistake in it, or None if all passes."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "madax"
        ignored = shutil.ignore_patterns(".*", "build", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        changed_file = copy / mutant.path.relative_to(ROOT)
        changed_file.write_text(mutant.source(), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header"]
        try:
            run = subprocess.run(
                [*command, *arguments],
                cwd=copy,
                env=os.environ | {"PYTHONPATH": str(copy), "CI": "1"},
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return "the time that it takes"
    if run.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", run.stdout, re.MULTILINE)
    # As when madax cannot even be imported.
    return found[1] if found else (run.stdout[-200:] + run.stderr[-200:]).strip()


def tried(mutant: Mutant, unit: bool) -> str | None:
    """What kills it."""
    likely = tests_of(mutant.path)
    found = first_failure(mutant, *likely) if likely else None
    if found or unit:
        return found
    return first_failure(mutant, "-n", "auto", "--dist", "loadfile", "tests", "madax")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("words", nargs="*", help="rooms, modules, functions or names")
    add("--list", action="store_true", help="only say what there is")
    add("--sample", type=int, help="so many, of every module in turn")
    add("--seed", type=int, default=0, help="of the sample")
    add("--unit", action="store_true", help="try the tests of the room alone")
    options = parser.parse_args(arguments)
    mutants = chosen(every_mutant(), options.words)
    if not mutants:
        parser.error(f"no mutant is called {' or '.join(options.words)}")
    if options.sample:
        random.Random(options.seed).shuffle(mutants)
        # Each module has its first before any has its second.
        seen = collections.Counter()
        turn = {m.name: seen.update([m.path]) or seen[m.path] for m in mutants}
        mutants = sorted(mutants, key=lambda m: turn[m.name])[: options.sample]
    if options.list:
        print(*mutants, f"{len(mutants)} mutants", sep="\n")
        return 0
    alive = []
    for number, mutant in enumerate(mutants, 1):
        found = tried(mutant, options.unit)
        print(f"{number}/{len(mutants)} {mutant}")
        print(f"    killed by {found}" if found else "    ALIVE")
        if not found:
            alive.append(mutant)
    print(f"{len(mutants) - len(alive)} of {len(mutants)} mutants are killed.")
    print(*(f"ALIVE {mutant}" for mutant in alive), sep="\n")
    return len(alive) > 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main(sys.argv[1:]))
