"""The folder of a run: create it, check it against the config, restore its newest checkpoint."""

import contextlib
import json
import os
import sys
import tempfile

import jax
from etils import epath

from big_vit import checkpoint, state, storage
from big_vit import config as config_lib
from big_vit.config import Config
from big_vit.data.sources.known import Known
from big_vit.errors import UserError


def open_workdir(
    path: str | os.PathLike[str], config: Config, abstract_state: state.State, force: bool
) -> epath.Path:
    """Create the workdir, or check that the existing one belongs to this config.

    Every process checks; only process 0 writes.

    Args:
      path: a local folder, or a place in an object store such as gs://bucket/run.
      abstract_state: the shapes, dtypes and shardings that checkpoints there must have.
      force: accept another config, though not another architecture.

    Raises:
      UserError: it cannot be reached or written, or holds a run of another config.
    """
    try:
        workdir = storage.place(path)
    except UserError as error:
        raise UserError(f'--workdir: {error}') from None
    file, dump = workdir / 'config.json', config.to_dict()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if storage.is_local(workdir):
            with tempfile.TemporaryFile(dir=workdir):
                pass
        old_text = file.read_text() if file.exists() else None
    except Exception as error:  # Errors of object stores share no base class.
        if storage.is_local(workdir) and not isinstance(error, OSError):
            raise
        raise UserError(f'--workdir: cannot write to {workdir}: {storage.reason(error)}') from error
    if old_text is not None:
        try:
            old = json.loads(old_text)
        except ValueError as error:
            raise UserError(f'{file}: is not JSON ({error}); use another --workdir') from None
        changes = config_lib.difference(old, dump)
        refused = _refused(changes)
        if refused and not force:
            raise UserError(
                f'--workdir: {workdir} holds a run of another config ({"; ".join(refused[:8])}); '
                'use another --workdir, or --force to go on with the new config'
            )
        if changes:
            print(f'config  changed since the last start: {"; ".join(changes)}', flush=True)
    for step in checkpoint.steps(workdir)[-1:]:
        with contextlib.suppress(
            checkpoint.CorruptCheckpointError
        ):  # `restore_newest` will say so.
            sidecar = checkpoint.read_sidecar(workdir, step)
            checkpoint.check_leaves(sidecar, abstract_state, f'{workdir}/checkpoints/{step}')
    if jax.process_index() == 0:
        storage.write_text(file, json.dumps(dump, indent=2) + '\n')
    return workdir


def _refused(changes: list[str]) -> list[str]:
    return [line for line in changes if not line.startswith(config_lib.RESUMABLE)]


def known_classes(path: str | os.PathLike[str], config: Config, force: bool) -> Known | None:
    """Return the classes of the parameters that a run goes on with.

    Returns:
      None if it starts afresh, its classes have no names, or `open_workdir` refuses the config.
    """
    try:
        workdir = storage.place(path)
        saved, file = checkpoint.steps(workdir), workdir / 'config.json'
        old = json.loads(file.read_text()) if saved and file.exists() else None
    except Exception:  # `open_workdir` says what is wrong with the folder.
        return None
    if old and not force and _refused(config_lib.difference(old, config.to_dict())):
        return None
    if config.switch and not saved:
        workdir, step = checkpoint.locate(config.switch, 'config: switch')
        saved = [step]
    for step in reversed(saved):
        with contextlib.suppress(checkpoint.CorruptCheckpointError):
            names = checkpoint.class_names(checkpoint.read_sidecar(workdir, step))
            holder = f'{workdir}/checkpoints/{step}'
            return None if names is None else Known(len(names), names, holder)
    return None


def restore_newest(workdir: epath.Path, abstract_state: state.State) -> state.State | None:
    """Restore the newest intact checkpoint; return None where there is no checkpoint.

    Damaged ones are moved to WORKDIR/damaged, out of the way of new ones, once an intact one is
    found.

    Raises:
      UserError: there are checkpoints, but none can be read.
    """
    saved, damaged = checkpoint.steps(workdir), []
    for step in reversed(saved):
        try:
            intact = checkpoint.restore(workdir, step, abstract_state)
        except checkpoint.CorruptCheckpointError as error:
            print(f'WARNING: {error}; falling back to the checkpoint before', file=sys.stderr)
            damaged.append(step)
            continue
        for damaged_step in damaged:
            checkpoint.set_aside(workdir, damaged_step)
        return intact
    if saved:
        raise UserError(
            f'{workdir}/checkpoints: none of the checkpoints of steps {saved} can be read; '
            'use another --workdir to start afresh'
        )
    return None
