"""The samples of a tar shard: members with one name up to its first dot, and their labels."""

import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from big_vit.data import files
from big_vit.data.decode import is_image
from big_vit.data.sources import tar_format
from big_vit.data.sources.media import is_missed, kind_of
from big_vit.data.sources.tar_format import Take
from big_vit.errors import UserError, failure_at

# Labels are read while a shard is indexed; longer members are no labels.
_MAX_LABEL_BYTES = 1 << 20
_MAX_NAME = 1000
_DIGITS = re.compile(r'[0-9]{1,18}')

_FIRST_DOT = "a sample's name ends at the first dot of its files: rename them without other dots"


class Sample(NamedTuple):
    """The media file of a sample, its label if it has one, and (offset, size) of its text."""

    offset: int
    size: int
    kind: str
    label: int | str | None
    text: tuple[int, int] | None


def samples(shard: files.Place, take: Take) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yield the samples of a shard in order: (name, (offset, size) of its members by ending).

    Args:
      take: from `files.forward`; the caller may use it between samples, on the last one.

    Raises:
      UserError: the shard is damaged, or has two members of one name.
    """
    for name, members in itertools.groupby(_sample_members(shard, take), lambda member: member[0]):
        yield name, _parts(shard, name, members)


def walk(
    shard: files.Place, label_column: str, text_column: str | None, labelled: bool
) -> tuple[
    list[tuple[Sample, dict[str, tuple[int, int]]]],
    dict[str, tuple[int, str]],
    UserError | None,
]:
    """Find the samples of a shard.

    Returns:
      (samples with (offset, size) of their members by ending, {ending: (number, example)} of what
      cannot be read, the error of a text without a label that was left out).

    Raises:
      UserError: the shard is damaged or cannot be read, or a sample is not as it should be.
    """
    kept: list[tuple[Sample, dict[str, tuple[int, int]]]] = []
    left: dict[str, tuple[int, str]] = {}
    unlabelled_text: UserError | None = None
    try:
        take = files.forward(shard)
        for name, parts in samples(shard, take):
            try:
                sample = _sample(shard, name, parts, take, label_column, text_column, labelled)
            except _UnlabelledText as error:  # A README beside images, unless there are no images.
                unlabelled_text = unlabelled_text or UserError(str(error))
                continue
            if sample is not None:
                kept.append((sample, parts))
                continue
            missed = next((f'.{part}' for part in parts if is_missed(f'x.{part}')), None)
            if missed is not None:
                count, example = left.get(missed, (0, f'{name}{missed}'))
                left[missed] = count + 1, example
    except OSError as error:
        kind = failure_at(shard, error)
        raise kind(f'{shard}: cannot be read: {error.strerror or error}') from error
    return kept, left, unlabelled_text


class _UnlabelledText(UserError):
    """A text without a label, which is no sample of a dataset of media."""


def _sample_members(shard: files.Place, take: Take) -> Iterator[tuple[str, str, int, int]]:
    """Yield (name of the sample, extension, offset, size) of members; hidden ones are skipped."""
    for member in tar_format.members(shard, take):
        folder, slash, base = member.name.rpartition('/')
        stem, dot, extension = base.partition('.')
        if slash and _is_hidden(folder):
            continue
        if not dot and is_image(take(member.offset, min(16, member.size))):
            extension = 'jpg'  # A picture without an ending; its bytes say which kind.
        if stem and extension:
            yield f'{folder}{slash}{stem}', extension.lower(), member.offset, member.size


@functools.lru_cache(maxsize=1024)
def _is_hidden(folder: str) -> bool:
    return any(files.is_clutter(part) for part in folder.split('/') if part not in ('.', '..'))


def _parts(
    shard: files.Place, name: str, members: Iterable[tuple[str, str, int, int]]
) -> dict[str, tuple[int, int]]:
    """Return (offset, size) of the members of a sample by their extensions.

    Raises:
      UserError: two members have one name, or pictures that differ behind the first dot.
    """
    parts: dict[str, tuple[int, int]] = {}
    for _, extension, offset, size in members:
        if extension in parts:
            raise UserError(
                f'{shard}: {name}.{extension} is there twice, at byte {parts[extension][0]:,} and '
                f'at {offset:,}: give each sample a name of its own'
            )
        parts[extension] = offset, size
    dotted = [part for part in parts if '.' in part and kind_of(f'x.{part}') not in (None, 'text')]
    endings = [part.rpartition('.')[2] for part in dotted]
    if len(set(endings)) < len(endings) and not any(part in endings for part in parts):
        raise UserError(
            f'{shard}: {name}.{dotted[0]} and {name}.{dotted[1]} would be one sample, {name}: '
            f'{_FIRST_DOT}'
        )
    return parts


def _sample(
    shard: files.Place,
    name: str,
    parts: dict[str, tuple[int, int]],
    take: Take,
    label_column: str,
    text_column: str | None,
    labelled: bool,
) -> Sample | None:
    """Read a sample from its members; None if it has no media file."""
    label_name = label_column.lower()
    text_name = None if text_column is None else text_column.lower()
    labels: dict[str, str] = {}
    for extension, (offset, size) in parts.items():
        if extension in (label_name, 'json'):
            if size > _MAX_LABEL_BYTES:
                raise UserError(f'{shard}: {name}.{extension} of {size:,} bytes is no label')
            labels[extension] = take(offset, size).decode('utf-8-sig', 'replace').strip()
    # The image is a.png rather than a.mask.png, whichever comes first.
    media = [
        (kind == 'text', '.' in extension, kind, place)
        for extension, place in parts.items()
        if extension not in (label_name, text_name)
        and (kind := kind_of(f'x.{extension}')) is not None
    ]
    if not media:
        return None
    label, why = _parse_label(f'{shard}: {name}', labels, label_column)
    present = ', '.join(f'.{part}' for part in sorted(parts))
    if text_name is not None and text_name not in parts:
        raise UserError(
            f'{shard}: sample {name} has no .{text_name} (it has {present}): '
            'set text_column to the member with its words'
        )
    _, _, kind, (offset, size) = min(media, key=lambda candidate: candidate[:2])
    if label is None and text_name is None and labelled:  # Captioned images need no classes.
        dotted = [part for part in parts if '.' in part]
        if why:
            advice = f'but {why}: labels are whole numbers or names'
        elif dotted:
            advice = f'(it has {present}): {_FIRST_DOT}'
        else:
            advice = f'(it has {present}): set label_column to the one that is meant'
        raise (_UnlabelledText if kind == 'text' else UserError)(
            f'{shard}: sample {name} has no .{label_column} and no {label_column!r} in a .json '
            f'{advice}'
        )
    if size >= 1 << 32:
        raise UserError(f'{shard}: {name} at byte {offset:,} has {size:,} bytes, 4 GiB or more')
    return Sample(offset, size, kind, label, parts[text_name] if text_name is not None else None)


def _parse_label(
    sample: str, labels: dict[str, str], label_column: str
) -> tuple[int | str | None, str]:
    """Read the label of a sample from the texts of its members.

    Returns:
      (the label or None, if it is there but no label what it is).
    """
    value: Any = labels.get(label_column.lower())
    if value is not None and _DIGITS.fullmatch(value):
        value = int(value)
    elif value is None and 'json' in labels:
        try:
            fields = json.loads(labels['json'])
        except (ValueError, RecursionError) as error:
            raise UserError(f'{sample}.json is not JSON ({error})') from error
        value = _field(fields, label_column)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # As programs write whole numbers that come from a table.
    if isinstance(value, bool) or not isinstance(value, int | str) or value == '':
        return None, '' if value is None else f'{label_column!r} there is {json.dumps(value):.60}'
    if (isinstance(value, int) and value >= 1 << 31) or len(str(value)) > _MAX_NAME:
        raise UserError(f'{sample}: {str(value)[:40]!r}... is no label: numbers are below 2**31')
    if isinstance(value, str) and ('\ufffd' in value or '\0' in value):
        raise UserError(f'{sample}: label {value[:40]!r} is not text in UTF-8: write it so')
    return value, ''


def _field(fields: Any, name: str) -> Any:
    """Return a field of a JSON object, or with dots in its name one within others."""
    if isinstance(fields, dict) and name in fields:
        return fields[name]
    for part in name.split('.'):
        fields = fields.get(part) if isinstance(fields, dict) else None
    return fields
