"""Reads what each leaf of a tree is, from its names and the shapes around it.

It answers three questions in turn. Which axes count layers? A norm has one axis, so a
second axis indicates a stack. Which axes are rows and columns? Names decide for
attention, experts and convolutions, shapes for the rest. What is the leaf for? Tables
and last layers have a typical name, or a size (a vocabulary, classes) that no other
leaf has.

A leaf of a repeated layer is compared with its own layer, and any other leaf with the
tree without those layers. So a leaf is read the same inside :func:`madax.layerwise`,
where an optimizer sees either the ends or one layer, and outside.
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

from madax._core import leaf_names as like
from madax._core.leaf_names import Axes, Below, Kind, Leaf, leaves_below, near, size_of
from madax._core.leaf_roles import find_roles
from madax._core.names import ENDS, LAYERS

_Layout = Literal["vector", "convolution", "from heads", "product"]


def read_leaves(
    paths: Sequence[str], shapes: Iterable[Sequence[int]]
) -> tuple[Leaf, ...]:
    """Reads kinds and axes of all leaves, given paths like ``"Dense_0/kernel"``."""
    return _read(tuple(paths), tuple(map(tuple, shapes)))


# One trace of a step reads the same tree several times.
@functools.lru_cache(maxsize=16)
def _read(
    paths: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]
) -> tuple[Leaf, ...]:
    leaves, modules = [], defaultdict(list)
    for path, shape in zip(paths, shapes, strict=True):
        names = tuple(re.split(r"[/.]", path))
        siblings = modules[names[:-1]]
        leaf = Leaf(names, tuple(shape), tuple(range(len(shape))), siblings=siblings)
        siblings.append(leaf)
        leaves.append(leaf)
    _find_stacks(leaves)
    _find_lists(leaves)
    below = leaves_below(leaves)
    # A leaf is compared with others, so all have an answer before any changes.
    layouts = [_layout(leaf, below) for leaf in leaves]
    for leaf, layout in zip(leaves, layouts, strict=True):
        if layout in ("product", "from heads"):
            leaf.core = tuple(i for i in leaf.core if leaf.shape[i] > 1)
    for leaf, layout in zip(leaves, layouts, strict=True):
        leaf.kind, leaf.axes = _as_matrix(leaf, layout, below)
    find_roles(leaves, below)
    return tuple(leaves)


# --- which axes count layers ----------------------------------------------------------


def _find_stacks(leaves: list[Leaf]) -> None:
    """Finds stacks of layers, and removes the axes that count layers."""
    tops = {leaf.names[0] for leaf in leaves}
    layers = [leaf for leaf in leaves if leaf.names[0] == LAYERS]
    if layers and tops <= {ENDS, LAYERS}:  # the form that layerwise trains
        listed = all(leaf.names[1:2] and leaf.names[1].isdigit() for leaf in layers)
        for leaf in layers:
            if not listed or ENDS in tops:
                leaf.layer = leaf.names[: 1 + listed]
        # Without the ends, the tree is a stack or one of its layers.
        alike = all(len(x.core) > 2 and not _is_convolution(x) for x in layers)
        if not listed and (ENDS in tops or alike):
            several = not _take_axis(layers, 0) and ENDS in tops
            for name in {
                leaf.names[1] for leaf in layers if several and leaf.names[1:]
            }:
                _take_axis([leaf for leaf in layers if leaf.names[1:2] == (name,)], 0)
    for _ in range(2):  # A stack may be a stack of stages, each of several layers.
        taken = set()
        groups = sorted(leaves_below(leaves).items(), key=lambda item: len(item[0]))
        for prefix, group in groups:
            if taken.isdisjoint(group) and _is_stack(group):
                taken |= set(group)
                _make_layer(group, prefix)


def _is_stack(group: list[Leaf]) -> bool:
    """Returns whether vectors show an axis of layers, which is then removed."""
    # Biases of queries have two axes even without a stack: heads and features.
    vectors = [x for x in group if x.is_vector and not like.TO_HEADS.fullmatch(x.owner)]
    shown = vectors and all(sum(n > 1 for n in x.sizes) > 1 for x in vectors)
    matrices = any(len(leaf.core) > 2 for leaf in group)
    if not (shown and matrices):
        return False
    # On its second axis, a single kernel may have as many heads as features of a head.
    several = sum(len(leaf.core) > 2 for leaf in group) > 1
    return _take_axis(group, 0) or (several and _take_axis(group, 1))


def _take_axis(group: list[Leaf], i: int) -> bool:
    """Removes a core axis from leaves if it has the same size in all of them."""
    sizes = {leaf.sizes[i : i + 1] for leaf in group}
    if len(sizes) != 1 or () in sizes:
        return False
    for leaf in group:
        leaf.core = leaf.core[:i] + leaf.core[i + 1 :]
    return True


def _find_lists(leaves: list[Leaf]) -> None:
    """Finds layers that are alike, as ``blocks/0``, ``blocks/1`` or ``Block_1``."""
    lists = defaultdict(dict)
    for prefix, group in leaves_below(leaves).items():
        number = re.fullmatch(r"(.*?)_?\d+", prefix[-1]) if prefix else None
        if number and all(leaf.layer is None for leaf in group):
            lists[*prefix[:-1], number[1]][prefix] = group
    for elements in lists.values():
        forms = [
            tuple((leaf.names[len(prefix) :], leaf.shape) for leaf in group)
            for prefix, group in elements.items()
        ]
        if len(set(forms)) < len(forms):
            for prefix, group in elements.items():
                _make_layer(group, prefix)


def _make_layer(group: list[Leaf], prefix: tuple[str, ...]) -> None:
    """Marks leaves as a repeated layer, unless it has a single weight."""
    if sum(len(x.core) > 1 and not x.is_vector for x in group) > 1:
        for leaf in group:
            leaf.layer = leaf.layer or prefix


# --- which axes are rows and columns --------------------------------------------------


def _layout(leaf: Leaf, below: Below) -> _Layout:
    """How a leaf is multiplied, by its names, or else by its shape."""
    # A gate of shape (1, 1) is no more a matrix than a gate of shape ().
    if len(leaf.core) < 2 or leaf.is_vector or max(leaf.sizes) < 2:
        return "vector"
    from_heads = like.FROM_HEADS.fullmatch(leaf.subject) is not None and (
        any(map(like.ATTENTION.fullmatch, leaf.names))
        or any(like.TO_HEADS.fullmatch(x.subject) for x in near(leaf, below))
    )
    if from_heads:
        return "from heads"
    return "convolution" if _is_convolution(leaf) else "product"


def _as_matrix(leaf: Leaf, layout: _Layout, below: Below) -> tuple[Kind, Axes | None]:
    """The kind of a leaf before its role is known, and its axes if it is a matrix."""
    if layout == "vector":
        return "vector", None
    if layout == "convolution":
        split = _split_convolution(leaf)
    else:
        split = _split(leaf, layout == "from heads", below)
    if split is None:
        return "unknown", None
    # A depthwise kernel or a single row would lose everything except its length.
    inputs, outputs = (tuple(leaf.core[i] for i in axes) for axes in split)
    if min(size_of(leaf.shape, axes) for axes in (inputs, outputs)) < 2:
        return "filter", None
    return "matrix", (inputs, outputs)


def _split(leaf: Leaf, from_heads: bool, below: Below) -> Axes | None:
    """Returns the core axes that a product sums over, and the axes of its result."""
    axes, sizes = range(len(leaf.core)), leaf.sizes
    if len(axes) < 3:
        # PyTorch and Equinox, whose cells have "weight_ih", keep the outputs first; a
        # bias tells of any layer.
        known = _outputs_by_bias(leaf)
        by_name = leaf.own == "weight" or leaf.own.startswith("weight_")
        first = by_name if known is None else known == 0
        return (axes[1:], axes[:1]) if first else (axes[:1], axes[1:])
    to_heads = like.TO_HEADS.fullmatch(leaf.subject)
    experts = any(map(like.EXPERTS.search, leaf.names)) and not (from_heads or to_heads)
    lora = [x for x in (leaf.owner, leaf.own) if like.LORA.search(x)]
    if lora and not experts:
        second = (leaf.own if lora[0].lower() == "lora" else lora[0])[-1] in "bB"
        return (axes[:1], axes[1:]) if second else (axes[:-1], axes[-1:])
    if from_heads:
        if len(axes) == 3 and sizes[1] >= sizes[2]:  # No head has as many features.
            return axes[1:2], axes[2:]
        in_groups = _has_rolled(leaf, below, like.TO_HEADS, -1)
        return (axes[:-1] if in_groups else axes[-3:-1]), axes[-1:]
    if to_heads:
        # An axis counts keys and values where the two are one leaf. It may count heads.
        if len(axes) == 3 and (sizes[0] < 4 or _heads_first(leaf, below)):
            return axes[1:2], axes[2:]
        if _has_rolled(leaf, below, like.FROM_HEADS, 1):
            return axes[:1], axes[1:]
        counted = len(axes) == 4 and sizes[1] in (2, 3) and sizes[0] > 3
        return (axes[:1] if counted else axes[-3:-2]), axes[-2:]
    if not experts and _is_fused(leaf, below):
        return axes[:1], axes[1:]
    if experts or like.STACK.search(leaf.subject) or leaf.own in ("kernels", "weights"):
        return axes[-2:-1], axes[-1:]
    for x in leaf.siblings:  # A bias has the shape of the outputs.
        bias = tuple(n for n in x.sizes if n > 1)
        is_bias = like.BIAS.fullmatch(x.own) and len(bias) < len(sizes)
        count = len(bias) if is_bias else 0
        if count and sizes[-count:] == bias:
            return axes[:-count], axes[-count:]
        if count and len(x.sizes) > 1 and sizes[:1] == bias:  # (outputs, 1, 1)
            return axes[1:], axes[:1]
    return None


def _heads_first(leaf: Leaf, below: Below) -> bool:
    """Whether features of the layer are the second axis, as its last product tells."""
    out = [
        x.sizes[-1]
        for x in near(leaf, below)
        if len(x.core) == 3 and like.FROM_HEADS.fullmatch(x.subject)
        if not like.LORA.search(x.own)
    ]
    return any(leaf.sizes[0] != features == leaf.sizes[1] for features in out)


def _has_rolled(leaf: Leaf, below: Below, name: re.Pattern[str], shift: int) -> bool:
    """Whether a leaf beside it has the same four axes, rolled by one.

    Queries of shape (features, groups, heads, size) have an output of shape (groups,
    heads, size, features). Two leaves of a stack, whose first axis counts layers, are
    no such pair.

    Args:
      leaf: with the axes (a, b, c, d).
      below: the leaves below each prefix.
      name: what the other leaf may be called.
      shift: 1 if it has the axes (b, c, d, a), and -1 for (d, a, b, c).
    """
    rolled = leaf.sizes[shift:] + leaf.sizes[:shift]
    return len(leaf.core) == 4 and any(
        x.sizes == rolled and name.fullmatch(x.subject) for x in near(leaf, below)
    )


def _is_fused(leaf: Leaf, below: Below) -> bool:
    """Whether two or three products in one, (inputs, 2, outputs), feed another leaf."""
    if len(leaf.core) != 3 or not leaf.sizes[1] < 4 <= leaf.sizes[0]:
        return False
    inputs, _, outputs = leaf.sizes
    return any(x.sizes == (outputs, inputs) for x in near(leaf, below))


def _outputs_by_bias(leaf: Leaf) -> int | None:
    """The only core axis as long as the bias of a layer with one weight, if it is."""
    several = [x for x in leaf.siblings if len(x.core) > 1 and not x.is_vector]
    biases = [
        tuple(n for n in x.sizes if n > 1)  # also of (outputs, 1, 1)
        for x in leaf.siblings
        if like.BIAS.fullmatch(x.own)
    ]
    if len(several) > 1 or len(biases) != 1 or len(biases[0]) != 1:
        return None
    found = [i for i, n in enumerate(leaf.sizes) if n == biases[0][0]]
    return found[0] if len(found) == 1 else None


def _is_convolution(leaf: Leaf) -> bool:
    """Returns whether a leaf is a convolution, by its name or its window axes."""
    sizes = leaf.sizes
    if like.CONVOLUTION.search(leaf.subject):
        return len(sizes) > 2 or min(sizes) < 9  # rank 2: a window of each channel
    windows = sizes[2:] if leaf.own == "weight" else sizes[:-2]
    if len(windows) < 2 or len(set(windows)) > 1 or windows[0] > 32:
        return False
    is_product = like.PRODUCT.search(leaf.subject) or any(
        map(like.EXPERTS.search, leaf.names)
    )
    if 1 < windows[0] < 8 and not is_product:
        return True  # The "up" and "down" of a U-Net, or its "q" and "v".
    # Matrices of a stack have a bias each, a convolution has one: "up" may be either.
    stack = like.STACK.search(leaf.subject) and _outputs_by_bias(leaf) is None
    return not (like.TO_HEADS.fullmatch(leaf.subject) or stack)


def _split_convolution(leaf: Leaf) -> Axes:
    """Like :func:`_split`, for kernels of two layouts; () for depthwise kernels."""
    sizes, axes = leaf.sizes, range(len(leaf.core))
    if len(sizes) == 2:
        return (), ()
    # A window has one size. Where both ends have, the smaller window is the likely one.
    before, behind = [(len(set(w)), math.prod(w)) for w in (sizes[:-2], sizes[2:])]
    outputs_first = leaf.own == "weight" or (leaf.own != "kernel" and behind < before)
    windows = sizes[2:] if outputs_first else sizes[:-2]
    if len(set(windows)) > 1 and any(map(like.LAYERS.fullmatch, leaf.names)):
        axes, sizes = axes[1:], sizes[1:]  # The first counts layers.
    inputs, outputs = sizes[1::-1] if outputs_first else sizes[-2:]
    window = math.prod(sizes) // (inputs * outputs)
    depthwise = any(map(like.DEPTHWISE.search, leaf.names)) or outputs >= 4 * window
    if inputs == 1 and depthwise:
        return (), ()
    return (axes[1:], axes[:1]) if outputs_first else (axes[:-1], axes[-1:])
