"""Kinds of media files by their extensions, and how examples of each kind are read."""

import os
from collections.abc import Callable, Iterator

import numpy as np

KINDS = {
    'image': ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.gif', '.ppm'),
    'video': ('.mp4', '.avi', '.mov', '.mkv', '.webm'),
    'audio': ('.wav', '.flac', '.ogg', '.mp3'),
    'text': ('.txt',),
}
_KIND_OF = {extension: kind for kind, extensions in KINDS.items() for extension in extensions}


def kind_of(name: str) -> str | None:
    """Return the kind of a file by the extension of its name; None for no media file."""
    return _KIND_OF.get(os.path.splitext(name)[1].lower())  # noqa: PTH122  Half a Path's time.


def loader(kind: str, read: Callable[[int], bytes]) -> Callable[[list[int]], list]:
    """Return a function that reads examples of a kind: files as bytes, texts as str."""
    if kind != 'text':
        return lambda indices: [read(i) for i in indices]
    return lambda indices: [read(i).decode('utf-8', 'replace') for i in indices]


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
