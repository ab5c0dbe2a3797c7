"""What several trainers need: their packages, and the codes of parameters."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from madax import hijax
from madax._core.checks import check_format
from madax._core.names import Tree
from madax.codes._quantize import quantize_params
from madax.formats._base import Format


def imported(module: str, package: str) -> Any:
    """Imports a module of a trainer when a function of :mod:`madax.trainers` needs it.

    Args:
      module: the full name of the module.
      package: the name of the function and of the package to install.

    Raises:
      ImportError: if the package is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # The trainer is there, and misses something itself.
        raise ImportError(
            f"madax.trainers.{package} needs the package {package}, which is not "
            f"installed; call pip install {package}."
        ) from error


def coder(format: Format, options: dict[str, Any]) -> Callable[[Tree], Tree]:
    """Returns the function that makes lifted codes of parameters.

    Trainers call it late, so the arguments are checked here.
    """
    check_format("format", format, Format, or_none=False)
    inspect.signature(quantize_params).bind(None, format, **options)
    return lambda params: hijax.lift(quantize_params(params, format, **options))
