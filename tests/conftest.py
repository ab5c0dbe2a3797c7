"""How the tests are laid out, and what runs when.

Each file has one subject, which its first lines state:

- ``unit/`` has a folder for each of madax: formulas against NumPy in float64, mistakes,
  faults, dtypes;
- ``search/``: random trees, formats, hyperparameters and layouts, judged by an oracle;
- ``programs/``: a mesh, other processes and other compilers get the same bits, and
  compilers make no more of a step than they did;
- ``integration/``: Flax, optax's wrappers and own tests, checkpoints, models and
  trainers of others, whole trainings;
- ``benchmarks/``, ``pages/``: what those folders hold runs, and says what is so;
- ``lib/``: what several files need, as no test file imports another. ``oracle`` has the
  formulas in plain NumPy, ``cases`` the formats and optimizers by name, ``helpers``
  equality to the bit; ``meshes``, ``layers``, ``drawn`` make what is trained,
  and ``zoo`` has models of others.

All tests have eight CPU devices; arrays are on the first unless they are put elsewhere.

``make test`` runs before every commit, and takes half an hour of a processor, nearly
all of it to compile. It leaves out what is marked ``nightly``: more of the same, such
as further dtypes and variants, and most of the benchmarks from their command line.
``make test-nightly`` runs that, sixty times the examples in every search, all
notebooks, and all tests on the oldest versions. ``.ci/run`` runs ``make test``, and two
files on the oldest versions. ``lib/mutants.py`` breaks madax in thousands of places,
one at a time, and shows which of them the tests see.

``quick_compiles`` is for files in which no bit depends on how a compiler optimises.

For a new test: what guards a line of madax that nothing else does goes into
``make test``, once, at the smallest size. Compiling is what takes the time, so one
program serves all cases that it can, and rates and data are its arguments.
"""

import jax
import pytest
from hypothesis import settings

# Before anything asks JAX for its devices.
jax.config.update("jax_num_cpu_devices", 8)

# By day the same examples each time, so that it fails of nothing but a change.
settings.register_profile("day", deadline=None, max_examples=12, derandomize=True)
settings.register_profile("nightly", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("day")


@pytest.fixture
def quick_compiles():
    """Compiles quickly what may run slowly."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
