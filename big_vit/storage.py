"""Paths of runs: local folders, or object stores such as gs://bucket/run."""

import importlib
import json
import os
import shutil
import time
from typing import Any

from etils import epath

from big_vit.errors import PERMANENT_ERRORS, UserError, failure_at

# Python package that gives access to each store, by URL scheme.
LIBRARIES = {'gs': 'gcsfs'}

# Seconds between attempts to write: network failures pass within seconds, or not at all.
PAUSES_S = (0.5, 1.0, 2.0)


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path is local, not a URL of an object store."""
    return '://' not in os.fspath(path)


def place(path: str | os.PathLike[str]) -> epath.Path:
    """Converts a path, local or in an object store, into one that can be read and written.

    Raises:
      UserError: the store is unknown, or its library is not installed.
    """
    if is_local(path):
        return epath.Path(path).expanduser()  # Shells leave --workdir=~/run as it is.
    scheme, _, rest = os.fspath(path).partition('://')
    if scheme == 's3':
        raise UserError(
            f'{path}: s3:// is for data: Orbax writes checkpoints to local disks and gs:// '
            'only, so use one of these'
        )
    if scheme not in LIBRARIES:
        known = ', '.join(f'{name}://' for name in LIBRARIES)
        raise UserError(f'{path}: {scheme}:// is not supported; a local path, or one of {known}')
    if not rest.strip('/'):
        raise UserError(f'{path}: names no bucket; write {scheme}://BUCKET/RUN')
    try:
        importlib.import_module(LIBRARIES[scheme])
    except ImportError:
        raise UserError(f'{path}: {scheme}:// needs `pip install {LIBRARIES[scheme]}`') from None
    import fsspec

    # Else etils would import TensorFlow for this, where it happens to be installed.
    os.environ['EPATH_USE_TF'] = 'false'
    # Orbax writes arrays without going through fsspec, so a cached listing would miss them.
    for name in (scheme, 'gcs') if scheme == 'gs' else (scheme,):
        fsspec.config.conf.setdefault(name, {})['use_listings_cache'] = False
    return epath.Path(path)


def absolute(path: epath.Path) -> epath.Path:
    """Makes a local path absolute; URLs are absolute already."""
    return path.resolve() if is_local(path) else path


def free_bytes(path: epath.Path) -> float:
    """Free bytes at a path; infinite for an object store."""
    return shutil.disk_usage(path).free if is_local(path) else float('inf')


def write_text(path: epath.Path, text: str) -> None:
    """Replaces a file atomically; retries errors that may pass.

    Raises:
      UserError: it cannot be written; Unavailable where that may pass.
    """
    for pause in (*PAUSES_S, None):
        try:
            if is_local(path):
                partial = path.with_name(f'{path.name}.tmp')
                partial.write_text(text)
                partial.replace(path)
            else:  # Objects appear completely or not at all.
                path.write_text(text)
            return
        except Exception as error:
            # Object stores raise errors of no common class.
            if is_local(path) and not isinstance(error, OSError):
                raise
            if pause is None or isinstance(error, PERMANENT_ERRORS):
                kind = failure_at(path, error)
                raise kind(f'{path}: cannot be written: {reason(error)}') from error
            time.sleep(pause)


def parse_object(text: str | bytes, where: str, advice: str) -> dict[str, Any]:
    """Parses the JSON object that a file, or a line of one, must be.

    Args:
      where: name of it, for messages.
      advice: what to do if it is something else.

    Raises:
      UserError: it is not JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where}: is not JSON ({reason(error)}); {advice}') from None
    if not isinstance(value, dict):
        raise UserError(f'{where}: is not a JSON object; {advice}')
    return value


def create_object(path: epath.Path, text: str) -> bool:
    """Creates an object unless it is there; of several processes at once, one succeeds."""
    import fsspec

    if path.exists():
        return False
    files, name = fsspec.core.url_to_fs(os.fspath(path))
    try:
        files.pipe_file(name, text.encode(), mode='create')
    except FileExistsError:
        return False
    return True


def reason(error: BaseException) -> str:
    """An error as one line, without the path, which the message around it already names."""
    text = getattr(error, 'strerror', None) or str(error) or repr(error)
    return ' '.join(text.split())[:300]


def move(source: epath.Path, target: epath.Path) -> None:
    """Moves a folder; an object store copies and deletes it by itself."""
    if is_local(source):
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
        return
    import fsspec

    files, path = fsspec.core.url_to_fs(os.fspath(source))
    files.mv(path, os.fspath(target), recursive=True)
