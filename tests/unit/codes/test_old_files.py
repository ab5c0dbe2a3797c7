"""Files of codes that madax 0.2.0 wrote are read as they were meant."""

import io
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import madax
from madax import LogFormat, SymlogFormat, UniformFormat

# flax.serialization.to_bytes({"w": codes}) by madax 0.2.0, in hexadecimal; the codes of
# the weights 1, -1/2, 1/4 and 1/10, and their scale.
SCALE = np.float32(1.7249999)
FILES = {
    "log": (
        LogFormat(bits=8, base_step=0.05),
        [116, -102, 88, 70],
        lambda c: np.sign(c) * np.exp(0.05 * (np.abs(c) - 127)),
        "81a17782d927636f6465733a4c6f67466f726d617428626974733d382c20626173655f737465703d"
        "302e303529c70f0193920104a4696e7438c404749a5846a57363616c65c7120193920101a7666c6f"
        "61743332c404ccccdc3f",
    ),
    "symlog": (
        SymlogFormat(bits=8, linear_range=0.5),
        [87, -49, 25, 10],
        lambda c: 0.5 * np.sinh(c * math.asinh(2) / 127),
        "81a17782d92c636f6465733a53796d6c6f67466f726d617428626974733d382c206c696e6561725f"
        "72616e67653d302e3529c70f0193920104a4696e7438c40457cf190aa57363616c65c71201939201"
        "01a7666c6f61743332c404ccccdc3f",
    ),
    "uniform": (
        UniformFormat(bits=8),
        [74, -37, 18, 7],
        lambda c: c / 127,
        "81a17782bb636f6465733a556e69666f726d466f726d617428626974733d3829c70f0193920104a4"
        "696e7438c4044adb1207a57363616c65c7120193920101a7666c6f61743332c404ccccdc3f",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_codes_of_0_2_come_back(name):
    fmt, codes, value_of, text = FILES[name]
    data = bytes.fromhex(text)
    target = {"w": madax.QuantizedArray(jnp.zeros((1, 4), jnp.int8), jnp.ones(1), fmt)}
    by_flax = serialization.from_bytes(target, data)["w"]
    arrays = serialization.msgpack_restore(data)["w"]
    file = io.BytesIO()
    np.savez(file, **{f"w/{key}": x for key, x in arrays.items()})
    file.seek(0)
    with np.load(file) as found:
        by_name = madax.from_flat_dict(found)["w"]
    assert list(madax.to_flat_dict({"w": by_name})) == [f"w/{key}" for key in arrays]
    for w in (by_flax, by_name):
        assert w.format == fmt
        np.testing.assert_array_equal(w.codes, [codes])
        expected = SCALE * value_of(np.array(codes, np.float64))
        np.testing.assert_allclose(w[0], expected, rtol=1e-6)
        np.testing.assert_allclose(w[0], [1, -0.5, 0.25, 0.1], rtol=0.05)


def test_codes_of_a_format_that_is_gone_are_refused():
    arrays = {"w/codes:CubicFormat(bits=8)": np.ones(3, np.int8)}
    with pytest.raises(
        ValueError, match=r"CubicFormat.*is not a number format of this ver"
    ):
        madax.from_flat_dict(arrays | {"w/scale": np.ones(1, np.float32)})
