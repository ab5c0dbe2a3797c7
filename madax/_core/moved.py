"""What version 0.2 called otherwise: errors that say what to write now.

This module is for one version only.
"""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


def by_name(
    *places: str, **gone: str
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Makes old positions and names of arguments errors that name the new ones.

    ``places`` are the arguments that lost their position after 0.2, and ``gone`` says
    by the name of an argument that is gone what to do instead.
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
