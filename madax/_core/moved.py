"""Errors for names and arguments of version 0.2, which say what to write now.

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
    """Decorates a function: old positions and names of arguments raise an error.

    ``places`` are the arguments that were positional in 0.2. ``gone`` says, by the name
    of a removed argument, what to do instead.
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
