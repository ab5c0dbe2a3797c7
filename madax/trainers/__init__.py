"""Codes and rounded weights in the trainers of others, by one call for each trainer.

.. warning::
   Experimental, like ``madax.hijax``, on which most of it is built.

madax depends on none of these trainers. Each is imported when its function is called.
"""

from madax.trainers._easydel import easydel
from madax.trainers._kauldron import kauldron
from madax.trainers._keras import keras
from madax.trainers._maxtext import maxtext

__all__ = ["easydel", "kauldron", "keras", "maxtext"]


def __dir__() -> list[str]:
    return __all__
