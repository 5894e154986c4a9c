"""Plan a run before renting the hardware.

    python -m big_vit.plan --config configs/x.py --topology v5p:8x8x8

Compiles the train step of a config for TPUs that are not attached, with their real compiler, and
reports whether it fits, how fast it would be and what it would cost.
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the slow imports.
    command_line.answer_help(command_line.plan())

import itertools
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from big_vit import config as config_lib
from big_vit import metrics, runtime, sharding, state, trees
from big_vit.build.experiment import Experiment, abstract_batch, build_experiment
from big_vit.build.steps import build_train_step
from big_vit.config import Config
from big_vit.errors import UserError
from big_vit.planning import hlo, topology

GIB = 2**30
# (part of the model, regex on the path of an operation); the first match wins.
PARTS = (
    ('attention projections', r'Attention_\d+/(query|key|value|out|qkv)\b'),
    ('attention core', r'Attention_\d+'),
    ('MLP', r'MlpBlock'),
    ('norms', r'LayerNorm|encoder_norm'),
    ('embedding', r'\bembedding\b|pos_embedding|cls'),
    ('head and loss', r'\bhead\b|MAPHead'),
    ('layer loop', r'Transformer/while'),
    ('rest of the model', r'jvp|transpose'),
    ('optimizer and metrics', r'.*'),
)
REMAT = ('none', 'names', 'full')


class Plan(NamedTuple):
    """The compiler's verdict on one way to run a config; times are estimates.

    If `fits` is False, only figures that are known without a compiled program are set.

    Attributes:
      hbm: bytes on the fullest device, by use.
      host_memory: bytes of host memory that a device uses.
      seconds: time of a step by part of the model; sums to `step_seconds`.
      ops: the costliest operations, with the seconds of all their executions.
      unknown_loops: number of loops of unknown length, counted as one round.
      problem: why it does not fit, or ''.
    """

    settings: dict[str, Any]
    chips: int
    hosts: int
    devices: int
    params: int
    batch_size: int
    fits: bool
    hbm: dict[str, float]
    hbm_capacity: float | None
    host_memory: float
    cycles: int
    seconds: dict[str, float]
    step_seconds: float
    examples_per_second: float
    mfu: float
    steps: int
    collectives: list[dict[str, Any]]
    ops: list[dict[str, Any]]
    compile_seconds: float
    unknown_loops: int
    problem: str = ''

    @property
    def hbm_peak(self) -> float:
        """Bytes on the fullest device at the peak."""
        return sum(self.hbm.values())

    @property
    def days(self) -> float:
        """Estimated duration of the entire run in days."""
        return self.steps * self.step_seconds / 86400

    @property
    def chip_hours(self) -> float:
        """Estimated cost of the entire run in chip-hours."""
        return self.days * 24 * self.chips


def part_of(source: str) -> str:
    """Part of the model that an operation belongs to, from its path."""
    return next(name for name, pattern in PARTS if re.search(pattern, source))


def _state_bytes(abstract_state: state.State) -> dict[str, float]:
    """Bytes of the state on one device, by use."""
    where = state.shardings(abstract_state)
    sizes = {
        name: float(sharding.device_bytes(abstract_state[name], where[name]))
        for name in abstract_state
    }
    more = {'ema': 'averaged parameters', 'task': 'state of the task'}
    named = ('params', 'opt', *more)
    rest = sum(size for name, size in sizes.items() if name not in named)
    return {
        'parameters': sizes['params'],
        'optimizer': sizes['opt'] + rest,
        **{use: sizes[name] for name, use in more.items() if name in sizes},
    }


def _memory(compiled: Any, parts: Experiment, batch: Any) -> dict[str, float]:
    """Bytes on one device by use; they add up to the peak."""
    stats = compiled.memory_analysis()
    known = _state_bytes(parts.abstract_state)
    known['batch'] = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(batch)
    )
    # On the device, arrays are padded to complete tiles.
    known['padding of arrays'] = max(stats.argument_size_in_bytes - sum(known.values()), 0)
    known['results'] = max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0)
    known['activations and temporaries'] = stats.temp_size_in_bytes
    known['program'] = stats.generated_code_size_in_bytes
    return known


def link_seconds(collective: hlo.Collective, place: topology.Topology) -> float:
    """Lower bound on the time of all executions of a collective, with all links in use."""
    assert place.chip is not None
    speed = place.chip.network if collective.network else place.chip.links
    return collective.sent * collective.times / (speed / place.devices_per_chip)


def _collectives(module: hlo.Module, place: topology.Topology) -> list[dict[str, Any]]:
    """Sums up collectives of the same kind, group size, network and overlap."""
    groups: dict[tuple[str, int, bool, bool], list[hlo.Collective]] = defaultdict(list)
    for collective in module.collectives:
        groups[collective.kind, collective.group, collective.network, collective.overlapped].append(
            collective
        )
    return [
        {
            'kind': kind,
            'devices': group,
            'over': 'network' if network else 'links',
            'overlapped': overlapped,
            'count': sum(collective.times for collective in members),
            'bytes': sum(collective.nbytes * collective.times for collective in members),
            'seconds': sum(link_seconds(collective, place) for collective in members)
            if place.chip
            else None,
        }
        for (kind, group, network, overlapped), members in sorted(groups.items())
    ]


# The compiler's two ways to say that a program needs (1) out of (2).
_OUT_OF_MEMORY = re.compile(
    r'(?:Used |temporaries \()([\d.]+[KMGT]?)\)?(?: of | exceeds available HBM \()([\d.]+[KMGT]?)'
)
_UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def out_of_memory(message: str) -> tuple[float, float] | None:
    """Parses (bytes needed, bytes available) from a compiler's error, or returns None."""
    match = _OUT_OF_MEMORY.search(message)
    if 'RESOURCE_EXHAUSTED' not in message or not match:
        return None
    needed, available = (float(n.rstrip('KMGT')) * _UNITS.get(n[-1], 1) for n in match.groups())
    return needed, available


def _costliest(module: hlo.Module, place: topology.Topology, count: int) -> list[dict[str, Any]]:
    ops = sorted(module.ops, key=lambda op: -op.cycles * op.times)[:count]
    return [
        {
            'part': part_of(op.source),
            'source': op.source,
            'times': op.times,
            'seconds': op.cycles * op.times / place.chip.clock,
        }
        for op in ops
        if place.chip
    ]


def make(config: Config, place: topology.Topology, ops: int = 0) -> Plan:
    """Compiles the config's train step for a topology and reads off its costs.

    Args:
      config: config of the run.
      place: topology to compile for.
      ops: number of costliest operations to list.

    Raises:
      UserError: the config does not fit the topology.
    """
    parts = build_experiment(config, place.devices)
    step, batch = build_train_step(config, parts), abstract_batch(parts)
    began = time.perf_counter()
    memory, problem, module, host_memory = {}, '', hlo.Module([], [], 0), 0.0
    capacity = place.chip.hbm / place.devices_per_chip if place.chip else None
    # Only lower and compile under this mesh: its devices cannot run anything.
    with jax.set_mesh(parts.mesh):
        try:
            compiled = step.lower(parts.abstract_state, batch).compile()
        except jax.errors.JaxRuntimeError as error:
            needed = out_of_memory(str(error))
            if needed is None:
                raise
            problem = f'needs {needed[0] / GIB:.1f} GiB of {needed[1] / GIB:.2f}'
            memory = _state_bytes(parts.abstract_state)
            memory['activations and temporaries'] = max(needed[0] - sum(memory.values()), 0)
        else:
            memory = _memory(compiled, parts, batch)
            host_memory = compiled.memory_analysis().host_temp_size_in_bytes
            module = hlo.read(compiled.as_text(), len(place.devices), place.slices)
    seconds: dict[str, float] = {}
    examples_per_second = 0.0
    if not problem and place.chip:
        for op in module.ops:
            name = part_of(op.source)
            seconds[name] = seconds.get(name, 0.0) + op.cycles * op.times / place.chip.clock
        exposed = [collective for collective in module.collectives if not collective.overlapped]
        seconds['collectives not overlapped'] = sum(
            link_seconds(collective, place) for collective in exposed
        )
        examples_per_second = config.batch_size / sum(seconds.values())
    peak = place.chips * place.chip.peak_flops if place.chip else 0.0
    mesh = parts.mesh.shape
    return Plan(
        settings={
            'variant': config.model.variant,
            'topology': place.name,
            'slices': place.slices,
            'mesh': dict(mesh),
            'batch_per_device': config.batch_size // (mesh['replica'] * mesh['fsdp']),
            'accumulation': config.accumulation,
            'remat': config.model.remat,
            'scan': config.model.scan,
            'optimizer': ', '.join(parts.settings),
        },
        chips=place.chips,
        hosts=place.hosts,
        devices=len(place.devices),
        params=trees.count(parts.abstract_state['params']),
        batch_size=config.batch_size,
        fits=not problem,
        hbm=memory,
        hbm_capacity=capacity,
        host_memory=host_memory,
        cycles=module.cycles,
        seconds=seconds,
        step_seconds=sum(seconds.values()),
        examples_per_second=examples_per_second,
        mfu=examples_per_second * parts.flops_per_example / peak if peak else 0.0,
        steps=parts.total_steps,
        collectives=_collectives(module, place),
        ops=_costliest(module, place, ops),
        compile_seconds=time.perf_counter() - began,
        unknown_loops=module.unknown_loops,
        problem=problem,
    )


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan with derived figures, in bytes and seconds."""
    derived = {'hbm_peak': plan.hbm_peak, 'days': plan.days, 'chip_hours': plan.chip_hours}
    return {**plan._asdict(), **derived}


def advice(plan: Plan) -> str:
    """Suggests settings to try when a plan does not fit."""
    s, hints = plan.settings, []
    remat, mesh = s['remat'], s['mesh']
    # 'offload' is none of them: like 'full' it keeps next to nothing on the device.
    if remat in REMAT[:-1]:
        hints.append(f'--config.model.remat={REMAT[REMAT.index(remat) + 1]}')
    if mesh['replica'] > s['slices']:
        hints.append(f'--mesh replica={s["slices"]},fsdp=-1,tensor={mesh["tensor"]}')
    if s['batch_per_device'] > s['accumulation']:
        hints.append(f'--config.accumulation={2 * s["accumulation"]}')
    return ', '.join([*hints, 'a larger topology', '--search'])


def _seconds(value: float) -> str:
    return f'{value:.2f} s' if value >= 1 else f'{value * 1e3:.2f} ms'


def page(plan: Plan) -> str:
    """Formats the plan as tables."""
    s = plan.settings
    mesh = ', '.join(f'{name} {size}' for name, size in s['mesh'].items())
    slices = f' in {s["slices"]} slices' if s['slices'] > 1 else ''
    chip = 'chip' if plan.devices == plan.chips else 'device'
    lines = [
        f'plan    {s["topology"]}{slices}: {plan.chips:,} chips on {plan.hosts:,} hosts, '
        f'mesh {mesh}',
        f'model   ViT-{s["variant"]}: {plan.params / 1e6:,.2f} M parameters, {s["optimizer"]}, '
        f'remat {s["remat"]}, {"scanned" if s["scan"] else "unrolled"} layers',
        f'batch   {plan.batch_size:,} = {s["batch_per_device"]} a {chip}'
        + (f' in {s["accumulation"]} parts' if s['accumulation'] > 1 else ''),
    ]
    memory = [(name, f'{size / GIB:.3f}') for name, size in plan.hbm.items()]
    memory.append(('peak', f'{plan.hbm_peak / GIB:.3f}'))
    if plan.hbm_capacity:
        memory.append(('capacity', f'{plan.hbm_capacity / GIB:.3f}'))
    if plan.host_memory:
        memory.append(('beside it, on the host', f'{plan.host_memory / GIB:.3f}'))
    tables = [metrics.table((f'memory of a {chip}', 'GiB'), memory)]
    if plan.seconds:
        order = sorted(plan.seconds.items(), key=lambda item: -item[1])
        rows = [(name, f'{t * 1e3:.2f}', f'{t / plan.step_seconds:.1%}') for name, t in order]
        rows.append(('step', f'{plan.step_seconds * 1e3:.2f}', '100.0%'))
        tables.append(metrics.table(('estimated time', 'ms', 'share'), rows))
    if plan.collectives:
        collective_rows = [
            (
                c['kind'],
                c['devices'],
                c['over'],
                c['count'],
                f'{c["bytes"] / 1e6:,.1f}',
                '-' if c['seconds'] is None else f'{c["seconds"] * 1e3:.2f}',
                'yes' if c['overlapped'] else 'no',
            )
            for c in plan.collectives
        ]
        header = ('collective', 'devices', 'over', 'a step', 'MB', 'ms at least', 'overlapped')
        tables.append(metrics.table(header, collective_rows))
    if plan.ops:
        op_rows = [
            (f'{op["seconds"] * 1e3:.2f}', op['times'], op['part'], op['source'].partition('/')[2])
            for op in plan.ops
        ]
        tables.append(metrics.table(('ms', 'runs', 'part', 'operation'), op_rows))
    return '\n\n'.join(['\n'.join(lines), *tables, '\n'.join(_verdict(plan))])


def _verdict(plan: Plan) -> list[str]:
    compiled = f'compiled in {plan.compile_seconds:.0f} s'
    if not plan.fits:
        return [f'DOES NOT FIT: {plan.problem}; {compiled}', f'try     {advice(plan)}']
    peak = f'{plan.hbm_peak / GIB:.2f} GiB'
    room = f' of {plan.hbm_capacity / GIB:.2f}' if plan.hbm_capacity else ''
    lines = [f'fits    {peak}{room}; {compiled}']
    if plan.seconds:
        lines += [
            f'speed   {plan.cycles / 1e6:,.1f} M cycles = {_seconds(plan.step_seconds)} a step, '
            f'{plan.examples_per_second:,.0f} examples/s, MFU {plan.mfu:.1%} (estimates)',
            f'cost    {plan.steps:,} steps = {metrics.duration(plan.steps * plan.step_seconds)} = '
            f'{plan.chip_hours:,.1f} chip-hours, without data waits, evaluation and saving',
        ]
    if plan.unknown_loops:
        lines.append(f'note    {plan.unknown_loops} loops of unknown length are counted once')
    return lines


def meshes(config: Config, place: topology.Topology) -> Iterator[dict[str, int]]:
    """Yields the meshes worth trying, those with the least communication first."""
    devices = len(place.devices)
    for tensor in (1, 2, 4, 8, 16):
        if devices % (tensor * place.slices):
            continue
        ways = devices // tensor
        for fsdp in sorted({1, 16, 64, 256, ways // place.slices}):
            if ways % fsdp == 0 and ways // fsdp % place.slices == 0:
                yield {'replica': ways // fsdp, 'fsdp': fsdp, 'tensor': tensor}


def search(config: Config, place: topology.Topology, per_device: list[int]) -> Iterator[Plan]:
    """Compiles promising combinations of batch per device, mesh, remat and accumulation.

    For each mesh whose state fits, it takes the least rematerialization that fits, without and
    with accumulation for as long as smaller microbatches are faster: they need less recomputation
    and keep more in a chip's fast memory (docs/performance.md). Tensor parallelism only costs time
    where memory suffices without it, so it is tried only if nothing has fit before.
    """
    if place.chip is None:
        raise UserError(f'--search: there are no time estimates for {place.name}')
    capacity = place.chip.hbm / place.devices_per_chip
    fitting = 0
    for _, group in itertools.groupby(meshes(config, place), key=lambda m: m['tensor']):
        if fitting:
            return
        for mesh, size in itertools.product(list(group), per_device or [0]):
            ways = mesh['replica'] * mesh['fsdp']
            batch = size * len(place.devices) if size else config.batch_size
            if batch % ways:
                continue
            fastest = 0.0
            for accumulation in (1, 2, 4):
                if batch % (ways * accumulation):
                    continue
                changes = {f'mesh.{name}': n for name, n in mesh.items()}
                changes |= {'batch_size': batch, 'accumulation': accumulation}
                candidate = config.replacing(changes)
                try:
                    state_bytes = sum(
                        _state_bytes(
                            build_experiment(candidate, place.devices).abstract_state
                        ).values()
                    )
                except UserError as error:
                    print(f'skip    {mesh}: {error}', file=sys.stderr)
                    break
                if state_bytes > capacity:
                    break
                for remat in REMAT:
                    plan = make(candidate.replacing({'model.remat': remat}), place)
                    yield plan
                    if plan.fits:
                        fitting += 1
                        break
                if plan.fits and remat == 'none' and plan.examples_per_second <= fastest:
                    break
                fastest = max(fastest, plan.examples_per_second)


def search_row(plan: Plan) -> str:
    """Formats a plan as one line of `--search`."""
    s, mesh = plan.settings, plan.settings['mesh']
    settings = (
        f'mesh {mesh["replica"]}x{mesh["fsdp"]}x{mesh["tensor"]}  '
        f'batch {s["batch_per_device"]:>4} a device  accumulation {s["accumulation"]}  '
        f'remat {s["remat"]:<5}'
    )
    if not plan.fits:
        return f'{settings}  {plan.problem}'
    return (
        f'{settings}  {plan.hbm_peak / GIB:7.2f} GiB  {plan.examples_per_second:>12,.0f} ex/s  '
        f'MFU {plan.mfu:.1%}'
    )


def parse_mesh(text: str) -> list[tuple[str, str]]:
    """Parses 'replica=1,fsdp=512,tensor=1' into config overrides; omitted axes are 1.

    Raises:
      UserError: an unknown axis or a malformed number.
    """
    sizes = {'replica': '1', 'fsdp': '1', 'tensor': '1'}
    for part in text.split(','):
        name, _, size = part.partition('=')
        if name not in sizes or not re.fullmatch(r'-?\d+', size):
            raise UserError(
                f'--mesh: cannot read {part!r}; write --mesh replica=1,fsdp=512,tensor=1 '
                '(one size may be -1, the rest)'
            )
        sizes[name] = size
    return [(f'mesh.{name}', size) for name, size in sizes.items()]


def main(argv: list[str]) -> None:
    args, overrides = command_line.parse(command_line.plan(), argv)
    spec, name = args.config, args.topology
    if not re.fullmatch(r'(\d+(,\d+)*)?', args.per_device):
        raise UserError(f'--per-device: cannot read {args.per_device!r}; write --per-device 16,32')
    runtime.check_json(args.json)
    config = config_lib.load(spec, overrides)
    topology.prepare_environment()
    if not name.startswith('gpu'):
        # This machine's accelerators are not needed, and may be busy.
        jax.config.update('jax_platforms', 'cpu')
    place = topology.load(name, args.slices)
    if place.chip:
        # Programs for devices that are not attached can be cached, but not loaded again.
        jax.config.update('jax_enable_compilation_cache', False)
    if args.mesh:
        config = config_lib.override(config, parse_mesh(args.mesh))
    runtime.start()
    if args.search:
        sizes = [int(n) for n in args.per_device.split(',') if n]
        tried = []
        for candidate in search(config, place, sizes):
            tried.append(candidate)
            print(search_row(candidate), flush=True, file=sys.stderr if args.json == '-' else None)
        fitting = [candidate for candidate in tried if candidate.fits]
        if not fitting:
            raise UserError(f'nothing fits on {place.name}: take a larger topology')
        plan = max(fitting, key=lambda candidate: candidate.examples_per_second)
    else:
        plan = make(config, place, args.ops)
    if args.json != '-':
        print(('\nfastest\n' if args.search else '') + page(plan))
    runtime.write_json(args.json, to_json(plan))


if __name__ == '__main__':
    runtime.command(main)
