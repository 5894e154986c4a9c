"""Kinds of media files by their names, which of a dataset's files are its examples, and reading."""

import collections
import functools
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from big_vit.data.decode import is_image
from big_vit.errors import UserError

KINDS = {
    'image': (
        *('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.gif', '.ppm'),
        *('.jpe', '.jfif', '.pjpeg', '.apng', '.avif', '.jp2', '.j2k', '.pgm', '.pbm', '.pnm'),
        *('.tga', '.ico'),
    ),
    'video': ('.mp4', '.avi', '.mov', '.mkv', '.webm'),
    'audio': ('.wav', '.flac', '.ogg', '.mp3'),
    'text': ('.txt',),
}
_KIND_OF = {extension: kind for kind, extensions in KINDS.items() for extension in extensions}
# What downloads are called: a.jpg_large, a.png?width=640, a.jpg:orig.
_CONTINUED = re.compile(r'(\.[a-z0-9]+)[_?:%& -].*', re.IGNORECASE)
# Endings of files that describe others, and of which none is missed.
_NOTES = frozenset(
    (
        *('.', '.txt', '.json', '.jsonl', '.csv', '.tsv', '.xml', '.yaml', '.yml', '.toml', '.md'),
        *('.rst', '.html', '.htm', '.css', '.js', '.pdf', '.log', '.py', '.sh', '.ini', '.db'),
        *('.cls', '.mat', '.npy', '.npz', '.pkl', '.md5', '.sha1', '.sha256', '.aae', '.xmp'),
        *('.thm', '.bak', '.tmp', '.part'),
    )
)
# Beyond this share, what is left out is no accident.
_MOST_LEFT_OUT = 1 / 4
_CONVERT = 'convert them, or move them away'


def ending_of(name: str) -> str:
    """Return the extension of a name in lower case, '.' if it has none."""
    return os.path.splitext(name)[1].lower() or '.'  # noqa: PTH122


def kind_of(name: str) -> str | None:
    """Return the kind of a file by the extension of its name; None for no media file."""
    ending = os.path.splitext(name)[1].lower()  # noqa: PTH122  Half a Path's time.
    kind = _KIND_OF.get(ending)
    if kind is None and not ending[1:].isalnum():
        ending = ending_of(name.rstrip(' .'))
        match = _CONTINUED.fullmatch(ending)
        return _KIND_OF.get(match[1] if match else ending)
    return kind


def sniffed_kind(name: str, start: Callable[[], bytes]) -> str | None:
    """Return the kind of a file by its name, or by its first bytes if it has no extension.

    Args:
      start: reads 16 bytes.
    """
    kind = kind_of(name)
    if kind is None and ending_of(name) == '.' and is_image(start()):
        return 'image'
    return kind


def is_missed(name: str) -> bool:
    """Whether a file that is no example may have been meant as one, by its ending."""
    return ending_of(name) not in _NOTES


class LeftOut:
    """Counts files that are no examples, by their endings."""

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()
        self._missed, self._example = 0, ''

    def add(self, name: str, is_companion: bool = False) -> None:
        """Count a file; a companion belongs to an example, so that nothing is lost with it."""
        ending = ending_of(name)
        if is_companion or not is_missed(name):
            self._counts[ending] += 1
        else:
            self.update({ending: (1, name)})

    def update(self, counts: dict[str, Any]) -> None:
        """Add files that are missed, as {ending: (number, example)}."""
        for ending, (count, example) in counts.items():
            self._counts[ending] += count
            self._missed += count
            self._example = self._example or example

    def __str__(self) -> str:
        """'12 files left out (10 .heic, 2 .json), such as a/1.heic'; '' if there are none."""
        parts = [
            f'{count:,} {"without an ending" if ending == "." else ending}'
            for ending, count in self._counts.most_common(6)
        ]
        example = f', such as {self._example}' if self._example else ''
        total = self._counts.total()
        files = 'file' if total == 1 else 'files'
        return f'{total:,} {files} left out ({", ".join(parts)}){example}' if total else ''

    def tell(self, where: object, taken: int, kind: str, key: str) -> None:
        """Print what is left out beside the files that are taken.

        Raises:
          UserError: it is a large share.
        """
        if not self._counts:
            return
        if self._missed > _MOST_LEFT_OUT * (self._missed + taken):
            raise UserError(
                f'{key}.path: {where} has {taken:,} {kind} files, and {self}, which cannot be '
                f'read: {_CONVERT}'
            )
        say_once(f'{where}: {self}')


@functools.cache
def say_once(line: str) -> None:
    """Print a line, but not again where a dataset is opened again, nor in each loading process."""
    if multiprocessing.parent_process() is None:
        print(f'data    {line}', file=sys.stderr, flush=True)


def loader(kind: str, read: Callable[[int], bytes]) -> Callable[[list[int]], list]:
    """Return a function that reads examples of a kind: files as bytes, texts as str."""
    if kind != 'text':
        return lambda indices: [read(i) for i in indices]
    return lambda indices: [read(i).decode('utf-8-sig', 'replace') for i in indices]


class Names:
    """An immutable list of strings in one buffer; a million `str` would take 100 MB more."""

    def __init__(self, names: Iterator[str]):
        data, ends = bytearray(), [0]
        for name in names:
            data += name.encode('utf-8', 'surrogateescape')
            ends.append(len(data))
        self._data, self._ends = bytes(data), np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        name = self._data[self._ends[index] : self._ends[index + 1]]
        return name.decode('utf-8', 'surrogateescape')


def main_kind(kinds: Sequence[str], labels: Sequence[int] = ()) -> str | None:
    """Return the kind that most classes have, and of several the most frequent; None for nothing.

    Texts beside media only describe them.

    Args:
      labels: the class of each file, if files are of classes.
    """
    counts = collections.Counter(kinds)
    classes = collections.Counter(kind for kind, _ in {*zip(kinds, labels, strict=False)})
    order = list(KINDS)
    media = [kind for kind in counts if kind != 'text'] or list(counts)
    # Phones put a video beside each photograph, so that images come first of equally many.
    return max(
        media, key=lambda kind: (classes[kind], counts[kind], -order.index(kind)), default=None
    )


def _kind_of_hosts(
    names: Names, kinds: list[str], labels: list[int], others: list[str]
) -> str | None:
    """Return the main kind of the files whose names do not continue those of others.

    Sounds may outnumber the pictures that they go with, as where each is named in many languages.
    """
    if len({*kinds} - {'text'}) < 2:
        return main_kind(kinds)
    stems = [_stem(names[row]) for row in range(len(names))]
    hosts = {*stems, *map(_stem, others)}
    own = [row for row, stem in enumerate(stems) if not _goes_with(_parent(stem), hosts)]
    return main_kind([kinds[row] for row in own], [labels[row] for row in own])


def examples(
    names: Names,
    kinds: list[str],
    labels: list[int],
    others: list[str],
    where: object,
    key: str,
) -> tuple[str, np.ndarray]:
    """Choose the files that are the examples of a dataset, and tell what is left out.

    Args:
      names: of all media files.
      kinds: of each of them.
      labels: the class of each of them.
      others: names of other files.
      where: the folder, for messages.
      key: section of the config.

    Returns:
      (kind, indices of the files of this kind).

    Raises:
      UserError: there are none, or many files would be left out.
    """
    kind = _kind_of_hosts(names, kinds, labels, others)
    left_out = LeftOut()
    if kind is None:
        for name in others:
            left_out.add(name)
        skipped = f' ({left_out})' if others else ''
        raise UserError(
            f'{key}.path: no image, video, sound or text in {where}{skipped}: images end in '
            f'{", ".join(KINDS["image"][:9])} and the like'
        )
    is_example = np.array([other == kind for other in kinds])
    rows = np.flatnonzero(is_example)
    strange = [names[row] for row in np.flatnonzero(~is_example).tolist()]
    taken = {_stem(names[row]) for row in rows.tolist()} if strange or others else set()
    # What goes with a file that is missed, such as a drawing, is not missed once more.
    hosts = taken | {_stem(name) for name in others if is_missed(name)}
    beside = {name for name in strange if _goes_with(_stem(name), hosts)}
    apart = next((n for n in strange if kind_of(n) != 'text' and n not in beside), None)
    for name in strange + others:
        left_out.add(name, is_companion=name in beside or _stem(name) in taken)
    try:
        left_out.tell(where, len(rows), kind, key)
    except UserError:
        if apart is None:
            raise
        raise UserError(
            f'{key}.path: {where} holds {kind} and {kind_of(apart)} files ({names[int(rows[0])]}, '
            f'{apart}): keep those of one kind in it'
        ) from None
    return kind, rows


def _goes_with(stem: str, hosts: set[str]) -> bool:
    """Whether a stem is one of these, or continues one: bird_desc_fr.ogg goes with bird.png."""
    folder, slash, base = stem.rpartition('/')
    while base and folder + slash + base not in hosts:
        base = base.rpartition('_')[0]
    return bool(base)


def _parent(stem: str) -> str:
    """Return what a stem may continue: a/bird_desc of a/bird_desc_fr, a/ if it continues none."""
    folder, slash, base = stem.rpartition('/')
    return folder + slash + base.rpartition('_')[0]


def _stem(name: str) -> str:
    """Return the name of a file without what follows the first dot of its last part."""
    folder, slash, base = name.rpartition('/')
    return folder + slash + base.partition('.')[0]
