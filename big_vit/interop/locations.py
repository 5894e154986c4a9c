"""Where weights are: at a local path, else on the hub or behind a URL, fetched once."""

import json
import os
import re
from pathlib import Path, PurePath
from typing import NamedTuple

from etils import epath

from big_vit import storage
from big_vit.interop import files, hub, openclip, remote_files, timm_vit

# Weight files to look for in a folder, most likely first.
IN_FOLDER = (
    'model.safetensors',
    'model.safetensors.index.json',
    openclip.WEIGHTS,
    'open_clip_pytorch_model.bin',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
)
# Of a workdir: what was fetched for it, by what the user called it.
RECORD = 'init.json'


class Location(NamedTuple):
    """A local file or folder, the part of it that is wanted, and where it was fetched from."""

    path: Path
    part: str = ''
    origin: str | None = None


def configs_of(file: str) -> tuple[str, ...]:
    """Return the names of the configs that belong to a file of weights: architecture, images."""
    name = PurePath(file).name
    if name.endswith('.npz') or files.is_single(PurePath(file)):
        return ()  # Single-file formats: a config in the same folder belongs to something else.
    first = openclip.CONFIG if name.startswith('open_clip') else 'config.json'
    return first, 'preprocessor_config.json'


_fetched: dict[str, Location] = {}
_recalled: dict[str, str] = {}


def locate(spec: str) -> Location:
    """Find the file or folder of weights that a user names; a local path goes before all else.

    Args:
      spec: a path, `timm/NAME`, `hf://OWNER/NAME[@REVISION][/FILE]` or the URL of a file; all with
        `:PART` behind it if one model of several is wanted.

    Returns:
      A path where nothing may be, if it is a local one.

    Raises:
      UserError: it cannot be fetched.
    """
    before, _, part = spec.rpartition(':')
    for text, wanted in ((spec, ''), (before, part)):
        if text and (local := Path(text).expanduser()).exists():
            return Location(local, wanted)
    if spec not in _fetched:
        name = hub.parse(spec)
        url, wanted = (before, part) if files.is_weights(before) else (spec, '')
        if name is not None:
            recalled = hub.parse(_recalled.get(spec, ''))
            path, origin = hub.fetch(recalled or name, IN_FOLDER, configs_of)
            _fetched[spec] = Location(path, name.part, str(origin))
        elif '://' in url and files.is_weights(url):
            _fetched[spec] = Location(remote_files.fetch(url), wanted, url)
        else:
            return Location(Path(spec).expanduser())
    return _fetched[spec]


def name_meant(spec: str) -> str:
    """Return the name on the hub that a path where nothing is may have been meant for, else ''."""
    if spec.partition('.')[0] in timm_vit.architectures():
        return f'timm/{spec}'
    owner_and_name = re.fullmatch(r'[\w-]+/[\w.-]+', spec)
    return f'hf://{spec}' if owner_and_name and not Path(spec).parent.exists() else ''


def recall(workdir: str | os.PathLike[str] | None) -> None:
    """Take what a workdir has begun with in the same revision again, whatever is newest now."""
    if not workdir:
        return
    try:
        file = storage.place(workdir) / RECORD
        text = file.read_text()
    except Exception:  # Errors of object stores share no base class; `owned` tells them.
        return
    record = storage.parse_object(text, str(file), 'remove it')
    _recalled.update({str(name): str(origin) for name, origin in record.items()})


def record(workdir: epath.Path) -> None:
    """Write down in a workdir what this process has fetched for it."""
    if _fetched:
        origins = {name: place.origin for name, place in sorted(_fetched.items())}
        storage.write_text(workdir / RECORD, json.dumps(origins, indent=2) + '\n')
