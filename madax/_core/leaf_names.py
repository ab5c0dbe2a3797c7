"""Reads the names of leaves and of their modules."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Literal

Kind = Literal["matrix", "vector", "table", "head", "router", "filter", "unknown"]
# The axes of a leaf that a product with the leaf sums over, and the axes of the result.
Axes = tuple[Sequence[int], Sequence[int]]


def _name(pattern: str) -> re.Pattern[str]:
    """Matches a whole name, with or without a number at its end."""
    return re.compile(rf"({pattern})(_?\d+)?", re.IGNORECASE)


# Names that do not say what a leaf is for.
GENERIC = _name(r"kernels?|weights?|w|params|lora|(\w+_)?lora_[ab]|layers|~|")
NORM = _name(
    r"\w*norm(_(?!proj|linear|mlp)[a-z]+)?|rms(_\w+)?|(\w+_)?(ln|bn)(\d*_[a-z]+)?"
)
OF_NORM = _name(r"weight|w|g|b")
VECTOR = _name(r"(\w+_|layer)?(bias|scale|offset|gamma|beta|gain)(e?s)?|r_k")
# Rates of state-space models: logarithms, or numbers of one sign.
RATE = _name(r"\w+_log|log_\w+|lambda(_\w+)?")
B = _name("b")
BIAS = _name(r"b|(\w+_)?bias(es)?")
TABLE = _name(
    r"(?!.*proj)\w*embed\w*|(\w+_)?(emb|wte|wpe|table|codebook|vocab(ulary)?|tokens?"
    r"|latents|prompt|positions?)"
)
PATCHES = re.compile("patch(es)?_?embed|embed_?patch", re.IGNORECASE)
HEAD = _name(r"(?!multi_?head|pre_)(\w*head|(\w+_)?logits(_\w+)?|classifier)")
LAST = _name(r"output|unembed\w*|readout")
ROUTER = _name(r"\w*router(_\w+)?")
GATE = _name("gate|gating")
ATTENTION = _name(r"\w*(attn|attention|multi_?head)\w*")
OF_ATTENTION = r"(to_|w_?|\w*(attn|attention)_)?"
PROJECTION = r"(_(proj|projection|linear|kernel|w))*"
TO_HEADS = _name(
    rf"{OF_ATTENTION}(q|k|v|kv|qkv|query|key|value|queries|keys|values){PROJECTION}"
)
FROM_HEADS = _name(rf"{OF_ATTENTION}(o|out|output|vec){PROJECTION}(_einsum)?")
EXPERTS = re.compile("expert|moe", re.IGNORECASE)
EXPERT = re.compile(r"experts?[_/]?(\d+)/", re.IGNORECASE)  # one of a list
LORA = re.compile(r"lora(_[ab])?$", re.IGNORECASE)
# Modules whose kernels of three axes and more are stacks of matrices.
STACK = re.compile(
    r"mlp|ffn|feed_?forward|einsum|linear|dense(?!_?general)"
    r"|(^|_)(wi|wo|up|gate|gating|down|fc)(_|$)",
    re.IGNORECASE,
)
# Modules that are no convolutions, whatever their shapes.
PRODUCT = re.compile("einsum|proj|linear|dense", re.IGNORECASE)
DENSE = re.compile(rf"proj|{STACK.pattern}", re.IGNORECASE)
CONVOLUTION = re.compile("conv", re.IGNORECASE)
DEPTHWISE = re.compile(r"depthwise|dw_?conv|conv_?dw", re.IGNORECASE)
LAYERS = _name("layers?|blocks?|stack|scan")


@dataclasses.dataclass(eq=False)
class Leaf:
    """A leaf, and what is known about it so far.

    Attributes:
      names: the components of its path.
      shape: shape of the whole leaf.
      core: the axes that do not count layers.
      layer: the path of its repeated layer; None outside of repeated layers.
      siblings: leaves of the same module, itself included.
      kind: "vector" for norms, biases, gains; "filter" for weights that are not
        matrices, such as depthwise kernels; "unknown" if names and shapes do not
        decide.
      axes: the axes of rows and columns; None if the leaf is not a matrix.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    core: tuple[int, ...]
    layer: tuple[str, ...] | None = None
    siblings: list["Leaf"] = dataclasses.field(default_factory=list)
    kind: Kind = "matrix"
    axes: Axes | None = None

    def __post_init__(self):
        *_, self.owner, own = "", *self.names
        self.own = own.lower()

    @cached_property
    def subject(self) -> str:
        """The last name that says what the leaf is for."""
        in_lora = LORA.search(self.owner)  # which owns "a" and "b"
        names = self.names[:-1] if in_lora else self.names
        named = [name for name in names if not GENERIC.fullmatch(name)]
        return named[-1] if named else self.names[-1]

    @property
    def around(self) -> tuple[str, ...]:
        """The path of what is around its module: ``query`` is in what ``out`` is in."""
        return self.names[: -2 if GENERIC.fullmatch(self.own) else -1]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in self.core)

    @property
    def fans(self) -> tuple[int, int]:
        """The numbers of inputs and outputs of a matrix."""
        fan_in, fan_out = [size_of(self.shape, x) for x in self.axes or ()] or (0, 0)
        return fan_in, fan_out

    @property
    def fan_in(self) -> int:
        """Returns the number of terms in a sum of products with the leaf, 1 or more.

        A table is looked up, and has the scale of a matrix that takes its rows. If
        names and shapes do not decide, the longest axis of a layer counts its outputs.
        """
        inputs, outputs = self.fans
        fan_in = outputs if self.kind == "table" else inputs
        return fan_in or max(math.prod(self.sizes) // max((1, *self.sizes)), 1)

    @cached_property
    def is_vector(self) -> bool:
        """Returns whether it is a vector in each layer, by its name."""
        if NORM.fullmatch(self.owner) and OF_NORM.fullmatch(self.own):
            return True
        if B.fullmatch(self.own) and not LORA.search(self.owner):
            # Matrices are also called "b"; a bias has fewer axes than its kernel.
            return any(_is_within(self.shape, x.shape) for x in self.siblings)
        weight = _weight_of(self.own)
        return any(x.fullmatch(self.own) for x in (VECTOR, NORM, RATE)) or any(
            x.own == weight and _is_within(self.shape, x.shape) for x in self.siblings
        )

    @property
    def may_be_bias(self) -> bool:
        return len(self.core) == 1 and not NORM.fullmatch(self.own)


Below = Mapping[tuple[str, ...], list[Leaf]]


def leaves_below(leaves: Iterable[Leaf]) -> Below:
    """Returns the leaves below each prefix of their paths."""
    below = defaultdict(list)
    for leaf in leaves:
        for i in range(len(leaf.names)):
            below[leaf.names[:i]].append(leaf)
    return below


def near(leaf: Leaf, below: Below, prefix: tuple[str, ...] | None = None) -> list[Leaf]:
    """Returns the other leaves of its layer below a prefix, by default around it."""
    found = below[leaf.around if prefix is None else prefix]
    return [x for x in found if x.layer == leaf.layer and x is not leaf]


def size_of(shape: Sequence[int], axes: Iterable[int]) -> int:
    return math.prod(shape[i] for i in axes)


def _weight_of(bias: str) -> str:
    """Returns the name of the weight beside ``"bq"``, ``"b_q"`` or ``"q_b"``."""
    return f"{bias[:-1]}w" if bias.endswith("_b") else re.sub("^b", "w", bias)


def _is_within(bias: Sequence[int], kernel: Sequence[int]) -> bool:
    """Returns whether a shape is the other one without some axes."""
    sizes = iter(kernel)
    return len(bias) < len(kernel) and all(n in sizes for n in bias)
