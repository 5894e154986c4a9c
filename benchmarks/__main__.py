"""Benchmarks that can run on this machine: `python -m benchmarks [PART ...]`

    chips     the train step on TPUs, estimated by their compiler, beside a plain one
    products  a block's matrix products alone on TPUs, estimated by their compiler
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
        # One process per part: parts need different devices, and a failure must not stop the
        # others.
        subprocess.run([sys.executable, '-m', 'benchmarks', part], check=False)


if __name__ == '__main__':
    runtime.command(main)
