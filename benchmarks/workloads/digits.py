"""Handwritten digits, 8 by 8 pixels, and a small convolutional network.

The images ship with scikit-learn, so nothing is downloaded.
"""

from functools import partial

from benchmarks.data import images
from benchmarks.workloads import Workload
from benchmarks.workloads.images import ConvNet, classification


def digits() -> Workload:
    """Returns the workload: 1347 images to train on, 450 held out."""
    return classification("digits", partial(ConvNet, 8), images("digits"))
