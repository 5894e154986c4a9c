"""Plan the large configs: `python -m benchmarks.plans [NAME ...]` rewrites docs/plans/.

Each plan compiles for a TPU that need not be present, and takes one to three minutes on two cores.
"""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

FOLDER = Path('docs/plans')
GIB = 2**30

# name: arguments of `python -m big_vit.plan`.
PLANS: dict[str, list[str]] = {
    # 64 images per chip without mixup: the setting for comparisons with other codebases.
    'vit_s16_v5e-16': [
        *('--config', 'configs/vit_s16_i1k.py', '--config.mixup=0', '--topology', 'v5e:4x4'),
        *('--mesh', 'fsdp=16', '--config.mesh.min_shard_size=500000'),
    ],
    'vit_b16_v5e-16': [
        *('--config', 'configs/vit_b16_i1k.py', '--config.mixup=0', '--topology', 'v5e:4x4'),
        *('--mesh', 'fsdp=16', '--config.batch_size=1024'),
    ],
    **{
        f'{config}_{pod}': [
            *('--config', f'configs/{config}.py:pod={pod}', '--topology', topology),
        ]
        for config in ('vit_b16_i1k', 'vit_l16_i21k', 'vit_h14', 'vit_g14', 'vit_22b')
        for pod, topology in (
            ('v5e-256', 'v5e:16x16'),
            ('v5p-512', 'v5p:8x8x8'),
            ('v6e-256', 'v6e:16x16'),
        )
    },
    **{
        f'{config}_v5e-256': [
            *('--config', f'configs/{config}.py:pod=v5e-256', '--topology', 'v5e:16x16'),
        ]
        for config in ('mae_b16_i1k', 'mae_l16_i1k', 'mae_h14_i1k')
    },
    **{
        f'vit_gigantic14_{pod}': [
            *('--config', f'configs/vit_g14.py:variant=G/14,pod={pod}', '--topology', topology),
        ]
        for pod, topology in (
            ('v5e-256', 'v5e:16x16'),
            ('v5p-512', 'v5p:8x8x8'),
            ('v6e-256', 'v6e:16x16'),
        )
    },
    'vit_g14_v5p-512_full': [
        *('--config', 'configs/vit_g14.py:pod=v5p-512', '--topology', 'v5p:8x8x8'),
        '--config.model.remat=full',
    ],
    'vit_22b_v5p-4096_full': [
        *('--config', 'configs/vit_22b.py:pod=v5p-4096', '--topology', 'v5p:16x16x16'),
        '--config.model.remat=full',
    ],
    'vit_22b_v5p-4096': [
        *('--config', 'configs/vit_22b.py:pod=v5p-4096', '--topology', 'v5p:16x16x16'),
    ],
}


def versions() -> str:
    return ', '.join(f'{name} {metadata.version(name)}' for name in ('jax', 'libtpu', 'flax'))


def make(name: str) -> bool:
    """Write NAME.md and NAME.json; return False if the plan failed."""
    command = ['-m', 'big_vit.plan', *PLANS[name], '--json', str(FOLDER / f'{name}.json')]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if result.returncode:
        print(f'{name}: {result.stderr.strip()[-500:]}', file=sys.stderr)
        return False
    shown = ' '.join(['python', '-m', 'big_vit.plan', *PLANS[name]])
    text = f'# {name}\n\nWith {versions()}:\n\n```bash\n{shown}\n```\n\n```\n{result.stdout}```\n'
    (FOLDER / f'{name}.md').write_text(text)
    summary = next(line for line in result.stdout.splitlines() if line[:5] in ('speed', 'DOES '))
    print(f'{name}: {summary}', flush=True)
    return True


def row(name: str) -> str:
    """Return one line of the index."""
    plan = json.loads((FOLDER / f'{name}.json').read_text())
    s = plan['settings']
    mesh = 'x'.join(str(n) for n in s['mesh'].values())
    cells = [
        f'[{name}]({name}.md)',
        s['variant'],
        s['topology'],
        mesh,
        s['batch_per_device'],
        s['remat'],
        f'{plan["hbm_peak"] / GIB:.2f} of {plan["hbm_capacity"] / GIB:.2f}',
        f'{plan["cycles"] / 1e6:,.1f}',
        f'{plan["step_seconds"] * 1e3:,.1f}',
        f'{plan["examples_per_second"]:,.0f}',
        f'{plan["mfu"]:.1%}',
        f'{plan["chip_hours"]:,.0f}',
    ]
    return '| ' + ' | '.join(map(str, cells)) + ' |'


def write_index() -> None:
    header = (
        'plan | model | topology | mesh | batch a chip | remat | HBM, GiB | M cycles | step, ms | '
        'examples/s | MFU | chip-hours'
    )
    rows = [row(name) for name in PLANS if (FOLDER / f'{name}.json').exists()]
    text = (
        '# Plans\n\nMade by `python -m benchmarks.plans`, compiled by the real TPU compiler, on a '
        'machine without TPUs.\nTimes are estimates of that compiler: [docs/planning.md]'
        '(../planning.md) says what is in them.\n\n'
        f'| {header} |\n|{"---|" * (header.count("|") + 1)}\n' + '\n'.join(rows) + '\n'
    )
    (FOLDER / 'README.md').write_text(text)


def main(names: list[str]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    unknown = [name for name in names if name not in PLANS]
    if unknown:
        sys.exit(f'no plan {unknown[0]}; there are {", ".join(PLANS)}')
    failed = [name for name in names or PLANS if not make(name)]
    write_index()
    if failed:
        sys.exit(f'failed: {", ".join(failed)}')


if __name__ == '__main__':
    main(sys.argv[1:])
