"""Small models of other people, whose packages are imported when one is built.

``MODELS`` has a function for each, by a name that ends in where the model comes from.
``python -m zoo.listed``, run in ``tests/lib`` with the packages of some, writes what
their programs do with each leaf to ``others.json``, against which ``make test``
compares how madax reads the leaves.
"""

import importlib

SOURCES = ("tunix", "bonsai", "gemma", "transformers", "equimo", "haiku", "kerashub")
_FAMILIES = [importlib.import_module(f"zoo.of_{name}") for name in SOURCES]
MODELS = {
    f"{name} of {family.SOURCE}": build
    for family in _FAMILIES
    for name, build in family.MODELS.items()
}
# Packages of which the record of a model has the versions.
PACKAGES = {family.SOURCE: family.PACKAGES for family in _FAMILIES}
