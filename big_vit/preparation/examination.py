"""What is known of the examples of a unit once each was read: faults, sizes, hashes, signatures."""

import collections
import hashlib
import json
from typing import Any, NamedTuple

import numpy as np

from big_vit.data.decode import DecodeError, Encoded
from big_vit.preparation import embeddings, examples, rules, signatures
from big_vit.preparation.examples import Example, Unit
from big_vit.preparation.settings import UNREADABLE, Given, Settings
from big_vit.preparation.signatures import Signatures

Arrays = dict[str, np.ndarray]


class _Seen(NamedTuple):
    """What one example shows.

    Attributes:
      reason: why it is left out, 'kept' if it is not.
      why: more about it.
      size: (height, width) of its picture, 0 where it was not looked at.
      digest: 16 bytes that equal examples share.
      thumbnail: uint8 [64, 64, 3]; None if no signature is made of it.
    """

    reason: str
    why: str = ''
    size: tuple[int, int] = (0, 0)
    digest: bytes = bytes(16)
    thumbnail: np.ndarray | None = None


def examine(given: Given, unit: Unit, settings: Settings) -> Arrays:
    """Read a unit and describe its examples.

    Args:
      given: the set that the unit is of; rules do not apply to evaluations.

    Returns:
      {'reason': uint8 [n], 'height', 'width', 'bytes': uint32 [n], 'digest': uint8 [n, 16],
      'where': uint64 [n], hashes of where each lies, 'bits', 'bands', 'colours', 'is_there' as
      `Signatures`, and 'about': JSON of {'names', 'why', 'fields', 'contents'}}.

    Raises:
      UserError: the unit is damaged.
      OSError: it cannot be read.
    """
    is_own = given == settings.given
    contents, fields = hashlib.sha256(), collections.Counter[str]()
    names: list[str] = []
    why: dict[int, str] = {}
    columns: dict[str, list] = collections.defaultdict(list)
    thumbnails: list[np.ndarray] = []
    for example in examples.read(given, unit):
        seen = _see(given, example, settings, is_own)
        contents.update(_fingerprint(example))
        fields.update(example.fields)
        if seen.why:
            why[example.row] = seen.why
        names.append(example.name)
        columns['where'].append(embeddings.place_hash(example.where))
        columns['reason'].append(settings.reasons.index(seen.reason))
        columns['height'].append(seen.size[0])
        columns['width'].append(seen.size[1])
        columns['bytes'].append(min(_length(example.data), 2**32 - 1))
        columns['digest'].append(np.frombuffer(seen.digest, np.uint8))
        columns['has_signature'].append(seen.thumbnail is not None)
        if seen.thumbnail is not None:
            thumbnails.append(seen.thumbnail)
    about = {
        'names': names,
        'why': why,
        'fields': sorted(fields),
        'contents': contents.hexdigest(),
    }
    rows = np.flatnonzero(columns['has_signature'])
    return {
        'reason': np.array(columns['reason'], np.uint8),
        'height': np.array(columns['height'], np.uint32),
        'width': np.array(columns['width'], np.uint32),
        'bytes': np.array(columns['bytes'], np.uint32),
        'digest': np.array(columns['digest'], np.uint8).reshape(-1, 16),
        'where': np.array(columns['where'], np.uint64),
        'about': np.frombuffer(json.dumps(about).encode(), np.uint8),
        **_signatures(len(names), rows, thumbnails, mirrored=not is_own),
    }


def _see(given: Given, example: Example, settings: Settings, is_own: bool) -> _Seen:
    """Judge an example by itself; what costs more comes later."""
    if example.data is None:
        return _Seen(UNREADABLE, 'has no picture that can be read')
    if is_own:
        text = examples.text_of(given, example) if reads_text(settings) else None
        fault = rules.broken_by_text(
            text, lambda column: examples.value_of(example, column), settings
        )
        if fault is not None:
            return _Seen(fault)
    try:
        data = example.data
        height, width = (Encoded(data).shape if isinstance(data, bytes) else data.shape)[:2]
        size = height, width
        fault = rules.broken_by_shape(height, width, settings) if is_own else None
        if fault is not None:
            return _Seen(fault, size=size)
        pixels = signatures.upright(data)
    except DecodeError as error:
        return _Seen(UNREADABLE, str(error))
    digest = bytes(16)
    if settings.exact == 'pixels':
        digest = signatures.pixel_hash(pixels)
    elif settings.exact == 'bytes':
        digest = hashlib.blake2b(bytes(data), digest_size=16).digest()
    by_pixels = settings.near is not None and not settings.embeddings
    thumbnail = signatures.thumbnail(pixels) if by_pixels else None
    return _Seen('kept', size=size, digest=digest, thumbnail=thumbnail)


def reads_text(settings: Settings) -> bool:
    return settings.caption_chars is not None or settings.caption_words is not None


def _length(data: Any) -> int:
    if data is None:
        return 0
    return len(data) if isinstance(data, bytes) else data.nbytes


def _fingerprint(example: Example) -> bytes:
    """Hash the name and the content of an example."""
    data = example.data
    whole = hashlib.sha256(example.name.encode('utf-8', 'surrogateescape') + b'\0')
    whole.update(b'' if data is None else data if isinstance(data, bytes) else data.tobytes())
    for field in sorted(example.fields):
        value = example.fields[field]
        whole.update(f'\0{field}\0'.encode('utf-8', 'surrogateescape'))
        whole.update(value if isinstance(value, bytes) else repr(value).encode())
    return whole.digest()


def _signatures(
    count: int, rows: np.ndarray, thumbnails: list[np.ndarray], mirrored: bool
) -> Arrays:
    """Make the signatures of `count` examples, of which `rows` have a thumbnail."""
    some = np.array(thumbnails, np.uint8).reshape(-1, 64, 64, 3)
    made = signatures.of_thumbnails(some, mirrored)
    arrays = {}
    for name, column in zip(Signatures._fields, made, strict=True):
        arrays[name] = np.zeros((count, *column.shape[1:]), column.dtype)
        arrays[name][rows] = column
    return arrays


def about(arrays: Arrays) -> dict[str, Any]:
    """Return what is said in words of a unit that was examined."""
    return json.loads(arrays['about'].tobytes())


def signatures_of(arrays: Arrays) -> Signatures:
    return Signatures(*(arrays[name] for name in Signatures._fields))
