"""The processes of a run: how they find each other, and the few things they tell each other on the host.

Every process runs the same program on the same rows and takes the same decisions, so most of the code need not know how
many there are. What differs from host to host (reward calls, signals, clocks, files) goes through `gather`, which hands
every process the same list. Messages are JSON in the key-value store of JAX's coordination service, apart from the
devices, so a process that waits for a slow one keeps no device waiting.

A process that fails tells the others before it ends (`run`); one that dies without a word is noticed by the coordination
service when its heartbeats stop, which ends the others.
"""

import itertools
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_llm.config import Distributed
from jaxrl_llm.launch import LOST
from jaxrl_llm.redaction import redact

BROKEN = 70  # exit code of an error nobody foresaw
LOOK = 1.0  # seconds between two looks at whether another process has failed
FAILED = "jaxrl_llm/failed/"


class LostProcessError(RuntimeError):
    """Another process failed, or did not come in time."""


@dataclass
class _Talk:
    """What this process knows of the conversation."""

    limit: float = 1800.0  # seconds to wait for another process
    said: int = 0  # messages so far; the same on all processes, as all say the same in the same order
    met: int = 0  # barriers so far


_talk = _Talk()


def start(settings: Distributed) -> None:
    """Join the other processes, when there are to be any; before any computation.

    Raises ValueError in one line when there is no cluster to detect.
    """
    if settings.coordinator is None:
        return
    # The loop stops on signals itself; JAX's handler would take SIGTERM away from it.
    jax.config.update("jax_enable_preemption_service", False)
    # On a CPU, programs of one process may overtake each other, and gloo pairs their messages by order alone.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    auto = settings.coordinator == "auto"
    # JAX ends a process whose others do not come with a trace of its own: what that waited for must be said before.
    who = "a process" if auto else f"process {settings.process} of {settings.processes}"
    print(
        f"jaxrl_llm: {who}: waits up to {settings.start_timeout} s for the others at distributed.coordinator="
        f"{settings.coordinator}",
        file=sys.stderr,
        flush=True,
    )
    try:
        jax.distributed.initialize(
            None if auto else settings.coordinator,
            settings.processes,
            settings.process,
            initialization_timeout=settings.start_timeout,
            heartbeat_timeout_seconds=settings.heartbeat_timeout,
            shutdown_timeout_seconds=settings.heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        expected = "a TPU, GKE, Slurm or Open MPI environment" if auto else "an address that process 0 can serve"
        raise ValueError(
            f"distributed.coordinator={settings.coordinator!r}: expected {expected}; {reason[:300]}"
        ) from None
    if jax.default_backend() == "cpu":
        # A program read back from JAX's compilation cache has lost the order between the collectives inside a loop and those
        # outside it (XLA makes each thunk sequence a communicator resource of its own): processes run them in different orders.
        jax.config.update("jax_enable_compilation_cache", False)
    _talk.limit, _talk.said = settings.wait_timeout, 0
    if not lead():  # what all would say, one says
        logging.getLogger("jaxrl_llm").setLevel(logging.ERROR)
        logging.getLogger("jaxrl_llm.tasks").setLevel(logging.WARNING)
        warnings.simplefilter("ignore")


def connect(mesh: Mesh) -> None:
    """Have the devices of a mesh meet once, along every set of its axes; every process must call this at the same point.

    Connections are made when devices first meet, and gloo, with which CPUs talk, gives up when the others come 30 s later: what
    loading and compiling easily differ by. So the processes wait for each other here, as long as the config allows.
    """
    if count() == 1:
        return
    axes = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]
    together = [some for n in range(1, len(axes) + 1) for some in itertools.combinations(axes, n)]

    def sums(one: Array) -> list[Array]:
        return [jax.lax.psum(one, some) for some in together]

    each = PartitionSpec(mesh.axis_names)
    ones = _put(np.ones(mesh.size), NamedSharding(mesh, each))
    f = jax.shard_map(sums, mesh=mesh, in_specs=each, out_specs=each, check_vma=False)
    compiled = jax.jit(f).lower(ones).compile()
    gather(None, "the first meeting of the devices")
    jax.block_until_ready(compiled(ones))
    multihost_utils.process_allgather(np.zeros(()))  # has a mesh of its own


def count() -> int:
    return jax.process_count()


def index() -> int:
    return jax.process_index()


def lead() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def share(n: int) -> slice:
    """This process's part of `n` rows; the parts of all processes, one after another, are all rows."""
    bounds = [n * i // count() for i in (index(), index() + 1)]
    return slice(*bounds)


def gather(value: Any, what: str) -> list[Any]:
    """The values (JSON) that all processes gave, in their order; every process must call this at the same point.

    Args:
      what: what is waited for, in the error.
    Raises LostProcessError when another process failed, or has not come after `distributed.wait_timeout` seconds.
    """
    if count() == 1:
        return [value]
    client = _client()
    number, _talk.said = _talk.said, _talk.said + 1
    said = _exchange(client, f"said/{number}", json.dumps(value), _talk.limit, what)
    if number > 0:  # all have said this, so all have read the one before
        client.key_value_delete(_key(f"said/{number - 1}", index()))
    return [json.loads(text) for text in said]


def meet(key: str, timeout_ms: int) -> None:
    """A barrier for threads too (orbax's `barrier_sync_fn`), where all come to the same barriers in the same order.

    Raises LostProcessError when another process failed, has not come in time, or is at another barrier: after an error of
    one, orbax has it wait at the next while the others still wait at this one.
    """
    number, _talk.met = _talk.met, _talk.met + 1
    client = _client()
    for process, theirs in enumerate(_exchange(client, f"met/{number}", key, timeout_ms / 1000, f"the barrier {key}")):
        if theirs != key:
            raise LostProcessError(f"process {process} is at the barrier {theirs}, this one at {key}")
    if number > 0:
        client.key_value_delete(_key(f"met/{number - 1}", index()))


def from_lead(make: Callable[[], Any], what: str) -> Any:
    """What `make` returns on process 0 (JSON), on all. An error there ends the others, too."""
    return gather(make() if lead() else None, what)[0]


def any_of(flag: bool, what: str) -> bool:
    """Whether any process says so."""
    return any(gather(bool(flag), what))


def put(tree: Any, shardings: Any) -> Any:
    """`jax.device_put`; host values, the same on all processes, go straight into the shards of each.

    Args:
      shardings: one for all leaves, or a tree of them, like `tree` or a prefix of it.
    """
    if count() == 1:
        return jax.device_put(tree, shardings)
    return jax.tree.map(lambda sharding, part: jax.tree.map(lambda x: _put(x, sharding), part), shardings, tree)


def fetch(x: Any) -> np.ndarray:
    """The whole of an array, on every process; all must call this at the same point."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def run(settings: Distributed, work: Callable[[], int]) -> int:
    """Join the others and do `work`; the exit code. With several processes an error is one line that names the process, is
    told to the others, and ends this process at once: there is nobody left to say goodbye to.
    """
    start(settings)
    if count() == 1:
        return work()
    try:
        code = work()
        if code:
            _end(code, f"ended with exit code {code}")
        return code
    except LostProcessError as error:
        _end(LOST, str(error))
    except (ValueError, OSError) as error:
        _end(2, " ".join(str(error).split()))
    except jax.errors.JaxRuntimeError as error:  # a collective whose other end is gone
        _end(LOST, f"lost another process, or a device: {_first_line(error)}")
    except Exception as error:
        traceback.print_exc()
        _end(BROKEN, f"{type(error).__name__}: {_first_line(error)}")


def _end(code: int, why: str) -> NoReturn:
    why = redact(why)
    if code != LOST:
        with suppress(jax.errors.JaxRuntimeError):  # the service may be gone
            _client().key_value_set(f"{FAILED}{index()}", why)
    with suppress(OSError):  # stderr may be a file on a full disk
        print(f"jaxrl_llm: process {index()} of {count()}: {why}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    if code != LOST and lead():  # the others hear it from this process's service
        time.sleep(2 * LOOK)
    os._exit(code)


def _exchange(client: Any, name: str, text: str, limit: float, what: str) -> list[str]:
    client.key_value_set(_key(name, index()), text)
    deadline = time.monotonic() + limit
    return [_wait(client, name, process, limit, deadline, what) for process in range(count())]


def _wait(client: Any, name: str, process: int, limit: float, deadline: float, what: str) -> str:
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise LostProcessError(f"waited {limit:g} s for process {process} at {what} (distributed.wait_timeout)")
        try:
            return client.blocking_key_value_get(_key(name, process), max(1, int(1000 * min(left, LOOK))))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise LostProcessError(
                    f"the coordination service is gone, waiting for process {process} at {what}"
                ) from None
        for key, why in client.key_value_dir_get(FAILED):
            raise LostProcessError(f"process {key.rsplit('/', 1)[1]} failed: {why}")


def _key(name: str, process: int) -> str:
    return f"jaxrl_llm/{name}/{process}"


def _client() -> Any:
    from jax._src import distributed  # the public API has no key-value store

    if distributed.global_state.client is None:
        raise ValueError(
            f"distributed.coordinator=null: JAX sees {count()} processes, expected auto or the address of process 0"
        )
    return distributed.global_state.client


def _put(x: Any, sharding: jax.sharding.Sharding) -> Any:
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda place: host[place])


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
