"""Weight files behind URLs (gs://, s3://, https://), kept in a cache of ours."""

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from big_vit import storage
from big_vit.data import files as data_files
from big_vit.errors import UserError

# What stores call the version of a file.
_VERSIONS = ('etag', 'ETag', 'md5Hash', 'generation', 'mtime', 'created')


def fetch(url: str) -> Path:
    """Get a file, from the cache if it is unchanged there; without a network, as it is there.

    Processes of one host wait for the first of them to fetch it; no file is ever half there.

    Raises:
      UserError: it cannot be read and the cache has none, or what came is not what was announced.
    """
    source = data_files.place(url, 'init')
    if '..' in url.split('/'):  # A place outside of the cache.
        raise UserError(f'{url}: name the file without ..')
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'big_vit' / 'weights'
    target = cache / url.replace('://', '/', 1)
    version_file = target.with_name(f'.{target.name}.json')
    try:
        about = source.system.info(source.path)
    except Exception as error:  # Errors of object stores share no base class.
        if target.is_file():
            return target
        cause = error.__cause__ or error
        if isinstance(cause, FileNotFoundError) or getattr(cause, 'status', None) == 404:
            raise UserError(f'{url}: there is no such file') from None
        raise UserError(
            f'{url}: cannot be read ({storage.reason(cause)}), and {target} is not there: where '
            'there is a network, download it, and put it there or give its path'
        ) from None
    size = about.get('size')
    version = {name: str(about[name]) for name in ('size', *_VERSIONS) if about.get(name)}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f'.{target.name}.lock')):
            if not _is_cached(target, version_file, version, size):
                _download(source, url, target, size, about.get('md5Hash'))
                version_file.write_text(json.dumps(version))
    except OSError as error:
        raise UserError(f'{target}: cannot be written: {error.strerror or error}') from None
    return target


def _is_cached(target: Path, version_file: Path, version: dict[str, str], size: int | None) -> bool:
    if not target.is_file() or (size is not None and target.stat().st_size != size):
        return False
    with contextlib.suppress(OSError, ValueError):
        return json.loads(version_file.read_text()) == version
    return True  # Put there by hand.


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open('a') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(source: data_files.Place, url: str, target: Path, size: int | None, md5: Any) -> None:
    """Write a file beside its place and move it there when it is all there, in a few attempts.

    Raises:
      UserError: no attempt succeeded.
      OSError: it cannot be written here.
    """
    print(f'fetch   {url}' + (f' ({size / 1e6:.1f} MB)' if size else ''), flush=True)
    partial, problem = target.with_name(f'.{target.name}.partial'), ''
    for pause in (*storage.PAUSES_S, None):
        try:
            problem = _copy(source, partial, size, md5)
            if not problem:
                partial.replace(target)
                return
        finally:
            partial.unlink(missing_ok=True)
        time.sleep(pause or 0)
    raise UserError(f'{url}: cannot be read: {problem}')


def _copy(source: data_files.Place, partial: Path, size: int | None, md5: Any) -> str:
    """Copy a file; return what is wrong with it, '' if nothing."""
    digest, count = hashlib.md5(usedforsecurity=False), 0
    with partial.open('wb') as file:
        for block in _blocks(source):
            if isinstance(block, str):
                return block
            file.write(block)
            digest.update(block)
            count += len(block)
    if size is not None and count != size:
        return f'{count} bytes came, of {size}'
    if isinstance(md5, str) and base64.b64decode(md5) != digest.digest():
        return 'its checksum is not the one that the store has'
    return ''


def _blocks(source: data_files.Place) -> Iterator[bytes | str]:
    """Yield what is in a file, and as text at the end what went wrong."""
    try:
        with source.system.open(source.path, 'rb') as file:
            while block := file.read(1 << 22):
                yield block
    except Exception as error:  # Errors of object stores share no base class.
        yield storage.reason(error)
