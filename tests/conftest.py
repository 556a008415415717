import importlib.util
import os

import hypothesis
import jax
import pytest

# Compiling takes most of the tests' time, and least where LLVM does not optimise and
# XLA emits fusions in its older way, which later versions no longer have. Without AVX2
# no sum is fused with a product, so that two programs round alike. Read when JAX first
# compiles; see .ci/run for what is tested without them.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_max_isa=AVX"]
if jax.__version_info__ < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

# How many cases each property is tried on, the same in every run.
for tier, max_examples in {"default": 16, "full": 10}.items():
    hypothesis.settings.register_profile(
        tier,
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        # A seed shrinks to nothing simpler, and a step takes long to compile.
        phases=(hypothesis.Phase.generate,),
    )

# What is about Flax, or uses the examples, which need it.
NEED_FLAX = [
    "optax_sam/flax.py",
    "optax_sam/implicit.py",
    "tests/data_files.py",
    "tests/docs",
    "tests/engine/test_batch_norm.py",
    "tests/engine/test_cost.py",
    "tests/engine/test_tpu.py",
    "tests/example_support.py",
    "tests/examples",
    "tests/implicit",
    "tests/test_docs.py",
    "tests/test_flax.py",
    "tests/test_readme.py",
]


def pytest_configure(config):
    """Leaves out what needs Flax where it is missing; keeps compiled programs.

    Many tests, and all that run again, share their programs.
    """
    tier = "default" if config.option.markexpr == "not full" else "full"
    hypothesis.settings.load_profile(tier)
    if importlib.util.find_spec("flax") is None:
        paths = [str(config.rootpath / path) for path in NEED_FLAX]
        config.option.ignore = [*(config.option.ignore or ()), *paths]
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
