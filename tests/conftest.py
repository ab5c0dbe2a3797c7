"""Settings of all tests: eight devices, and how many examples a search takes."""

import os

import jax
from hypothesis import settings

# Before anything asks JAX for its devices; other processes are told by a variable.
jax.config.update("jax_num_cpu_devices", 8)

settings.register_profile("local", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
settings.register_profile("nightly", deadline=None, max_examples=1000, print_blob=True)
profile = "ci" if os.environ.get("CI") else "local"
settings.load_profile(os.environ.get("MADAX_FUZZ") or profile)
