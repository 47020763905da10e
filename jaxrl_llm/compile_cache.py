"""What a start spends on compiling: JAX's persistent cache, on for the commands, options for programs that hardly run, and the
memory that compilers leave behind.

JAX itself turns an entry that it cannot read or write into a warning and compiles; two processes may share a directory.
"""

import ctypes
import hashlib
import os
import platform
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

LIMIT = 4 * 2**30  # bytes kept in our own directory
NEVER = 1e9  # seconds of compilation that no program takes
LEVEL = "xla_backend_optimization_level"
LONG = 0.2  # seconds of compilation that leave memory worth the milliseconds it takes to return it


def use(where: str | None) -> Path | None:
    """Keep compiled programs in `where`: a directory, "auto", or None for nowhere. Call it before the first computation.

    "auto" is the directory of the environment variable JAX_COMPILATION_CACHE_DIR, else what the calling program told JAX,
    else our own under the user's cache directory, which is kept under 4 GiB. Programs of any compile time are kept,
    unless JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS says otherwise.

    Returns the directory, None when there is none. One that cannot be made is a line on stderr, never an error; one that
    cannot be written is only read.
    """
    import jax

    told = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if where == "auto" and not told and (set_up := jax.config.jax_compilation_cache_dir):  # type: ignore[attr-defined]
        return Path(set_up)
    if where is None:
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    chosen = (told or str(own())) if where == "auto" else where
    writable = True
    if "://" not in chosen:  # JAX asks etils to write to gs:// and the like
        try:
            Path(chosen).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"jaxrl_llm: compiled programs are not kept, {chosen}: {error.strerror}", file=sys.stderr)
            jax.config.update("jax_compilation_cache_dir", None)
            return None
        writable = os.access(chosen, os.W_OK | os.X_OK)
        if writable and chosen == str(own()):
            prune(Path(chosen), LIMIT)
    jax.config.update("jax_compilation_cache_dir", chosen)
    if not writable:  # or every program would warn
        jax.config.update("jax_persistent_cache_min_compile_time_secs", NEVER)
    elif "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return Path(chosen)


def well(platform: str) -> dict[str, bool | int]:
    """`compiler_options` for the programs that a run spends its time in; none but on a CPU.

    There LLVM's higher levels of optimization take a quarter longer to compile and the programs run no faster: XLA has
    arranged their loops before. A level in the environment's XLA_FLAGS stands.
    """
    told = LEVEL in os.environ.get("XLA_FLAGS", "")
    return {LEVEL: 1} if platform == "cpu" and not told else {}


def in_place(platform: str) -> dict[str, bool | int]:
    """`compiler_options` for what changes most of the memory it reads: on a CPU XLA finds what it may overwrite only by this
    analysis, and copies the rest first."""
    known = platform == "cpu" and _jaxlib() <= (0, 12)  # an option that XLA does not know is an error, not a warning
    return well(platform) | ({"xla_cpu_copy_insertion_use_region_analysis": True} if known else {})


def quickly(platform: str) -> dict[str, bool | int]:
    """`compiler_options` for what takes longer to compile than it will run on a platform; none but on a CPU.

    There XLA's older emitters, while it has them (jaxlib 0.10), compile in half the time; what they make may run a fifth slower.
    """
    older = platform == "cpu" and _jaxlib() <= (0, 10)
    return well(platform) | ({"xla_cpu_use_fusion_emitters": False} if older else {})


def _jaxlib() -> tuple[int, ...]:
    return tuple(map(int, version("jaxlib").split(".")[:2]))


@cache
def return_memory() -> None:
    """From here on return freed memory to the system after every long compilation.

    The heap of a compiler ends in many small free pieces, which glibc would keep: a third of a gigabyte after the start of a
    small run, on top of which the buffers of the run come. Other C libraries are left alone.
    """
    import jax

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        return

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and duration_secs > LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)


def own() -> Path:
    """Our directory for this kind of machine: XLA's programs for a CPU are for its very features, and JAX's keys don't tell
    CPUs apart. In a home shared by different machines XLA would complain of each program, and some could not run."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jaxrl_llm" / "programs" / machine()


def machine() -> str:
    """A short name of this machine's instruction set and, where the system tells, its CPU's features."""
    features = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def prune(directory: Path, limit: int) -> None:
    """Remove the entries used longest ago until the rest have at most `limit` bytes."""
    entries = []
    for path in directory.iterdir():
        with suppress(OSError):  # another process removed it
            stat = path.stat()
            entries.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    kept = 0
    for _, size, path in sorted(entries, reverse=True):
        kept += size
        if kept > limit:
            with suppress(OSError):
                path.unlink()
