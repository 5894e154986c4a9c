"""Ask a model about pictures and whatever else it reads: `python -m big_vit.predict RUN FILES`.

    python -m big_vit.predict runs/pets photo.jpg holiday/       the best classes of each picture
    python -m big_vit.predict runs/pets holiday/ --out a.csv     the same as a table
    python -m big_vit.predict runs/pets holiday/ --embed a.npz   feature vectors
    python -m big_vit.predict runs/pets --config.data.name=tar --config.data.path=shards --embed out

    python -m big_vit.predict runs/coco holiday/ --out found.json --draw drawn    boxes of objects
    python -m big_vit.predict runs/ade20k holiday/ --out maps --draw drawn        label maps

Examples are prepared as the run's own evaluation does. Those that cannot be read are named, and the
others answered. Tables and vectors are written in parts: the same command goes on where it stopped.
Boxes and label maps are written anew.
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the slow imports.
    command_line.answer_help(command_line.predict())

import csv
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from big_vit import config as config_lib
from big_vit import interop, predictor, runtime, storage
from big_vit.build.data import asked_data
from big_vit.data import files
from big_vit.data.sources.base import Source
from big_vit.data.sources.media import LeftOut, Names, sniffed_kind
from big_vit.distributed import hosts
from big_vit.errors import UserError, printable
from big_vit.evaluators import detection
from big_vit.inspection import objects, sightings
from big_vit.interop.files import replacing
from big_vit.predictor import NOUNS, Asked, Predictor, Seen, Unread
from big_vit.pretrained.load import config_of_weights

_TABLES, _FEATURES = ('.csv', '.jsonl', '.parquet'), ('.npz', '.npy', '.parquet')
_MOST_NAMED = 20
_OURS = b'big_vit'

Row = dict[str, Any]


# What is asked about.


def named_files(words: Sequence[str], lines: Iterable[str], kind: str) -> Names:
    """List the files that a command line names.

    Args:
      words: files, folders, or '-'.
      lines: standard input, of which '-' takes a path a line.
      kind: of files, which those in folders must be.

    Raises:
      UserError: something is not there, or a folder has no such files.
    """

    def paths() -> Iterator[str]:
        for word in words:
            if word == '-':
                yield from (line.rstrip('\r\n') for line in lines if line.strip())
                continue
            place = files.place(word, 'pictures')
            if not files.exists(place):
                raise UserError(f'{word}: there is no such file or folder')
            yield from _files_below(place, kind) if files.is_folder(place) else [word]

    names = Names(paths())
    if not len(names):
        raise UserError('no file is named: give files, folders, or paths on standard input')
    return names


def _files_below(folder: files.Place, kind: str) -> Iterator[str]:
    """Yield the files of a kind in a folder at any depth, and say what else is there."""
    taken, left_out = 0, LeftOut()
    for entry in files.walk(folder):
        place = folder / entry.name
        start = functools.partial(files.read_range, place, 0, 16)
        if sniffed_kind(entry.name, start) == kind:
            taken += 1
            yield str(place)
        else:
            left_out.add(entry.name)
    if not taken:
        raise UserError(
            f'{folder}: has no {NOUNS[kind]}' + (f'; {left_out}' if str(left_out) else '')
        )
    if str(left_out):
        print(f'{folder}: {left_out}', file=sys.stderr)


class _Files(Sequence[Path]):
    """Paths of which only the bytes of their names are held."""

    def __init__(self, names: Names):
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        return Path(self._names[index]) if '://' not in self._names[index] else self._names[index]


def named(model: Predictor, words: Sequence[str], overrides: Sequence[tuple[str, str]]) -> Source:
    """Open what a command line asks about: files, or data as the config names it.

    Raises:
      UserError: neither is named, or both are, or it is not there.
    """
    other = next((key for key, _ in overrides if key.split('.')[0] not in ('data', 'mixture')), '')
    if other:
        raise UserError(
            f'--config.{other}: predict reads the config of the run, and of what is given only '
            'data and mixture'
        )
    if words and overrides:
        raise UserError(f'--config.{overrides[0][0]}: name files or data, not both')
    if words:
        if len(model.kinds) != 1:
            raise UserError(
                f'{words[0]}: the model takes {" and ".join(model.kinds)} together: name data that '
                'has both, as in --config.data.split=test'
            )
        if hasattr(sys.stdin, 'reconfigure'):  # Names of files need not be UTF-8.
            sys.stdin.reconfigure(errors='surrogateescape')
        return model.source(_Files(named_files(words, sys.stdin, model.kinds[0])))
    if not overrides:
        raise UserError(
            f'{model.name}: nothing is asked about: name files, folders or - for paths on standard '
            'input, or data, as in --config.data.split=test'
        )
    if model.config is not None:
        return asked_data(config_lib.override(model.config, overrides))
    weights = interop.load_init(model.name)
    assert weights is not None
    return asked_data(config_of_weights(weights, overrides))


def _name(source: Source, row: int) -> str:
    """Return where an example lies, as text that any file can hold."""
    return os.fsencode(source.place(row)).decode('utf-8', 'backslashreplace')


# What is answered.


def class_rows(
    model: Predictor, asked: Asked, unread: Unread, top: int
) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Yield for each example its place, and its most probable classes with probabilities."""
    source = asked.data.source
    for answers in model.answers(asked, unread):
        assert answers.probabilities is not None
        for row, likely in zip(answers.rows.tolist(), answers.probabilities, strict=True):
            yield _name(source, row), model.ranked(likely, top)


def classes_of(model: Predictor, asked: Asked, unread: Unread, top: int) -> Any:
    """Tabulate `class_rows` as a table of Arrow."""
    import pyarrow

    rows = list(class_rows(model, asked, unread, top))
    names = [[name for name, _ in best] for _, best in rows]
    likely = [[round(p, 6) for _, p in best] for _, best in rows]
    return pyarrow.table(
        {
            'file': pyarrow.array([place for place, _ in rows], pyarrow.string()),
            'classes': pyarrow.array(names, pyarrow.list_(pyarrow.string())),
            'probabilities': pyarrow.array(likely, pyarrow.list_(pyarrow.float64())),
        }
    )


def features_of(model: Predictor, asked: Asked, unread: Unread) -> Any:
    """Tabulate places and feature vectors, float32, as a table of Arrow."""
    import pyarrow

    answers = list(model.answers(asked, unread))
    vectors = np.concatenate([some.features for some in answers])
    source = asked.data.source
    places = [_name(source, row) for some in answers for row in some.rows.tolist()]
    flat = pyarrow.array(vectors.reshape(-1))
    column = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return pyarrow.table({'file': pyarrow.array(places, pyarrow.string()), 'embedding': column})


# What is written.


def write(asked: Asked, out: Path, flag: str, about: Row, tabulate: Callable[..., Any]) -> Row:
    """Write a table of all examples: parts in a folder, or one file made of them.

    Parts are written at once or not at all, and those that are there are kept, so that the same
    command goes on where it stopped. Each process makes every n-th of them.

    Args:
      out: a folder, or a file with the suffix of its format.
      flag: that named it, for messages.
      about: what the rows are of.
      tabulate: (part of what is asked, unread) -> table of Arrow.

    Returns:
      {place: why} of the examples that could not be read.

    Raises:
      UserError: parts of something else are there, or it cannot be written.
    """
    is_file = out.suffix != ''
    folder = out.with_name(f'.{out.name}.parts') if is_file else out
    hosts.lead(lambda: _claim(folder, f'{flag} {out}', about))
    length, rows = asked.data.source.length, about['rows']
    count = -(-length // rows)
    parts = [folder / f'part-{number:05d}-of-{count:05d}.parquet' for number in range(count)]
    done = sum(part.exists() for part in parts)
    first = jax.process_index() == 0
    if done and first:
        print(f'{flag[2:]:8}{folder}: {done:,} of {count:,} parts are there', flush=True)
    for number in range(jax.process_index(), count, jax.process_count()):
        if not parts[number].exists():
            _write_part(asked.part(number * rows, rows), parts[number], tabulate)
            if not is_file or count > 1:
                print(f'{flag[2:]:8}{parts[number].name}', flush=True)
    hosts.gather('written')
    missing = next((part for part in parts if not part.exists()), None)
    if missing is not None:
        raise UserError(f'{flag} {out}: {missing} is not there: all processes must see one folder')
    unread = {place: why for part in parts for place, why in _unread_of(part)}
    if is_file:
        hosts.lead(lambda: _join(parts, out))
    if first:
        print(f'wrote   {out}: {length - len(unread):,} rows', flush=True)
    return unread


def _claim(folder: Path, shown: str, about: Row) -> None:
    """Say in a folder what its parts are of; UserError if they are of something else."""
    note = folder / 'about.json'
    if note.exists():
        saved = interop.files.read_json(note)
        other = [name for name in about if saved.get(name) != about[name]]
        if other:
            raise UserError(
                f'{shown}: {folder} holds parts of other {", ".join(other)}: name another, or '
                'remove it'
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f'{shown}: {folder} holds other files: name a new folder')
    interop.files.write_json(note, about)


def _write_part(asked: Asked, part: Path, tabulate: Callable[..., Any]) -> None:
    import pyarrow.parquet

    unread: Unread = {}
    table, some = tabulate(asked, unread), asked.data.source
    bad = json.dumps([(_name(some, row), why) for row, why in sorted(unread.items())])
    table = table.replace_schema_metadata({_OURS: bad.encode()})
    with replacing(part) as partial:
        pyarrow.parquet.write_table(table, partial)


def _unread_of(part: Path) -> list[tuple[str, str]]:
    import pyarrow.parquet

    return json.loads((pyarrow.parquet.read_schema(part).metadata or {})[_OURS])


def _tables(parts: Sequence[Path]) -> Iterator[Any]:
    import pyarrow.parquet

    return (pyarrow.parquet.read_table(part) for part in parts)


def _join(parts: Sequence[Path], out: Path) -> None:
    """Join parts into one file and remove them; a part at a time is in memory."""
    kinds = {'.parquet': _parquet, '.jsonl': _jsonl, '.csv': _csv, '.npz': _npz, '.npy': _npy}
    with replacing(out) as partial:
        kinds[out.suffix](parts, partial, out)
    shutil.rmtree(parts[0].parent)


def _parquet(parts: Sequence[Path], partial: Path, out: Path) -> None:
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(parts[0]).remove_metadata()
    with pyarrow.parquet.ParquetWriter(partial, schema) as writer:
        for table in _tables(parts):
            writer.write_table(table.replace_schema_metadata(None))


def _jsonl(parts: Sequence[Path], partial: Path, out: Path) -> None:
    with partial.open('w', encoding='utf-8') as file:
        for table in _tables(parts):
            file.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in table.to_pylist())


def _csv(parts: Sequence[Path], partial: Path, out: Path) -> None:
    with partial.open('w', encoding='utf-8', newline='') as file:
        writer = None
        for table in _tables(parts):
            for row in table.to_pylist():
                flat = _flat(row)
                if writer is None:
                    writer = csv.DictWriter(file, list(flat))
                    writer.writeheader()
                writer.writerow(flat)


def _flat(row: Row) -> Row:
    flat = {'file': row['file']}
    pairs = zip(row.get('classes', ()), row.get('probabilities', ()), strict=True)
    for place, (name, likely) in enumerate(pairs, 1):
        flat |= {f'class_{place}': name, f'probability_{place}': likely}
    return flat


def _write_vectors(parts: Sequence[Path], file: Any) -> None:
    """Write the vectors of all parts as one array of NumPy's format, a part at a time."""
    rows, kind = 0, None
    for table in _tables(parts):
        rows, kind = rows + table.num_rows, table.schema.field('embedding').type
    assert kind is not None
    header = {'descr': '<f4', 'fortran_order': False, 'shape': (rows, kind.list_size)}
    np.lib.format.write_array_header_1_0(file, header)
    for table in _tables(parts):
        for chunk in table['embedding'].chunks:
            file.write(chunk.flatten().to_numpy().astype('<f4').tobytes())


def _npz(parts: Sequence[Path], partial: Path, out: Path) -> None:
    places = [place for table in _tables(parts) for place in table['file'].to_pylist()]
    with zipfile.ZipFile(partial, 'w', allowZip64=True) as archive:
        with archive.open('files.npy', 'w', force_zip64=True) as file:
            np.lib.format.write_array(file, np.array(places, str), allow_pickle=False)
        with archive.open('features.npy', 'w', force_zip64=True) as file:
            _write_vectors(parts, file)


def _npy(parts: Sequence[Path], partial: Path, out: Path) -> None:
    with replacing(out.with_name(f'{out.stem}.files.csv')) as names, names.open('w') as text:
        writer = csv.writer(text)
        writer.writerow(['file'])
        writer.writerows([place] for table in _tables(parts) for place in table['file'].to_pylist())
    with partial.open('wb') as file:
        _write_vectors(parts, file)


def tell_unread(unread: Row, total: int, noun: str) -> None:
    """Name the examples that could not be read."""
    for place, why in list(unread.items())[:_MOST_NAMED]:
        print(printable(f'WARNING: {place}: {why}'), file=sys.stderr)
    if unread:
        print(f'WARNING: {len(unread):,} of {total:,} {noun} cannot be read', file=sys.stderr)


# What is seen.


def see(model: Predictor, source: Source, args: Any, out: Path | None) -> None:
    """Say what a model finds in pictures, write it, and draw it.

    Args:
      out: a file of COCO's results, or a folder of label maps.

    Raises:
      UserError: `out` is of another kind, or nothing can be read or written.
    """
    boxes = model.sees == 'boxes'
    if out is not None and out.suffix != ('.json' if boxes else ''):
        raise UserError(
            f'--out {out}: boxes are written to a file of COCO results: give it the ending .json'
            if boxes
            else f'--out {out}: label maps are written into a folder: give it no ending'
        )
    asked, unread = model.asked(source, skip_bad=True), Unread()
    for path in (None if boxes else out, _drawings(args)):
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
    entries: list[Row] = []
    for seen in model.see(asked, unread):
        place, name = _name(source, seen.row), _stem(source, seen.row)
        if seen.objects is not None:
            own = seen.objects
            found = sightings.Objects(
                np.asarray(own.scores), np.asarray(own.labels), seen.corners()
            )
            likely = found.likely(args.threshold)
            line = likely.words(model.seen_names)
            entries += _coco_entries(model, source, seen)
        else:
            assert seen.labels is not None
            line = sightings.shares(seen.labels, model.seen_names, args.top)
            if out is not None:
                png = sightings.label_png(seen.labels, len(model.seen_names))
                (out / f'{name}.png').write_bytes(png)
        print(printable(f'{place}  {line}'), flush=True)
        if (folder := _drawings(args)) is not None:
            picture = predictor.stored_picture(asked.data.source, seen.row)
            if seen.labels is not None:
                drawn = objects.coloured(picture, seen.labels)
            else:
                drawn = likely.drawn(picture, model.seen_names)
            (folder / f'{name}.jpg').write_bytes(sightings.jpeg(drawn))
    if boxes and out is not None:
        interop.files.write_json(out, entries)
        print(f'wrote   {out}: {len(entries):,} objects', flush=True)
    places = {_name(source, row): why for row, why in sorted(unread.items())}
    tell_unread(places, source.length, model.noun)


def _drawings(args: Any) -> Path | None:
    return None if args.draw is None else Path(args.draw).expanduser()


def _stem(source: Source, row: int) -> str:
    """Return a name for what is made of an example: its number and the name of its file."""
    name = re.sub(r'[^\w.-]+', '_', Path(_name(source, row)).stem)[-80:]
    return f'{row + 1:06d}_{name}'


def _coco_entries(model: Predictor, source: Source, seen: Seen) -> list[Row]:
    """Return all objects of a picture as COCO has results, with the names of file and category."""
    assert seen.objects is not None
    image, file = seen.row + 1, _name(source, seen.row)
    if source.annotations is not None:
        (own,) = source.annotations(np.array([seen.row]))
        image, file = own.image_id, own.identity
    scores, labels, boxes = map(np.asarray, seen.objects[:3])
    entries = detection.results(scores, labels, boxes, seen.size, image)
    names = [model.seen_names[label] for label in labels.tolist()]
    return [
        {**entry, 'category': name, 'file_name': file}
        for entry, name in zip(entries, names, strict=True)
    ]


# The command.


def _check_suffix(flag: str, out: str | None, suffixes: Sequence[str]) -> Path | None:
    if out is None:
        return None
    path = Path(out).expanduser()
    if path.suffix not in ('', *suffixes) or path.name in ('', '..'):
        raise UserError(f'{flag} {out}: the name ends in {", ".join(suffixes)}, or is of a folder')
    if not path.parent.is_dir():
        raise UserError(f'{flag} {out}: there is no folder {path.parent}')
    if path.suffix and path.is_dir():
        raise UserError(
            f'{flag} {out}: is a folder: name a file, or a folder without {path.suffix}'
        )
    if not path.suffix and path.is_file():
        raise UserError(f'{flag} {out}: is a file: give it an ending: {", ".join(suffixes)}')
    return path


def _classes(text: str) -> list[str]:
    """Read names of classes: those of a file, one a line, or those between commas."""
    path = Path(text).expanduser()
    if ',' in text or not path.is_file():
        return [name.strip() for name in text.split(',')]
    try:
        return [line.strip() for line in path.read_text('utf-8-sig').splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f'--classes {text}: cannot be read: {storage.reason(error)}') from None


def _digest(source: Source) -> str:
    """Hash what tells sources apart: their length, and where some examples lie."""
    rows = np.unique(np.linspace(0, source.length - 1, 10_000).astype(int)).tolist()
    text = '\0'.join([source.name, source.split, str(source.length), *map(source.place, rows)])
    return hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:16]


def run(args: Any, overrides: Sequence[tuple[str, str]], out: Path | None) -> None:
    """Answer for what the command line asks about; see `main`."""
    model = predictor.load(
        args.path,
        which=args.which,
        transform=args.transform,
        batch_size=args.batch_size,
        labels=args.labels,
    )
    if args.classes is not None:
        model = model.with_classes(_classes(args.classes), args.prompts or ['{}'])
    if model.sees and not args.embed:
        if jax.process_count() > 1:
            raise UserError('one process says what is seen in pictures: start one')
        see(model, named(model, args.pictures, overrides), args, out)
        return
    if args.draw is not None or (out is not None and out.suffix == '.json'):
        flag = '--draw' if args.draw is not None else f'--out {out}'
        raise UserError(f'{flag}: {model.name} finds neither objects nor classes of pixels')
    if not args.embed:
        model.require_classes()
    source = named(model, args.pictures, overrides)
    asked = model.asked(source, skip_bad=True)
    if out is None:
        unread: Unread = {}
        for place, best in class_rows(model, asked, unread, args.top):
            shown = '  '.join(f'{name} {likely:.1%}' for name, likely in best)
            print(printable(f'{place}  {shown}'), flush=True)
        places = {_name(source, row): why for row, why in sorted(unread.items())}
        tell_unread(places, source.length, model.noun)
        return
    about: Row = {'model': f'{model.name} ({model.digest})', 'transform': model.transform}
    about |= {'inputs': _digest(source), 'rows': args.rows}
    tabulate: Callable[..., Any]
    if args.embed:
        tabulate = functools.partial(features_of, model)
    else:
        names = hashlib.sha256('\0'.join(model.class_names).encode()).hexdigest()[:16]
        about |= {'top': args.top, 'classes': names}
        tabulate = functools.partial(classes_of, model, top=args.top)
    flag = '--embed' if args.embed else '--out'
    unread_places = write(asked, out, flag, about, tabulate)
    if jax.process_index() == 0:
        tell_unread(unread_places, source.length, model.noun)


def main(argv: list[str]) -> None:
    args, overrides = command_line.parse(command_line.predict(), argv)
    out = _check_suffix('--out', args.out, (*_TABLES, '.json'))
    _check_suffix('--draw', args.draw, ())
    features = _check_suffix('--embed', args.embed, _FEATURES)
    if out and features:
        raise UserError('--out and --embed: ask for one of them at a time')
    if args.prompts and args.classes is None:
        raise UserError('--prompts: are of names of classes: name them, as in --classes cat,dog')
    for word in args.pictures:
        if word != '-' and not files.exists(files.place(word, 'pictures')):
            raise UserError(f'{word}: there is no such file or folder')
    runtime.start()
    facts = {'model': args.path, 'asked': str((args.pictures, overrides))}
    with hosts.session(args.distributed, facts):
        if jax.process_count() > 1 and (not (out or features) or '-' in args.pictures):
            raise UserError('several processes write files: give --out or --embed, and no -')
        run(args, overrides, out or features)


if __name__ == '__main__':
    runtime.command(main)
