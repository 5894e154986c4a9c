"""Measure the cost of optimizers.

    python -m benchmarks.optimizers [--only NAME;...] [--tpu | --cpu]

Three parts: `tpu`, the complete train step of ViT-B/16 as estimated by the TPU compiler without
TPUs; `devices`, the update alone compiled for eight devices, with its state; `time`, the update
alone on this machine. Each row is made in its own process, which is killed at its time limit, and
is stored at once: a restart only makes missing rows.
"""

import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.machine import cpu
from big_vit import config as config_lib
from big_vit import ledger, plan, sharding, state, trees
from big_vit.build.experiment import abstract_batch, build_experiment
from big_vit.build.steps import build_train_step
from big_vit.models import variants
from big_vit.models.vit import make_vit
from big_vit.optim import blocks, factory, matrices, roots
from big_vit.optim.factory import Rules
from big_vit.planning import hlo, topology

RESULTS = Path(__file__).parent / 'results'
TOPOLOGY, BATCH = 'v5e:8x8', 4096

# name: settings of `optim`; its `name` is the optimizer's.
OWN: dict[str, dict[str, Any]] = {
    'adamw': {'name': 'adamw'},
    'muon': {'name': 'muon'},
    'shampoo': {'name': 'shampoo'},
    'shampoo, groups 4': {'name': 'shampoo', 'groups': 4},
    'shampoo, sliced': {'name': 'shampoo', 'sliced': True},
    'shampoo, sent as bfloat16': {'name': 'shampoo', 'gather_dtype': 'bfloat16'},
    'shampoo, every 1': {'name': 'shampoo', 'every': 1},
    'shampoo, every 100': {'name': 'shampoo', 'every': 100},
    'shampoo, eigh': {'name': 'shampoo', 'root': 'eigh'},
    'soap': {'name': 'soap'},
}
PEERS = ('optax.adamw', 'optax.contrib.muon', 'optax-shampoo', 'precondition')
# Without soap: the compiler has no estimate for its QR decompositions.
TPU = ('adamw', 'shampoo', 'shampoo, sent as bfloat16', 'shampoo, sliced', 'shampoo, groups 4')
# Block sizes with which a refresh ends within a minute or so on a CPU; TPUs use the default, 1024.
TREES = {'Ti/16': 256, 'S/16': 256, 'B/16': 256}
LIMITS = {'tpu': 1500, 'devices': 300, 'time': 90}
ROUNDS = 2
SHARE = 0.05  # Share of the train step that an optimizer may cost with its default `every`.
SLOWER_COMPILE = 3.0


def versions() -> dict[str, str]:
    installed = {}
    for name in ('jax', 'jaxlib', 'libtpu', 'flax', 'optax', 'optax-shampoo', 'precondition-opt'):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = 'not installed'
    return installed


# Optimizers.


def _aliases() -> None:
    """Restore names that JAX has removed but packages of 2022 still use."""
    for old, new in (
        ('tree_map', jax.tree.map),
        ('tree_flatten', jax.tree.flatten),
        ('tree_unflatten', jax.tree.unflatten),
        ('tree_leaves', jax.tree.leaves),
        ('tree_structure', jax.tree.structure),
    ):
        if old not in vars(jax):
            setattr(jax, old, new)


def _same_types(condition: Any, body: Any, first: Any) -> Any:
    """Run a while loop with constant types.

    The loop that computes roots has six parts, and the last one starts with True instead of 1.
    """
    if isinstance(first, tuple) and len(first) == 6:
        first = (*first[:5], 1.0 if first[5] is True else first[5])
    return jax.lax.while_loop(condition, body, first)


def optax_shampoo(block: int) -> optax.GradientTransformation:
    """Return the PyPI package with the two changes that any current JAX needs to run it."""
    _aliases()
    from optax_shampoo import distributed_shampoo as package

    package.lax = types.SimpleNamespace(**{**vars(jax.lax), 'while_loop': _same_types})
    return package.distributed_shampoo(
        1e-3, block, preconditioning_compute_steps=20, start_preconditioning_step=1
    )


def precondition(block: int) -> optax.GradientTransformation:
    """Return the installed package, unchanged."""
    from precondition import distributed_shampoo as package

    return package.distributed_shampoo(
        1e-3, block, preconditioning_compute_steps=20, start_preconditioning_step=1
    )


def build_optimizer(name: str, block: int, params: Any, mesh: Any) -> Any:
    """Return the complete update, including learning rate and decay."""
    peers: dict[str, Callable[[], Any]] = {
        'optax.adamw': lambda: optax.adamw(1e-3),
        'optax.contrib.muon': lambda: optax.contrib.muon(1e-3),
        'optax-shampoo': lambda: optax_shampoo(block),
        'precondition': lambda: precondition(block),
    }
    if name in peers:
        return optax.with_extra_args_support(peers[name]())
    settings = {k: v for k, v in OWN[name].items() if k != 'name'}
    optimizer = OWN[name]['name']
    if 'block' in factory.defaults(optimizer):
        settings = {'block': block, **settings}
    if 'start' in factory.defaults(optimizer):
        settings = {'start': 1, **settings}
    names = trees.flatten(params)
    rules = Rules(
        lambda _: jnp.float32(1e-3), dict.fromkeys(names, 1e-4), dict.fromkeys(names, 1.0), mesh
    )
    law = factory.LAWS[optimizer](**settings)
    return optax.with_extra_args_support(optax.chain(*law(rules)))


def shapes(variant: str, scan: bool = True) -> Any:
    sizes: dict[str, Any] = variants.parse(variant)
    model = make_vit(num_classes=1000, scan=scan, **sizes)
    return state.abstract_params(model, (224, 224, 3))


def every(name: str) -> int:
    """Return the number of steps between refreshes."""
    if name not in OWN:
        return 20 if 'shampoo' in name or name == 'precondition' else 0
    settings = {**factory.defaults(OWN[name]['name']), **OWN[name]}
    return settings.get('every', 0) // settings.get('groups', 1)


# The work, each part in a process of its own.


def say(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def compiled(lower: Callable[[], Any]) -> Any:
    """Compile a program and report the time.

    Processor time is reported as well, as other processes do not lengthen it.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    program = lower().compile()
    say(compile_seconds=time.perf_counter() - start, compile_cpu=time.process_time() - cpu_start)
    return program


def operations(name: str, params: Any) -> dict[str, float]:
    """Count floating-point operations of the products of a step and of one refresh.

    Only products of blocks count, including padding. 'step' counts each product once;
    'step_in_passes' counts six passes for full precision, three for high and one for others.
    """
    settings = {**factory.defaults(OWN[name]['name']), **OWN[name]}
    if 'block' not in settings:
        return {}
    flat = {path: leaf.shape for path, leaf in trees.flatten(params).items()}
    cuts = blocks.plan(flat, settings['block'], matrices.matrix)
    step = passes = refresh = 0.0
    for stack in cuts.stacks.values():
        r, c, n = stack.rows, stack.columns, stack.blocks
        # SOAP rotates G and M, and rotates the result back.
        turns = 1 if settings['name'] == 'shampoo' else 3
        pair = 2.0 * n * r * c * (r + c)
        step += pair * (1 + turns)
        passes += pair * (1 + 3 * turns)
        if settings['name'] == 'shampoo':
            # Four products per Newton step, three for the residual.
            products = 2 * (4 * roots.newton_steps(4, settings['ridge']) + 3)
            refresh += n * products * (r**3 + c**3)
        else:
            # A product, one for the error, and Householder's QR with its Q.
            refresh += n * (2 + 2 + 8 / 3) * (r**3 + c**3)
    return {'step': step, 'step_in_passes': passes, 'refresh': refresh}


def on_tpu(name: str, topology_name: str = TOPOLOGY) -> None:
    """Estimate the complete train step, scanned, with the TPU compiler."""
    place = topology.load(topology_name)
    assert place.chip is not None
    changes = {'batch_size': BATCH, 'mixup': 0, 'model.scan': True}
    changes |= {f'optim.{key}': value for key, value in OWN[name].items()}
    config = config_lib.load('configs/vit_b16_i1k.py').replacing(changes)
    parts = build_experiment(config, place.devices)
    step, batch = build_train_step(config, parts), abstract_batch(parts)
    costs = ledger.measure(parts.abstract_state)
    say(
        flops=parts.flops_per_example * BATCH,
        **{
            f'operations_{key}': n
            for key, n in operations(name, parts.abstract_state['params']).items()
        },
        words=costs.optimizer_total.scalars / costs.params.scalars,
        state_on_device=costs.optimizer_total.on_device,
    )
    with jax.set_mesh(parts.mesh):
        program = compiled(lambda: step.lower(parts.abstract_state, batch))
    module = hlo.read(program.as_text(), len(place.devices))
    waits: dict[str, float] = {}
    for collective in module.collectives:
        if not collective.overlapped:
            seconds = plan.link_seconds(collective, place)
            waits[collective.branch] = (
                waits.get(collective.branch, 0.0) + seconds * place.chip.clock
            )
    cycles = module.cycles_by_branch
    where = {op.branch: op.source for op in module.ops if 'branch_' in op.source}
    parts_of_step: dict[str, float] = {}
    for op in module.ops:
        if not op.branch:
            part = plan.part_of(op.source)
            parts_of_step[part] = parts_of_step.get(part, 0) + op.cycles * op.times
    say(
        cycles=cycles.pop('', 0) + waits.get('', 0),
        parts=parts_of_step,
        branches=[
            {
                'cycles': branch_cycles + waits.get(branch, 0),
                'source': where.get(branch, ''),
                'unknown_loops': module.unknown_in.count(branch),
            }
            for branch, branch_cycles in cycles.items()
        ],
        unknown_loops=module.unknown_in.count(''),
        hbm=plan._memory(program, parts, batch),
        collectives=plan._collectives(module, place),
        clock=place.chip.clock,
    )
    # State per device of larger and smaller slices, which needs no compiler.
    for others, devices in ((8, 'v5e:2x4'), (64, 'v5e:8x8'), (512, 'v5p:8x8x8')):
        # Parameters are split over at most 64 devices: they have too few rows for more.
        axes = {'mesh.fsdp': min(others, 64), 'mesh.replica': max(others // 64, 1)}
        abstract_state = build_experiment(
            config.replacing(axes), topology.load(devices).devices
        ).abstract_state
        say(**{f'state_on_{others}': ledger.measure(abstract_state).optimizer_total.on_device})


def on_devices(name: str, variant: str) -> None:
    """Compile the update alone for eight devices with equal parameters and gradients."""
    jax.config.update('jax_num_cpu_devices', 8)
    mesh = sharding.make_mesh(8, 1, 1, jax.devices('cpu'))
    params = shapes(variant)
    optimizer = build_optimizer(name, TREES[variant], params, mesh)
    replicated = sharding.replicated(mesh)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), params
    )
    with jax.set_mesh(mesh):
        abstract_state = jax.eval_shape(optimizer.init, params)
        shardings = sharding.shardings_for(abstract_state, mesh, 2**62)
        abstract_state = jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
            abstract_state,
            shardings,
        )
        numbers, count = trees.count(abstract_state), trees.count(params)
        say(words=numbers / count, bytes=trees.nbytes(abstract_state), params=count)
        say(state_on_device=sharding.device_bytes(abstract_state, shardings))

        def update(grads: Any, old: Any, params: Any) -> Any:
            return optimizer.update(grads, old, params, step=jnp.int32(100))

        jitted = jax.jit(update, donate_argnums=1, out_shardings=(replicated, shardings))
        program = compiled(lambda: jitted.lower(params, abstract_state, params))
    module = hlo.read(program.as_text(), 8)
    kinds: dict[str, int] = {}
    for collective in module.collectives:
        kinds[collective.kind] = kinds.get(collective.kind, 0) + 1
    sent = sum(collective.nbytes * collective.times for collective in module.collectives)
    temporary = program.memory_analysis().temp_size_in_bytes
    say(collectives=kinds, collective_bytes=sent, temporary=temporary)


def in_time(name: str, variant: str) -> None:
    """Time steps of the update alone on this machine, as many as the time limit allows."""
    params = shapes(variant)
    optimizer = build_optimizer(name, TREES[variant], params, None)
    rng = np.random.default_rng(0)

    def noise(scale: float) -> Any:
        return jax.tree.map(
            lambda x: jnp.asarray(scale * rng.standard_normal(x.shape, np.float32)), params
        )

    weights, grads = noise(0.02), [noise(1e-3), noise(1e-3)]
    opt_state = jax.jit(optimizer.init)(weights)
    abstract_state, step = jax.eval_shape(lambda x: x, opt_state), jnp.int32(0)

    def update(grads: Any, old: Any, params: Any, step: Any) -> Any:
        return optimizer.update(grads, old, params, step=step)

    jitted = jax.jit(update, donate_argnums=1)
    program = compiled(lambda: jitted.lower(grads[0], abstract_state, weights, step))
    for number in range(1, 2 * max(every(name), 20) + 3):
        start = time.perf_counter()
        _, opt_state = jax.block_until_ready(program(grads[number % 2], opt_state, weights, step))
        say(step=number, seconds=time.perf_counter() - start)


# Jobs and their rows.


def jobs(only: list[str], parts: list[str]) -> list[str]:
    """Return the jobs in their order: rounds over all optimizers, small models first."""
    names = [name for name in (*OWN, *PEERS) if not only or name in only]
    all_jobs = [f'tpu|B/16|{name}|1' for name in TPU if name in names and 'tpu' in parts]
    for variant in TREES:
        if 'devices' in parts:
            all_jobs += [f'devices|{variant}|{name}|1' for name in names]
        for number in range(1, ROUNDS + 1):
            if 'time' in parts:
                all_jobs += [f'time|{variant}|{name}|{number}' for name in names]
    return all_jobs


def work(job: str) -> None:
    part, variant, name, _ = job.split('|')
    {
        'tpu': lambda: on_tpu(name),
        'devices': lambda: on_devices(name, variant),
        'time': lambda: in_time(name, variant),
    }[part]()


def run(job: str, limit: float) -> dict[str, Any]:
    """Run a job and collect what its process reported before it ended or was killed."""
    topology.prepare_environment()
    child = subprocess.Popen(
        [sys.executable, '-m', 'benchmarks.optimizers', '--job', job],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    )
    assert child.stdout is not None and child.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(child.stderr or []))
    reader.start()
    timed_out = threading.Event()

    def end() -> None:
        timed_out.set()
        child.kill()

    timer = threading.Timer(limit, end)
    timer.start()
    row: dict[str, Any] = {'job': job, 'load': round(os.getloadavg()[0], 1), 'steps': []}
    for text in child.stdout:
        message = json.loads(text) if text.startswith('{') else {}
        if 'step' in message:
            row['steps'].append(round(message['seconds'], 5))
        else:
            row.update(message)
    code = child.wait()
    timer.cancel()
    reader.join()
    if timed_out.is_set():
        row['problem'] = f'stopped after {limit:.0f} s'
    elif code:
        named = [text.strip() for text in errors if re.match(r'[\w.]+(Error|Exception)\b', text)]
        row['problem'] = named[-1][:200] if named else f'exit status {code}'
    return row


# Tables.


def amortised(row: dict[str, Any], name: str) -> tuple[float, float] | None:
    """Return the cycles of an average step and of the slowest one.

    Branches count at the refresh interval of the optimizer. SOAP's initial branch, which runs once,
    is left out. Returns None if loops of unknown length matter.
    """
    branches = [b for b in row['branches'] if 'branch_1_fun' not in b['source'] or name != 'soap']
    if any(b['unknown_loops'] for b in branches):
        return None
    extra = [b['cycles'] for b in branches]
    interval = max(every(name), 1)
    return row['cycles'] + sum(extra) / interval, row['cycles'] + max(extra, default=0)


def percent(value: float) -> str:
    return f'{100 * value:.1f} %'


def verdict(value: float, limit: float) -> str:
    return 'met' if value <= limit else 'MISSED'


def tpu_table(rows: dict[str, dict[str, Any]]) -> str:
    header = (
        'optimizer | a step without refresh, M cycles | average step | slowest step | '
        'more than AdamW | operations of its products, of the step | compiling, s (of CPU) | '
        'compiling, × AdamW | words a parameter | state on 8, 64, 512 devices, MB | '
        'peak HBM, GiB | note'
    )
    base = rows.get('tpu|B/16|adamw|1', {})
    lines = [f'| {header} |', '|' + '---|' * (header.count('|') + 1)]
    for name in TPU:
        row = rows.get(f'tpu|B/16|{name}|1')
        if not row:
            continue
        cells = [name, *['-'] * 10, row.get('problem', '')]
        if 'operations_step' in row:
            rate = row['operations_refresh'] / max(every(name), 1)
            cells[5] = percent((row['operations_step'] + rate) / row['flops'])
        if 'words' in row:
            cells[8] = f'{row["words"]:.2f}'
        if 'compile_cpu' in row:
            cells[6] = f'{row["compile_cpu"]:.0f}'
            if 'compile_cpu' in base:
                cells[7] = f'{row["compile_cpu"] / base["compile_cpu"]:.1f}'
        if 'state_on_512' in row:
            cells[9] = ', '.join(f'{row[f"state_on_{n}"] / 1e6:,.1f}' for n in (8, 64, 512))
        if 'cycles' in row:
            cells[1] = f'{row["cycles"] / 1e6:.1f}'
            cells[10] = f'{sum(row["hbm"].values()) / 2**30:.2f}'
            step_cycles = amortised(row, name)
            if step_cycles is None:
                cells[11] = 'a refresh has loops of unknown length'
            else:
                cells[2:4] = [f'{one / 1e6:.1f}' for one in step_cycles]
                if 'cycles' in base:
                    cells[4] = percent(step_cycles[0] / base['cycles'] - 1)
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def targets(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line per optimizer that says whether it meets its targets."""
    base, lines = rows.get('tpu|B/16|adamw|1', {}), []
    for name in TPU[1:]:
        row = rows.get(f'tpu|B/16|{name}|1', {})
        results = []
        if 'operations_step' in row:
            work = row['operations_step'] + row['operations_refresh'] / max(every(name), 1)
            share = work / row['flops']
            results.append(
                f'operations {percent(share)} of {percent(SHARE)} {verdict(share, SHARE)}'
            )
        step_cycles = amortised(row, name) if 'cycles' in row else None
        if step_cycles and 'cycles' in base:
            more = step_cycles[0] / base['cycles'] - 1
            results.append(f'cycles {percent(more)} of {percent(SHARE)} {verdict(more, SHARE)}')
        if 'compile_cpu' in row and 'compile_cpu' in base:
            times = row['compile_cpu'] / base['compile_cpu']
            results.append(
                f'compiling {times:.1f} of {SLOWER_COMPILE:g} {verdict(times, SLOWER_COMPILE)}'
            )
        if 'state_on_512' in row:
            ratio = row['state_on_512'] * 512 / (row['state_on_8'] * 8)
            results.append(f'state of 512 devices together {ratio:.2f} times that of 8')
        if results:
            lines.append(f'* {name}: {"; ".join(results)}')
    return lines


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(math.ceil(share * len(values)), len(values)) - 1]


def update_table(rows: dict[str, dict[str, Any]]) -> str:
    header = (
        'model | optimizer | words a parameter | collectives of 8 devices | they move, MB | '
        'compiling, s | steps timed (with a refresh) | median, ms | 99 %, ms | slowest, ms | note'
    )
    lines = [f'| {header} |', '|' + '---|' * (header.count('|') + 1)]
    for variant in TREES:
        for name in (*OWN, *PEERS):
            placed = rows.get(f'devices|{variant}|{name}|1', {})
            keys = [f'time|{variant}|{name}|{n}' for n in range(1, ROUNDS + 1)]
            rounds = [rows[key] for key in keys if key in rows]
            if not placed and not rounds:
                continue
            cells = [f'ViT-{variant}', name, *['-'] * 8, '']
            if 'words' in placed:
                cells[2] = f'{placed["words"]:.2f}'
            if 'collectives' in placed:
                kinds = placed['collectives'].items()
                cells[3] = ', '.join(f'{n} {kind}' for kind, n in sorted(kinds)) or 'none'
                cells[4] = f'{placed["collective_bytes"] / 1e6:.1f}'
            took = [row['compile_cpu'] for row in rounds if 'compile_cpu' in row]
            if took:
                cells[5] = f'{statistics.median(took):.1f}'
            # The first step makes all roots of all groups, which happens once in a run.
            timed = [s for row in rounds for s in row['steps'][1:]]
            if timed:
                refreshes = sum(
                    step % every(name) == 0
                    for row in rounds
                    for step in range(2, len(row['steps']) + 1)
                    if every(name)
                )
                cells[6] = f'{len(timed)} ({refreshes})'
                cells[7:10] = [
                    f'{1e3 * value:,.0f}'
                    for value in (statistics.median(timed), quantile(timed, 0.99), max(timed))
                ]
            problems = [row['problem'] for row in (placed, *rounds) if 'problem' in row]
            cells[10] = '; '.join(dict.fromkeys(problems))
            lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def page(results: dict[str, Any]) -> str:
    rows, about = results['rows'], results['about']
    packages = ', '.join(f'{name} {number}' for name, number in about['versions'].items())
    blocks_of = ', '.join(f'{block} for ViT-{variant}' for variant, block in TREES.items())
    parts = [
        f'With {packages}; {about["cpu"]}, load {about["load"]} when the last row was made.',
        f'The whole train step of ViT-B/16, batch {BATCH:,}, scanned layers, without mixing, on '
        f'{TOPOLOGY}, as its compiler estimates it (docs/planning.md); transfers that nothing '
        'hides are in it, as cycles.',
        tpu_table(rows),
        '\n'.join(targets(rows)),
        'The update alone, float32 gradients, scanned layers, on this machine. Times are those of '
        'two busy cores: they say nothing of accelerators, and little of small differences. '
        f'Blocks of {blocks_of}; compiling in seconds of CPU, without its waiting for others.',
        update_table(rows),
    ]
    return '\n\n'.join(part for part in parts if part) + '\n'


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.optimizers', allow_abbrev=False)
    parser.add_argument('--only', default='', help='some of ' + '; '.join((*OWN, *PEERS)))
    parser.add_argument('--tpu', action='store_true', help='only the part of the TPU compiler')
    parser.add_argument('--cpu', action='store_true', help='only the parts of this machine')
    parser.add_argument('--trees', default='', help='some of ' + ','.join(TREES))
    parser.add_argument('--json', default=str(RESULTS / 'optimizers.json'), metavar='FILE')
    parser.add_argument('--limit', type=float, help='seconds for each row')
    parser.add_argument('--minutes', type=float, default=math.inf, help='start no row after them')
    parser.add_argument('--again', action='store_true', help='make rows again that are there')
    parser.add_argument('--job', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job:
        work(args.job)
        return
    only = [name.strip() for name in args.only.split(';') if name.strip()]
    unknown = [name for name in only if name not in OWN and name not in PEERS]
    if unknown:
        sys.exit(f'no {unknown[0]!r}; there are {"; ".join((*OWN, *PEERS))}')
    parts = ['tpu'] * (not args.cpu) + ['devices', 'time'] * (not args.tpu)
    path, began = Path(args.json), time.monotonic()
    results = json.loads(path.read_text()) if path.exists() else {'rows': {}}
    for job in jobs(only, parts):
        part, variant, *_ = job.split('|')
        if part != 'tpu' and args.trees and variant not in args.trees.split(','):
            continue
        if job in results['rows'] and not args.again:
            continue
        if time.monotonic() - began > 60 * args.minutes:
            print('time is up; started again, it goes on from here')
            break
        row = run(job, args.limit or LIMITS[part])
        results['rows'][job] = row
        results['about'] = {
            'cpu': f'{os.cpu_count()} x {cpu()}',
            'load': [round(value, 1) for value in os.getloadavg()],
            'python': platform.python_version(),
            'versions': versions(),
        }
        path.write_text(json.dumps(results, indent=1) + '\n')
        print(f'{job}: {row.get("problem", "done")}', flush=True)
    if results['rows']:
        path.with_suffix('.md').write_text(page(results))
        print(page(results))


if __name__ == '__main__':
    main(sys.argv[1:])
