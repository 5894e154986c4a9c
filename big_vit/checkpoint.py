"""Checkpoints: asynchronous, atomic, restorable on any mesh or as NumPy. Only file with Orbax.

    WORKDIR/checkpoints/STEP/state      arrays (Orbax, OCDBT)
    WORKDIR/checkpoints/STEP/sidecar    JSON: config, versions, metrics, shapes and hashes

A directory gets its final name when all of it is written. Each leaf has a hash of
its bits that does not depend on the sharding, so damage is found when it is read.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import big_vit
from big_vit import hosts, trees
from big_vit.errors import UserError
from big_vit.state import State

FORMAT = 1


class CorruptCheckpointError(UserError):
    """A checkpoint whose contents are not what was saved."""


def _hash_bits(bits: Any, index: Any, xp: Any) -> Any:
    """Two 32-bit sums over (bits, position); changing any one value changes both."""
    totals = []
    for a, b in ((0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F)):
        weight = (index + xp.uint32(b)) * xp.uint32(a)
        weight = (weight ^ (weight >> xp.uint32(15))) * xp.uint32(0x2C1B3C6D)
        weight = (weight ^ (weight >> xp.uint32(13))) | xp.uint32(1)
        totals.append((bits * weight).sum(dtype=xp.uint32))
    return xp.stack(totals)


def _hash_device(leaf: jax.Array) -> jax.Array:
    """Runs where the leaf lies; sums of integers do not depend on their order."""
    width = leaf.dtype.itemsize * 8
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f'uint{width}')).astype(jnp.uint32)
    index, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        index += along * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    return _hash_bits(bits, index, jnp)


def hash_array(array: np.ndarray) -> str:
    """The hash of one leaf on the host, equal to the one made on the devices at saving."""
    bits = np.ascontiguousarray(array).view(f'uint{array.dtype.itemsize * 8}')
    bits = bits.reshape(-1).astype(np.uint32)
    index = np.arange(bits.size, dtype=np.uint64).astype(np.uint32)
    with np.errstate(over='ignore'):
        return np.asarray(_hash_bits(bits, index, np)).tobytes().hex()


_hash_tree = jax.jit(lambda tree: jax.tree.map(_hash_device, tree))


def _hashes(state: Any) -> dict[str, str]:
    values = jax.device_get(_hash_tree(state))
    return {
        name: np.asarray(value).tobytes().hex() for name, value in trees.flatten(values).items()
    }


def describe(state: State, config: dict[str, Any], metrics: dict[str, float]) -> dict[str, Any]:
    """The sidecar of a state: all that is needed to read, check and understand it."""
    hashes = _hashes(state)
    leaves = {
        name: {'shape': list(leaf.shape), 'dtype': str(leaf.dtype), 'hash': hashes[name]}
        for name, leaf in trees.flatten(state).items()
    }
    packages = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
    return {
        'format': FORMAT,
        'step': int(state['step']),
        'config': config,
        'metrics': metrics,
        'versions': {
            'big_vit': big_vit.__version__,
            'python': sys.version.split()[0],
            **{name: metadata.version(name) for name in packages},
        },
        'leaves': leaves,
        'content_hash': _content_hash(leaves),
    }


def _content_hash(leaves: dict[str, Any]) -> str:
    text = json.dumps({name: leaf['hash'] for name, leaf in leaves.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def steps(workdir: str | Path) -> list[int]:
    """Steps of the finished checkpoints of a workdir, ascending."""
    folder = Path(workdir) / 'checkpoints'
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if p.name.isdigit() and (p / 'sidecar').is_dir())
    return sorted(int(p.name) for p in found)


def locate(path: str | Path, key: str = '--workdir') -> tuple[Path, int]:
    """(workdir, step) of a workdir (its newest checkpoint) or of one `checkpoints/STEP` folder.

    Raises:
      UserError: there is no checkpoint there.
    """
    path = Path(path)
    if path.name.isdigit() and path.parent.name == 'checkpoints':
        workdir, wanted = path.parent.parent, int(path.name)
        if wanted in steps(workdir):
            return workdir, wanted
        have = ', '.join(map(str, steps(workdir))) or 'none'
        raise UserError(f'{key}: there is no checkpoint {path} (steps there: {have})')
    workdir = path.parent if path.name == 'checkpoints' else path
    if not steps(workdir):
        what = 'no finished checkpoint' if workdir.is_dir() else 'no such folder'
        raise UserError(
            f'{key}: {path}: {what}; give the --workdir of a training run, or one of its '
            'checkpoints/STEP folders'
        )
    return workdir, steps(workdir)[-1]


def set_aside(workdir: str | Path, step: int) -> None:
    """Moves a damaged checkpoint to WORKDIR/damaged, so that its step can be saved again."""
    if jax.process_index() == 0:
        folder = Path(workdir) / 'damaged'
        folder.mkdir(exist_ok=True)
        number = len(list(folder.iterdir()))
        (Path(workdir) / 'checkpoints' / str(step)).rename(folder / f'{step}-{number}')


def read_sidecar(workdir: str | Path, step: int) -> dict[str, Any]:
    """What `describe` wrote.

    Raises:
      CorruptCheckpointError: it cannot be read or does not match its own hash.
    """
    path = Path(workdir) / 'checkpoints' / str(step) / 'sidecar' / 'metadata'
    try:
        sidecar = json.loads(path.read_text())
        intact = sidecar['content_hash'] == _content_hash(sidecar['leaves'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f'{path}: cannot be read: {error!r}') from None
    if not intact:
        raise CorruptCheckpointError(f'{path}: does not match its own content hash')
    if sidecar['format'] > FORMAT:
        raise UserError(f'{path}: format {sidecar["format"]} is newer than this big_vit reads')
    return sidecar


def check_leaves(sidecar: dict[str, Any], like: Any, where: str) -> None:
    """Compares shapes and types with an abstract tree, before anything is read.

    Raises:
      UserError: names the leaves that differ.
    """
    saved = {name: (tuple(x['shape']), x['dtype']) for name, x in sidecar['leaves'].items()}
    wanted = {name: (tuple(x.shape), str(x.dtype)) for name, x in trees.flatten(like).items()}
    _complain_of_difference(saved, wanted, where)


def check_params(params: Any, like: Any, where: str) -> None:
    """The same for parameters that are in memory already; only shapes count."""
    saved, wanted = (
        {name: tuple(leaf.shape) for name, leaf in trees.flatten(tree).items()}
        for tree in (params, like)
    )
    _complain_of_difference(saved, wanted, where)


def _complain_of_difference(saved: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    lines = [
        f'{name} is {saved[name]} in the checkpoint and {wanted[name]} in the model'
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    lines += [f'{name} is only in the checkpoint' for name in saved if name not in wanted]
    lines += [f'{name} is only in the model' for name in wanted if name not in saved]
    if lines:
        more = f'; and {len(lines) - 6} more' if len(lines) > 6 else ''
        raise UserError(f'{where} holds another architecture: ' + '; '.join(lines[:6]) + more)


@contextlib.contextmanager
def _quiet():
    """Orbax reports its own progress and its own deprecations; ours are enough."""
    import warnings

    loggers = [logging.getLogger(name) for name in ('absl', 'orbax')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Manager:
    """Saves a run's checkpoints; a context manager that ends only when all are on disk.

    Args:
      keep_last: how many of the newest to keep.
      keep_every: multiples of this step are kept for ever; None keeps none.
    """

    def __init__(self, workdir: str | Path, keep_last: int, keep_every: int | None = None):
        with _quiet():
            import orbax.checkpoint as ocp
            from orbax.checkpoint.checkpoint_managers import preservation_policy

            keep: list[Any] = [preservation_policy.LatestN(keep_last)]
            if keep_every:
                keep.append(preservation_policy.EveryNSteps(keep_every))
            self._ocp = ocp
            self._folder = Path(workdir).absolute() / 'checkpoints'
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=preservation_policy.AnyPreservationPolicy(keep),
                    enable_async_checkpointing=True,
                    # Our own hooks decide when to save, so that evaluation always comes first.
                    save_decision_policy=None,
                ),
            )

    def save(self, state: State, config: dict[str, Any], metrics: dict[str, float]) -> None:
        """Copies the state off the devices and returns; the writing goes on in the background.

        Raises:
          UserError: the disk has too little room, or the previous save failed.
        """
        self.check()
        step = int(jax.device_get(state['step']))
        needed = trees.nbytes(state)
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise self._failure(
                step, f'it needs up to {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free'
            )
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(state),
            sidecar=self._ocp.args.JsonSave(describe(state, config, metrics)),
        )
        try:
            with _quiet():
                self._manager.save(step, args=args, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failure(step, error) from error

    def check(self) -> None:
        """Raises UserError if the save in the background has failed."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failure(None, error) from error

    def wait(self) -> None:
        """Returns when everything is on disk; raises UserError if it could not be written."""
        try:
            with _quiet():
                self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(None, error) from error

    def _failure(self, step: int | None, error: object) -> UserError:
        good = steps(self._folder.parent)
        last = f'the last good one is step {good[-1]}' if good else 'there is no earlier one'
        which = '' if step is None else f' of step {step}'
        reason = ' '.join(str(error).split())[:300]
        return UserError(
            f'{self._folder}: saving the checkpoint{which} failed: {reason}; {last}. '
            'Make room and start the same command again: it resumes there'
        )

    def __enter__(self) -> 'Manager':
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self.wait()
        except UserError:
            if kind is None:
                raise
        finally:
            # After a failed save Orbax's own close waits for what will never come.
            closer = threading.Thread(target=self._close, daemon=True)
            closer.start()
            closer.join(timeout=60)

    def _close(self) -> None:
        with _quiet(), contextlib.suppress(Exception):
            self._manager.close()


def restore(workdir: str | Path, step: int, like: State) -> State:
    """The state of a checkpoint, on the shardings of the abstract state `like`.

    Raises:
      UserError: another architecture.
      CorruptCheckpointError: unreadable, or not the bits that were saved.
    """
    where = Path(workdir).absolute() / 'checkpoints' / str(step)
    with _by_all():
        sidecar = read_sidecar(workdir, step)
    check_leaves(sidecar, like, str(where))
    with _by_all(), _quiet():
        import orbax.checkpoint as ocp

        try:
            with ocp.StandardCheckpointer() as reader:
                state = reader.restore(where / 'state', like)
        except Exception as error:
            reason = ' '.join(str(error).split())[:300]
            raise CorruptCheckpointError(f'{where}: cannot be read: {reason}') from error
    _check_hashes(_hashes(state), sidecar, where)
    return state


@contextlib.contextmanager
def _by_all():
    """What one process cannot read, all take as damaged: they must go on with the same step."""
    failure = None
    try:
        yield
    except CorruptCheckpointError as error:
        failure = error
    failures = [text for text in hosts.gather(failure and str(failure)) if text]
    if failures:
        raise failure or CorruptCheckpointError(failures[0])


def scored_part(sidecar: dict[str, Any]) -> str:
    """Which parameters stand for the model: the averaged ones where there are any."""
    averaged = any(name.startswith('ema/') for name in sidecar['leaves'])
    return 'ema' if averaged else 'params'


def load_params(
    workdir: str | Path, step: int, which: str = 'params'
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters as nested NumPy arrays, sidecar); needs no config, mesh or accelerator.

    Args:
      which: 'params', or 'ema' for the averaged parameters.

    Raises:
      UserError: the checkpoint has no such part.
      CorruptCheckpointError: unreadable, or not the bits that were saved.
    """
    where = Path(workdir).absolute() / 'checkpoints' / str(step)
    sidecar = read_sidecar(workdir, step)
    names = [name for name in sidecar['leaves'] if name.startswith(which + '/')]
    if not names:
        raise UserError(f'{where}: holds no {which}')
    wanted = trees.unflatten(
        {
            name: np.empty(sidecar['leaves'][name]['shape'], sidecar['leaves'][name]['dtype'])
            for name in names
        }
    )
    with _quiet():
        import orbax.checkpoint as ocp

        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        request = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                tree = reader.restore(where / 'state', args=request)
        except Exception as error:
            reason = ' '.join(str(error).split())[:300]
            raise CorruptCheckpointError(f'{where}: cannot be read: {reason}') from error
    hashes = {name: hash_array(leaf) for name, leaf in trees.flatten(tree).items()}
    _check_hashes(hashes, sidecar, where)
    return tree[which], sidecar


def _check_hashes(found: dict[str, str], sidecar: dict[str, Any], where: Path) -> None:
    wrong = [name for name in found if found[name] != sidecar['leaves'][name]['hash']]
    if wrong:
        raise CorruptCheckpointError(
            f'{where}: {len(wrong)} of {len(found)} arrays are not what was saved, first {wrong[0]}'
        )
