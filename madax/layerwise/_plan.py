"""The stacks of layers that :func:`madax.layerwise` runs, one after another."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from madax._core.checks import check_function, type_error
from madax._core.names import LAYERS, Tree

Index = int | jax.Array  # of a layer, or of a part of the batch
Function: TypeAlias = Callable[..., Tree]
# A function for all layers, or a pattern of functions, which repeats.
Layer: TypeAlias = Function | Sequence[Function]
T = TypeVar("T")
REMEDY = "pass one with the arguments above"


class Stack(NamedTuple):
    """A stack of layers, and the functions that make its inputs."""

    name: str | None  # in the layers of the parameters; None if they are one stack
    embed: Function | None
    shared: Function | None
    kinds: tuple[Function, ...]  # of layers, no two the same
    pattern: tuple[int, ...]  # the kinds of the first layers, which repeats
    is_first: bool

    def layers(self, params: Tree) -> Tree:
        """Returns the parameters of the stack, below its name if it has one."""
        name, layers = self.name, params[LAYERS]
        return layers if name is None else {name: layers[name]}

    def start(self, ends: Tree, batch: Tree, x: Tree, shared: Tree) -> tuple:
        """Returns the inputs of the layers, from the output of the stack before."""
        before = () if self.is_first else (x,)
        if self.shared is not None:
            shared = self.shared(ends, batch, *before)
            if not isinstance(shared, dict) or not all(map(_is_name, shared)):
                wanted = "a dict of arguments of layer by name"
                remedy = 'return for example {"mask": mask}'
                raise type_error("what shared returns", wanted, shared, remedy)
        if self.embed is not None:
            x = self.embed(ends, batch, *before)
        return x, shared

    def of_kind(self, i: Index, run: Callable[[Function], T]) -> T:
        """Returns ``run(layer)`` for the function of layer ``i``."""
        if len(self.kinds) == 1:
            return run(self.kinds[0])
        kind = jnp.asarray(self.pattern)[i % len(self.pattern)]
        return jax.lax.switch(kind, [lambda one=one: run(one) for one in self.kinds])


def stacks_of(
    embed: Function | Mapping[str, Function],
    layer: Layer | Mapping[str, Layer],
    shared: Function | Mapping[str, Function] | None,
) -> list[Stack]:
    """Returns the stacks, in the order of ``layer``, from ``layerwise``'s arguments."""
    several = isinstance(layer, Mapping)
    layers: dict = dict(layer) if several else {None: layer}
    names = list(layers)
    if several and not (names and all(map(_is_name, names))):
        raise ValueError(
            f"layer must have a function for each stack by its name, got {names}; pass "
            'for example {"encoder": encode, "decoder": decode}.'
        )
    embeds, shares = (
        _of_stacks("embed", embed, layers),
        _of_stacks("shared", shared, layers),
    )
    if embeds[0] is None:
        raise ValueError(
            f"embed has no function for {names[0]!r}, the first stack; pass one that "
            "returns x for its layers."
        )
    each = zip(layers.items(), embeds, shares, strict=True)
    return [
        Stack(name, embed, share, *_kinds(layer), name == names[0])
        for (name, layer), embed, share in each
    ]


def _of_stacks(
    argument: str,
    given: Function | Mapping[str, Function] | None,
    names: Iterable[str | None],
) -> list[Function | None]:
    """Returns the function of each stack; a single function is for the first one."""
    names = list(names)
    found: dict = dict(given) if isinstance(given, Mapping) else {names[0]: given}
    if not set(found) <= set(names):
        raise ValueError(
            f"{argument} has functions for {list(found)}, but layer for {names}; pass "
            "one function, for the first stack, or a dict with the same names."
        )
    for function in found.values():
        if function is not None or (argument == "embed" and given is None):
            check_function(argument, function, REMEDY)
    return [found.get(name) for name in names]


def _kinds(layer: Layer) -> tuple[tuple[Function, ...], tuple[int, ...]]:
    """Returns the distinct functions of a pattern, and their indices along it."""
    pattern: Iterable = [layer]
    if isinstance(layer, Sequence) and not isinstance(layer, str) and layer:
        pattern = layer
    kinds: dict[Function, int] = {}
    for one in pattern:
        check_function("layer", one, REMEDY)
        kinds.setdefault(one, len(kinds))
    return tuple(kinds), tuple(kinds[one] for one in pattern)


def _is_name(name: object) -> bool:
    """Returns whether a key can be a name; in paths, a number would be a layer."""
    return isinstance(name, str) and bool(name) and not name.isdecimal()
