"""The command `prepare filter`: its flags as settings, checked before anything is read."""

import importlib.util
import logging
import shlex
from argparse import Namespace

from big_vit import command_line, ownership, storage
from big_vit.data import files
from big_vit.data.sources.registry import SOURCES
from big_vit.errors import UserError, nearest
from big_vit.preparation import embeddings, examples, rules
from big_vit.preparation.settings import Given, Settings

_MOST = 10**9
# Beyond it, half of all pictures would be near each other.
_MOST_NEAR = 0.4


def main(argv: list[str]) -> None:
    """Filter a set of examples, as the arguments say."""
    own, flags = command_line.before_dashes(argv)
    args, overrides = command_line.parse(command_line.prepare_filter(), own)
    if overrides:
        raise UserError(f'--config.{overrides[0][0]}: `prepare filter` reads no config; see --help')
    settings = settings_of(args)
    if importlib.util.find_spec('apache_beam') is None:
        raise UserError(
            "prepare filter needs Apache Beam: pip install 'big_vit[beam]', or pip install "
            'apache-beam'
        )
    logging.disable(logging.WARNING)  # Of libraries of Google's cloud that are not there.
    from big_vit.preparation import pipeline

    logging.disable(logging.NOTSET)

    out = storage.place(args.out)
    _check_apart(settings, args.out)
    with ownership.own(out, '--out'):
        ownership.began()
        command = f'python -m big_vit.prepare filter {shlex.join(own)}'
        made = pipeline.run(settings, str(storage.absolute(out)), flags, command)
        pipeline.tell(made, args.out)


def settings_of(args: Namespace) -> Settings:
    """Check the flags of the command and return what they mean.

    Raises:
      UserError: a value makes no sense, or a path leads nowhere.
    """
    for rule in args.where:
        rules.parse_where(rule)
    for path in args.embeddings:
        embeddings.parts(path)
    near = _near(args.near)
    if args.embeddings and near is None:
        raise UserError('--embeddings: says what is near, which --near=off does not ask for')
    if args.evaluation and near is None and args.exact == 'off':
        raise UserError('--evaluation: nothing is compared with --exact=off and --near=off')
    source = args.source or examples.source_of(args.path, 'INPUT')
    if source not in SOURCES:
        near_name = nearest(source, SOURCES)
        hint = f'did you mean {near_name}?' if near_name else f'there are {", ".join(SOURCES)}'
        raise UserError(f'--source: there is no {source!r}; {hint}')
    given = Given(
        *('INPUT', source, _absolute(args.path), args.split),
        *(args.image_column, args.text_column, args.label_column),
    )
    return Settings(
        given=given,
        evaluations=tuple(map(_evaluation, args.evaluation)),
        min_side=args.min_side,
        max_aspect=args.max_aspect,
        caption_chars=_bounds(args.caption_chars, '--caption_chars'),
        caption_words=_bounds(args.caption_words, '--caption_words'),
        where=tuple(args.where),
        exact=args.exact,
        near=near,
        near_evaluation=args.near_evaluation,
        embeddings=tuple(map(_absolute, args.embeddings)),
        keep=args.keep,
        resize=args.resize,
        encode=args.encode,
        quality=args.quality,
        format=args.format or ('parquet' if source == 'parquet' else 'tar'),
        shard_samples=args.shard_samples,
        name=args.split or 'train',
    )


def _evaluation(text: str) -> Given:
    path, _, split = text.rpartition('@') if '@' in text.rpartition('/')[2] else (text, '', '')
    source = examples.source_of(path, '--evaluation')
    return Given('--evaluation', source, _absolute(path), split or None)


def _absolute(path: str) -> str:
    """Make a local path absolute: workers may be started elsewhere."""
    return str(files.place(path, 'INPUT'))


def _near(text: str) -> float | None:
    if text == 'off':
        return None
    try:
        value = float(text)
    except ValueError:
        raise UserError(f'--near must be a number or off, got {text[:50]!r}') from None
    if not 0 <= value <= _MOST_NEAR:
        raise UserError(f'--near must lie in 0 to {_MOST_NEAR}, got {text[:50]}')
    return value


def _bounds(text: str | None, flag: str) -> tuple[int, int] | None:
    """Parse MIN:MAX, of which either may be missing."""
    if text is None:
        return None
    least, colon, most = text.partition(':')
    if not colon or not all(part.isdecimal() or not part for part in (least, most)):
        raise UserError(f'{flag} must be MIN:MAX, such as 5:200, 5: or :200, got {text[:50]!r}')
    bounds = int(least or 0), int(most or _MOST)
    if bounds[0] > bounds[1]:
        raise UserError(f'{flag}: {text} holds no number')
    return bounds


def _check_apart(settings: Settings, out: str) -> None:
    """Raise UserError if what is written would lie where pictures are read."""
    target = _absolute(out).rstrip('/') + '/'
    for given in (settings.given, *settings.evaluations):
        folder = given.path.rstrip('/') + '/'
        if target.startswith(folder) or folder.startswith(target):
            raise UserError(f'--out: {out} and {given.flag} {given.path} lie in each other')
