"""The tar shards that a path names, and the splits that their names tell."""

import fnmatch
import re

from big_vit.data import files
from big_vit.errors import UserError

_SPLIT = re.compile(r'(?:^|[^a-z])(train|validation|valid|val|test|dev|eval)(?:[^a-z]|$)', re.I)
_BRACES = re.compile(r'\{(\d+)\.\.(\d+)\}')
_GLOB = re.compile(r'[*?[]')
_MAX_SHARDS = 1_000_000


def shards_of_splits(path: str, key: str) -> dict[str, list[files.Place]]:
    """Return the shards of each split of a path, in order.

    Raises:
      UserError: there is none.
    """
    splits = find_splits(path, key)
    return {name: [shard.place for shard in shards] for name, shards in splits.items()}


def find_splits(path: str, key: str) -> dict[str, list[files.Stored]]:
    """Return the shards of each split of a path, in order, with their sizes and stamps.

    Raises:
      UserError: there is none.
    """
    shards = find_shards(path, f'{key}.path')
    splits: dict[str, list[files.Stored]] = {}
    words = [split_word(shard.place.name) for shard in shards]
    words = words if all(words) else ['train'] * len(shards)
    for shard, word in zip(shards, words, strict=True):
        splits.setdefault(word, []).append(shard)
    return splits


def split_word(name: str) -> str:
    """Return the word for a split in the name of a shard; '' if there is none."""
    word = _SPLIT.search(name.removesuffix('.tar'))
    return word[1].lower() if word else ''


def find_shards(path: str, key: str) -> list[files.Stored]:
    """Find the shards of a path: a file, a folder, a glob or a range.

    Args:
      key: what the path is called in messages, such as 'data.path'.

    Raises:
      UserError: there is none, one is not there or compressed, or one is named twice.
    """
    names = _expand_braces(path, key)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f'{key}: {path} names {twice} twice: name each shard once')
    shards: list[files.Stored] = []
    with files.reading(files.place(names[0], key), key):
        if len(names) > 1 and not any(_GLOB.search(n) or not n.endswith('.tar') for n in names):
            shards = _named_shards([files.place(name, key) for name in names], key)
        else:
            for name in names:
                shards += _find_shards(name, key, is_first=not shards)
    if not shards:
        raise UserError(f'{key}: no .tar file in {path}')
    for shard in shards:
        if not shard.place.name.endswith('.tar'):
            raise UserError(
                f'{key}: {shard.place} is not a plain .tar file: if it is compressed, decompress it'
            )
    return shards


def _named_shards(places: list[files.Place], key: str) -> list[files.Stored]:
    """Look up shards of a range of names, by one listing of a remote folder."""
    try:
        return files.stored(places)
    except FileNotFoundError as error:
        missing = next((place for place in places if not files.exists(place)), places[0])
        raise UserError(f'{key}: there is no shard {missing}') from error


def _expand_braces(path: str, key: str) -> list[str]:
    match = _BRACES.search(path)
    if match is None:
        return [path]
    first, last = match.groups()
    rest = _expand_braces(path[match.end() :], key)
    if (int(last) - int(first)) * len(rest) > _MAX_SHARDS:
        raise UserError(f'{key}: {match[0]} are more than {_MAX_SHARDS:,} shards')
    numbers = [f'{n:0{len(first)}d}' for n in range(int(first), int(last) + 1)]
    if not numbers:
        raise UserError(f'{key}: {match[0]} counts backwards')
    return [path[: match.start()] + number + end for number in numbers for end in rest]


def _find_shards(name: str, key: str, is_first: bool) -> list[files.Stored]:
    """Find the shards of a path: a file, a folder or a glob; `is_first` if none came before."""
    place = files.place(name, key)
    if _GLOB.search(place.name):
        parent = place._replace(path=place.path.rpartition('/')[0] or '.')
        names = files.entries(parent) if files.is_folder(parent) else []
        return [_stored(parent, e) for e in names if fnmatch.fnmatch(e.name, place.name)]
    if files.is_folder(place):
        entries = files.entries(place)
        shards = [_stored(place, e) for e in entries if e.name.endswith('.tar')]
        if is_first and not shards and any('.tar' in e.name for e in entries):
            raise UserError(
                f'{key}: {place} holds compressed archives, in which nothing can be found '
                'without reading all: decompress them (gzip -d)'
            )
        return shards
    if files.exists(place):
        return files.stored([place])
    raise UserError(f'{key}: there is no shard {place}')


def _stored(folder: files.Place, entry: files.Entry) -> files.Stored:
    return files.Stored(folder / entry.name, entry.size, entry.stamp)
