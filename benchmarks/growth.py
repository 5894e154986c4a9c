"""How cost grows with batch, tokens, depth and chips, estimated by the TPU compiler without a TPU.

    python -m benchmarks growth [--only batch,tokens,depth,chips,devices]

`devices` is measured: steps of one small model and batch, split over fake CPU devices that share
this machine, so that any growth is the overhead of splitting. All other points are plans of a
ViT-B/16 with two blocks that change one setting, compiled in their own process in one to three
minutes and stored at once; a restart only makes missing points. The share of a step that chips
spend waiting for each other is a lower bound: the time of the collectives that the compiler does
not overlap with other work, using all links of a chip.
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
from benchmarks.chips import run_planner
from benchmarks.machine import cpu
from big_vit import sharding
from big_vit.errors import UserError
from big_vit.planning import topology

FILE = Path(__file__).parent / 'results' / 'growth.json'
GIB = 2**30
# The common point that each line varies: a 4x4 slice, 16 images of 196 tokens per chip, two blocks.
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


def chip_count(name: str) -> int:
    count = 1
    for side in name.partition(':')[2].split('x'):
        count *= int(side)
    return count


def plan(point: dict[str, Any]) -> dict[str, Any]:
    """Plan one point and return its figures."""
    devices = chip_count(point['topology'])
    plan_result = run_planner(
        *('--topology', point['topology']),
        *('--mesh', f'replica={devices // point["fsdp"]},fsdp={point["fsdp"]}'),
        f'--config.batch_size={devices * point["batch"]}',
        f'--config.image_size={point["size"]}',
        f'--config.model.depth={point["depth"]}',
        f'--config.accumulation={point.get("accumulation", 1)}',
        '--config.schedule.warmup_steps=0',  # Large batches leave fewer steps than the warmup has.
    )
    moved = sum(collective['bytes'] for collective in plan_result['collectives'])
    waiting = plan_result['seconds'].get('collectives not overlapped', 0.0)
    names = ('fits', 'cycles', 'step_seconds', 'hbm_peak', 'mfu', 'examples_per_second')
    return {**{name: plan_result[name] for name in names}, 'moved': moved, 'waiting': waiting}


def stored() -> dict[str, Any]:
    return json.loads(FILE.read_text()) if FILE.exists() else {'points': {}}


def table(line: str, points: dict[str, Any]) -> str:
    """Format the stored points of a line as Markdown."""
    header = (
        f'{line} | M cycles a chip | step, ms | images/s a chip | HBM, GiB | moved, MB a chip | '
        'waiting for others | MFU'
    )
    lines = [f'| {header} |', f'|{"---|" * (header.count("|") + 1)}']
    for change in LINES[line]:
        point = {**SHARED, **change}
        point_figures = points.get(json.dumps(point))
        if point_figures is None:
            continue
        label = {
            'batch': f'{point["batch"]} images'
            + (f' in {point["accumulation"]} parts' if 'accumulation' in point else ''),
            'tokens': f'{(point["size"] // 16) ** 2:,} tokens',
            'depth': f'{point["depth"]} blocks',
            'chips': f'{chip_count(point["topology"]):,} chips',
        }[line]
        if not point_figures['fits']:
            lines.append(f'| {label} | does not fit |' + ' |' * (header.count('|') - 1))
            continue
        rate = point_figures['examples_per_second'] / chip_count(point['topology'])
        cells = [
            *(
                label,
                f'{point_figures["cycles"] / 1e6:,.1f}',
                f'{point_figures["step_seconds"] * 1e3:,.2f}',
            ),
            *(
                f'{rate:,.0f}',
                f'{point_figures["hbm_peak"] / GIB:.2f}',
                f'{point_figures["moved"] / 1e6:,.0f}',
            ),
            *(
                f'{point_figures["waiting"] / point_figures["step_seconds"]:.1%}',
                f'{point_figures["mfu"]:.1%}',
            ),
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def serve_devices(count: int) -> None:
    """Serve timed steps on this number of fake devices."""
    devices = jax.devices()
    assert len(devices) == count, f'{len(devices)} devices, not {count}'
    with jax.set_mesh(sharding.make_mesh(1, count, 1, devices)):
        step.serve(*step.ours(step.SIZES['cpu'][0], 'cpu', 'adamw', scan=False, devices=count))


def measure_devices() -> dict[str, Any]:
    """Measure seconds per step on different numbers of fake devices, which take turns."""
    running: dict[int, step.Side] = {}
    times: dict[str, list[float]] = {str(count): [] for count in DEVICES}
    try:
        for count in DEVICES:
            environment = {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(count)}
            running[count] = step.Side('growth', '--split', str(count), environment=environment)
            running[count].read_message()
        for _ in range(ROUNDS):
            for count, side in running.items():
                times[str(count)].append(side.round())
    finally:
        for side in running.values():
            side.end()
    size = step.SIZES['cpu'][0]
    about = {'cpu': f'{os.cpu_count()} x {cpu()}', 'jax': metadata.version('jax')}
    return {'model': size.name, 'batch': size.batch, 'seconds': times, **about}


def table_of_devices(measurements: dict[str, Any]) -> str:
    """Format the measurements as Markdown, a row per number of devices."""
    header = 'fake devices | images/s | spread | beside one device'
    lines = [f'| {header} |', f'|{"---|" * (header.count("|") + 1)}']
    medians = {count: statistics.median(all_) for count, all_ in measurements['seconds'].items()}
    for count, all_ in measurements['seconds'].items():
        rate, least, most = (
            f'{measurements["batch"] / t:,.0f}' for t in (medians[count], max(all_), min(all_))
        )
        ratio = f'{medians["1"] / medians[count]:.2f}'
        lines.append(f'| {count} | {rate} | {least} to {most} | {ratio} |')
    return '\n'.join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks growth', allow_abbrev=False)
    known = (*LINES, 'devices')
    parser.add_argument('--only', default=','.join(known), help='some of ' + ', '.join(known))
    parser.add_argument('--split', type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.split:
        serve_devices(args.split)
        return
    asked = args.only.split(',')
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise UserError(f'--only: there is no {unknown[0]!r}; there are {", ".join(known)}')
    if set(asked) & set(LINES):
        topology.check_libtpu()
    for line in asked:
        if line == 'devices':
            all_ = {**stored(), 'devices': measure_devices()}
            FILE.write_text(json.dumps(all_, indent=1) + '\n')
            print(f'\n{table_of_devices(all_["devices"])}\n')
            continue
        for change in LINES[line]:
            key = json.dumps({**SHARED, **change})
            if key in stored()['points']:
                continue
            point_figures = plan({**SHARED, **change})
            all_ = stored()
            all_['points'][key] = point_figures
            all_['versions'] = {name: metadata.version(name) for name in ('jax', 'libtpu')}
            FILE.write_text(json.dumps(all_, indent=1) + '\n')
            print(f'{line} {change}: {point_figures["cycles"] / 1e6:.1f} M cycles', flush=True)
        print(f'\n{table(line, stored()["points"])}\n')
