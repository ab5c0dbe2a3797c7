"""Models of Tunix on codes: what they compute, and ten steps of its own loop."""

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import is_quantized, needs_hijax, same

import madax

pytest.importorskip("tunix.sft.peft_trainer")
import others
from tunix_loop import by_tunix

pytestmark = [
    needs_hijax,
    pytest.mark.nightly,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("quick_compiles"),
    pytest.mark.parametrize("name", others.MODELS),
]

FMT = madax.SymlogFormat(8)


def test_the_list_is_what_its_program_does(name):
    listed = others.json.loads(others.LISTED.read_text())
    assert others.leaves_of(name) == listed[name]


def test_codes_compute_what_their_decoded_model_does(name):
    model = madax.quantize_params(others.build(name), FMT)
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=is_quantized)
    coded = sum(x.size for x in leaves if is_quantized(x))
    assert coded > 0.97 * sum(x.size for x in leaves)

    @nnx.jit
    def both(model, decoded):
        loss = lambda model: (others.logits(model).astype(float) ** 2).mean()
        plain, grads = nnx.value_and_grad(loss)(decoded)
        value, ours = madax.value_and_grad(loss)(model)
        # One structure for the two, by the paths of leaves.
        return (plain, jax.tree.leaves(grads)), (value, jax.tree.leaves(ours))

    same(*both(model, madax.dequantize_params(model)))


def test_its_loop_trains_it_on_codes(name):
    model = madax.hijax.lift(madax.quantize_params(others.build(name), FMT))
    losses = by_tunix(model, madax.hijax.optimizer(madax.muon_madam(0.01)), steps=10)
    assert np.mean(losses[-3:]) < losses[0]
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert {w.codes.dtype.name for w in leaves if hasattr(w, "codes")} == {"int8"}
