"""Leaves of codes that were taken out of their tree in a loss: no arithmetic."""

import sys

import jax

from madax._core.names import Tree

_REMEDY = (
    "a leaf of codes that is no weight, as a penalty or a norm takes it: take it over "
    "jax.tree.leaves(madax.dequantize_params(params))"
)
# What takes leaves for a tree that it makes again, or for their shapes alone.
_LIBRARIES = {"jax", "flax", "haiku", "equinox", "madax"}
_OF_TREES = {"jax._src.tree", "jax._src.tree_util"}
_ARITHMETIC = """
abs add array bool complex divmod eq float floordiv ge getitem gt index int iter
le lt matmul mod mul ne neg pos pow radd rdivmod rfloordiv rmatmul rmod rmul
round rpow rsub rtruediv sub truediv
""".split()  # noqa: SIM905


def leaves_are_taken() -> bool:
    """Whether the tree that JAX takes apart will be a list of leaves, in a loss.

    It is called where JAX asks a node for its children. Functions of JAX and of layers
    ask, too, but put the tree together again.
    """
    frame, functions = sys._getframe(2), []
    while frame and frame.f_globals.get("__name__") in _OF_TREES:
        functions.append(frame.f_code.co_name)
        frame = frame.f_back
    caller = frame.f_globals.get("__name__", "") if frame else ""
    return caller.partition(".")[0] not in _LIBRARIES and any(
        "leaves" in name or "reduce" in name for name in functions
    )


class _InErrors(type):
    def __repr__(cls) -> str:
        return f"<class '{cls.__name__}'> ({_REMEDY})"


class LeafOfCodes(metaclass=_InErrors):
    """An array with its shape and dtype, and without its values."""

    def __init__(self, array: jax.Array):
        self._array = array

    shape = property(lambda self: self._array.shape)
    dtype = property(lambda self: self._array.dtype)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    nbytes = property(lambda self: self._array.nbytes)

    def __len__(self) -> int:
        return len(self._array)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or not hasattr(jax.Array, name):
            raise AttributeError(f"a {type(self).__name__} has no {name!r}.")
        return _refuse()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype})"


def _refuse(*_: object) -> object:
    raise TypeError(f"an operation got {_REMEDY}.")


for _name in _ARITHMETIC:
    setattr(LeafOfCodes, f"__{_name}__", _refuse)


def without_guard(x: Tree) -> Tree:
    """The array that was guarded, for a tree that is put together again."""
    return x._array if isinstance(x, LeafOfCodes) else x
