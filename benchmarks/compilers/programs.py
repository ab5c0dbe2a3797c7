"""Kernels, bytes and operations of a compiled program, read from its text."""

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cached_property

SIZES = {"s8": 1, "u8": 1, "pred": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
SIZES |= {"s64": 8, "u64": 8, "f64": 8, "token": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
# What takes no time: it names or rearranges what is there, or waits.
_NAMES = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier"),
}
# Parts of a kernel that XLA's cost analysis does not count as operations, either.
_MOVES = _NAMES | {
    *("broadcast", "reshape", "transpose", "copy", "slice", "concatenate", "pad"),
    *("iota", "reverse", "dynamic-slice", "dynamic-update-slice", "gather", "scatter"),
    *("custom-call", "dot", "convolution", "sort", "rng-bit-generator"),
}
_TRANSCENDENTAL = {
    *("exponential", "exponential-minus-one", "log", "log-plus-one", "power", "sqrt"),
    *("rsqrt", "cbrt", "sine", "cosine", "tan", "tanh", "logistic", "erf", "atan2"),
}


@dataclasses.dataclass(frozen=True)
class Counts:
    """The work of a program, or of a part of it.

    Attributes:
      kernels: launches, loops unrolled; a TPU's scalar unit is none.
      bytes: read from and written to main memory by them: all of their operands and
        results, whatever of these they need. Of an operand of a fusion that is nothing
        but sliced, the slices.
      operations: on the elements of arrays, inside kernels, integers and comparisons
        too; neither those of matrix products nor transcendental functions.
      cycles: that a TPU's compiler estimates for kernels, copies beside them aside.
      foreign: kernels, of those, that XLA did not make, of which it counts nothing but
        the bytes: Pallas', and libraries'.
    """

    kernels: int = 0
    bytes: int = 0
    operations: int = 0
    cycles: int = 0
    foreign: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Counts(*(a + b for a, b in pairs))

    def __mul__(self, times: int) -> "Counts":
        return Counts(*(times * x for x in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class _Instruction:
    type: str
    opcode: str
    rest: str  # Operands and attributes.

    @cached_property
    def arguments(self) -> list[str]:
        """Names of the operands."""
        inside = re.split(r"\)(?:,|$)", self.rest, maxsplit=1)[0]
        return re.findall(r"%([\w.-]+)", inside)

    @cached_property
    def operands(self) -> list[str]:
        """Their names, each once."""
        return list(dict.fromkeys(self.arguments))

    def called(self, *roles: str) -> list[str]:
        """Names of computations that it calls in these roles."""
        found = re.findall(
            rf"\b(?:{'|'.join(roles)})=(\{{[^}}]*\}}|%?[\w.-]+)", self.rest
        )
        return [name for text in found for name in re.findall(r"[\w.-]+", text)]

    def number(self, name: str, otherwise: int) -> int:
        """A number in the compiler's notes."""
        found = re.search(rf'"{name}":(?:{{"n":)?"(\d+)"', self.rest)
        return int(found[1]) if found else otherwise


_Computation = dict[str, _Instruction]
_Computations = dict[str, _Computation]


def count(text: str) -> Counts:
    """Returns what a program does.

    Args:
      text: of the compiled program, as by ``compiled.as_text()``. Of a conditional it
        counts the branch that moves less, which is what branches are there for.
    """
    computations: _Computations = {}
    here: _Computation = {}
    entry = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            here = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif found := _LINE.match(line):
            here[found[1]] = _Instruction(*found.groups()[1:])
    return _of_computation(computations, entry)


def _of_computation(computations: _Computations, name: str) -> Counts:
    here = computations[name]
    return sum((_of_one(computations, here, x) for x in here.values()), Counts())


def _of_one(computations: _Computations, here: _Computation, x: _Instruction) -> Counts:
    """What an instruction outside of kernels does."""
    if x.opcode == "call":
        (name,) = x.called("to_apply")
        return _of_computation(computations, name)
    if x.opcode == "while":
        (test,) = x.called("condition")
        times = x.number("known_trip_count", _rounds(computations[test]))
        return _of_computation(computations, *x.called("body")) * times
    if x.opcode == "conditional":
        names = x.called("true_computation", "false_computation", "branch_computations")
        branches = [_of_computation(computations, name) for name in names]
        return min(branches, key=lambda w: (w.bytes, w.kernels))
    if x.opcode in _NAMES or x.opcode.endswith("-done"):
        return Counts()
    if x.opcode.endswith("-start"):
        return Counts(bytes=_copied(x.type))
    on_tpu = ":T(" in x.type
    if on_tpu and (
        "ConcatBitcast" in x.rest or (x.opcode != "fusion" and _is_scalar(x))
    ):
        return Counts()
    return Counts(
        kernels=1,
        bytes=_read(computations, x, here) + _nbytes(x.type),
        operations=_operations(computations, x, here),
        cycles=x.number("estimated_cycles", 0),
        foreign=int(x.opcode == "custom-call"),
    )


def _rounds(test: _Computation) -> int:
    """Rounds of a loop that counts from zero to a constant; of any other loop, 1."""
    constants = [x.rest for x in test.values() if x.opcode == "constant"]
    compares = [x.rest for x in test.values() if x.opcode == "compare"]
    if len(constants) == len(compares) == 1 and "direction=LT" in compares[0]:
        bound = re.match(r"(\d+)\)", constants[0])
        return int(bound[1]) if bound else 1
    return 1


def _read(computations: _Computations, x: _Instruction, here: _Computation) -> int:
    """Bytes that a kernel reads from main memory."""
    read = {o: _nbytes(here[o].type) for o in x.operands if o in here}
    if x.opcode == "fusion":
        (body,) = (computations[name] for name in x.called("calls"))
        parameters = {n: y for n, y in body.items() if y.opcode == "parameter"}
        for name, parameter in parameters.items():
            users = [user for user in body.values() if name in user.operands]
            if {user.opcode for user in users} == {"slice"}:
                operand = x.arguments[int(parameter.rest.split(")")[0])]
                slices = sum(_nbytes(user.type) for user in users)
                read[operand] = min(read.get(operand, 0), slices)
    return sum(read.values())


def _operations(
    computations: _Computations, x: _Instruction, here: _Computation
) -> int:
    """Operations on elements, including computations that it calls."""
    if x.opcode in ("fusion", "call"):
        bodies = [computations[name] for name in x.called("calls", "to_apply")]
        return sum(_operations(computations, y, b) for b in bodies for y in b.values())
    if x.opcode in _MOVES | _TRANSCENDENTAL or x.opcode.startswith("all-"):
        return 0
    if x.opcode in ("reduce", "reduce-window"):
        return sum(_elements(here[o].type) for o in x.operands[:1])
    return _elements(x.type)


def _arrays(type: str) -> Iterator[tuple[str, int, bool]]:
    """Yields of each array the dtype, the number of elements, if in main memory."""
    for dtype, dims, layout in _ARRAY.findall(type):
        elements = math.prod(int(n) for n in dims.split(",") if n)
        yield dtype, elements, re.search(r"S\([1-9]", layout) is None


def _nbytes(type: str) -> int:
    """Bytes in main memory."""
    return sum(SIZES.get(t, 4) * n for t, n, is_main in _arrays(type) if is_main)


def _elements(type: str) -> int:
    return next((n for _, n, _ in _arrays(type)), 0)


def _is_scalar(x: _Instruction) -> bool:
    return all(n == 1 for _, n, _ in _arrays(x.type))


def _copied(type: str) -> int:
    """Bytes that an asynchronous copy, or slice, moves from or to main memory."""
    # Its type is a tuple of both sides and something to wait for; a slice is the
    # smaller side.
    ends = list(_arrays(type))[:2]
    moved = min(SIZES.get(t, 4) * n for t, n, _ in ends)
    return moved * sum(is_main for *_, is_main in ends)
