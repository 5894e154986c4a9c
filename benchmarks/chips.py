"""The complete train step on TPUs beside a plain one, estimated by the TPU compiler without a TPU.

    python -m benchmarks chips [--only v5e/B/16,...] [--again]

Each row is compiled in its own process, which takes two to ten minutes on two cores, and is stored
at once; a restart only makes missing rows. Cycles are the compiler's estimates (docs/planning.md)
and the same on every machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import baseline
from big_vit import plan, sharding, state
from big_vit.errors import UserError
from big_vit.models import flops, variants
from big_vit.models.vit import make_vit
from big_vit.planning import hlo, topology

FILE = Path(__file__).parent / 'results' / 'chips.json'
GIB = 2**30


class Row(NamedTuple):
    """A model on one kind of slice.

    Attributes:
      batch: images per chip.
      mesh: mesh of big_vit; the plain step only splits the batch.
      accumulation: parts in which big_vit processes the batch.
    """

    variant: str
    topology: str
    batch: int
    mesh: str = 'fsdp=16'
    accumulation: int = 1

    @property
    def name(self) -> str:
        return f'{self.topology.partition(":")[0]}/{self.variant}'


ROWS = (
    Row('S/16', 'v5e:4x4', 64, 'replica=16'),
    Row('B/16', 'v5e:4x4', 64, accumulation=2),
    Row('L/16', 'v5e:4x4', 64, accumulation=2),
    Row('H/14', 'v5e:4x4', 16),
    Row('g/14', 'v5e:4x4', 16),
    Row('S/16', 'v6e:4x4', 64, 'replica=16'),
    Row('B/16', 'v6e:4x4', 64, accumulation=2),
    Row('L/16', 'v6e:4x4', 64, accumulation=2),
    Row('H/14', 'v6e:4x4', 32),
    Row('g/14', 'v6e:4x4', 32),
    Row('S/16', 'v5p:2x2x4', 64, 'replica=16'),
    Row('B/16', 'v5p:2x2x4', 64),
    Row('L/16', 'v5p:2x2x4', 64),
    Row('H/14', 'v5p:2x2x4', 32),
    Row('g/14', 'v5p:2x2x4', 32),
)
SIDES = ('plain', 'big_vit')


def run_planner(*arguments: str) -> dict[str, Any]:
    """Return the plan of ViT-B/16 with these changes, also if it does not fit."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'plan.json'
        command = [
            *(sys.executable, '-m', 'big_vit.plan', '--config', 'configs/vit_b16_i1k.py'),
            *('--config.mixup=0', *arguments, '--json', str(file)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if not file.exists():
            raise UserError(f'{" ".join(arguments)}: {done.stderr.strip()[-300:]}')
        return json.loads(file.read_text())


def ours(row: Row) -> dict[str, Any]:
    """Estimate big_vit's step with the planner."""
    plan_result = run_planner(
        *('--topology', row.topology, '--mesh', row.mesh, f'--config.batch_size={16 * row.batch}'),
        f'--config.model.variant={row.variant}',
        f'--config.accumulation={row.accumulation}',
    )
    return {
        name: plan_result[name]
        for name in ('fits', 'cycles', 'step_seconds', 'mfu', 'hbm_peak', 'problem')
    }


def plain(row: Row) -> dict[str, Any]:
    """Estimate the step of `baseline`, split over the batch alone."""
    place = topology.load(row.topology)
    assert place.chip is not None
    mesh = sharding.make_mesh(16, 1, 1, place.devices)
    lowered = baseline.lower(row.variant, mesh, 16 * row.batch)
    empty = {'cycles': 0, 'step_seconds': 0.0, 'mfu': 0.0, 'hbm_peak': 0.0}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = plan.out_of_memory(str(error))
        if needed is None:
            raise
        return {**empty, 'fits': False, 'problem': f'needs {needed[0] / GIB:.1f} GiB'}
    module = hlo.read(compiled.as_text(), len(place.devices))
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.generated_code_size_in_bytes
    waiting = [collective for collective in module.collectives if not collective.overlapped]
    seconds = module.cycles / place.chip.clock
    seconds += sum(plan.link_seconds(collective, place) for collective in waiting)
    model = make_vit(num_classes=baseline.CLASSES, **variants.parse(row.variant))
    params = state.abstract_params(model, (224, 224, 3))
    images = jax.ShapeDtypeStruct((row.batch, 224, 224, 3), jnp.float32)
    operations = 3 * flops.count(model.apply, {'params': params}, images)
    return {
        'fits': True,
        'cycles': module.cycles,
        'step_seconds': seconds,
        'mfu': operations / seconds / place.chip.peak_flops,
        'hbm_peak': peak,
        'problem': '',
    }


def stored() -> dict[str, Any]:
    return json.loads(FILE.read_text()) if FILE.exists() else {'rows': {}}


def stored_sides(row: Row, results: dict[str, Any]) -> dict[str, Any]:
    """Return the stored sides of a row; none if they were made with other settings."""
    stored_row = results['rows'].get(row.name, {})
    unchanged = (
        row._asdict().items() <= {k: v for k, v in stored_row.items() if k not in SIDES}.items()
    )
    return {side: stored_row[side] for side in SIDES if unchanged and side in stored_row}


def make(row: Row, side: str) -> None:
    """Compile one side of a row in this process and store the result."""
    result = {'plain': plain, 'big_vit': ours}[side](row)
    results = stored()
    versions = {name: metadata.version(name) for name in ('jax', 'libtpu', 'flax')}
    results['rows'][row.name] = {**row._asdict(), **stored_sides(row, results)}
    results['rows'][row.name][side] = {**result, 'versions': versions}
    FILE.write_text(json.dumps(results, indent=2) + '\n')


def table(rows: dict[str, Any]) -> str:
    """Format all rows as Markdown; a ratio below 1 means that big_vit is faster."""
    header = (
        'model | slice | images a chip | parts, big_vit | M cycles, plain | M cycles, big_vit | '
        'ratio | step ms, plain | step ms, big_vit | MFU, plain | MFU, big_vit | HBM GiB, plain | '
        'HBM GiB, big_vit'
    )
    lines = [f'| {header} |', f'|{"---|" * (header.count("|") + 1)}']
    for row in (rows[one.name] for one in ROWS if one.name in rows):
        if not all(side in row for side in SIDES):
            continue
        a, b = (row[side] for side in SIDES)

        def both(name: str, scale: float, form: str, a: Any = a, b: Any = b) -> list[str]:
            return [
                format(one[name] * scale, form) if one['fits'] else one['problem'] for one in (a, b)
            ]

        fit = a['fits'] and b['fits']
        cells = [
            *(row['variant'], row['topology'], str(row['batch'])),
            *(str(row['accumulation']), *both('cycles', 1e-6, ',.1f')),
            f'{b["cycles"] / a["cycles"]:.2f}' if fit else '-',
            *(*both('step_seconds', 1e3, '.1f'), *both('mfu', 100, '.1f')),
            *both('hbm_peak', 1 / GIB, '.2f'),
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks chips', allow_abbrev=False)
    parser.add_argument('--only', help='rows, such as v5e/B/16,v6e/L/16')
    parser.add_argument('--again', action='store_true', help='also those that are stored')
    parser.add_argument('--side', choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = [row.name for row in ROWS]
    chosen = args.only.split(',') if args.only else names
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise UserError(f'--only: there is no {unknown[0]!r}; there are {", ".join(names)}')
    topology.check_libtpu()
    rows = [row for row in ROWS if row.name in chosen]
    if args.side:
        make(rows[0], args.side)
        return
    failed = []
    for row in rows:
        for side in SIDES:
            if side in stored_sides(row, stored()) and not args.again:
                continue
            command = [sys.executable, '-m', 'benchmarks', 'chips', '--only', row.name]
            done = subprocess.run([*command, '--side', side], capture_output=True, text=True)
            last_line = done.stderr.strip().splitlines()[-1:] if done.returncode else ['done']
            failed += [f'{row.name} {side}'] if done.returncode else []
            print(
                f'{row.name} {side}: {last_line[0] if last_line else done.returncode}', flush=True
            )
    print(table(stored()['rows']))
    if failed:
        raise UserError(f'not compiled: {", ".join(failed)}')
