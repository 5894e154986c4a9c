"""The tar format: the members of an archive and their headers."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from big_vit.data import files
from big_vit.errors import UserError

# Bytes of a header, of which data fill a multiple.
BLOCK = 512
_ZEROS = bytes(BLOCK)
_REGULAR = (b'0', b'\0', b'7')
# Links, devices, folders and pipes.
_WITHOUT_DATA = (b'1', b'2', b'3', b'4', b'5', b'6')
# Magic numbers of gzip, bzip2, xz and Zstandard.
_COMPRESSED = (b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd')
_MAX_NAME_BYTES = 1 << 20

Take = Callable[[int, int], bytes]


class Member(NamedTuple):
    """A regular file of a tar: its path, and where its data are."""

    name: str
    offset: int
    size: int


def members(shard: files.Place, take: Take) -> Iterator[Member]:
    """Yield the regular files of a tar in order; nothing is extracted.

    Reads the headers of POSIX ustar and pax and of GNU tar. The tarfile module is slower, and
    takes a damaged header for the end of the archive.

    Args:
      take: from `files.forward`; the caller may use it between members, on the last one.

    Raises:
      UserError: damaged or truncated; names the byte.
    """
    end = files.size_of(shard)
    if any(take(0, 6).startswith(magic) for magic in _COMPRESSED):
        raise UserError(f'{shard}: compressed, whatever its name says: decompress it (gzip -d)')
    at, long_name = 0, b''
    extended: dict[bytes, bytes] = {}
    while len(header := take(at, BLOCK)) == BLOCK:
        try:
            if header == _ZEROS:
                return
            kind, size = kind_and_size(header, extended)
            data = at + BLOCK
            after = data if kind in _WITHOUT_DATA else data + -(-size // BLOCK) * BLOCK
            if kind not in _WITHOUT_DATA and data + size > end:
                name = _terminated(header[:100]).decode('utf-8', 'surrogateescape')
                raise UserError(
                    f'{shard}: truncated: {name} at byte {at:,} needs {data + size:,} bytes of '
                    f'{end:,}: copy it again'
                )
            if kind in (b'L', b'x') and size > _MAX_NAME_BYTES:
                raise ValueError(f'a name of {size:,} bytes')
            if kind == b'L':
                long_name = _terminated(take(data, size))
            elif kind == b'x':
                extended = _parse_pax(take(data, size))
            elif kind not in (b'K', b'g'):
                if kind == b'S' or any(name.startswith(b'GNU.sparse') for name in extended):
                    raise UserError(f'{shard}: a sparse file at byte {at:,}: write it without -S')
                if kind in _REGULAR:
                    path = extended.get(b'path') or long_name or _header_path(header)
                    yield Member(path.decode('utf-8', 'surrogateescape'), data, size)
                long_name, extended = b'', {}
        except ValueError as error:
            raise UserError(
                f'{shard}: damaged or truncated at byte {at:,} ({error}): copy it again'
            ) from error
        at = after
    raise UserError(f'{shard}: truncated at byte {end:,}, where its end is missing')


def kind_and_size(header: bytes, extended: dict[bytes, bytes]) -> tuple[bytes, int]:
    """Check a header and return the kind and size of its member; ValueError."""
    checksum = sum(header) - sum(header[148:156]) + 8 * 32
    if _parse_number(header[148:156]) != checksum:
        raise ValueError('no header is there')
    size = int(extended.get(b'size', -1))
    return header[156:157], size if size >= 0 else _parse_number(header[124:136])


def _header_path(header: bytes) -> bytes:
    path, prefix = _terminated(header[:100]), _terminated(header[345:500])
    return prefix + b'/' + path if header[257:263] == b'ustar\0' and prefix else path


def _terminated(field: bytes) -> bytes:
    return field.split(b'\0', 1)[0]


def _parse_number(field: bytes) -> int:
    """Parse a number of a header: octal digits, or big-endian after a byte 0x80; ValueError."""
    if field[:1] == b'\x80':
        return int.from_bytes(field[1:], 'big')
    digits = _terminated(field).strip()
    if digits and not digits.isdigit():
        raise ValueError('no number is there')
    return int(digits or b'0', 8)


def _parse_pax(data: bytes) -> dict[bytes, bytes]:
    """Parse the entries 'LENGTH KEY=VALUE\\n' of an extended header; ValueError."""
    entries = {}
    while data:
        digits, _, _ = data.partition(b' ')
        length = int(digits)
        entry = data[len(digits) + 1 : length - 1]
        if length <= len(digits) + 1 or data[length - 1 : length] != b'\n' or b'=' not in entry:
            raise ValueError('a broken extended header')
        name, _, value = entry.partition(b'=')
        entries[name] = value
        data = data[length:]
    return entries


def place_of(shard: files.Place, offset: int, size: int) -> str:
    """Return the shard and the name of a member, or its offset where the header has it not whole.

    The header of a member in a remote shard would be a request of its own.
    """
    if shard.is_local:
        header = bytes(512)
        with contextlib.suppress(OSError):  # It may be the very shard that cannot be read.
            header = files.read_range(shard, offset - 512, 512)
        name, prefix = (header[i:j].partition(b'\0')[0] for i, j in ((0, 100), (345, 500)))
        # Longer names and, from some writers, other letters than ASCII are in a block before it.
        is_ustar = header[257:263] == b'ustar\0'
        if name and b'?' not in name and (len(name) < 100 or (is_ustar and prefix)):
            path = b'/'.join(part for part in (prefix if is_ustar else b'', name) if part)
            return f'{shard}: {path.decode("utf-8", "surrogateescape")}'
    return f'{shard} at byte {offset:,} ({size:,} bytes)'
