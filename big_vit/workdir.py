"""The folder of a run: create it, check it against the config, restore its newest checkpoint."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator

from etils import epath

from big_vit import checkpoint, interop, metrics, ownership, state, storage
from big_vit import config as config_lib
from big_vit.config import Config
from big_vit.data.sources.known import Known
from big_vit.distributed import hosts
from big_vit.errors import UserError, failure_at

CONFIG = 'config.json'


@contextlib.contextmanager
def owned(path: str | os.PathLike[str]) -> Iterator[epath.Path]:
    """Context in which this run alone writes into a workdir; of its processes, process 0 owns it.

    All processes must enter it. See `ownership.own` for what stays of a run that fails at once.

    Raises:
      UserError: the place is unknown, cannot be written, or belongs to a run that lives.
    """
    try:
        workdir = storage.place(path)
    except UserError as error:
        raise UserError(f'--workdir: {error}') from None
    hosts.lead(lambda: checkpoint.check_place(workdir, '--workdir'))
    with contextlib.ExitStack() as stack:
        hosts.lead(lambda: stack.enter_context(ownership.own(workdir)))
        hosts.lead(lambda: interop.record(workdir))
        yield workdir


def check_workdir(
    workdir: epath.Path, config: Config, abstract_state: state.State, force: bool
) -> None:
    """Check that what a workdir holds, if anything, goes on with this config.

    Args:
      abstract_state: the shapes, dtypes and shardings that checkpoints there must have.
      force: accept another config, though not another architecture.

    Raises:
      UserError: it cannot be read, or holds a run of another config.
    """
    file, folder = workdir / CONFIG, workdir / 'checkpoints'
    try:
        text = file.read_bytes() if file.exists() else b''
        saved = checkpoint.steps(workdir)
        rows = workdir / metrics.FILE
        for path, is_folder in ((rows, False), (folder, True)):
            if storage.is_local(path) and path.exists() and path.is_dir() != is_folder:
                raise UserError(f'--workdir: {path} is no {"folder" if is_folder else "file"}')
        begun = bool(saved or (rows.exists() and rows.read_bytes().strip()))
    except Exception as error:  # Errors of object stores share no base class.
        if isinstance(error, UserError) or (
            storage.is_local(workdir) and not isinstance(error, OSError)
        ):
            raise
        kind = failure_at(workdir, error)
        raise kind(f'--workdir: cannot read {workdir}: {storage.reason(error)}') from error
    old = None
    if text and begun:  # What ended before its first row has nothing to go on with.
        old = storage.parse_object(text, str(file), 'use another --workdir')
    elif saved:
        with contextlib.suppress(checkpoint.CorruptCheckpointError):
            old = checkpoint.read_sidecar(workdir, saved[-1])['config']
    if old is not None:
        changes = config_lib.difference(old, config.to_dict())
        refused = _refused(changes)
        if refused and not force:
            raise UserError(
                f'--workdir: {workdir} holds a run of another config ({"; ".join(refused[:8])}); '
                'use another --workdir, or --force to go on with the new config'
            )
        if changes:
            print(f'config  changed since the last start: {"; ".join(changes)}', flush=True)
    for step in saved[-1:]:
        with contextlib.suppress(
            checkpoint.CorruptCheckpointError
        ):  # `restore_newest` will say so.
            sidecar = checkpoint.read_sidecar(workdir, step)
            wanted = state.to_save(abstract_state)
            checkpoint.check_leaves(sidecar, wanted, f'{workdir}/checkpoints/{step}')


def write_config(workdir: epath.Path, config: Config) -> None:
    """Write the config of the run that starts now; in process 0 alone."""
    storage.write_text(workdir / CONFIG, json.dumps(config.to_dict(), indent=2) + '\n')


def _refused(changes: list[str]) -> list[str]:
    return [line for line in changes if not line.startswith(config_lib.RESUMABLE)]


def known_classes(path: str | os.PathLike[str], config: Config, force: bool) -> Known | None:
    """Return the classes of the parameters that a run goes on with.

    Returns:
      None if it starts afresh, its classes have no names, or `check_workdir` refuses the config.
    """
    try:
        workdir = storage.place(path)
        saved, file = checkpoint.steps(workdir), workdir / CONFIG
        old = json.loads(file.read_text()) if saved and file.exists() else None
    except Exception:  # `check_workdir` says what is wrong with the folder.
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
