"""Ask a model about pictures: `python -m big_vit.predict RUN FILES`.

    python -m big_vit.predict runs/pets photo.jpg holiday/       the best classes of each picture
    python -m big_vit.predict runs/pets holiday/ --out a.csv     the same as a table
    python -m big_vit.predict runs/pets holiday/ --embed a.npz   feature vectors

Pictures are prepared as the run's own evaluation does. Those that cannot be read are named, and the
others answered.
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the slow imports.
    command_line.answer_help(command_line.predict())

import csv
import functools
import hashlib
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from big_vit import predictor, runtime, storage
from big_vit.data import files
from big_vit.data.sources.media import LeftOut, sniffed_kind
from big_vit.errors import UserError, printable
from big_vit.interop.files import replacing
from big_vit.predictor import Predictor

# Feature vectors of so many pictures go into one file of a folder.
SHARD = 1 << 16
_TABLES, _FEATURES = ('.csv', '.jsonl', '.parquet'), ('.npz', '.parquet')
_MOST_NAMED = 20

Row = dict[str, Any]


def named_pictures(words: Sequence[str], lines: Iterable[str]) -> list[str]:
    """List the pictures that a command line names.

    Args:
      words: files, folders, or '-'.
      lines: standard input, of which '-' takes a path a line.

    Raises:
      UserError: something is not there, or a folder has no pictures.
    """
    paths: list[str] = []
    for word in words:
        if word == '-':
            paths += [line.rstrip('\n') for line in lines if line.strip()]
            continue
        place = files.place(word, 'pictures')
        if not files.exists(place):
            raise UserError(f'{word}: there is no such file or folder')
        paths += _pictures_below(place) if files.is_folder(place) else [word]
    if not paths:
        raise UserError('no picture is named: give files, folders, or paths on standard input')
    return paths


def _pictures_below(folder: files.Place) -> list[str]:
    """List the pictures in a folder at any depth, and say what else is there."""
    taken, left_out = [], LeftOut()
    for entry in files.walk(folder):
        place = folder / entry.name
        start = functools.partial(files.read_range, place, 0, 16)
        if sniffed_kind(entry.name, start) == 'image':
            taken.append(str(place))
        else:
            left_out.add(entry.name)
    if not taken:
        raise UserError(f'{folder}: has no pictures' + (f'; {left_out}' if str(left_out) else ''))
    if str(left_out):
        print(f'{folder}: {left_out}', file=sys.stderr)
    return taken


Answer = tuple[str, np.ndarray, np.ndarray | None]


def answered(model: Predictor, paths: Sequence[str], unread: list[str]) -> Iterator[Answer]:
    """Yield (path, features, probabilities) of each picture that can be read; note the others."""
    expected = 0
    for answers in model.answers(paths, skip_bad=True):
        for position, row in enumerate(answers.rows.tolist()):
            unread += paths[expected:row]
            expected = row + 1
            probabilities = answers.probabilities
            likely = None if probabilities is None else probabilities[position]
            yield paths[row], answers.features[position], likely
    unread += paths[expected:]


def tell_unread(model: Predictor, unread: Sequence[str], total: int) -> None:
    """Name the pictures that cannot be read; UserError if these are all."""
    if unread and len(unread) == total:
        why = f'{unread[0]}: {model.problem(unread[0])}'
        raise UserError(why if total == 1 else f'none of {total:,} pictures can be read, {why}')
    for path in unread[:_MOST_NAMED]:
        print(printable(f'WARNING: {path}: {model.problem(path)}'), file=sys.stderr)
    if unread:
        print(f'WARNING: {len(unread):,} of {total:,} pictures cannot be read', file=sys.stderr)


def class_rows(answers: Iterable[Answer], model: Predictor, top: int) -> Iterator[Row]:
    """Yield for each picture its file, and its most probable classes with their probabilities."""
    for path, _, probabilities in answers:
        assert probabilities is not None
        best = model.ranked(probabilities, top)
        yield {'file': path, 'classes': [name for name, _ in best]} | {
            'probabilities': [round(p, 6) for _, p in best]
        }


def _flat(row: Row) -> Row:
    pairs = zip(row['classes'], row['probabilities'], strict=True)
    named = [(f'class_{i}', n, f'probability_{i}', p) for i, (n, p) in enumerate(pairs, 1)]
    return {'file': row['file'], **{k: v for a, n, b, p in named for k, v in ((a, n), (b, p))}}


def write_table(rows: Iterable[Row], out: Path) -> None:
    """Write rows of `class_rows` as CSV, JSON lines or Parquet, complete or not at all."""
    if out.suffix == '.parquet':
        rows = list(rows)
        _write_parquet({name: [row[name] for row in rows] for name in rows[0]} if rows else {}, out)
    elif out.suffix == '.jsonl':
        lines = (json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
        storage.write_text(storage.place(out), ''.join(lines))
    else:
        flat, text = [_flat(row) for row in rows], io.StringIO()
        writer = csv.DictWriter(text, list(flat[0]) if flat else ['file'])
        writer.writeheader()
        writer.writerows(flat)
        storage.write_text(storage.place(out), text.getvalue())


def _write_parquet(columns: Row, out: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    def column(values: Any) -> Any:
        if not isinstance(values, np.ndarray):
            return values
        flat = pyarrow.array(values.reshape(-1))
        return pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])

    table = pyarrow.table({name: column(values) for name, values in columns.items()})
    with replacing(out) as partial:
        pyarrow.parquet.write_table(table, partial)


def write_features(
    model: Predictor, paths: Sequence[str], out: Path, unread: list[str], about: Row
) -> None:
    """Write feature vectors to a file, or to a folder of files, of which finished ones stay.

    Args:
      about: what the vectors are of; a folder of others is refused.

    Raises:
      UserError: the folder holds vectors of other pictures or of another model.
    """
    if out.suffix in _FEATURES:
        named, vectors = _features(model, paths, unread)
        if out.suffix == '.parquet':
            _write_parquet({'file': named, 'embedding': vectors}, out)
            return
        with replacing(out) as partial, partial.open('wb') as file:
            np.savez(file, files=np.array(named), features=vectors)
        return
    note, text = out / 'about.json', json.dumps(about, indent=1)
    if note.exists() and note.read_text() != text:
        raise UserError(
            f'--embed {out}: holds features of other pictures or of another model; name another '
            'folder'
        )
    out.mkdir(parents=True, exist_ok=True)
    storage.write_text(storage.place(note), text)
    count = -(-len(paths) // SHARD)
    for number in range(count):
        shard = out / f'features-{number:05d}-of-{count:05d}.parquet'
        if not shard.exists():
            part = paths[number * SHARD : (number + 1) * SHARD]
            named, vectors = _features(model, part, unread)
            _write_parquet({'file': named, 'embedding': vectors}, shard)
            print(f'embed   {shard}: {len(named):,} pictures', flush=True)


def _features(
    model: Predictor, paths: Sequence[str], unread: list[str]
) -> tuple[list[str], np.ndarray]:
    """Return the files that can be read, and their features, float32 [N, width]."""
    answers = list(answered(model, paths, unread))
    vectors = [features for _, features, _ in answers]
    return [path for path, _, _ in answers], np.stack(vectors) if vectors else np.zeros((0, 1))


def _check_suffix(flag: str, out: str | None, suffixes: Sequence[str]) -> Path | None:
    if out is None:
        return None
    path = Path(out).expanduser()
    if (path.suffix and path.suffix not in suffixes) or (not path.suffix and flag == '--out'):
        raise UserError(f'{flag} {out}: the name ends in {", ".join(suffixes)}')
    if not path.parent.is_dir():
        raise UserError(f'{flag} {out}: there is no folder {path.parent}')
    return path


def main(argv: list[str]) -> None:
    args, overrides = command_line.parse(command_line.predict(), argv)
    if overrides:
        raise UserError(f'--config.{overrides[0][0]}: predict reads the config of the run alone')
    out = _check_suffix('--out', args.out, _TABLES)
    features = _check_suffix('--embed', args.embed, _FEATURES)
    if out and features:
        raise UserError('--out and --embed: ask for one of them at a time')
    paths = named_pictures(args.pictures, sys.stdin)
    runtime.start()
    model = predictor.load(
        args.path,
        which=args.which,
        transform=args.transform,
        batch_size=args.batch_size,
        labels=args.labels,
    )
    unread: list[str] = []
    if features:
        digest = hashlib.sha256('\0'.join(paths).encode('utf-8', 'surrogateescape')).hexdigest()
        about = {'model': model.name, 'transform': model.transform, 'pictures': digest}
        write_features(model, paths, features, unread, about)
    else:
        model.require_classes()
        rows = class_rows(answered(model, paths, unread), model, args.top)
        if out:
            write_table(rows, out)
        else:
            for row in rows:
                pairs = zip(row['classes'], row['probabilities'], strict=True)
                best = '  '.join(f'{name} {p:.1%}' for name, p in pairs)
                print(printable(f'{row["file"]}  {best}'), flush=True)
    tell_unread(model, unread, len(paths))


if __name__ == '__main__':
    runtime.command(main)
