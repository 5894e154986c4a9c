"""How fast it is: `python -m benchmarks [PART ...]`, what this machine can measure of

    chips     the train step on TPUs, by their compiler, beside a plain one
    products  what a block's matrix products reach alone on TPUs, by their compiler
    step      the train step on this machine, beside timm in PyTorch
    startup   seconds until help is shown and until the first step is done
    growth    how cost grows with batch, tokens, depth and chips

Results are kept under benchmarks/results. `python -m benchmarks PART --help` has a part's options.
"""

import importlib
import subprocess
import sys

from big_vit import runtime
from big_vit.errors import UserError

PARTS = ('chips', 'products', 'step', 'startup', 'growth')


def main(argv: list[str]) -> None:
    if argv[:1] in (['-h'], ['--help']):
        print(__doc__)
        return
    unknown = [name for name in argv[:1] if name not in PARTS]
    if unknown:
        raise UserError(f'there is no part {unknown[0]!r}; there are {", ".join(PARTS)}')
    if argv:
        importlib.import_module(f'benchmarks.{argv[0]}').main(argv[1:])
        return
    for part in PARTS:
        print(f'\n## {part}\n', flush=True)
        # A process each: they want other devices, and one that fails leaves the rest.
        subprocess.run([sys.executable, '-m', 'benchmarks', part], check=False)


if __name__ == '__main__':
    runtime.command(main)
