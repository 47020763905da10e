"""The programs of an RL step, compiled for TPUs that are described but not there: memory, communication, time.

libtpu compiles without a chip (extra `tpu`). Arguments are shapes: no weights are made, nothing runs. Times are a roofline,
the longest of what arithmetic, memory and links take at their peaks; no program reaches it, and none was timed on a TPU.
"""

import math
import os
import re
import warnings
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_llm.algorithms.base import views_in
from jaxrl_llm.config import Config
from jaxrl_llm.planning import hlo
from jaxrl_llm.rollout.engine import most_slots, prefill_batch
from jaxrl_llm.rollout.rows import pack
from jaxrl_llm.sharding import rules, target
from jaxrl_llm.sharding.mesh import make_mesh
from jaxrl_llm.sharding.target import CHIPS, Chip
from jaxrl_llm.tasks.text import load_text
from jaxrl_llm.training import build, layouts, plan
from jaxrl_llm.training.learner import Learner
from jaxrl_llm.training.metrics import PEAKS
from jaxrl_llm.training.plan import Step
from jaxrl_llm.training.state import POLICY
from jaxrl_llm.types import Rollouts

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
# On a machine that is no TPU host libtpu must not look for one, and as no chip is touched several processes may load it.
ALONE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
ALONE |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


# Custom calls with which the TPU compiler says something to itself; the others are kernels.
PLUMBING = {
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "AsyncCollectiveDone",
    "AsyncCollectiveStart",
    "ConcatBitcast",
}
PLUMBING |= {"GatherScatterIndicesBitpacked"}


class Memory(NamedTuple):
    """Bytes of one device while a program runs."""

    arguments: int
    temporaries: int
    output: int  # without what takes the place of arguments
    beside: int  # of the run, not this program's

    @property
    def peak(self) -> int:
        return sum(self)


class Program(NamedTuple):
    """One compiled program; all numbers are of one device."""

    name: str
    runs: int  # in one RL step with completions of full length; of "decode", tokens
    memory: Memory | None  # None: the compiler refused
    needs: int  # bytes at its peak; where it was refused, what the compiler says it would need
    work: hlo.Work | None
    seconds: dict[
        str, float
    ]  # of one run: what arithmetic, memory, links and the network of slices take at their peaks


class Report(NamedTuple):
    topology: str
    chip: Chip
    step: Step
    programs: list[Program]

    @property
    def peak(self) -> int:
        """Bytes of the fullest program."""
        return max(p.needs for p in self.programs)

    @property
    def fits(self) -> bool:
        return self.peak <= self.chip.memory and all(p.memory for p in self.programs)

    @property
    def seconds(self) -> float:
        """Roofline of an RL step."""
        return sum(p.runs * max(p.seconds.values(), default=0.0) for p in self.programs)


class Topology(NamedTuple):
    chip: Chip
    slice: str  # the name of one
    sides: tuple[int, ...]  # of one
    slices: int

    @property
    def chips(self) -> int:
        """In all slices."""
        return self.slices * math.prod(self.sides)


def parse(topology: str) -> Topology:
    """What is meant by "v5e:4x4", "v5p:2x2x4", or "2xv5e:4x4", which are two slices.

    Raises ValueError when it does not name a known chip and as many sides as its torus has.
    """
    found = re.fullmatch(r"(?:(\d+)x)?((\w+):(\d+(?:x\d+)+))", topology)
    slices, one, name, sides = found.groups() if found else (None, "", "", "0")
    dims, count = tuple(int(n) for n in sides.split("x")), int(slices or 1)
    if name not in CHIPS or len(dims) != (3 if name == "v5p" else 2) or 0 in (*dims, count):
        raise ValueError(
            f"--topology {topology!r}: expected v5e:AxB, v6e:AxB or v5p:AxBxC, such as v5e:4x4, and 2xv5e:4x4 for two slices"
        )
    return Topology(CHIPS[name], one, dims, count)


def devices(topology: str) -> list[Any]:
    """Descriptions of the chips of one or several slices, to compile for.

    Raises ValueError for a topology that libtpu does not know, or without libtpu.
    """
    asked = parse(topology)
    from jax.experimental import topologies

    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    more: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if any(n % 2 for n in asked.sides[:2]) else {}
    if asked.slices > 1:
        more["num_slices"] = asked.slices
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=asked.slice, **more).devices)
    except Exception as error:  # of several kinds, by what is missing
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--topology {topology}: {reason}; expected libtpu (the extra `tpu`: pip install 'jaxrl_llm[tpu]') and a slice "
            "it knows"
        ) from None


def make(config: Config, topology: str) -> Report:
    """Compile prefill, decode, rescoring and update of a config for a slice of TPUs.

    Raises ValueError when the config, its mesh or the topology does not do.
    """
    chip, found = parse(topology).chip, devices(topology)
    mesh = make_mesh(config.mesh, found)
    step = plan.make(config, len(found), target.of(mesh))
    lowered, held = _lower(config, step, mesh)
    return Report(topology, chip, step, [_compile(*program, held, chip) for program in lowered])


def _lower(
    config: Config, step: Step, mesh: Mesh
) -> tuple[list[tuple[str, int, jax.stages.Lowered, tuple[str, ...]]], dict[str, int]]:
    """Programs, how often an RL step runs them, and what they need no room for beside them of what the run holds; and bytes
    of that."""
    alg, spec, r = step.alg, step.spec, config.rollout
    state = jax.tree.map(jnp.asarray, alg.init())
    first = alg.plan(state)
    learner = Learner(config, spec, alg, mesh)
    words = load_text(config.tokenizer, config.model.path)
    plain = config.model_copy(update={"rollout": r.model_copy(update={"stop": []})})
    engine = build.engine(plain, spec, mesh, words, hook=first.hook)
    train = learner.train_shapes()
    weights = engine.weight_shapes(train.params[POLICY])
    generation = engine.lower(train.params[POLICY], r.prompts, step.group_size, first.hook_state)
    rows, piece, credit = _batch(config, step, mesh, state)
    update = learner.lower(step.layout, piece, state, rows, credit, step.route == "fused")

    shards = math.prod(step.mesh[a] for a in rules.RULES["batch"])
    contexts, items = -(-r.prompts // shards), -(-step.rows // shards)
    slots = min(-(-r.slots // shards) if r.slots else most_slots(step.on.platform), items)
    updates, once = config.learner.epochs * config.learner.minibatches, config.learner.minibatches * step.microbatches
    given = ("parameters", "weights")  # generation has let go of its weights when the learner runs
    out: list[tuple[str, int, jax.stages.Lowered, tuple[str, ...]]] = [
        ("prepare_layer", step.spec.layers, generation["prepare_layer"], ("parameters",)),
        ("prepare", 1, generation["prepare"], ("parameters",)),
        ("prefill", -(-contexts // prefill_batch(contexts, r.max_prompt)), generation["prefill"], ("parameters",)),
        ("decode", r.max_new * -(-items // slots), generation["decode"], ("weights",)),
    ]
    asked: dict[str, dict[str, None]] = {"old": {"logp": None}} if config.learner.old_logp == "rescore" else {}
    for name in views_in(alg, state)[1]:
        policy, view = name.split("_", 1)
        asked.setdefault(policy, {})["logp" if view == "prompt_logp" else view] = None
    for views, policies in Counter(tuple(names) for names in asked.values()).items():
        out.append(("rescore", policies * once, learner.lower_views(step.layout, piece, rows, views), given))
    pieces = updates * step.microbatches
    if "score" in update:
        out.append(("views", pieces, update["score"], given))
    out.append(("gradient", pieces, update.get("fused") or update["pull"], given))
    out.append(("apply", updates, update["apply"], (*given, "moments")))

    held = {"parameters": _bytes(train.params), "moments": _bytes(train.opt), "weights": _bytes(weights)}
    if config.reference.mode == "resident":
        held["reference"] = _bytes(train.params[POLICY])
    if config.guide is not None:
        held["guide"] = _bytes(train.params[POLICY])
    return out, held


def _batch(config: Config, step: Step, mesh: Mesh, state: Any) -> tuple[Rollouts, layouts.Piece, Any]:
    """Shapes of a minibatch, of one of its pieces and of its credit."""
    alg, r, layout = step.alg, config.rollout, step.layout
    rows = pack(
        [],
        contexts=r.prompts,
        prompt_len=r.max_prompt,
        size=step.minibatch_rows,
        length=r.max_new,
        parts=1,
        extras=alg.needs.row_extras,
        routes=None if config.learner.routing_replay == "none" else step.spec.routes,
    )
    size, zeros = step.minibatch_rows, rows.old_logp
    seen: dict[str, Any] = {
        name: np.zeros((size, r.max_prompt), np.float32) if name.endswith("prompt_logp") else zeros
        for name in views_in(alg, state)[1]
    }
    rows = rows.with_(extras=seen)
    credit = jax.eval_shape(alg.credit, state, rows, jax.random.key(0))
    split, everywhere = rules.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    places = [(layout.sequences, layout.length)] * 3
    scored = [(layout.sequences, layout.slots * layout.completion)] * 3
    arrays: list[Any] = [jax.ShapeDtypeStruct(s, np.int32, sharding=split) for s in [*places, *scored, places[0]]]
    answers: Any = jax.ShapeDtypeStruct((size,), bool, sharding=everywhere)
    return rows, layouts.Piece(*arrays, rows=answers), credit


def _bytes(tree: Any) -> int:
    """What one device holds of shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _compile(
    name: str, runs: int, lowered: jax.stages.Lowered, given: tuple[str, ...], held: dict[str, int], chip: Chip
) -> Program:
    beside = sum(n for what, n in held.items() if what not in given)
    try:
        with warnings.catch_warnings():  # JAX's persistent cache keeps such programs but cannot read them back
            warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.findall(r"(?:Used|required[^()]*\() ?([\d.]+)([KMG]?)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not found:
            raise
        needs = max(int(float(n) * UNITS[unit]) for n, unit in found)
        return Program(name, runs, None, needs + beside, None, {})
    stats: Any = compiled.memory_analysis()
    output = stats.output_size_in_bytes - stats.alias_size_in_bytes
    if name in ("prepare", "prepare_layer"):  # makes parts of the weights, which are beside it whole
        output = 0
    memory = Memory(stats.argument_size_in_bytes, stats.temp_size_in_bytes, output, beside)
    work = hlo.read(compiled.as_text() or "")
    seconds = {
        "arithmetic": work.flops / PEAKS[chip.kind],
        "memory": work.bytes / chip.bandwidth,
        "links": work.sent / chip.links,
        "slices": work.exchanged / chip.network,
    }
    return Program(name, runs, memory, memory.peak, work, seconds)


def describe(report: Report) -> str:
    """The text `jaxrl_llm plan --topology` prints."""
    chip, step = report.chip, report.step
    rows: list[tuple[str, ...]] = [
        ("program", "runs", "arguments", "temporary", "output", "beside", "peak", "flops", "sent", "roofline")
    ]
    for p in report.programs:
        if p.memory is None or p.work is None:
            rows.append((p.name, str(p.runs), *["-"] * 4, f"refused: {_gib(p.needs)}", "-", "-", "-"))
            continue
        bound = max(p.seconds, key=lambda what: p.seconds[what])
        times = f"{p.seconds[bound] * 1e3:.3g} ms ({bound})"
        rows.append(
            (p.name, str(p.runs), *map(_gib, (*p.memory, p.needs)), f"{p.work.flops:.3g}", _gib(p.work.sent), times)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows
    ]
    lines = [
        f"{report.topology}: {math.prod(step.mesh.values())} chips of {_gib(chip.memory)} GiB, mesh "
        + " × ".join(f"{axis} {n}" for axis, n in step.mesh.items()),
        "compiled by libtpu from shapes; GiB, FLOP and bytes of one chip in one run of a program; never run on a TPU",
        "",
        *table,
        "",
        f"peak {_gib(report.peak)} GiB of {_gib(chip.memory)} GiB: {'fits' if report.fits else 'DOES NOT FIT'}",
        f"roofline of an RL step: {report.seconds:.3g} s, "
        f"{step.rows * step.layout.completion / max(report.seconds, 1e-9):,.0f} completion tokens a second at most",
    ]
    for p in report.programs:
        if p.work:
            said = [f"{kind} × {n} ({_gib(sent)} GiB)" for kind, (n, sent) in sorted(p.work.collectives.items())]
            said += [f"kernel {kernel} × {n}" for kernel, n in sorted(p.work.kernels.items()) if kernel not in PLUMBING]
            lines.append(f"{p.name}: {', '.join(said) or 'no collectives'}")
    return "\n".join(lines)


def _gib(n: float) -> str:
    return f"{n / 2**30:.3g}"
