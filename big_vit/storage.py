"""Where runs lie: local folders, or places in an object store such as gs://bucket/run."""

import importlib
import os
import shutil
import time

from etils import epath

from big_vit.errors import UserError

# What reaches each store, and which error its users should see when it is not installed.
LIBRARIES = {'gs': 'gcsfs'}

# Between tries of a write: what a network drops comes back within seconds or not at all.
PAUSES_S = (0.5, 1.0, 2.0)
# These do not go away by trying again.
LASTING = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)


def is_local(path: str | os.PathLike[str]) -> bool:
    return '://' not in os.fspath(path)


def place(path: str | os.PathLike[str]) -> epath.Path:
    """The path as one that can be used, local or not.

    Raises:
      UserError: an object store that is unknown, or whose library is not installed.
    """
    if is_local(path):
        return epath.Path(path)
    scheme, _, rest = os.fspath(path).partition('://')
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

    # Where TensorFlow happens to be installed, etils would import it for this.
    os.environ['EPATH_USE_TF'] = 'false'
    # Orbax's arrays are written behind fsspec's back: a cached listing would miss them.
    for name in (scheme, 'gcs') if scheme == 'gs' else (scheme,):
        fsspec.config.conf.setdefault(name, {})['use_listings_cache'] = False
    return epath.Path(path)


def absolute(path: epath.Path) -> epath.Path:
    return path.resolve() if is_local(path) else path


def free_bytes(path: epath.Path) -> float:
    """Room at a path, in bytes; an object store has no end."""
    return shutil.disk_usage(path).free if is_local(path) else float('inf')


def write_text(path: epath.Path, text: str) -> None:
    """Replaces a whole file, or leaves the old one; what may pass is tried again.

    Raises:
      UserError: it cannot be written.
    """
    for pause in (*PAUSES_S, None):
        try:
            if is_local(path):
                partial = path.with_suffix('.tmp')
                partial.write_text(text)
                partial.replace(path)
            else:  # An object appears whole or not at all.
                path.write_text(text)
            return
        except Exception as error:
            # The errors of object stores have no class in common.
            if is_local(path) and not isinstance(error, OSError):
                raise
            if pause is None or isinstance(error, LASTING):
                raise UserError(f'{path}: cannot be written: {reason(error)}') from error
            time.sleep(pause)


def reason(error: BaseException) -> str:
    """An error in one line, without the path that the message around it names already."""
    said = getattr(error, 'strerror', None) or str(error) or repr(error)
    return ' '.join(said.split())[:300]


def move(source: epath.Path, target: epath.Path) -> None:
    """Moves a folder; within an object store it is copied and deleted by the store."""
    if is_local(source):
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
        return
    import fsspec

    files, path = fsspec.core.url_to_fs(os.fspath(source))
    files.mv(path, os.fspath(target), recursive=True)
