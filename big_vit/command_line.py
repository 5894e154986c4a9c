"""Flags of every command.

Imports no JAX, so that `--help` answers before JAX would load. The functions named after commands
return their parsers.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from big_vit import signals
from big_vit.errors import UserError, nearest

# What comes before the name of a command in its help; `big_vit.__main__` says how it was called.
program = 'python -m big_vit.'


def answer_help(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> None:
    """Prints a command's help and exits, if that is asked for; Ctrl-C ends it with one line.

    A mistake in the flags, a config file that is not there and a key that does not exist are told
    as well: commands call it before their other imports, which take more than a second.

    Args:
      argv: what the parser reads; by default all arguments.
    """
    signals.handle(lambda number, _: signals.leave(number))
    argv = sys.argv[1:] if argv is None else argv
    if not {'-h', '--help'}.isdisjoint(argv):
        parser.print_help()
        sys.exit()
    try:
        args, overrides = parse(parser, argv)
        if getattr(args, 'config', None):
            from big_vit import config  # Not for --help, which answers in a twentieth of a second.

            config.check_keys(args.config, [key for key, _ in overrides])
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)


def parse(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Splits arguments into the parser's own flags and `--config.key=value` overrides.

    Returns:
      (parsed flags, overrides as pairs of key and text).

    Raises:
      UserError: an unknown flag, a missing one, or an override without a value.
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
        raise UserError(f'unknown argument {unknown[0]}; {_hint(parser, unknown[0])}')
    if isinstance(parser, _Parser):
        for flag, example in parser.needs.items():
            if not (flag == '--workdir' and args.explain):
                require_flag(getattr(args, flag.removeprefix('--')), flag, example)
    return args, overrides


def before_dashes(argv: list[str]) -> tuple[list[str], list[str]]:
    """Splits arguments at the first `--`, after which they are another program's."""
    at = argv.index('--') if '--' in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def _hint(parser: argparse.ArgumentParser, word: str) -> str:
    """What may have been meant by an argument that the parser does not know."""
    flag, equals, value = word.partition('=')
    flags = [option for action in parser._actions for option in action.option_strings]
    near = nearest(flag.replace('_', '-'), flags, cutoff=0.75) or nearest(flag, flags, cutoff=0.75)
    if '--config' in flags and word[0] != '-' and word.partition(':')[0].endswith('.py'):
        return f'did you mean --config {word}?'
    if '--config' in flags and flag.startswith('--') and not near:
        from big_vit import config

        key = config.nearest_key(flag.removeprefix('--'))
        return f'did you mean --config.{key}{equals}{value}?' if key else 'see --help'
    return f'did you mean {near}?' if near else 'see --help'


def require_flag(value: str | None, flag: str, example: str) -> str:
    """Returns a flag's value; raises UserError with an example if it is missing."""
    if not value:
        raise UserError(f'{flag} is missing, for example {flag} {example}')
    return value


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the config are.

    Attributes:
      needs: flags that must be given, each with an example of its value.
    """

    needs: Mapping[str, str] = MappingProxyType({})

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


def _parser(
    name: str, description: str, epilog: str | None = None, **needs: str
) -> argparse.ArgumentParser:
    """Makes the parser of a command; `needs` are flags that must be given, with an example."""
    parser = _Parser(
        prog=f'{program}{name}',
        description=description,
        epilog=epilog,
        allow_abbrev=False,
    )
    parser.needs = {f'--{flag}': example for flag, example in needs.items()}
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--config',
        metavar='FILE[:arg=value,...]',
        help='a config file, or big_vit:NAME, a recipe in the package',
    )


def _training_parser(
    name: str, description: str, epilog: str, **needs: str
) -> argparse.ArgumentParser:
    """Parser with the flags of all training commands."""
    parser = _parser(name, description, epilog, **needs)
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
        config='configs/fashion_mnist.py',
        workdir='runs/first',
    )
    _add_sweep(parser)
    return parser


def transfer() -> argparse.ArgumentParser:
    parser = _training_parser(
        'transfer',
        'Fine-tune a checkpoint on a small dataset, with controls from random parameters.',
        '--config.init=PATH says which checkpoint: a workdir, a checkpoints/STEP folder, or '
        'weights of timm, Hugging Face, open_clip or big_vision, as in timm/NAME or '
        'hf://OWNER/NAME.',
        config='configs/transfer_digits.py',
        workdir='runs/digits',
    )
    _add_sweep(parser)
    return parser


def plan() -> argparse.ArgumentParser:
    parser = _parser(
        'plan',
        'Compile the train step of a config for TPUs that are not here: does it fit, '
        'how fast, how much.',
        'Keys of the config can be set as for training: --config.batch_size=8192.',
        config='configs/vit_b16_i1k.py',
        topology='v5e:16x16',
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
        config='configs/vit_b16_i1k.py',
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
        'another codebase, also as timm/NAME or hf://OWNER/NAME',
    )
    parser.add_argument('--checkpoint', metavar='PATH', help='the same')
    parser.add_argument('--json', action='store_true', help='print one JSON object')
    parser.add_argument(
        '--per-class',
        metavar='FILE',
        help='write precision, recall and F1 of each class there: .csv, or .json with confusions',
    )
    _add_distributed(parser)
    return parser


def _add_labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--labels',
        metavar='FILE',
        help='names of the classes: one a line, or JSON: a list, {number: name}, {name: number}',
    )


def predict() -> argparse.ArgumentParser:
    parser = _parser(
        'predict',
        'Name the classes of pictures, or write their feature vectors.',
        'Instead of files, data of any kind: --config.data.split=test is of the run, '
        '--config.data.name=tar --config.data.path=... other data; docs/predict.md.',
    )
    parser.add_argument(
        'path',
        help="a workdir (its newest), a checkpoints/STEP folder, or another codebase's weights, "
        'also as timm/NAME or hf://OWNER/NAME',
    )
    parser.add_argument(
        'pictures',
        nargs='*',
        help='files, folders (at any depth), or - for paths on standard input, one a line',
    )
    parser.add_argument('--top', type=_number(1, 1000), default=5, metavar='N', help='classes (5)')
    parser.add_argument(
        '--out',
        metavar='OUT',
        help='write there instead: .csv, .jsonl, .parquet, or a folder; a restart goes on with it. '
        'Boxes: .json, as COCO has results; classes of pixels: a folder of PNG files',
    )
    parser.add_argument(
        '--draw', metavar='FOLDER', help='draw boxes, or classes of pixels, over the pictures there'
    )
    parser.add_argument(
        '--threshold',
        type=_number(0, 1, float),
        default=0.5,
        metavar='P',
        help='name and draw objects of at least this score (0.5)',
    )
    parser.add_argument(
        '--embed',
        metavar='OUT',
        help='features instead: .npz, .npy, .parquet, or a folder of parts',
    )
    parser.add_argument(
        '--classes',
        metavar='NAMES',
        help='of a model of pictures and words: cat,dog or a file with a name a line',
    )
    parser.add_argument(
        '--prompts',
        action='append',
        metavar='TEXT',
        help="as in 'a photo of a {}'; may be repeated",
    )
    parser.add_argument(
        '--transform', metavar='TEXT', help="operations instead of those of the run's evaluation"
    )
    parser.add_argument(
        '--batch_size', type=_number(1, 1 << 16), default=64, help='pictures at a time (64)'
    )
    parser.add_argument(
        '--rows',
        type=_number(1, 1 << 30),
        default=1 << 14,
        metavar='N',
        help='rows of a part, which a restart makes or keeps (16384)',
    )
    _add_labels(parser)
    parser.add_argument('--which', choices=('params', 'ema'), help='by default ema where there is')
    _add_distributed(parser)
    return parser


def explore() -> argparse.ArgumentParser:
    parser = _parser(
        'explore',
        'Show what is in any checkpoint: parameters, history, spectra, attention.',
    )
    parser.add_argument(
        'path',
        nargs='+',
        help="a workdir (its newest), a checkpoints/STEP folder, or another codebase's weights, "
        'also as timm/NAME or hf://OWNER/NAME',
    )
    parser.add_argument('--compare', metavar='OTHER', help='how this checkpoint differs from it')
    parser.add_argument(
        '--spectra', action='store_true', help='norms and singular values of kernels, by block'
    )
    parser.add_argument(
        '--image',
        metavar='FILE',
        action='append',
        help='what the model looks at in a picture; several times for several',
    )
    parser.add_argument(
        '--foreground',
        action='store_true',
        help='in patches.png, leave out the background that the first component tells',
    )
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
        out='runs/mean',
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
        out='exported/',
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument('--checkpoint', help='a workdir (its newest), or a checkpoints/STEP folder')
    source.add_argument(
        '--from',
        dest='source',
        metavar='PATH',
        help='a file or folder of weights, timm/NAME or hf://OWNER/NAME; FILE:PART is one model of '
        'several: model.npz:img, '
        'checkpoint.pth:state_dict_ema, dino.pth:student.backbone',
    )
    parser.add_argument(
        '--to',
        help='one of augreg, big_vision, timm, hf_vit, hf_deit, hf_mae, hf_ijepa, hf_dinov2, '
        'hf_dinov2_reg, hf_siglip, hf_dinov3, open_clip, hf_detr, hf_yolos; or a model that needs '
        'no big_vit: onnx, stablehlo',
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
    parser.add_argument(
        '--transform',
        metavar='TEXT',
        help='with --to: how pictures are prepared, instead of what the evaluation says',
    )
    _add_labels(parser)
    return parser


def prepare() -> argparse.ArgumentParser:
    parser = _parser(
        'prepare',
        'Download a dataset of TensorFlow Datasets and write it for training.',
        '`prepare index SHARDS` indexes shards, `prepare filter INPUT` cleans a large set: see the '
        '--help of each.',
        data_dir='~/tensorflow_datasets',
    )
    parser.add_argument('name', help='as in cifar10, imagenet2012, or name/config:1.0.0')
    parser.add_argument('--data_dir', help='where datasets are kept')
    parser.add_argument(
        '--format',
        default='array_record',
        choices=('array_record', 'tfrecord', 'idx'),
        help='of the files; idx is for fashion_mnist, as its authors publish it',
    )
    parser.add_argument('--download_dir', help='where downloaded files are, or are put')
    return parser


def prepare_filter() -> argparse.ArgumentParser:
    """Parser of `prepare filter`; what comes after -- is for Beam."""
    parser = _parser(
        'prepare filter',
        'Filter a large set of pictures: rules, duplicates, pictures of evaluation sets; shrink '
        'and write what remains as shards. On Apache Beam.',
        'Flags of Beam come after --, as in -- --runner=DataflowRunner --project=P. '
        'docs/data.md has the rest.',
        out='clean',
    )
    add = parser.add_argument
    add('path', metavar='INPUT', help='shards (a folder, glob or range), Parquet files, a folder')
    add('--out', metavar='OUT', help='a folder for shards, manifest.json and left_out/')
    add('--source', help='what reads INPUT, as data.name: tar, parquet, folder, tfds, records, ...')
    add('--split', help='split of INPUT, where it has several')
    for column in ('image', 'text', 'label'):
        add(f'--{column}_column', metavar='NAME', help=f'as data.{column}_column')
    add('--min_side', type=_number(1, 1 << 20), default=1, metavar='N', help='shorter side, pixels')
    add('--max_aspect', type=_number(1, 1e6, float), metavar='R', help='longer side / shorter side')
    for unit in ('chars', 'words'):
        add(f'--caption_{unit}', metavar='MIN:MAX', help=f'{unit} of the caption; either may miss')
    add(
        '--where',
        action='append',
        default=[],
        metavar='RULE',
        help="of a column, as 'score>=5', 'language=en|de'; may be repeated",
    )
    add(
        '--exact',
        choices=('pixels', 'bytes', 'off'),
        default='pixels',
        help='of examples with equal pixels (or files) keep one',
    )
    add(
        '--near',
        default='0.15',
        metavar='D',
        help='of pictures whose signatures differ in so few of their bits keep one (0.15); or off',
    )
    add(
        '--near_evaluation',
        type=_number(0, 0.4, float),
        default=0.2,
        metavar='D',
        help='the same where one is of --evaluation (0.2)',
    )
    add(
        '--embeddings',
        action='append',
        default=[],
        metavar='PATH',
        help='compare what predict --embed wrote instead of pixels; may be repeated',
    )
    add(
        '--keep',
        choices=('largest', 'first'),
        default='largest',
        help='which of several that are alike',
    )
    add(
        '--evaluation',
        action='append',
        default=[],
        metavar='PATH[@SPLIT]',
        help='leave out what is near or equal to pictures of this set; may be repeated',
    )
    add('--resize', type=_number(1, 1 << 14), metavar='N', help='shorter side at most, pixels')
    add('--encode', choices=('jpeg', 'png', 'webp'), help='write all pictures so')
    add('--quality', type=_number(1, 100), default=95, metavar='Q', help='of JPEG and WebP (95)')
    add('--format', choices=('tar', 'parquet'), help='of shards; by default as INPUT, else tar')
    add(
        '--shard_samples',
        type=_number(1, 1 << 24),
        default=10_000,
        metavar='N',
        help='examples of a shard (10000)',
    )
    return parser


def prepare_index() -> argparse.ArgumentParser:
    """Parser of `prepare index`."""
    parser = _parser(
        'prepare index',
        'Index tar or TFRecord shards once, so that no run must read them to know what they hold.',
        'It goes on where it was stopped. Hosts may each do a share: --share 0/8, --share 1/8, ...',
    )
    parser.add_argument('path', help='shards as data.path has them: a folder, a glob, a range')
    parser.add_argument(
        '--to', metavar='PLACE', help='folder of the indices, where the store is read-only'
    )
    parser.add_argument(
        '--label_column', default='cls', help='as data.label_column, of tar shards; default cls'
    )
    parser.add_argument(
        '--share', type=_share, default=(0, 1), metavar='I/N', help='this host, of how many'
    )
    parser.add_argument(
        '--workers', type=_number(1, 1024), help='processes; as many as there are processors'
    )
    return parser


def _share(text: str) -> tuple[int, int]:
    which, _, of = text.partition('/')
    if not (which.isdecimal() and of.isdecimal() and int(which) < int(of) <= 10_000):
        raise argparse.ArgumentTypeError(f'must be I/N with I from 0 to N - 1, got {text[:50]!r}')
    return int(which), int(of)


def bench_data() -> argparse.ArgumentParser:
    parser = _parser(
        'bench_data',
        'Measure the loader of a config alone, and name the slowest operation.',
        'Any key of the config can be set: --config.data.workers=4.',
        config='configs/fashion_mnist.py',
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
        config='configs/fashion_mnist.py',
        png='data.png',
    )
    _add_config(parser)
    parser.add_argument('--png', metavar='FILE', help='where to draw')
    parser.add_argument(
        '--step', type=_number(0, 2**31 - 1), default=0, help='of which step the batch is, from 0'
    )
    parser.add_argument('--count', type=_number(1, 1024), default=8, help='how many examples')
    return parser


# In the order in which a user meets them.
COMMANDS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    make.__name__: make
    for make in (
        *(train, transfer, evaluate, predict, explore, report, average, export),
        *(show_data, bench_data, prepare, plan, ledger),
    )
}
