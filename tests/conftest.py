"""Shared settings of the tests: CPU, eight virtual devices, float64 on request, a compilation cache between runs."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The tests spend their time compiling, which takes a fraction of it without optimizations and by XLA's older emitters, while it
# has them.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_backend_optimization_level=0"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "")
)

import jax
import pytest

gc.set_threshold(50_000)  # tracing makes objects that stay: looking for garbage among them took a twelfth of the tests
jax.config.update("jax_num_cpu_devices", 8)  # before any computation; a later change raises
_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxrl_llm" / "tests"
jax.config.update("jax_compilation_cache_dir", str(_cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture
def x64():
    """Double precision inside the test; create arrays inside it too."""
    with jax.enable_x64(True):
        yield


_compiled = 0


def _count(event: str, duration: float, **kwargs) -> None:
    global _compiled
    _compiled += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.fixture(autouse=True)
def programs():
    """Let go of compiled programs now and then: each holds memory maps, and a process may have 65,530 of them."""
    global _compiled
    yield
    if _compiled > 1000:
        _compiled = 0
        jax.clear_caches()
        gc.collect()
