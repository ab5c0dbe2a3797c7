"""What version 0.2 called otherwise is refused by name: arguments and states."""

import contextlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest

import madax
from madax import papers, transforms


@contextlib.contextmanager
def raises(kind, *texts):
    with pytest.raises(kind) as error:
        yield
    assert all(text in str(error.value) for text in texts), str(error.value)


CALLS = {
    "madam": (lambda: madax.madam(0.1, 0.9), "madam", "learning_rate", "b2=0.9"),
    "muon_madam": (lambda: madax.muon_madam(0.1, 0.9), "muon_madam", "b1=0.9"),
    "bbit_madam": (lambda: papers.bbit_madam(0.1, 12), "bbit_madam", "bits=12"),
    "lns_madam": (lambda: papers.lns_madam(0.1, None), "lns_madam", "format=None"),
    "mask": (lambda: transforms.add_decayed_log_weights(0.1, True), "mask=True"),
    "base_precision": (lambda: papers.bbit_madam(base_precision=1), "base_step"),
    "format": (lambda: madax.lns_quantize(format=None), "papers.quantize_to_grid"),
    "position": (lambda: madax.lns_quantize(madax.LogFormat(8)), "quantize_to_grid"),
    "p_scale": (lambda: madax.lns_quantize(p_scale=1), "papers.quantize_to_grid"),
    "weight_decay": (lambda: madax.madam(weight_decay=None), "weight_decay", "0.0"),
    "unknown": (lambda: madax.madam(rate=1), "rate"),
}


@pytest.mark.parametrize("name", CALLS)
def test_old_arguments_name_the_new_ones(name):
    call, *texts = CALLS[name]
    with raises(TypeError, *texts):
        call()


def test_the_message_says_which_position_it_was():
    with raises(TypeError, "write b2=0.9 (it was the second position until 0.2)."):
        madax.madam(0.1, 0.9, 3.0)


def test_the_last_positions_that_are_left():
    madax.madam(0.1), madax.muon_madam(0.1), transforms.add_decayed_log_weights(0.1)
    with pytest.raises(TypeError, match="positional"):
        madax.clip_log_weights(1.0, 0.1)


# --- states ---------------------------------------------------------------------------


class ScaleBySecondMomentState(NamedTuple):
    """As it was in 0.2."""

    count: Any
    v: Any
    m: Any
    window: Any


PARAMS = {"w": jnp.ones((2, 3))}
OLD = ScaleBySecondMomentState(jnp.int32(3), PARAMS, None, None)


def test_flax_refuses_an_old_state_by_name():
    serialization = pytest.importorskip("flax.serialization")
    fields = serialization.to_state_dict(OLD)
    direction = madax.scale_by_second_moment().init(PARAMS)
    with raises(ValueError, "'v'", "'nu'"):
        serialization.from_state_dict(direction, fields)
    with raises(ValueError, "'0'", "'direction'", "'geometry'"):
        serialization.from_state_dict(
            madax.madam().init(PARAMS), serialization.to_state_dict((OLD, OLD))
        )


def test_orbax_refuses_an_old_state_by_name(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old", OLD)
        checkpointer.wait_until_finished()
        target = madax.scale_by_second_moment().init(PARAMS)
        with pytest.raises(ValueError) as error:
            checkpointer.restore(tmp_path / "old", target)
    assert "nu" in str(error.value)
