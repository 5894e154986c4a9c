"""Flags of every command.

Imports no JAX, so that `--help` answers before JAX would load. The functions named after commands
return their parsers.
"""

import argparse
import difflib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from big_vit import signals
from big_vit.errors import UserError


def answer_help(parser: argparse.ArgumentParser) -> None:
    """Prints a command's help and exits, if that is asked for; Ctrl-C ends it with one line.

    Commands call it before their other imports, which take more than a second.
    """
    signals.handle(lambda number, _: signals.leave(number))
    if not {'-h', '--help'}.isdisjoint(sys.argv[1:]):
        parser.print_help()
        sys.exit()


def parse(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Splits arguments into the parser's own flags and `--config.key=value` overrides.

    Returns:
      (parsed flags, overrides as pairs of key and text).

    Raises:
      UserError: an unknown flag, or an override without a value.
    """
    overrides, rest, words = [], [], iter(argv)
    for word in words:
        if not word.startswith('--config.'):
            rest.append(word)
            continue
        key, equals, text = word.removeprefix('--config.').partition('=')
        value = text if equals else next(words, '--')
        if not equals and value.startswith('--'):
            raise UserError(f'{word} needs a value: --config.{key}=VALUE')
        overrides.append((key, value))
    args, unknown = parser.parse_known_args(rest)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition('=')[0], flags, n=1)
        hint = f'; did you mean {near[0]}?' if near else '; see --help'
        raise UserError(f'unknown argument {unknown[0]}{hint}')
    return args, overrides


def require_flag(value: str | None, flag: str, example: str) -> str:
    """Returns a flag's value; raises UserError with an example if it is missing."""
    if not value:
        raise UserError(f'{flag} is missing, for example {flag} {example}')
    return value


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the config are."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix('argument ').replace(': must', ' must', 1))


def _number(lowest: float, highest: float, kind: type = int) -> Callable[[str], Any]:
    """Makes a check of the text of a flag: a number in a range, bounds included."""

    def parsed(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            name = 'whole number' if kind is int else 'number'
            raise argparse.ArgumentTypeError(f'must be a {name}, got {text[:50]!r}') from None
        if not value >= lowest:  # Also refuses nan.
            raise argparse.ArgumentTypeError(f'must be at least {lowest}, got {text[:50]}')
        if value > highest:
            raise argparse.ArgumentTypeError(f'must be at most {highest}, got {text[:50]}')
        return value

    return parsed


def _parser(name: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    return _Parser(
        prog=f'python -m big_vit.{name}',
        description=description,
        epilog=epilog,
        allow_abbrev=False,
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--config', metavar='FILE[:arg=value,...]', help='a file of configs/')


def _training_parser(name: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Parser with the flags of all training commands."""
    parser = _parser(name, description, epilog)
    _add_config(parser)
    parser.add_argument('--workdir', help='where checkpoints, metrics and the config go')
    parser.add_argument('--force', action='store_true', help='accept a changed config')
    parser.add_argument(
        '--explain', action='store_true', help='print what the config means, and stop'
    )
    _add_distributed(parser)
    return parser


def _add_distributed(parser: argparse.ArgumentParser) -> None:
    """Adds the flag of commands that can run as several processes."""
    parser.add_argument(
        '--distributed',
        choices=('auto', 'on', 'off'),
        default='auto',
        help='one of several processes: if the environment says so (auto), certainly, or not',
    )


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of commands that can train several settings and choose one."""
    parser.add_argument(
        '--sweep',
        action='append',
        default=[],
        metavar='KEY=VALUE,VALUE',
        help='train each value, choose by evals.val, score evals.test once; may be repeated',
    )
    parser.add_argument(
        '--seeds',
        type=_number(1, 10_000),
        metavar='N',
        help='seeds of each setting, for the error of the mean',
    )
    parser.add_argument(
        '--at-once',
        type=_number(1, 10**6),
        metavar='N',
        help='most trials in one program (default: what fits)',
    )


def train() -> argparse.ArgumentParser:
    parser = _training_parser(
        'train',
        'Pretrain a Vision Transformer; started again on its workdir it resumes.',
        'Any key of the config can be set: --config.lr=1e-3 --config.model.variant=S/16. '
        'docs/config.md lists them all.',
    )
    _add_sweep(parser)
    return parser


def transfer() -> argparse.ArgumentParser:
    parser = _training_parser(
        'transfer',
        'Fine-tune a checkpoint on a small dataset, with controls from random parameters.',
        '--config.init=PATH says which checkpoint: a workdir, a checkpoints/STEP folder, or '
        'weights of timm, Hugging Face, open_clip or big_vision.',
    )
    _add_sweep(parser)
    return parser


def plan() -> argparse.ArgumentParser:
    parser = _parser(
        'plan',
        'Compile the train step of a config for TPUs that are not here: does it fit, '
        'how fast, how much.',
        'Keys of the config can be set as for training: --config.batch_size=8192.',
    )
    _add_config(parser)
    parser.add_argument('--topology', help='such as v5e:16x16, v5p:8x8x8, v6e:16x16, cpu:8')
    parser.add_argument(
        '--slices', type=_number(1, 4096), default=1, help='TPU slices of that shape'
    )
    parser.add_argument('--mesh', help='replica=1,fsdp=512,tensor=1, instead of the mesh.* keys')
    parser.add_argument('--search', action='store_true', help='find the fastest that fits')
    parser.add_argument(
        '--per-device', default='', metavar='N,N', help='batches a device to search, for batch_size'
    )
    parser.add_argument(
        '--ops', type=_number(0, 10**6), default=0, metavar='N', help='show the N costliest'
    )
    parser.add_argument('--json', metavar='FILE', help='also write the figures there; - prints it')
    return parser


def ledger() -> argparse.ArgumentParser:
    parser = _parser(
        'ledger',
        'What a config keeps in memory with each optimizer, without allocating it.',
        'Keys of the config can be set as for training: --config.optim.name=sgd.',
    )
    _add_config(parser)
    parser.add_argument('--topology', help='such as v5e:16x16 (needs the TPU compiler), cpu:8')
    parser.add_argument(
        '--devices', type=_number(1, 2**16), help='so many devices, of any kind; 1 by default'
    )
    parser.add_argument('--variants', default='', help='a table of models, as B/16,L/16,22B/14')
    parser.add_argument('--optimizers', default='', help='these instead of all, as adamw,sgd')
    parser.add_argument('--json', metavar='FILE', help='also write the figures there; - prints it')
    return parser


def evaluate() -> argparse.ArgumentParser:
    parser = _parser(
        'evaluate',
        'Score a checkpoint by the evaluations of its config, over whole splits.',
        "Keys of the checkpoint's config can be set, as in --config.evals.val.split=test, "
        'and evaluations added, as in --config.evals.near.type=knn; docs/evaluators.md has them.',
    )
    parser.add_argument(
        'path',
        nargs='?',
        help='a workdir (its newest), WORKDIR@best, a checkpoints/STEP folder, or weights of '
        'another codebase',
    )
    parser.add_argument('--checkpoint', metavar='PATH', help='the same')
    parser.add_argument('--json', action='store_true', help='print one JSON object')
    _add_distributed(parser)
    return parser


def predict() -> argparse.ArgumentParser:
    parser = _parser(
        'predict',
        'Name the classes of pictures, or write their feature vectors.',
    )
    parser.add_argument(
        'path',
        help="a workdir (its newest), a checkpoints/STEP folder, or another codebase's weights",
    )
    parser.add_argument(
        'pictures',
        nargs='+',
        help='files, folders (at any depth), or - for paths on standard input, one a line',
    )
    parser.add_argument('--top', type=_number(1, 1000), default=5, metavar='N', help='classes (5)')
    parser.add_argument(
        '--out', metavar='FILE', help='write there instead: .csv, .jsonl or .parquet'
    )
    parser.add_argument(
        '--embed',
        metavar='OUT',
        help='features instead: .npz, .parquet, or a folder, which a restart goes on with',
    )
    parser.add_argument(
        '--transform', metavar='TEXT', help="operations instead of those of the run's evaluation"
    )
    parser.add_argument(
        '--batch_size', type=_number(1, 1 << 16), default=64, help='pictures at a time (64)'
    )
    parser.add_argument('--which', choices=('params', 'ema'), help='by default ema where there is')
    return parser


def explore() -> argparse.ArgumentParser:
    parser = _parser(
        'explore',
        'Show what is in any checkpoint: parameters, history, spectra, attention.',
    )
    parser.add_argument(
        'path',
        nargs='+',
        help="a workdir (its newest), a checkpoints/STEP folder, or another codebase's weights",
    )
    parser.add_argument('--compare', metavar='OTHER', help='how this checkpoint differs from it')
    parser.add_argument(
        '--spectra', action='store_true', help='norms and singular values of kernels, by block'
    )
    parser.add_argument('--image', metavar='FILE', help='what the model looks at in a picture')
    parser.add_argument('--which', choices=('params', 'ema'), help='by default ema where there is')
    parser.add_argument('--png', metavar='FOLDER', help='draw into this folder instead of printing')
    parser.add_argument('--html', metavar='FILE', help='compare the runs on one page instead')
    return parser


def report() -> argparse.ArgumentParser:
    parser = _parser(
        'report',
        "Write a run's results, curves, pictures and costs as one HTML file, or compare runs.",
    )
    parser.add_argument(
        'run',
        nargs='+',
        help='workdir of a run, a transfer or a sweep, or a folder of runs; several are compared',
    )
    parser.add_argument('--out', metavar='FILE', help='by default RUN/report.html')
    return parser


def average() -> argparse.ArgumentParser:
    parser = _parser(
        'average',
        'Mix the weights of checkpoints into a new one, with the config of the last.',
    )
    parser.add_argument(
        'checkpoint', nargs='+', help='a workdir (its newest), or a checkpoints/STEP folder'
    )
    parser.add_argument('--out', help='the workdir of the result')
    parser.add_argument(
        '--weights', metavar='W,W', help='of each, with a sum of 1; by default equal'
    )
    parser.add_argument(
        '--last',
        type=_number(1, 10**6),
        metavar='N',
        help='of one run: its last N checkpoints, equally',
    )
    return parser


def export() -> argparse.ArgumentParser:
    parser = _parser(
        'export',
        "Write a checkpoint for another codebase, or make one of another's weights.",
        'With --from, keys of the config can be set, as in --config.data.path=photos.',
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument('--checkpoint', help='a workdir (its newest), or a checkpoints/STEP folder')
    source.add_argument(
        '--from',
        dest='source',
        metavar='PATH',
        help='a file or folder of weights; FILE:PART is one model of several: model.npz:img, '
        'checkpoint.pth:state_dict_ema, dino.pth:student.backbone',
    )
    parser.add_argument(
        '--to',
        help='one of augreg, big_vision, timm, hf_vit, hf_deit, hf_mae, hf_dinov2, hf_dinov2_reg, '
        'hf_siglip, hf_dinov3, open_clip',
    )
    parser.add_argument('--out', help='where the result goes: a folder, a .npz file, a workdir')
    parser.add_argument('--format', help='what --from is; recognised by default')
    parser.add_argument(
        '--drop', action='append', default=[], metavar='REGEX', help='names to leave out'
    )
    parser.add_argument(
        '--set', action='append', default=[], metavar='NAME=VALUE', help='a setting to correct'
    )
    parser.add_argument('--which', choices=('params', 'ema'), help='by default ema where there is')
    parser.add_argument(
        '--architecture',
        help="timm's name of the model: of --from where no config.json is beside it, of --to "
        'open_clip that of the tower',
    )
    parser.add_argument('--licence', help='of the weights, as in apache-2.0')
    return parser


def prepare() -> argparse.ArgumentParser:
    parser = _parser(
        'prepare',
        'Download a dataset of TensorFlow Datasets and write it for training.',
    )
    parser.add_argument('name', help='as in cifar10, imagenet2012, or name/config:1.0.0')
    parser.add_argument('--data_dir', help='where datasets are kept')
    parser.add_argument('--format', default='array_record', choices=('array_record', 'tfrecord'))
    parser.add_argument('--download_dir', help='where downloaded files are, or are put')
    return parser


def bench_data() -> argparse.ArgumentParser:
    parser = _parser(
        'bench_data',
        'Measure the loader of a config alone, and name the slowest operation.',
        'Any key of the config can be set: --config.data.workers=4.',
    )
    _add_config(parser)
    parser.add_argument(
        '--seconds', type=_number(0, 10**6, float), default=10.0, help='how long to load'
    )
    parser.add_argument('--json', action='store_true', help='print one JSON object')
    return parser


def show_data() -> argparse.ArgumentParser:
    parser = _parser(
        'show_data',
        'Draw training examples before and after what is done to them, as a PNG.',
        'Any key of the config can be set: --config.data.transform=... .',
    )
    _add_config(parser)
    parser.add_argument('--png', metavar='FILE', help='where to draw')
    parser.add_argument(
        '--step', type=_number(0, 2**31 - 1), default=0, help='of which step the batch is, from 0'
    )
    parser.add_argument('--count', type=_number(1, 1024), default=8, help='how many examples')
    return parser
