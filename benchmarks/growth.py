"""How cost grows with batch, tokens, depth and chips, by the TPU compiler: no TPU is needed.

    python -m benchmarks growth [--only batch,tokens,depth,chips]

Each point is a plan of ViT-B/16 of two blocks (the others change one thing), compiled by a process
of its own in one to three minutes and stored at once; started again, what is missing is made. The
share of a step that many chips wait for each other is the least time of collectives that the
compiler does not run beside other work, over all links of a chip.
"""

import argparse
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.chips import planned
from big_vit import topology
from big_vit.errors import UserError

FILE = Path(__file__).parent / 'results' / 'growth.json'
GIB = 2**30
# Overrides of the point that all share: one 4x4 slice, 16 images of 196 tokens a chip, two blocks.
SHARED = {'topology': 'v5e:4x4', 'batch': 16, 'size': 224, 'depth': 2, 'fsdp': 16}
LINES: dict[str, list[dict[str, Any]]] = {
    'batch': [{'batch': n} for n in (8, 16, 32, 64, 128)],
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
            'batch': f'{point["batch"]} images',
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


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks growth', allow_abbrev=False)
    parser.add_argument('--only', default=','.join(LINES), help='some of ' + ', '.join(LINES))
    args = parser.parse_args(argv)
    unknown = [name for name in args.only.split(',') if name not in LINES]
    if unknown:
        raise UserError(f'--only: there is no {unknown[0]!r}; there are {", ".join(LINES)}')
    topology.check_libtpu()
    for line in args.only.split(','):
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
