"""The README's examples run, and name what there is."""

import re
from pathlib import Path

import jax
import numpy as np

import madax

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_examples_run_and_train():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)  # one after the other, as a reader would paste them
        if "loss_before" not in names:
            assert names["loss"](names["params"]) < 1e-3
            names["loss_before"] = np.log(10)
    params = names["params"]
    assert isinstance(params["kernel"], madax.QuantizedArray)
    final = names["loss"](madax.dequantize_params(params), names["x"], names["y"])
    assert final < 0.9 * names["loss_before"]
    stored = sum(x.nbytes for x in jax.tree.leaves((params, names["state"][0].v)))
    assert stored < 2.2 * (64 * 10 + 10)


def test_names_mentioned_exist():
    for name in re.findall(r"madax\.(\w+)", README):
        assert hasattr(madax, name), name


def test_every_public_name_is_documented_with_an_example():
    for name in madax.__all__:
        documented = getattr(madax, name)
        is_tuple = hasattr(documented, "_fields")  # of states, and of what is returned
        assert documented.__doc__
        exempt = is_tuple or name in ("Format", "diagnostics")
        assert exempt or ">>>" in documented.__doc__, name


def test_local_links_lead_somewhere():
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / target).exists(), target
