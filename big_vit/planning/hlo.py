"""Costs of a compiled module, parsed from the text that the TPU compiler prints.

The compiler annotates each fused operation with an estimate in cycles. It covers the arithmetic
and memory traffic of one core, but not the links between chips; those are derived here from the
bytes of each collective. Other backends print no estimates: their modules only have collectives.
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
    """An instruction with a cycle estimate, and how often it runs per call of the module.

    Attributes:
      source: path of the model code that it was made from.
      cycles: estimate for one execution.
      branch: the conditional branch or loop of unknown length that it is in, '' if it runs the
        same number of times in every call; see `Module.cycles_by_branch`.
    """

    name: str
    opcode: str
    source: str
    cycles: int
    times: int
    branch: str = ''


class Collective(NamedTuple):
    """A transfer between devices.

    Attributes:
      nbytes: size on one device of the full array: before it is scattered, or once gathered.
      group: number of devices that take part together.
      overlapped: whether the compiler schedules other work meanwhile.
      network: whether it uses the data-centre network, between slices.
      branch: as in `Op`.
    """

    kind: str
    source: str
    nbytes: int
    group: int
    times: int
    overlapped: bool
    network: bool
    branch: str = ''

    @property
    def sent(self) -> float:
        """Least number of bytes that one device sends in one execution (ring algorithms)."""
        share = (self.group - 1) / self.group
        return {'all-reduce': 2 * share, 'collective-permute': 1.0}.get(self.kind, share) * (
            self.nbytes
        )


class Module(NamedTuple):
    """Everything read from a module.

    Attributes:
      unknown_loops: number of loops whose trip count could not be read; counted as one round.
      unknown_in: the branches that contain them, '' for those outside of any.
    """

    ops: list[Op]
    collectives: list[Collective]
    unknown_loops: int
    unknown_in: tuple[str, ...] = ()

    @property
    def cycles(self) -> int:
        return sum(op.cycles * op.times for op in self.ops)

    @property
    def cycles_by_branch(self) -> dict[str, int]:
        """Cycles by the outermost conditional branch or loop of unknown length.

        Everything that runs the same number of times in every call is under ''.
        """
        cycles: dict[str, int] = defaultdict(int)
        for op in self.ops:
            cycles[op.branch] += op.cycles * op.times
        return dict(cycles)


class _Line(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str


def _computations(text: str) -> tuple[dict[str, list[_Line]], str]:
    """Splits a module into ({computation: instructions in text order}, name of the entry)."""
    computations: dict[str, list[_Line]] = {}
    current: list[_Line] = []
    entry = ''
    for row in text.splitlines():
        if not row.startswith(' '):
            header = _COMPUTATION.match(row)
            if header:
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            continue
        line = _INSTRUCTION.match(row)
        if not line:
            continue
        # The opcode is the first lower-case word before a parenthesis. Layouts in the shape
        # before it, such as {1,0:T(8,128)}, use capital letters.
        opcode = _OPCODE.search(line[3])
        if opcode:
            shape, rest = line[3][: opcode.start(1)], line[3][opcode.start(1) :]
            current.append(_Line(line[2], shape, opcode[1], rest))
    return computations, entry


def array_bytes(shape: str) -> int:
    """Total bytes of the arrays in a shape such as `(f32[2,3]{1,0}, bf16[4])`."""
    total = 0
    for kind, sizes in _ARRAY.findall(shape):
        bits = 8 if kind == 'pred' else int(re.sub(r'\D', ' ', kind).split()[0])
        total += math.prod(int(n) for n in sizes.split(',') if n) * max(bits // 8, 1)
    return total


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(',') if n]


def group_size(rest: str, devices: int) -> int:
    """Number of devices per group of a collective, from its attributes."""
    mesh = _MESH_GROUPS.search(rest)
    if mesh:
        sizes = dict(part.replace("'", '').split('=') for part in mesh[1].split(','))
        axes = [axis.strip().strip("'") for axis in mesh[2].split(',')]
        # Part of an axis is written 'axis':(before)size.
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


def _trip_count(line: _Line, computations: dict[str, list[_Line]]) -> int | None:
    """Trip count of a loop: the annotated one, or the bound its counter is compared with."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', line.rest)
    if known:
        return int(known[1])
    condition = re.search(r'condition=%?([\w.-]+)', line.rest)
    lines = computations.get(condition[1], []) if condition else []
    bounds = {
        instruction.name: int(value[1])
        for instruction in lines
        if instruction.opcode == 'constant'
        and (value := re.match(r'constant\((\d+)\)', instruction.rest))
    }
    for instruction in lines:
        if instruction.opcode == 'compare' and 'direction=LT' in instruction.rest:
            operands = re.findall(r'%([\w.-]+)', instruction.rest.partition(')')[0])
            for operand in operands:
                if operand in bounds:
                    return bounds[operand]
    return None


def _executions(
    computations: dict[str, list[_Line]], entry: str
) -> tuple[dict[str, int], dict[str, bool], dict[str, str], list[str]]:
    """Follows calls from the entry computation.

    Returns:
      ({computation: number of executions}, {computation: whether it is part of a fusion},
      {computation: branch it is in}, branch of each loop with an unknown trip count).
    """
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
            rounds = _trip_count(line, computations)
            unknown.extend([branch[caller]] if rounds is None else [])
        rare = line.opcode == 'conditional' or rounds is None
        for callee in names:
            yield callee, 1 if rounds is None else rounds, rare

    # A computation must come after all of its callers. Callees precede callers in the text, so
    # the reverse of the text order is topological.
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
    """Reads the costs of an optimized module from `compiled.as_text()`.

    All branches of a conditional are counted; `cycles_by_branch` tells them apart.

    Args:
      text: the module.
      devices: number of devices of the run, for collectives that name no group.
      slices: number of slices, for transfers between them, which name no group either.
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
            path = source[1] if source else ''
            cycles = re.search(r'"estimated_cycles":"(\d+)"', line.rest)
            if cycles and not fused[computation]:
                executions = times[computation], branch[computation]
                ops.append(Op(line.name, line.opcode, path, int(cycles[1]), *executions))
            kind = line.opcode.removesuffix('-start')
            between = _BETWEEN_SLICES.search(line.rest) if kind == 'send' else None
            if kind not in COLLECTIVES and not between:
                continue
            started = bool(between) or line.opcode.endswith('-start')
            # The shape of a -start holds operands as well as results, and u32 flags.
            nbytes = array_bytes(line.shape.replace('u32[]', '') if started else line.shape)
            if between:
                kind, group = between[1].lower().replace('_', '-'), slices
            else:
                group = group_size(line.rest, devices)
                if started and kind == 'all-gather':
                    nbytes = nbytes * group // (group + 1)
                elif started and kind != 'all-reduce':
                    nbytes //= 2
                if kind == 'reduce-scatter':
                    nbytes *= group
            collective = Collective(
                kind=kind,
                source=path,
                nbytes=nbytes,
                group=group,
                times=times[computation],
                overlapped=started or fused[computation],
                network=bool(between),
                branch=branch[computation],
            )
            key: tuple[object, ...] = (computation, line.name)
            if fused[computation]:
                # A collective that is split over several fusions appears in each with the same
                # channel and source. Channel alone is no key: several collectives may share one.
                channel = re.search(r'channel_id=(\d+)', line.rest)
                key = (channel and channel[1], kind, path, nbytes)
            known = collectives.get(key)
            if known is None or collective.nbytes * collective.times > known.nbytes * known.times:
                collectives[key] = collective
    return Module(ops, list(collectives.values()), len(unknown), tuple(unknown))
