"""Products enter sums through a door: no compiler fuses the two."""

import ast
import math
import pathlib

import pytest

import madax

_ROOT = pathlib.Path(madax.__file__).parent
# A comment in a statement, or above it, gives the reason of an exception.
_MARK = "# may fuse: "
_PRODUCTS = {"multiply", "square", "power"}
_SUMS = {"add", "subtract"}


def _is_power_of_two(node: ast.expr) -> bool:
    """Whether a factor is one that a float can be multiplied by without rounding."""
    match node:
        case ast.UnaryOp(operand=operand):
            return _is_power_of_two(operand)
        case ast.BinOp(left=left, op=ast.Pow()):
            return _is_power_of_two(left)
        case ast.Constant(value=float() | int() as value) if value > 0:
            return math.frexp(value)[0] == 0.5
    return False


def _is_product(node: ast.expr, names: dict[str, ast.expr]) -> bool:
    match node:
        case ast.UnaryOp(operand=operand):
            return _is_product(operand, names)
        case ast.Name(id=name):
            value = names.get(name)
            return value is not None and _is_product(value, {})
        case ast.BinOp(left=ast.List() | ast.Tuple(), op=ast.Mult()):
            return False
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return not (_is_power_of_two(left) or _is_power_of_two(right))
        case ast.BinOp(left=left, op=ast.Pow()):
            return not _is_power_of_two(left)
        case ast.Call(func=ast.Attribute(attr=name)):
            return name in _PRODUCTS
    return False


def _once_assigned(scope: ast.AST) -> dict[str, ast.expr]:
    """The local names that a function assigns in a single place."""
    stores = [
        node.id
        for node in ast.walk(scope)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
    found = {}
    for node in ast.walk(scope):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                if stores.count(name) == 1:
                    found[name] = value
    return found


def _operands(node: ast.AST) -> list[ast.expr]:
    """What a node adds or subtracts."""
    match node:
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=right):
            return [left, right]
        case ast.AugAssign(op=ast.Add() | ast.Sub(), value=value):
            return [value]
        case ast.Call(func=ast.Attribute(attr=name), args=args) if name in _SUMS:
            return args
    return []


def fused_products(source: str) -> list[int]:
    """The lines of sums that have a product as an operand, and no mark."""
    tree, lines = ast.parse(source), source.splitlines()
    starts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    scopes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.Lambda)]
    found = set()
    for scope in [tree, *scopes]:
        names = {} if scope is tree else _once_assigned(scope)
        for node in ast.walk(scope):
            if any(_is_product(x, names) for x in _operands(node)):
                start = max((i for i in starts if i <= node.lineno), default=1)
                around = lines[max(start - 2, 0) : node.end_lineno]
                if not any(_MARK in line for line in around):
                    found.add(node.lineno)
    return sorted(found)


def test_no_product_is_a_direct_operand_of_a_sum():
    found = [
        f"madax/{path.relative_to(_ROOT)}:{line}"
        for path in sorted(_ROOT.rglob("*.py"))
        for line in fused_products(path.read_text())
    ]
    assert not found, (
        f"{found}: use plus_product or minus_product of madax._core.numerics, or "
        f"give the reason for an exception in a comment, '{_MARK}...'."
    )


@pytest.mark.parametrize(
    "code",
    [
        "c + a * b",
        "c - (a * b)",
        "-(a * b) + c",
        "c + jnp.square(a)",
        "c + x**2",
        "jnp.add(c, jnp.multiply(a, b))",
        "def f(c, a, b):\n    p = a * b\n    return c + p",
        "def f(c, a, b):\n    c += a * b\n    return c",
        "c + a * 3.0",
    ],
)
def test_the_search_finds_a_product_in_a_sum(code):
    assert fused_products(code)


@pytest.mark.parametrize(
    "code",
    [
        "plus_product(c, a, b)",
        "c + rounded(a * b)",
        "c + 0.5 * a",
        "c + a * 2.0**-32",
        "c + a / b",
        "c + [a] * b",
        "c + a * b  # may fuse: both are integers",
        "def f(c, a, b):\n    p = a * b\n    p = rounded(p)\n    return c + p",
    ],
)
def test_the_search_lets_other_sums_pass(code):
    assert not fused_products(code)
