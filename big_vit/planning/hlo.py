"""What a compiled module costs, read from the text that the TPU compiler gives.

The compiler writes an estimate in cycles into each fused operation. It covers
the arithmetic and the memory traffic of one core, not the links between chips;
those are computed here from the bytes of each collective. Other backends write
no estimates: their modules only have collectives.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    'all-reduce',
    'all-gather',
    'reduce-scatter',
    'all-to-all',
    'collective-permute',
    'ragged-all-to-all',
    'collective-broadcast',
)

_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$')
_INSTRUCTION = re.compile(r'  (ROOT )?%?([\w.-]+) = (.*)$')
_OPCODE = re.compile(r'(?:^|[\s)}\]])([a-z][a-z0-9-]*)\(')
_ARRAY = re.compile(r'\b(pred|[subf]\d+[a-z0-9]*|bf16|c64|c128)\[([\d,]*)\]')
_CALLS = re.compile(
    r'(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_MESH_GROUPS = re.compile(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}')
_IOTA_GROUPS = re.compile(r'replica_groups=\[([\d,]+)\]<=')
_LISTED_GROUPS = re.compile(r'replica_groups=\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}')
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


class Op(NamedTuple):
    """An instruction with an estimate, and how often it runs in one call of the module."""

    name: str
    opcode: str
    source: str  # The path of the model's code that it was made from.
    cycles: int  # Of one execution.
    times: int
    branch: str = ''  # What it is in that runs not once in each call, see `cycles_by_branch`.


class Collective(NamedTuple):
    """A transfer between devices."""

    kind: str
    source: str
    nbytes: int  # Of the array before it is scattered or after it is gathered, on one device.
    group: int  # Devices that take part together.
    times: int
    overlapped: bool  # Whether the compiler runs other work meanwhile.
    network: bool  # Whether it goes over the data-centre network, between slices.
    branch: str = ''  # As of `Op`.

    @property
    def sent(self) -> float:
        """Bytes that one device sends, at least, for one execution."""
        share = (self.group - 1) / self.group
        return {'all-reduce': 2 * share, 'collective-permute': 1.0}.get(self.kind, share) * (
            self.nbytes
        )


class Module(NamedTuple):
    ops: list[Op]
    collectives: list[Collective]
    unknown_loops: int  # Loops whose number of rounds could not be read; counted once.
    unknown_in: tuple[str, ...] = ()  # The branches that they are in, if not in themselves.

    @property
    def cycles(self) -> int:
        return sum(op.cycles * op.times for op in self.ops)

    @property
    def cycles_by_branch(self) -> dict[str, int]:
        """Of what every call runs so often under '', the rest by the outermost branch of a
        conditional, or loop of unknown length, that it is in."""
        found: dict[str, int] = defaultdict(int)
        for op in self.ops:
            found[op.branch] += op.cycles * op.times
        return dict(found)


class _Line(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str


def _computations(text: str) -> tuple[dict[str, list[_Line]], str]:
    """({computation: instructions in the order they run}, name of the entry)."""
    found: dict[str, list[_Line]] = {}
    current: list[_Line] = []
    entry = ''
    for row in text.splitlines():
        if not row.startswith(' '):
            header = _COMPUTATION.match(row)
            if header:
                current = found.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            continue
        line = _INSTRUCTION.match(row)
        if not line:
            continue
        # The opcode is the first word before a parenthesis, after the shape; shapes have
        # layouts such as {1,0:T(8,128)}, whose T is a capital letter.
        opcode = _OPCODE.search(line[3])
        if opcode:
            shape, rest = line[3][: opcode.start(1)], line[3][opcode.start(1) :]
            current.append(_Line(line[2], shape, opcode[1], rest))
    return found, entry


def array_bytes(shape: str) -> int:
    """Bytes of all arrays in a shape such as `(f32[2,3]{1,0}, bf16[4])`."""
    total = 0
    for kind, sizes in _ARRAY.findall(shape):
        bits = 8 if kind == 'pred' else int(re.sub(r'\D', ' ', kind).split()[0])
        total += math.prod(int(n) for n in sizes.split(',') if n) * max(bits // 8, 1)
    return total


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(',') if n]


def group_of(rest: str, devices: int) -> int:
    """How many devices take part in a collective together, from its attributes."""
    mesh = _MESH_GROUPS.search(rest)
    if mesh:
        sizes = dict(part.replace("'", '').split('=') for part in mesh[1].split(','))
        axes = [axis.strip().strip("'") for axis in mesh[2].split(',')]
        # A part of an axis is written 'axis':(before)size.
        return math.prod(
            int(axis.rpartition(')')[2]) if ':' in axis else int(sizes[axis]) for axis in axes
        )
    iota = _IOTA_GROUPS.search(rest)
    if iota:
        return _numbers(iota[1])[-1]
    listed = _LISTED_GROUPS.search(rest)
    if listed:
        return max(len(_numbers(part)) for part in listed[1].strip('{}').split('},{'))
    return 2 if 'source_target_pairs=' in rest else devices


def _rounds(line: _Line, computations: dict[str, list[_Line]]) -> int | None:
    """How often a loop's body runs: the bound that its counter is compared with."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', line.rest)
    if known:
        return int(known[1])
    condition = re.search(r'condition=%?([\w.-]+)', line.rest)
    lines = computations.get(condition[1], []) if condition else []
    bounds = {
        one.name: int(value[1])
        for one in lines
        if one.opcode == 'constant' and (value := re.match(r'constant\((\d+)\)', one.rest))
    }
    for one in lines:
        if one.opcode == 'compare' and 'direction=LT' in one.rest:
            operands = re.findall(r'%([\w.-]+)', one.rest.partition(')')[0])
            for operand in operands:
                if operand in bounds:
                    return bounds[operand]
    return None


def _executions(
    computations: dict[str, list[_Line]], entry: str
) -> tuple[dict[str, int], dict[str, bool], dict[str, str], list[str]]:
    """({computation: times it runs}, {computation: whether it is part of a fusion},
    {computation: branch it is in}, branch of each loop whose number of rounds is unknown)."""
    times: dict[str, int] = defaultdict(int)
    fused: dict[str, bool] = defaultdict(bool)
    branch: dict[str, str] = defaultdict(str)
    unknown: list[str] = []

    def calls(line: _Line, caller: str) -> Iterator[tuple[str, int, bool]]:
        names = _CALLS.findall(line.rest)
        branches = _BRANCHES.search(line.rest)
        names += [n.strip().lstrip('%') for n in branches[1].split(',')] if branches else []
        rounds: int | None = 1
        if line.opcode == 'while':
            rounds = _rounds(line, computations)
            unknown.extend([branch[caller]] if rounds is None else [])
        rare = line.opcode == 'conditional' or rounds is None
        for callee in names:
            yield callee, 1 if rounds is None else rounds, rare

    # A computation is called after all of its callers are known: callees come first in the
    # text, so the reverse of its order is a topological one.
    times[entry] = 1
    for name in reversed(list(computations)):
        if not times[name]:
            continue
        for line in computations[name]:
            for callee, rounds, rare in calls(line, name):
                times[callee] += times[name] * rounds
                inside = line.opcode not in ('while', 'conditional', 'call', 'async-start')
                fused[callee] |= fused[name] or inside
                branch[callee] = branch[name] or callee * rare
    return times, fused, branch, unknown


def read(text: str, devices: int = 1, slices: int = 1) -> Module:
    """The costs of an optimised module, from `compiled.as_text()`.

    All branches of a conditional count; `cycles_by_branch` tells them apart.

    Args:
      devices: of the whole run, for collectives that name no group.
      slices: that the devices are in; transfers between them name no group either.
    """
    computations, entry = _computations(text)
    times, fused, branch, unknown = _executions(computations, entry)
    ops: list[Op] = []
    collectives: dict[tuple[object, ...], Collective] = {}
    for computation, lines in computations.items():
        if not times[computation]:
            continue
        for line in lines:
            source = re.search(r'op_name="([^"]*)"', line.rest)
            where = source[1] if source else ''
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line.rest)
            if cycles and not fused[computation]:
                often = times[computation], branch[computation]
                ops.append(Op(line.name, line.opcode, where, int(cycles[1]), *often))
            kind = line.opcode.removesuffix('-start')
            between = _BETWEEN_SLICES.search(line.rest) if kind == 'send' else None
            if kind not in COLLECTIVES and not between:
                continue
            started = bool(between) or line.opcode.endswith('-start')
            # The shape of a start holds the operands as well as the results, and flags.
            nbytes = array_bytes(line.shape.replace('u32[]', '') if started else line.shape)
            if between:
                kind, group = between[1].lower().replace('_', '-'), slices
            else:
                group = group_of(line.rest, devices)
                if started and kind == 'all-gather':
                    nbytes = nbytes * group // (group + 1)
                elif started and kind != 'all-reduce':
                    nbytes //= 2
                if kind == 'reduce-scatter':
                    nbytes *= group
            one = Collective(
                kind=kind,
                source=where,
                nbytes=nbytes,
                group=group,
                times=times[computation],
                overlapped=started or fused[computation],
                network=bool(between),
                branch=branch[computation],
            )
            key: tuple[object, ...] = (computation, line.name)
            if fused[computation]:
                # One that is split over several fusions keeps its channel and its source;
                # the channel alone may be that of many.
                channel = re.search(r'channel_id=(\d+)', line.rest)
                key = (channel and channel[1], kind, where, nbytes)
            old = collectives.get(key)
            if old is None or one.nbytes * one.times > old.nbytes * old.times:
                collectives[key] = one
    return Module(ops, list(collectives.values()), len(unknown), tuple(unknown))
