"""Fashion-MNIST, 28 by 28 pixels, and two networks: an MLP and a small CNN."""

from functools import partial
from pathlib import Path

from benchmarks.data import images
from benchmarks.workloads import Workload
from benchmarks.workloads.images import MLP, ConvNet, classification

NETWORKS = {"mlp": MLP, "cnn": partial(ConvNet, width=16)}


def fashion_mnist(
    network: str, folder: Path | None = None, *, shrink: int = 1
) -> Workload:
    """Returns the workload: 60 000 images to train on, 10 000 held out.

    Args:
      network: "mlp" or "cnn".
      folder: where the data is, see ``benchmarks.data.images``.
      shrink: factor by which images are made smaller.
    """
    data = images("fashion-mnist", folder, shrink=shrink)
    make = partial(NETWORKS[network], data.shape[0])
    return classification(f"fashion-mnist {network}", make, data)
