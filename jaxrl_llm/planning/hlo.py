"""What a compiled program does, read from its text: matrix products, memory traffic, collectives, kernels.

XLA's own cost analysis counts the body of a loop once; here it counts as often as the loop is known to run. A loop whose
number of steps only the data tell counts once: of decoding, everything is per token.
"""

import math
import re
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

SLICES = "between slices"  # not an operation of HLO: chips hand to their hosts what those exchange
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
PALLAS = "tpu_custom_call"  # the target of all its kernels; the instruction bears the kernel's name
# No memory is read or written by these themselves.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"}
FREE |= {"after-all", "partition-id", "replica-id", "async-start", "async-update", "async-done", "opt-barrier"}
WIDTHS = {"pred": 1, "c64": 8, "c128": 16, "token": 0, "opaque": 0}  # bytes; other names end in bits

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\w+\[[^\]]*\](?:\{[^}]*\})?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')


class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str  # and before them the operands, as they are printed


class Work(NamedTuple):
    """Of one device in one run of a program."""

    flops: float  # multiply-adds × 2 of matrix products, without those of kernels
    bytes: float  # of main memory read or written by instructions, fusions counted as one
    collectives: dict[
        str, tuple[int, float]
    ]  # kind -> how often, and the bytes one device sends; to its host of `SLICES`
    kernels: dict[str, int]  # custom calls by target, Pallas's by their own name -> how often

    @property
    def sent(self) -> float:
        """Bytes one device sends to others of its slice."""
        return sum(n for kind, (_, n) in self.collectives.items() if kind != SLICES)

    @property
    def exchanged(self) -> float:
        """Bytes one device sends to other slices, through its host."""
        return self.collectives.get(SLICES, (0, 0.0))[1]


def read(text: str) -> Work:
    """The work of a compiled program, from `jax.stages.Compiled.as_text`."""
    computations, entry = _parse(text)
    times, inside = _times(computations, entry)
    flops = traffic = 0.0
    # TPUs spread a collective's steps over fusions, even over a loop's: it runs as often as the fusion that starts it.
    channels: dict[tuple[str, str], tuple[int, float]] = {}
    kernels: Counter[str] = Counter()
    for name, often in times.items():
        types = {i.name: i.type for i in computations[name]}
        for i in computations[name]:
            flops += often * _flops(i, types)
            kind = SLICES if i.op == "send" and "xla_megascale_runtime" in i.attributes else i.op.removesuffix("-start")
            if kind == "all-reduce" and name in inside and _scattered(i, computations[name]):
                kind = "reduce-scatter"
            if kind in (*COLLECTIVES, SLICES):
                channel = _CHANNEL.search(i.attributes)
                this, seen = (
                    (often, often * _sent(i, kind, types)),
                    (kind, channel[1] if channel else f"{name} {i.name}"),
                )
                channels[seen] = min(this, channels.get(seen, this))
            if i.op == "custom-call" and (target := _TARGET.search(i.attributes)):
                kernels[i.name.partition(".")[0] if target[1] == PALLAS else target[1]] += often
            if name not in inside and i.op not in FREE and not i.op.endswith("-done"):
                traffic += often * _traffic(i, types, computations)
    collectives: dict[str, tuple[int, float]] = {}
    for (kind, _), (count, sent) in channels.items():
        before = collectives.get(kind, (0, 0.0))
        collectives[kind] = (before[0] + count, before[1] + sent)
    return Work(flops, traffic, collectives, dict(kernels))


def _scattered(i: Instruction, body: list[Instruction]) -> bool:
    """Whether only a slice of a sum over devices is used: fused so, as TPU programs have it, each gets its slice alone."""
    users = [j for j in body if i.name in j.operands]
    return bool(users) and all(j.op == "dynamic-slice" and j.operands[0] == i.name for j in users)


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Instructions of each computation, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry = ""
    current: list[Instruction] = []
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif found := _INSTRUCTION.match(line):
            name, kind, op, rest = found.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.partition("), ")[0]))
            current.append(Instruction(name, kind, op, operands, rest))
    return computations, entry


def _times(computations: dict[str, list[Instruction]], entry: str) -> tuple[Counter[str], set[str]]:
    """How often each computation runs, and which run inside a fusion. Of branches all count: one of them is small."""
    times: Counter[str] = Counter()
    inside: set[str] = set()

    def visit(name: str, often: int, fused: bool) -> None:
        times[name] += often
        if fused:
            inside.add(name)
        for i in computations[name]:
            if i.op.endswith(("-done", "-update")) or i.op in ("reduce", "sort", "scatter", "map", "reduce-window"):
                continue
            called = _CALLED.findall(i.attributes)
            for branches in _BRANCHES.findall(i.attributes):
                called += re.findall(r"%?([\w.\-]+)", branches)
            trips = _trips(i, computations) if i.op == "while" else 1
            for other in called:
                if other in computations and not i.op.startswith(COLLECTIVES):
                    visit(other, often * trips, fused or i.op == "fusion")

    visit(entry, 1, False)
    return times, inside


def _trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """Steps of a loop: as the compiler says, or the one constant its counter, which starts at 0, is compared with; else 1."""
    if said := _TRIPS.search(loop.attributes):
        return int(said[1])
    condition = computations.get((_CONDITION.search(loop.attributes) or [""] * 2)[1], [])
    if not condition:
        return 1
    end = condition[-1]  # the root comes last
    within = [end, *(i for name in _CALLED.findall(end.attributes) for i in computations.get(name, []))]
    compared = any(i.op == "compare" and "direction=LT" in i.attributes for i in within)
    limits = [i for i in condition if i.op == "constant" and i.name in end.operands and i.type.startswith("s32[]")]
    if not compared or any(i.op in ("and", "or") for i in within) or len(limits) != 1:
        return 1
    return int(limits[0].attributes.partition(")")[0])


def _shapes(kind: str) -> list[tuple[str, tuple[int, ...], str]]:
    return [
        (dtype, tuple(int(n) for n in dims.split(",") if n), layout) for dtype, dims, layout in _SHAPE.findall(kind)
    ]


def _bytes(kind: str, main: bool = False, but: Collection[tuple[str, tuple[int, ...]]] = ()) -> float:
    """Bytes of a type but for some shapes; with `main` only in the main memory, not in a memory space of the core's own."""
    total = 0.0
    for dtype, dims, layout in _shapes(kind):
        if (dtype, dims) in but or (main and re.search(r"S\([1-9]", layout)):
            continue
        bits = re.search(r"\d+", dtype)
        width = WIDTHS.get(dtype, int(bits[0]) / 8 if bits else 1)
        total += math.prod(dims) * width
    return total


def _traffic(i: Instruction, types: dict[str, str], computations: dict[str, list[Instruction]]) -> float:
    """Bytes read and written. Of what an instruction only slices or updates, the slice counts."""
    out = _bytes(i.type, main=True)
    read = [_bytes(types.get(o, ""), main=True) for o in i.operands]
    if i.op in ("dynamic-slice", "gather"):
        return 2 * out
    if i.op == "dynamic-update-slice":
        return 2 * read[1]
    if i.op in ("copy-start", "slice-start"):  # into the core's own memory or out of it; their type has both ends
        return min((n for shape in _SHAPE.finditer(i.type) if shape[2] and (n := _bytes(shape[0]))), default=0.0)
    called = _CALLED.search(i.attributes)
    if i.op != "fusion" or called is None or called[1] not in computations:
        return sum(read) + out
    body = computations[called[1]]
    inner = {j.name: j for j in body}
    steps = [j for j in body if j.op.startswith(COLLECTIVES)]  # of a collective: its buffers only pass through
    passing = {shape[:2] for j in steps for x in (j, *(inner[o] for o in j.operands)) for shape in _shapes(x.type)}
    if passing:
        out = _bytes(i.type, main=True, but=passing)
        read = [_bytes(types.get(o, ""), main=True, but=passing) for o in i.operands]
    parameters = sorted((j for j in body if j.op == "parameter"), key=lambda j: int(j.attributes.partition(")")[0]))
    for n, parameter in enumerate(parameters[: len(read)]):
        users = [j for j in body if parameter.name in j.operands]
        if users and all(j.op in ("dynamic-slice", "gather") and j.operands[0] == parameter.name for j in users):
            read[n] = min(read[n], sum(_bytes(j.type) for j in users))
        if users and all(j.op == "dynamic-update-slice" and j.operands[0] == parameter.name for j in users):
            updates = sum(_bytes(inner[j.operands[1]].type) for j in users if j.operands[1] in inner)
            out, read[n] = min(out, out - read[n] + updates) if out >= read[n] else out, 0.0
    return sum(read) + out


def _sent(i: Instruction, kind: str, types: dict[str, str]) -> float:
    """Bytes one device sends in a collective, by the bandwidth-optimal algorithm over its group of g devices."""
    given = sum(_bytes(types.get(o, "")) for o in i.operands)
    if kind in ("collective-permute", "collective-broadcast", SLICES):
        return given
    g = _group(i.attributes)
    share = (g - 1) / g
    return {"all-gather": given * (g - 1), "all-reduce": 2 * given * share}.get(kind, given * share)


def _group(attributes: str) -> int:
    """Devices that take part in one instance of a collective."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(axis.split("=") for axis in found[1].split(","))
        return math.prod(int(sizes[axis.strip()]) for axis in found[2].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return found[1].count(",") + 1
    return 1


def _flops(i: Instruction, types: dict[str, str]) -> float:
    if i.op not in ("dot", "convolution", "ragged-dot") or i.operands[0] not in types:
        return 0.0
    out = _shapes(i.type)[0][1]
    left, right = (_shapes(types[o])[0][1] for o in i.operands[:2])
    if i.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        dims = [int(n) for n in contracted[1].split(",") if n] if contracted else []
        return 2.0 * math.prod(out) * math.prod(left[n] for n in dims)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    if labels is None:
        return 0.0
    a, b, c = labels.groups()
    size = 2.0 * out[c.index("b")] * out[c.index("f")] * right[b.index("i")]
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    settings = dict(word.split("=") for word in window[1].split()) if window else {}
    for n in range(len(c) - 2):
        size *= _positions(n, left[a.index(str(n))], out[c.index(str(n))], right[b.index(str(n))], settings)
    return size


def _positions(n: int, size: int, out: int, kernel: int, settings: dict[str, str]) -> int:
    """Products of kernel and input elements along one spatial dimension; padding and the holes of dilation are none.

    Batched matrix products are convolutions whose batch is a dimension dilated so that one product each is left.
    """

    def of(name: str, default: str) -> str:
        return settings[name].split("x")[n] if name in settings else default

    stride, hole, spread = int(of("stride", "1")), int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1"))
    low = int(of("pad", "0_0").split("_")[0])
    at = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * spread - low
    return int(((at >= 0) & (at <= (size - 1) * hole) & (at % hole == 0)).sum())
