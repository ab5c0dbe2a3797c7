"""The type hints of codes and formats resolve."""

import inspect
import typing

import pytest

from madax.codes import _array, _grad, _quantize, _saving
from madax.formats import _base, _log, _symlog, _uniform

MODULES = (_array, _grad, _quantize, _saving, _base, _log, _symlog, _uniform)
PUBLIC = {
    f"{module.__name__}.{name}": value
    for module in MODULES
    for name, value in vars(module).items()
    if getattr(value, "__module__", None) == module.__name__
    and (inspect.isclass(value) or inspect.isfunction(value))
}


@pytest.mark.parametrize("name", PUBLIC)
def test_hints_resolve(name):
    value = PUBLIC[name]
    typing.get_type_hints(value)
    if inspect.isclass(value):
        for method in filter(inspect.isfunction, vars(value).values()):
            typing.get_type_hints(method)


def test_fields_of_codes_are_arrays():
    hints = typing.get_type_hints(_array.QuantizedArray)
    assert typing.Any not in hints.values()
