"""Settings shared by every test: CPU, the persistent compile cache, no leftovers of x64."""

import gc
import importlib.metadata
import os
import pathlib
import sys

from packaging.version import Version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault(
    "PJRT_NPROC", os.environ.get("TESTNPROC", "16")
)  # see rlhf_jax.distributed.runtime.choose_threads
# Most of a test's time is spent compiling: optimised and fused code costs it more than it saves.
# On a busy machine eight devices may need more than the usual 40 seconds to meet.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=600"
    # jaxlib beyond 0.11.0 does not know this one.
    + " --xla_cpu_use_fusion_emitters=false"
    * (Version(importlib.metadata.version("jaxlib")) <= Version("0.11.0")),
)

import jax
import jaxtyping
import pytest

# Functions check the types and shapes that they are annotated with (processes that tests start run without).
# Installed before any of them is imported; an int passes for a float (PEP 484). Losses and kernels check the
# fields of dataclasses too; elsewhere these stand for many runs at once, behind a vmap.
sys.path.insert(0, str(pathlib.Path(__file__).parent))
STRICT = ["rlhf_jax.kernels", "rlhf_jax.losses"]
jaxtyping.install_import_hook(STRICT, "type_checks.check")
others = os.environ.get("RLHF_JAX_TYPECHECK", "rlhf_jax.core,rlhf_jax.algorithms").split(",")
jaxtyping.install_import_hook(others, "type_checks.check_functions")

# One folder for each worker: JAX does not write cache entries atomically.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax" / WORKER
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)  # for the processes that tests start
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


# Tracing makes many small objects that live for long: to look through them as often as usual took a sixth of
# the time of the laws of updates and losses.
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs of one file are of no use to the next, and fill the memory."""
    yield
    jax.clear_caches()
