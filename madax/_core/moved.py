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
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def by_name(
    *places: str, **gone: str
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Makes old positions and old names of arguments errors that name the new ones.

    Args:
      places: the arguments that could be given by position in 0.2, after those that
        still can.
      gone: what to write instead of an argument that is gone, by its name.

    Returns:
      A decorator that keeps the signature and the annotations of a function.
    """

    def decorate(function):
        parameters = inspect.signature(function).parameters
        kinds = [parameter.kind for parameter in parameters.values()]
        positions = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)
        name, first = function.__name__, next(iter(parameters))

        @functools.wraps(function)
        def checked(*args, **kwargs):
            old = [*places[: max(len(args) - positions, 0)], *kwargs]
            for argument in old:
                if argument in gone:
                    raise TypeError(f"{name} has no {argument}: {gone[argument]}.")
            if len(args) > positions and places:
                raise TypeError(
                    f"{name} takes arguments after {first} by name: write "
                    f"{places[0]}={args[positions]!r} (it was the "
                    f"{_ORDINALS[positions]} position until 0.2)."
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
                f"{fullname} was a module of madax 0.2, which this file was written "
                "with, for example by pickle; load the file with that version and save "
                "the parameters by madax.to_flat_dict, which every version reads. The "
                "state of an optimizer is not carried over: call init.",
                name=fullname,
            )


# It is asked last: for modules that nothing else finds.
sys.meta_path.append(_OldModules())
