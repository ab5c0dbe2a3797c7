"""What version 0.2 called otherwise: errors that say what to write now.

This module is for one version only.
"""

import functools
import importlib.abc
import inspect
import re
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


def by_name(
    *places: str, **gone: str
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Makes old positions and old names of arguments errors that name the new ones.

    Args:
      places: the arguments that had a position in 0.2, after those that still have one.
      gone: what to do instead of giving an argument that is gone, by its name.

    Returns:
      A decorator that keeps the signature and the annotations of a function.
    """

    def decorate(function):
        parameters = inspect.signature(function).parameters
        kinds = [parameter.kind for parameter in parameters.values()]
        left = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)
        name, first = function.__name__, next(iter(parameters))

        @functools.wraps(function)
        def checked(*args, **kwargs):
            for old in (*places[: max(len(args) - left, 0)], *kwargs):
                if old in gone:
                    raise TypeError(f"{name} has no {old}: {gone[old]}.")
            if len(args) > left:
                place = ("first", "second")[left]
                raise TypeError(
                    f"{name} takes arguments after {first} by name: write "
                    f"{places[0]}={args[left]!r} (it was the {place} position until "
                    "0.2)."
                )
            return function(*args, **kwargs)

        return checked

    return decorate


class _OldModules(importlib.abc.MetaPathFinder):
    """Says what to do with pickles that name the modules of 0.2."""

    def find_spec(self, fullname, path=None, target=None):
        del path, target
        if re.fullmatch(r"madax\._(?!core)[a-z_]+", fullname):
            raise ModuleNotFoundError(
                f"{fullname} was a module of madax 0.2, which wrote this file, for "
                "example by pickle; load it with that version, save the parameters by "
                "madax.to_flat_dict, which all versions read, and make a new state.",
                name=fullname,
            )


# It is asked last: for modules that nothing else finds.
sys.meta_path.append(_OldModules())
