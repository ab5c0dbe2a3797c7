"""What users may name: where each name is, where it went, and hints that resolve."""

import inspect
import re
import typing

import jax
import pytest

import madax
from madax import (
    diagnostics,
    formats,
    hijax,
    optimizers,
    papers,
    trainers,
    transforms,
    wrappers,
)

ROOMS = (optimizers, transforms, papers, wrappers, formats, diagnostics, trainers)
if jax.__version_info__ >= (0, 10, 2):
    ROOMS += (hijax,)
NAMESPACES = (madax, *ROOMS)
PUBLIC = {
    f"{space.__name__}.{name}": getattr(space, name)
    for space in NAMESPACES
    for name in space.__all__
    if not inspect.ismodule(getattr(space, name))
}
# All that stood at the top of madax 0.2 and no longer does.
MOVED = {
    "AddDecayedLogWeightsState": "transforms.Geometry",
    "ClipLogWeightsState": "transforms.Geometry",
    "Format": "formats",
    "LnsQuantizeState": "transforms",
    "MatrixDimensionNumbers": "transforms",
    "ScaleByOrthogonalMomentumState": "transforms",
    "ScaleBySecondMomentState": "transforms",
    "ScaleBySignLogState": "transforms.Geometry",
    "WithQuantizedParamsState": "wrappers",
    "WithQuantizedStateState": "wrappers",
    "add_decayed_log_weights": "transforms",
    "bbit_madam": "papers",
    "fake_quantize": "papers",
    "lns_madam": "papers",
    "scale_by_orthogonal_momentum": "transforms",
    "with_dequantized_params": "transforms",
}


def test_the_top_has_25_names():
    named = """madam muon muon_madam scale_by_second_moment scale_by_sign_log
    clip_log_weights lns_quantize LogFormat SymlogFormat UniformFormat MomentFormat
    quantize_params dequantize_params QuantizedArray with_quantized_params
    with_quantized_state value_and_grad grad layerwise split_layers to_flat_dict
    from_flat_dict diagnostics transforms papers""".split()  # noqa: SIM905
    assert sorted(named) == madax.__all__
    rooms = ["formats", "hijax", "trainers", "wrappers"]
    assert dir(madax) == sorted([*named, "__version__", *rooms])
    assert callable(madax.layerwise)  # The function, and not the folder.


def refused(text):
    return pytest.raises(AttributeError, match=re.escape(text))


@pytest.mark.parametrize("space", NAMESPACES, ids=lambda space: space.__name__)
def test_a_namespace_has_what_it_lists(space):
    assert sorted(space.__all__) == sorted(set(space.__all__))
    assert all(getattr(space, name) is not None for name in space.__all__)


@pytest.mark.parametrize("name", MOVED)
def test_a_name_that_moved_is_refused_with_its_place(name):
    space, _, new = MOVED[name].partition(".")
    new = new or name
    with refused(f"madax.{name} is madax.{space}.{new} since 0.3."):
        getattr(madax, name)
    assert getattr(vars(madax)[space], new).__name__ == new


@pytest.mark.parametrize(
    "name", ["Layerwise", "MomentWindow", "SplitLayers", "StateWindow"]
)
def test_a_type_that_is_not_public_any_more_is_refused(name):
    with refused(f"madax.{name} is not public since 0.3"):
        getattr(madax, name)


def test_other_names_are_unknown():
    with refused("'madax' has no attribute 'adam'"):
        getattr(madax, "adam")  # noqa: B009


def functions_of(thing):
    """A function itself; of a class, the class and its public methods."""
    if not inspect.isclass(thing):
        return [thing]
    members = [x for name, x in vars(thing).items() if not name.startswith("_")]
    unwrapped = [getattr(x, "fget", getattr(x, "__func__", x)) for x in members]
    return [thing, *filter(inspect.isfunction, unwrapped)]


@pytest.mark.parametrize("name", PUBLIC)
def test_hints_resolve(name):
    for function in functions_of(PUBLIC[name]):
        hints = typing.get_type_hints(function)
        assert inspect.isclass(function) or "return" in hints, function
