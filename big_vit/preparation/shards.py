"""Writes the shards of a prepared set: tar as webdataset reads it, or Parquet."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from big_vit.data import files
from big_vit.errors import UserError
from big_vit.preparation import columns, resize, stored
from big_vit.preparation.examples import Example, text_of
from big_vit.preparation.settings import Settings


class Written(NamedTuple):
    """A shard that is there.

    Attributes:
      rewritten: examples whose picture was written anew.
    """

    name: str
    examples: int
    bytes: int
    sha256: str
    rewritten: int


def shard_name(settings: Settings, number: int, total: int) -> str:
    """Return the name of a shard, of which there are `total`."""
    digits = max(5, len(str(total - 1)))
    if settings.format == 'parquet':
        return f'{settings.name}-{number:0{digits}d}-of-{total:0{digits}d}.parquet'
    return f'{settings.name}-{number:0{digits}d}.tar'


def write(
    file: files.Place,
    chosen: Iterable[Example],
    settings: Settings,
    fields: list[str],
    first: str,
) -> Written:
    """Write a shard as a whole.

    Args:
      chosen: what is written, in order.
      fields: names of what comes with examples of all shards.
      first: the first shard of the input, whose columns all have.

    Raises:
      DecodeError: a picture cannot be decoded.
      OSError: it cannot be read or written.
    """
    with stored.partial(file) as path:
        count = rewritten = 0
        into = _Tar(path) if settings.format == 'tar' else _Parquet(path, settings, fields, first)
        for example in chosen:
            picture, ending = resize.fitted(example.data, example.ending, settings)
            rewritten += picture is not example.data
            into.write(example, picture, ending, settings)
            count += 1
        into.close()
        with path.open('rb') as whole:
            digest = hashlib.file_digest(whole, 'sha256').hexdigest()
        size = path.stat().st_size
    return Written(file.name, count, size, digest, rewritten)


class _Tar:
    """Examples as groups of members that share a name up to its first dot."""

    def __init__(self, path: Path):
        self._tar = tarfile.open(path, 'w', format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._names: set[str] = set()

    def write(self, example: Example, picture: bytes, ending: str, settings: Settings) -> None:
        name = self._free(example.name)
        beside = members(example, settings)
        if ending in beside:  # Another picture, which was less of one: a.png comes before b.jpg.
            beside[f'other.{ending}'] = beside.pop(ending)
        for kind, data in {ending: picture, **beside}.items():
            # Of root, from 1970: the bytes of a shard are those of its examples.
            about = tarfile.TarInfo(f'{name}.{kind}')
            about.size = len(data)
            self._tar.addfile(about, io.BytesIO(data))

    def _free(self, name: str) -> str:
        """Return a name that the shard has not, without dots, at which readers would cut it."""
        folder, slash, base = name.rpartition('/')
        name = folder + slash + (base.lstrip('.').replace('.', '_') or 'example')
        free, number = name, 2
        while free in self._names:
            free, number = f'{name}-{number}', number + 1
        self._names.add(free)
        return free

    def close(self) -> None:
        self._tar.close()


def members(example: Example, settings: Settings) -> dict[str, bytes]:
    """Return what comes with an example as members of a tar, by their endings."""
    if settings.given.source == 'tar':
        return dict(example.fields)
    left = dict(example.fields)
    found: dict[str, bytes] = {}
    text = text_of(settings.given, example)
    if text is not None:
        found['txt'] = text.encode()
        left.pop(settings.given.text_column or 'text', None)
    label = left.get(settings.given.label_column or 'label')
    if isinstance(label, int | str):
        found['cls'] = str(label).encode()
        left.pop(settings.given.label_column or 'label')
    if left:
        text = json.dumps(left, ensure_ascii=False, sort_keys=True, default=_plain)
        found['json'] = text.encode()
    return found


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        raise UserError('a column holds bytes, for which JSON has no room: write --format parquet')
    return str(value)


class _Parquet:
    """Examples as rows: with the columns of the input if that is Parquet, else with our own."""

    def __init__(self, path: Path, settings: Settings, fields: list[str], first: str):
        self._own = settings.given.source != 'parquet'
        self._image = settings.given.image_column or 'image'
        if self._own:
            schema = columns.schema_of_fields(sorted({_COLUMNS.get(f, f) for f in fields}))
        else:
            schema = columns.schema_of(files.place(first, 'INPUT'))
        self._struct = not self._own and _is_struct(schema, self._image)
        self._schema, self._writer = schema, columns.Writer(path, schema)

    def write(self, example: Example, picture: bytes, ending: str, settings: Settings) -> None:
        if self._own:
            row = {_COLUMNS.get(k, k): _text(k, v) for k, v in members(example, settings).items()}
            row |= {'name': example.name, 'image': picture}
        else:
            image: Any = {'bytes': picture, 'path': None} if self._struct else picture
            row = example.fields | {self._image: image}
        self._writer.write(row)

    def close(self) -> None:
        self._writer.close()


# Columns of our own by the endings of members.
_COLUMNS = {'txt': 'text', 'cls': 'label'}


def _text(ending: str, data: bytes) -> Any:
    return data.decode('utf-8-sig', 'replace') if ending in ('txt', 'cls', 'json') else data


def _is_struct(schema: Any, column: str) -> bool:
    return schema.field(column).type.num_fields > 0
