"""Tells what a matrix is for: tables, last layers and routers.

They have a typical name, or a size (a vocabulary, classes) that no other leaf has.
"""

from collections import defaultdict

from madax._core import leaf_names as like
from madax._core.leaf_names import Below, Kind, Leaf, near
from madax._core.names import ENDS


def find_roles(leaves: list[Leaf], below: Below) -> None:
    """Tells tables, last layers and routers from other matrices."""
    for leaf in leaves:
        if leaf.kind in ("matrix", "unknown"):
            leaf.kind = _by_name(leaf, below)
    outside = [leaf for leaf in leaves if leaf.layer is None]
    layered = len(outside) < len(leaves) or {x.names[0] for x in leaves} == {ENDS}
    by_size = _BySize(outside, layered)
    found = [by_size.kind_of(leaf) for leaf in outside]
    for leaf, kind in zip(outside, found, strict=True):
        leaf.kind = kind


def _by_name(leaf: Leaf, below: Below) -> Kind:
    _, fan_out = leaf.fans
    heads = [i for i, name in enumerate(leaf.names) if like.HEAD.fullmatch(name)]
    attends = any(map(like.ATTENTION.fullmatch, leaf.names))
    # The heads of attention are others: MultiHead_0/Head_0, or head_0/query.
    if heads and not (attends or like.TO_HEADS.fullmatch(leaf.subject)):
        # In a classifier of several layers, only the last is a last layer.
        group = near(leaf, below, leaf.names[: heads[0] + 1])
        feeds = fan_out and any(x.fans[0] == fan_out for x in group)
        return leaf.kind if feeds else "head"
    if like.LAST.fullmatch(leaf.subject) and leaf.layer is None and not attends:
        return "head"
    if any(map(like.TABLE.fullmatch, (leaf.own, leaf.subject))) or any(
        map(like.PATCHES.search, leaf.names)  # which embeds the input, too
    ):
        return "table"
    if like.GATE.fullmatch(leaf.subject):
        return "router" if _counts_experts(leaf, below) else leaf.kind
    return "router" if like.ROUTER.fullmatch(leaf.subject) else leaf.kind


def _counts_experts(leaf: Leaf, below: Below) -> bool:
    """Whether a leaf has an output for each of the experts beside it."""
    _, fan_out = leaf.fans
    if any(len(x.core) > 2 and x.sizes[0] == fan_out for x in near(leaf, below)):
        return True
    # Experts in a list may be layers of their own, if nothing around them is.
    paths = ("/".join(x.names) for x in below[leaf.around])
    listed = {found[1] for found in map(like.EXPERT.search, paths) if found}
    return len(listed) == fan_out > 0


class _BySize:
    """Recognises a table or a last layer by a size that no other leaf has."""

    def __init__(self, leaves: list[Leaf], layered: bool):
        self.layered = layered
        self.holders = defaultdict(list)
        for leaf in leaves:
            for n in set(leaf.sizes):
                self.holders[n].append(leaf)
        biases = [x for x in leaves if like.BIAS.fullmatch(x.own)]
        self.biased = {(*x.names[:-1], x.sizes) for x in biases}

    def kind_of(self, leaf: Leaf) -> Kind:
        if leaf.kind != "matrix" or len(leaf.core) != 2:
            return leaf.kind
        fan_in, fan_out = leaf.fans
        # A leaf that multiplies features is not looked up, so it is not a table.
        biased = (*leaf.names[:-1], (fan_out,)) in self.biased
        dense = biased or leaf.own == "kernel" or bool(like.DENSE.search(leaf.subject))
        if self.is_alone(leaf, fan_out, fan_in, dense):
            return "head"
        tall = self.layered or fan_in > fan_out
        table = tall and not dense and self.is_alone(leaf, fan_in, fan_out, dense)
        return "table" if table else "matrix"

    def is_alone(self, leaf: Leaf, n: int, other: int, dense: bool) -> bool:
        """Returns whether ``other`` is a width of features, and ``n`` is not."""
        if len(self.holders[n]) > 4:  # itself, a bias, a table, a last layer
            return False
        same = [
            x
            for x in self.holders[n]
            if x is not leaf and (not x.may_be_bias or x.names[:-1] != leaf.names[:-1])
        ]
        tables = [x for x in same if x.kind == "table" and x.sizes[0] == n]
        # A table and a last layer have a vocabulary in common.
        if self.layered and not dense and not tables and len(same) == 1 and n > other:
            tables = [x for x in same if sorted(x.sizes) == [other, n]]
        known = any(x is not leaf and x not in tables for x in self.holders[other])
        if not known or len(tables) < len(same):
            return False
        if tables or (self.layered and not dense):
            return True
        # Fused queries, keys and values, or gates, have a multiple of a width.
        widths = [other, *(m for m in self.holders if m > 7 and m != n)]
        return not any(n % m == 0 and n // m < 10 for m in widths)
