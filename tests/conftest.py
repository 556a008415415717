import importlib.util
import os

# Compiling takes most of the tests' time, and a sixth less at LLVM's first level. Set
# before JAX starts; the newest versions are tested at the default one, see .ci/run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

if importlib.util.find_spec("flax") is None:
    # What is about Flax, or uses the examples, which need it.
    collect_ignore = [
        "data_files.py",
        "example_support.py",
        "docs",
        "engine/test_batch_norm.py",
        "engine/test_cost.py",
        "engine/test_tpu.py",
        "examples",
        "implicit",
    ]
    collect_ignore_glob = ["test_readme*.py", "test_recipes*.py", "test_docs*.py"]


def pytest_configure(config):
    """Keeps compiled programs: many tests, and all that run again, share theirs."""
    if hasattr(config, "cache") and jax.config.jax_compilation_cache_dir is None:
        for name, value in {
            "jax_compilation_cache_dir": str(config.cache.mkdir("compiled")),
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }.items():
            jax.config.update(name, value)
            os.environ[name.upper()] = str(value)  # For processes that tests start.


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
