"""How cost grows with batch, tokens, depth and chips, by the TPU compiler: no TPU is needed.

    python -m benchmarks growth [--only batch,tokens,depth,chips,devices]

`devices` is measured: steps of one small model and batch, split over fake CPU devices that share
the machine, so that what grows is what splitting costs. Each other point is a plan of ViT-B/16 of
two blocks (the others change one thing), compiled by a process of its own in one to three minutes
and stored at once; started again, what is missing is made. The share of a step that many chips wait
for each other is the least time of collectives that the compiler does not run beside other work,
over all links of a chip.
"""

import argparse
import json
import os
import statistics
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from benchmarks import step
from benchmarks.checkpoint import cpu
from benchmarks.chips import planned
from big_vit import sharding
from big_vit.errors import UserError
from big_vit.planning import topology

FILE = Path(__file__).parent / 'results' / 'growth.json'
GIB = 2**30
# Overrides of the point that all share: one 4x4 slice, 16 images of 196 tokens a chip, two blocks.
SHARED = {'topology': 'v5e:4x4', 'batch': 16, 'size': 224, 'depth': 2, 'fsdp': 16}
LINES: dict[str, list[dict[str, Any]]] = {
    'batch': [
        *({'batch': n} for n in (8, 16, 32, 64, 128)),
        *({'batch': n, 'accumulation': parts} for n, parts in ((64, 2), (128, 2), (128, 4))),
    ],
    'tokens': [{'size': n, 'batch': 4} for n in (224, 512, 1024)],
    'depth': [{'depth': n} for n in (2, 4, 8)],
    'chips': [
        {'topology': 'v5p:2x2x4', 'fsdp': 16},
        {'topology': 'v5p:4x4x4', 'fsdp': 16},
        {'topology': 'v5p:8x8x4', 'fsdp': 16},
        {'topology': 'v5p:8x8x16', 'fsdp': 16},
        {'topology': 'v5p:16x16x16', 'fsdp': 16},
    ],
}

DEVICES, ROUNDS = (1, 2, 4, 8), 5


def chips(name: str) -> int:
    count = 1
    for side in name.partition(':')[2].split('x'):
        count *= int(side)
    return count


def plan(point: dict[str, Any]) -> dict[str, Any]:
    """The figures of one point."""
    devices = chips(point['topology'])
    found = planned(
        *('--topology', point['topology']),
        *('--mesh', f'replica={devices // point["fsdp"]},fsdp={point["fsdp"]}'),
        f'--config.batch_size={devices * point["batch"]}',
        f'--config.image_size={point["size"]}',
        f'--config.model.depth={point["depth"]}',
        f'--config.accumulation={point.get("accumulation", 1)}',
        '--config.schedule.warmup_steps=0',  # Of large batches there are few steps.
    )
    moved = sum(one['bytes'] for one in found['collectives'])
    waiting = found['seconds'].get('collectives not overlapped', 0.0)
    names = ('fits', 'cycles', 'step_seconds', 'hbm_peak', 'mfu', 'examples_per_second')
    return {**{name: found[name] for name in names}, 'moved': moved, 'waiting': waiting}


def stored() -> dict[str, Any]:
    return json.loads(FILE.read_text()) if FILE.exists() else {'points': {}}


def table(line: str, points: dict[str, Any]) -> str:
    """Markdown, a row for each point of a line that is there."""
    header = (
        f'{line} | M cycles a chip | step, ms | images/s a chip | HBM, GiB | moved, MB a chip | '
        'waiting for others | MFU'
    )
    lines = [f'| {header} |', f'|{"---|" * (header.count("|") + 1)}']
    for change in LINES[line]:
        point = {**SHARED, **change}
        found = points.get(json.dumps(point))
        if found is None:
            continue
        label = {
            'batch': f'{point["batch"]} images'
            + (f' in {point["accumulation"]} parts' if 'accumulation' in point else ''),
            'tokens': f'{(point["size"] // 16) ** 2:,} tokens',
            'depth': f'{point["depth"]} blocks',
            'chips': f'{chips(point["topology"]):,} chips',
        }[line]
        if not found['fits']:
            lines.append(f'| {label} | does not fit |' + ' |' * (header.count('|') - 1))
            continue
        rate = found['examples_per_second'] / chips(point['topology'])
        cells = [
            *(label, f'{found["cycles"] / 1e6:,.1f}', f'{found["step_seconds"] * 1e3:,.2f}'),
            *(f'{rate:,.0f}', f'{found["hbm_peak"] / GIB:.2f}', f'{found["moved"] / 1e6:,.0f}'),
            *(f'{found["waiting"] / found["step_seconds"]:.1%}', f'{found["mfu"]:.1%}'),
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def split(count: int) -> None:
    """The process that steps on so many fake devices."""
    devices = jax.devices()
    assert len(devices) == count, f'{len(devices)} devices, not {count}'
    with jax.set_mesh(sharding.make_mesh(1, count, 1, devices)):
        step.serve(*step.ours(step.SIZES['cpu'][0], 'cpu', 'adamw', scan=False, devices=count))


def measured() -> dict[str, Any]:
    """Seconds of a step on so many fake devices, which take turns."""
    running: dict[int, step.Side] = {}
    times: dict[str, list[float]] = {str(count): [] for count in DEVICES}
    try:
        for count in DEVICES:
            environment = {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(count)}
            running[count] = step.Side('growth', '--split', str(count), environment=environment)
            running[count].told()
        for _ in range(ROUNDS):
            for count, side in running.items():
                times[str(count)].append(side.round())
    finally:
        for side in running.values():
            side.end()
    size = step.SIZES['cpu'][0]
    about = {'cpu': f'{os.cpu_count()} x {cpu()}', 'jax': metadata.version('jax')}
    return {'model': size.name, 'batch': size.batch, 'seconds': times, **about}


def table_of_devices(found: dict[str, Any]) -> str:
    """Markdown, a row for each number of devices."""
    header = 'fake devices | images/s | spread | beside one device'
    lines = [f'| {header} |', f'|{"---|" * (header.count("|") + 1)}']
    middle = {count: statistics.median(all_) for count, all_ in found['seconds'].items()}
    for count, all_ in found['seconds'].items():
        rate, least, most = (
            f'{found["batch"] / t:,.0f}' for t in (middle[count], max(all_), min(all_))
        )
        ratio = f'{middle["1"] / middle[count]:.2f}'
        lines.append(f'| {count} | {rate} | {least} to {most} | {ratio} |')
    return '\n'.join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks growth', allow_abbrev=False)
    known = (*LINES, 'devices')
    parser.add_argument('--only', default=','.join(known), help='some of ' + ', '.join(known))
    parser.add_argument('--split', type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.split:
        split(args.split)
        return
    asked = args.only.split(',')
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise UserError(f'--only: there is no {unknown[0]!r}; there are {", ".join(known)}')
    if set(asked) & set(LINES):
        topology.check_libtpu()
    for line in asked:
        if line == 'devices':
            all_ = {**stored(), 'devices': measured()}
            FILE.write_text(json.dumps(all_, indent=1) + '\n')
            print(f'\n{table_of_devices(all_["devices"])}\n')
            continue
        for change in LINES[line]:
            key = json.dumps({**SHARED, **change})
            if key in stored()['points']:
                continue
            found = plan({**SHARED, **change})
            all_ = stored()
            all_['points'][key] = found
            all_['versions'] = {name: metadata.version(name) for name in ('jax', 'libtpu')}
            FILE.write_text(json.dumps(all_, indent=1) + '\n')
            print(f'{line} {change}: {found["cycles"] / 1e6:.1f} M cycles', flush=True)
        print(f'\n{table(line, stored()["points"])}\n')
