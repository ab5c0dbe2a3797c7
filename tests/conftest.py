"""How the tests are laid out, and what runs when.

Each file has one subject, which its first lines state:

- formulas: ``test_formats``, ``test_moments``, ``test_rounding``, ``test_numerics``,
  ``test_oracle``, ``test_bbit_lns``, ``test_weight_decay``, ``test_orthogonal``,
  ``test_derivatives``, ``test_fake_quantize``, ``test_diagnostics*`` compare one part
  each with NumPy in float64, much of it in ``oracle.py``;
- trees of real models, and what is read out of them: ``test_leaf_kinds``;
- searches: ``test_fuzz`` has random trees, formats and hyperparameters, every step
  checked by an oracle; ``test_fuzz_meshes`` has random layouts, ``test_properties``
  what holds for every weight;
- mistakes and faults: ``test_bad_input*``, ``test_faults``, ``test_dtypes``,
  ``test_init``;
- codes: ``test_quantize*``, ``test_codes_as_weights``, ``test_array_functions``,
  ``test_trees_of_codes``, ``test_grad``, ``test_native``, ``test_with_quantized_*``,
  ``test_freezing``, ``test_saving``, ``test_*layer*``; ``test_state_survey`` has every
  optimizer of optax with an 8-bit state;
- programs: ``test_*meshes``, ``test_shard_map``, ``test_many_weights``,
  ``test_processes``, ``test_same_bits``, ``test_lowering`` show that a mesh, other
  processes and other compilers get the same bits; ``test_compiled`` bounds what
  compilers make of a step;
- around it: ``test_wrappers*``, ``test_optax_suite``, ``test_flax*``,
  ``test_linen_codes``, ``test_checkpoint*``, ``test_training``, ``test_growth``;
- pages: ``test_readme``, ``test_docs``;
- benchmarks/: ``test_demo``, ``test_sweeps``, ``test_workloads``, ``test_hub``, ...

``helpers.py`` has what several of them need, ``processes.py`` starts processes.
All tests have eight CPU devices; arrays are on the first unless they are put elsewhere.

``make test`` runs before every commit, in about seven minutes on two cores. It
leaves out what is marked ``nightly``: more of the same, such as further dtypes and
variants, and most of the benchmarks from their command line. ``make test-nightly``
runs that, twenty times the examples in every search, all notebooks, and all tests on
the oldest versions. ``.ci/run`` runs ``make test``, and two files on the oldest
versions.
``mutants.py`` breaks madax in many places, and shows that ``make test`` fails of each.

``quick_compiles`` is for files in which no bit depends on how a compiler optimises.

For a new test: what guards a line of madax that nothing else does goes into
``make test``, once, at the smallest size. Compiling is what takes the time, so one
program serves all cases that it can, and rates and data are its arguments.
"""

import os

import jax
import pytest
from hypothesis import settings

# Before anything asks JAX for its devices.
jax.config.update("jax_num_cpu_devices", 8)

settings.register_profile("local", deadline=None, max_examples=32)
settings.register_profile("ci", deadline=None, max_examples=32, derandomize=True)
settings.register_profile("nightly", deadline=None, max_examples=1000, print_blob=True)
profile = "ci" if os.environ.get("CI") else "local"
settings.load_profile(os.environ.get("MADAX_FUZZ") or profile)


@pytest.fixture
def quick_compiles():
    """Compiles quickly what may run slowly."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
