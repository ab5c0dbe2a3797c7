"""Guards leaves of codes against arithmetic in a loss, such as a penalty."""

import sys

import jax

from madax._core.names import Tree

_REMEDY = (
    "a leaf of codes, which is not a weight; take penalties and norms over "
    "jax.tree.leaves(madax.dequantize_params(params))"
)
# Libraries that flatten a tree only to build it again, or to read shapes.
_LIBRARIES = {"jax", "flax", "haiku", "equinox", "madax"}
_OF_TREES = {"jax._src.tree", "jax._src.tree_util"}
_ARITHMETIC = """
abs add array bool complex divmod eq float floordiv ge getitem gt index int iter
le lt matmul mod mul ne neg pos pow radd rdivmod rfloordiv rmatmul rmod rmul
round rpow rsub rtruediv sub truediv
""".split()  # noqa: SIM905


def leaves_are_taken() -> bool:
    """Returns whether a user's code is flattening the tree to a list of leaves.

    It is called where JAX asks a node for its children. Libraries ask, too, but build
    the tree again from them.
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
    """An array that shows its shape and dtype, but refuses arithmetic."""

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
    """Returns the guarded array, for a tree that is built again."""
    return x._array if isinstance(x, LeafOfCodes) else x
