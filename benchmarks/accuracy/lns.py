"""LNS-Madam in full: weights, activations and gradients on logarithmic grids."""

from pathlib import Path

import jax
import tyro
from flax import nnx

import madax
from benchmarks.data import images
from benchmarks.lib import records
from benchmarks.lib.contender import Contender, points
from benchmarks.lib.optimizers import OPTIMIZERS
from benchmarks.lib.train import Budget, train
from benchmarks.workloads.images import MLP, classification

# The paper's forward and backward format: 8 codes an octave, 15.9 octaves.
LNS_8 = madax.LogFormat.from_gamma(bits=8, gamma=8)
BUDGET = Budget(steps=1000, evaluations=10, batch_size=32, seeds=3)
SMOKE = Budget(steps=60, evaluations=2, batch_size=32, seeds=2)


class LnsLinear(nnx.Linear):
    """A linear layer whose matrix products see 8-bit operands, both ways."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ kernel + bias``, operands and their gradients on the grid."""
        kernel = madax.papers.fake_quantize(
            self.kernel[...], LNS_8, backward_format=LNS_8
        )
        x = madax.papers.fake_quantize(x, LNS_8, backward_format=LNS_8)
        # The gradient that arrives here is an operand of both backward products.
        y = madax.papers.fake_quantize(x @ kernel, None, backward_format=LNS_8)
        return y if self.bias is None else y + self.bias[...]


class LnsMLP(MLP):
    """The MLP of the benchmarks in simulated 8-bit arithmetic."""

    linear = LnsLinear


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
def lns(out: Path = Path("benchmarks/results/lns"), *, smoke: bool = False) -> None:
    """Train digits in simulated LNS arithmetic, 8 bits forward and backward.

    LNS-Madam, its weights on the 16-bit update grid, in the 8-bit network and in
    float32, beside Madam and Adam in float32.

    Args:
        out: Folder for lns.jsonl.
        smoke: Take seconds: too few steps to judge by, enough to see that it works.
    """
    raw = records.file(out, "lns", fresh=True)
    in_lns = Contender(madax.papers.lns_madam, (2**-6,))
    cases = [
        ("lns_madam", "8-bit LNS", LnsMLP, in_lns),
        ("lns_madam", "float32", MLP, in_lns),
        ("madam", "float32", MLP, OPTIMIZERS["madam"]),
        ("adam", "float32", MLP, OPTIMIZERS["adam"]),
    ]
    for name, arithmetic, network, contender in cases:
        workload = classification(
            "digits mlp", lambda rngs, make=network: make(8, rngs), images("digits")
        )
        budget = SMOKE if smoke else BUDGET
        label = f"{name}, {arithmetic}"
        rates = points(contender.rates)
        for run in train(workload, contender, rates, budget, label=label):
            where = {"optimizer": name, "arithmetic": arithmetic}
            records.append(raw, {"workload": workload.name} | where | run)
    runs = records.read(raw)
    table = runs.groupby(["optimizer", "arithmetic"], sort=False)["accuracy"]
    accuracy = 100 * table.agg(["median", "min", "max"])
    print(accuracy.reset_index().to_markdown(index=False, floatfmt=".1f"))
    print(f"\nRecords: {raw}")
