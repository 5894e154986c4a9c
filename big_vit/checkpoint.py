"""Asynchronous, atomic checkpoints that restore on any mesh or as NumPy; hides Orbax.

    WORKDIR/checkpoints/STEP/state      arrays (Orbax, OCDBT)
    WORKDIR/checkpoints/STEP/sidecar    JSON: config, versions, metrics, shapes and hashes

A local directory gets its final name once it is complete. An object store cannot rename, so there
the file COMMITTED is written last. Every leaf has a hash of its bits that does not depend on the
sharding, and the sidecar one of all that it says, so damage is detected on reading.
"""

import contextlib
import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

import big_vit
from big_vit import interop, ownership, sharding, storage, trees
from big_vit import metrics as metrics_lib
from big_vit.checkpoint_hashes import hash_array, hashes_of
from big_vit.errors import UserError, failure_at
from big_vit.state import State, to_save

# Format 1 has a hash of its leaves alone; from 2 on, one of all that the sidecar says as well.
FORMAT = 2
COMMITTED = 'commit_success.txt'
# In the folder of a sweep: which trials it chose.
CHOSEN = 'test.json'
# A save that is not committed after this long is considered hung.
TIMEOUT_S = 30 * 60
# Replicas share the work of saving an array only in parts of at least this many bytes.
MIN_SLICE_BYTES = 1 << 20


Place = str | os.PathLike[str]


class CorruptCheckpointError(UserError):
    """A checkpoint that is unreadable, or whose contents are not what was saved."""


def _first_problem(problem: str) -> str:
    """Returns the first problem that any process has, on all of them ('' if there is none).

    All processes must call it: otherwise one would stop while the rest wait for it.
    """
    if jax.process_count() == 1:
        return problem
    text = np.frombuffer(problem.encode()[:1000].ljust(1000, b'\0'), np.uint8)
    with jax.transfer_guard('allow'):
        texts = multihost_utils.process_allgather(text)
    problems = [bytes(row).rstrip(b'\0').decode(errors='ignore') for row in np.asarray(texts)]
    return next(filter(None, problems), '')


def describe(
    state: State,
    config: dict[str, Any],
    metrics: dict[str, float],
    class_names: Sequence[str] | None = None,
    position: int | None = None,
    shards: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Builds the sidecar of a state: everything needed to read, check and understand it.

    Args:
      position: of the next example in the order of the data; None if all steps had one batch size.
      shards: of the training data, see `data.shard_ledger`; none where it is not of shards.
    """
    hashes = hashes_of(state)
    leaves = {
        name: {'shape': list(leaf.shape), 'dtype': str(leaf.dtype), 'hash': hashes[name]}
        for name, leaf in trees.flatten(state).items()
    }
    packages = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
    sidecar = {
        'format': FORMAT,
        'step': int(state['step']),
        'config': config,
        'metrics': metrics,
        'class_names': None if class_names is None else list(class_names),
        **({} if position is None else {'position': position}),
        **({'shards': shards} if shards else {}),
        'versions': {
            'big_vit': big_vit.__version__,
            'python': sys.version.split()[0],
            **{name: metadata.version(name) for name in packages},
        },
        'leaves': leaves,
        'content_hash': _content_hash(leaves),
    }
    return {**sidecar, 'sidecar_hash': _sidecar_hash(sidecar)}


def _content_hash(leaves: dict[str, Any]) -> str:
    return _digest({name: leaf['hash'] for name, leaf in leaves.items()})


def _sidecar_hash(sidecar: dict[str, Any]) -> str:
    said = {name: value for name, value in sidecar.items() if name != 'sidecar_hash'}
    return _digest(json.loads(json.dumps(said)))  # As it will be read: keys are text.


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _is_intact(sidecar: dict[str, Any]) -> bool:
    if sidecar['format'] != 1 and sidecar['sidecar_hash'] != _sidecar_hash(sidecar):
        return False
    return sidecar['content_hash'] == _content_hash(sidecar['leaves'])


def _folder(workdir: Place, step: int | None = None) -> epath.Path:
    folder = storage.absolute(storage.place(workdir)) / 'checkpoints'
    return folder if step is None else folder / str(step)


def _committed(path: epath.Path) -> bool:
    return storage.is_local(path) or (path / COMMITTED).exists()


def _step_of(name: str) -> int | None:
    """The step whose checkpoint has a folder of this name; not of 06, which nothing wrote."""
    return int(name) if name.isdecimal() and str(int(name)) == name else None


def steps(workdir: Place) -> list[int]:
    """Steps of a workdir's committed checkpoints, ascending; they may still be damaged."""
    folder = _folder(workdir)
    if not folder.is_dir():
        return []
    found = {_step_of(path.name): path for path in folder.iterdir()}
    return sorted(s for s, path in found.items() if s is not None and _committed(path))


def locate(path: Place, key: str = '--workdir') -> tuple[epath.Path, int]:
    """Resolves a workdir (to its newest checkpoint), `WORKDIR@best` or a `checkpoints/STEP` folder.

    Args:
      path: what the user gave.
      key: flag or config key that error messages name.

    Returns:
      (workdir, step).

    Raises:
      UserError: there is no checkpoint there.
    """
    run, wants_best = without_selector(path)
    try:
        given = storage.place(run)
    except UserError as error:
        raise UserError(f'{key}: {error}') from None
    # Where a link such as `latest` leads; epath does not follow any.
    target = epath.Path(Path(given).resolve()) if storage.is_local(given) else given
    if 'checkpoints' not in (given.name, given.parent.name) and 'checkpoints' in (
        target.name,
        target.parent.name,
    ):
        given = target
    wanted = _step_of(given.name)
    if wanted is not None and given.parent.name == 'checkpoints':
        workdir = given.parent.parent
        if wanted in steps(workdir):
            return workdir, wanted
        present = ', '.join(map(str, steps(workdir))) or 'none'
        raise UserError(f'{key}: there is no checkpoint {path} (steps there: {present})')
    workdir = given.parent if given.name == 'checkpoints' else given
    available = steps(workdir)
    if not available and (trial := _chosen_trial(workdir, key)) is not None:
        return locate(f'{trial}@best' if wants_best else trial, key)
    if not available:
        what = 'no finished checkpoint' if workdir.is_dir() else 'no such folder'
        meant = '' if workdir.is_dir() else interop.name_meant(str(path))
        raise UserError(
            f'{key}: {path}: {what}; give the --workdir of a training run, or one of its '
            'checkpoints/STEP folders' + (f', or {meant} of the hub' if meant else '')
        )
    return workdir, _best_step(workdir, key) if wants_best else available[-1]


def _chosen_trial(workdir: epath.Path, key: str) -> epath.Path | None:
    """The first trial of what a sweep chose, and a line that says so; None if it is no sweep."""
    file = workdir / CHOSEN
    if not file.exists():
        if not (workdir / 'trials').is_dir():
            return None
        there = sorted(path.parent for path in workdir.glob('trials/*/*/checkpoints'))
        raise UserError(
            f'{key}: {workdir}: is a sweep that has not chosen yet: start it again, or name a trial'
            + (f', as in {there[0]}' if there else '')
        )
    advice = 'delete it, and start the sweep again'
    results = storage.parse_object(file.read_bytes(), str(file), advice)
    for start, result in results.items():
        trials = result.get('trials') if isinstance(result, dict) else None
        trials = trials if isinstance(trials, list) else []
        trial = Path(trials[0]) if trials and isinstance(trials[0], str) else None
        if trial is None or trial.is_absolute() or '..' in trial.parts:
            raise UserError(f'{file}: is not what a sweep chose; {advice}')
        others = [name for name in results if name != start]
        more = f'; the other starts, {", ".join(others)}, are in its test.json' if others else ''
        seeds = f', the first of {len(trials)} seeds' if trials[1:] else ''
        print(f'note    {workdir}: is a sweep: this is {trial}, which it chose{seeds}{more}',
              file=sys.stderr)  # fmt: skip
        return workdir / trial
    return None


def without_selector(path: Place) -> tuple[str, bool]:
    """Splits `RUN@best` or `RUN:best` into (RUN, True), and gives (path, False) of all others."""
    text = os.fspath(path)
    selected = text.endswith(('@best', ':best')) and not ('://' not in text and Path(text).exists())
    return (text[: -len('@best')], True) if selected else (text, False)


def _best_step(workdir: epath.Path, key: str) -> int:
    available = steps(workdir)
    for step in reversed(available):
        with contextlib.suppress(CorruptCheckpointError):
            metric = read_sidecar(workdir, step)['config'].get('checkpoint', {}).get('best')
            break
    else:
        raise CorruptCheckpointError(f'{key}: {workdir}: no checkpoint there can be read')
    if metric is None:
        raise UserError(
            f'{key}: {workdir} keeps no best checkpoint: its config sets no checkpoint.best, as in '
            '--config.checkpoint.best=val/top1'
        )
    rows = metrics_lib.read(workdir)
    best = metrics_lib.Best(metric).add_rows(rows, available[-1], available)
    if best.step is None:
        raise UserError(f'{key}: {workdir} has no checkpoint yet at which {metric} was measured')
    return best.step


def check_place(workdir: epath.Path, key: str) -> None:
    """Check that a new workdir does not lie among the checkpoints of another.

    Raises:
      UserError: it does, and would be taken for one of them.
    """
    folder = storage.absolute(workdir)
    for path in (folder, *folder.parents):
        if path.name == 'checkpoints' and steps(path.parent):
            raise UserError(
                f'{key}: {workdir} lies among the checkpoints of {path.parent}: give that to go on '
                'with its run, or another folder'
            )


def set_aside(workdir: Place, step: int) -> None:
    """Moves a damaged checkpoint to WORKDIR/damaged, so that its step can be saved again."""
    if jax.process_index() == 0:
        folder = storage.place(workdir) / 'damaged'
        number = len(list(folder.iterdir())) if folder.is_dir() else 0
        storage.move(_folder(workdir, step), storage.absolute(folder) / f'{step}-{number}')


def remove_after(workdir: Place, step: int) -> None:
    """Deletes the checkpoints of later steps."""
    if jax.process_index() == 0:
        for later in steps(workdir):
            if later > step:
                _remove(_folder(workdir, later))


def _remove(path: epath.Path) -> None:
    """Deletes a checkpoint such that, if killed half-way, the remains do not look like one."""
    if storage.is_local(path):
        path = path.rename(path.with_name(f'{path.name}.deleted'))
    else:
        (path / COMMITTED).unlink(missing_ok=True)
    path.rmtree(missing_ok=True)


def _remove_leftovers(folder: epath.Path) -> None:
    """Deletes the remains of saves and deletions that were killed."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        number, _, rest = path.name.partition('.')
        killed = rest == 'deleted' or rest.startswith('orbax-checkpoint-tmp')
        if number.isdecimal() and (killed or (not rest and not _committed(path))):
            path.rmtree(missing_ok=True)


def read_sidecar(workdir: Place, step: int) -> dict[str, Any]:
    """Reads the sidecar that `describe` made.

    Raises:
      CorruptCheckpointError: it is unreadable, does not match its own hash, or is of another step.
      UserError: it was written by a newer version of big_vit.
    """
    path = storage.place(workdir) / 'checkpoints' / str(step) / 'sidecar' / 'metadata'
    try:
        sidecar = json.loads(path.read_text())
        intact = _is_intact(sidecar)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f'{path}: cannot be read: {error!r}') from None
    if not intact:
        raise CorruptCheckpointError(f'{path}: does not match its own hash')
    if (saved_at := sidecar.get('step')) != step:
        raise CorruptCheckpointError(
            f'{path.parent.parent}: is the checkpoint of step {saved_at}: rename it back'
        )
    if sidecar['format'] > FORMAT:
        raise UserError(f'{path}: format {sidecar["format"]} is newer than this big_vit reads')
    return sidecar


def class_names(sidecar: dict[str, Any]) -> tuple[str, ...] | None:
    """Names of the classes of the head, in order, '' for one without a name.

    Returns:
      None if the classes have no names, or an older version wrote the sidecar.
    """
    names = sidecar.get('class_names')
    return tuple(names) if names else None


def check_leaves(sidecar: dict[str, Any], abstract_state: Any, where: str) -> None:
    """Compares saved shapes and dtypes with an abstract tree, before any array is read.

    Args:
      sidecar: sidecar of the checkpoint.
      abstract_state: tree of ShapeDtypeStructs to restore into.
      where: name of the checkpoint, for messages.

    Raises:
      UserError: names the leaves that differ.
    """
    saved = {
        name: (_without_padding(name, x['shape']), x['dtype'])
        for name, x in sidecar['leaves'].items()
    }
    wanted = {
        name: (_without_padding(name, x.shape), str(x.dtype))
        for name, x in trees.flatten(abstract_state).items()
    }
    _raise_if_different(saved, wanted, where)


def _without_padding(name: str, shape: Sequence[int]) -> tuple[int | None, ...]:
    """Hides the number of blocks in a stack, which includes padding for the number of devices.

    Padding blocks are zeros, which contribute nothing to a hash; restoring adds or drops them.
    """
    return (None, *shape[1:]) if sharding.STACKS.search(name) else tuple(shape)


def check_params(params: Any, abstract_state: Any, where: str) -> None:
    """Like `check_leaves`, for parameters already in memory; compares shapes only."""
    saved, wanted = (
        {name: tuple(leaf.shape) for name, leaf in trees.flatten(tree).items()}
        for tree in (params, abstract_state)
    )
    _raise_if_different(saved, wanted, where)


def _raise_if_different(saved: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
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
def _silence_orbax():
    """Silences Orbax, whose progress reports and deprecation warnings duplicate ours."""
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


def _array_handler(ocp: Any) -> Any:
    """Handler by which the replicas of an array share the work of saving it, if it is large.

    By default Orbax slices even the smallest arrays and compiles a program for each slice.
    """
    return ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=MIN_SLICE_BYTES)


class Manager:
    """Saves the checkpoints of a run; as a context manager it exits once all are stored.

    One save runs in the background at a time. A failed save ends the run. Older checkpoints are
    deleted only after a newer one is complete.

    Args:
      workdir: folder of the run.
      keep_last: number of newest checkpoints to keep.
      keep_every: multiples of this step are kept forever; None keeps none.
      class_names: those of the run's classes, if they have names.
      shards: as for `describe`.
    """

    def __init__(
        self,
        workdir: Place,
        keep_last: int,
        keep_every: int | None = None,
        class_names: Sequence[str] | None = None,
        shards: dict[str, Any] | None = None,
    ):
        with _silence_orbax():
            import orbax.checkpoint as ocp

            self._ocp = ocp
            self._writer = ocp.AsyncCheckpointer(
                ocp.CompositeCheckpointHandler(
                    # Without a limit on concurrent bytes, Orbax writes everything in one
                    # transaction: one data file per process instead of a varying 5 to 12.
                    state=ocp.PyTreeCheckpointHandler(
                        handler_impl=ocp.BasePyTreeCheckpointHandler(
                            save_concurrent_bytes=None,
                            type_handler_registry=ocp.type_handlers.create_type_handler_registry(
                                (jax.Array, _array_handler(ocp))
                            ),
                        )
                    ),
                    sidecar=ocp.JsonCheckpointHandler(),
                ),
                async_options=ocp.AsyncOptions(
                    timeout_secs=TIMEOUT_S,
                    # In the background, a directory that cannot be created would hang the save.
                    create_directories_asynchronously=False,
                ),
            )
        self._workdir, self._folder = workdir, _folder(workdir)
        self._keep_last, self._keep_every = keep_last, keep_every
        self._class_names, self._shards = class_names, shards
        self._best: int | None = None
        self._saving: threading.Thread | None = None
        self._step, self._began = 0, 0.0
        self._error: BaseException | None = None
        self._timings: dict[str, float] = {}
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self._folder)

    def save(
        self,
        state: State,
        config: dict[str, Any],
        metrics: dict[str, float],
        best: int | None = None,
        position: int | None = None,
    ) -> None:
        """Copies the state off the devices and returns; writing continues in the background.

        All processes must call it.

        Args:
          best: step whose checkpoint is kept beside the newest, once this one is stored.
          position: as for `describe`.

        Raises:
          UserError: too little disk space, or this save or the previous one failed.
        """
        began, state = time.monotonic(), to_save(state)
        self.wait()
        step = int(jax.device_get(state['step']))
        problem = _first_problem(self._reason_not_to_save(step, trees.nbytes(state)))
        if problem:
            raise self._failure(step, problem)
        # A copy: the caller goes on writing metrics while the sidecar is stored.
        sidecar = describe(state, config, dict(metrics), self._class_names, position, self._shards)
        args = self._ocp.args.Composite(
            state=self._ocp.args.PyTreeSave(state), sidecar=self._ocp.args.JsonSave(sidecar)
        )
        try:
            with _silence_orbax():
                # Force: in an object store a killed save may have left a folder of this name.
                self._writer.save(self._folder / str(step), args=args, force=True)
        except Exception as error:
            raise self._failure(step, storage.reason(error)) from error
        self._step, self._began, self._error, self._best = step, began, None, best
        self._timings = {'time/save_blocked_s': time.monotonic() - began}
        # Orbax's thread would print the traceback of an error that `check` raises anyway.
        logging.getLogger('absl').setLevel(logging.CRITICAL)
        self._saving = threading.Thread(target=self._finish, daemon=True)
        self._saving.start()

    def _reason_not_to_save(self, step: int, needed: int) -> str:
        """Reason not to save, or ''. Only process 0 looks: others might see it differently."""
        if jax.process_index() != 0:
            return ''
        if step in steps(self._workdir):
            return 'it is there already: is another run writing to this workdir?'
        free = storage.free_bytes(self._folder)
        if free < needed:
            return f'it needs up to {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free'
        return ''

    def _finish(self) -> None:
        try:
            self._writer.wait_until_finished()
            self._timings['time/save_s'] = time.monotonic() - self._began
            if jax.process_index() == 0:
                self._remove_old()
        except BaseException as error:
            self._error = error
        finally:
            logging.getLogger('absl').setLevel(logging.WARNING)

    def _remove_old(self) -> None:
        for step in steps(self._workdir)[: -self._keep_last]:
            if step != self._best and not (self._keep_every and step % self._keep_every == 0):
                _remove(self._folder / str(step))

    def check(self) -> None:
        """Raises UserError if the background save has failed or takes too long."""
        if self._saving is None:
            return
        if self._saving.is_alive():
            if time.monotonic() - self._began > TIMEOUT_S:
                self._saving = None
                minutes = f'{TIMEOUT_S / 60:.3g} minutes'
                failure = self._failure(self._step, f'it is still being written after {minutes}')
                _leave_without_waiting(failure.status)
                raise failure
            return
        self._saving = None
        if self._error is not None:
            raise self._failure(self._step, storage.reason(self._error)) from self._error

    def wait(self) -> None:
        """Waits until everything is stored; raises UserError if that fails or takes too long."""
        while self._saving is not None:
            left = self._began + TIMEOUT_S - time.monotonic()
            self._saving.join(max(left, 0) + 0.001)
            self.check()

    def timings(self) -> dict[str, float]:
        """Seconds of the latest finished save, blocked and in total; reported only once."""
        if self._saving is not None and self._saving.is_alive():
            return {}
        timings, self._timings = self._timings, {}
        return timings

    def _failure(self, step: int, why: str) -> UserError:
        try:
            saved = steps(self._workdir)
            last = f'the last good one is step {saved[-1]}' if saved else 'there is no earlier one'
        except Exception as error:
            last = f'which ones there are cannot be seen ({storage.reason(error)})'
        kind = failure_at(self._folder, self._error or TimeoutError())
        return kind(
            f'{self._folder}: saving the checkpoint of step {step} failed: {why}; {last}. '
            'Make room or repair it, and start the same command again: it resumes there'
        )

    def __enter__(self) -> 'Manager':
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self.wait()
        except UserError as error:
            if kind is None:
                raise
            print(f'WARNING: {error}', file=sys.stderr)
        finally:
            # After a failed save Orbax's own close may wait forever.
            closer = threading.Thread(target=self._close, daemon=True)
            closer.start()
            closer.join(timeout=10)

    def _close(self) -> None:
        with contextlib.suppress(Exception):
            self._writer.close()


def _leave_without_waiting(status: int) -> None:
    """Lets the process exit although a thread of Orbax hangs, which Python would wait for."""

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    # Must run before the exit handlers of concurrent.futures, which wait; those of `atexit` run
    # after them. Hence the private function.
    threading._register_atexit(leave)  # type: ignore[attr-defined]


def restore(workdir: Place, step: int, abstract_state: State) -> State:
    """Restores a checkpoint with the shapes, dtypes and shardings of `abstract_state`.

    A frozen teacher is not in it: see `state.to_save`.

    All processes must call it: if one cannot read its part, all of them fail.

    Raises:
      UserError: the checkpoint is of another architecture.
      CorruptCheckpointError: it is unreadable, or its bits are not those that were saved.
    """
    where, abstract_state = _folder(workdir, step), to_save(abstract_state)
    sidecar = _read_sidecar_everywhere(workdir, step)
    check_leaves(sidecar, abstract_state, str(where))
    with _silence_orbax():
        import orbax.checkpoint as ocp

        problem = ''
        try:
            # Not a Checkpointer: on exit it waits for all processes, even one that has failed.
            state = ocp.StandardCheckpointHandler().restore(
                where / 'state', args=ocp.args.StandardRestore(abstract_state, strict=False)
            )
        except Exception as error:
            problem = f'{where}: cannot be read: {storage.reason(error)}'
    problem = _first_problem(problem)
    if problem:
        raise CorruptCheckpointError(problem)
    _check_hashes(hashes_of(state), sidecar, where)
    return state


def _read_sidecar_everywhere(workdir: Place, step: int) -> dict[str, Any]:
    problem = ''
    try:
        sidecar = read_sidecar(workdir, step)
    except CorruptCheckpointError as error:
        problem = str(error)
    problem = _first_problem(problem)
    if problem:
        raise CorruptCheckpointError(problem)
    return sidecar


def scored_part(sidecar: dict[str, Any]) -> str:
    """Part of the state to evaluate: 'ema' where there are averaged parameters, or 'params'."""
    averaged = any(name.startswith('ema/') for name in sidecar['leaves'])
    return 'ema' if averaged else 'params'


def save_params(
    out: Place,
    params: Any,
    step: int,
    config: dict[str, Any],
    class_names: Sequence[str] | None = None,
) -> epath.Path:
    """Makes a workdir whose only checkpoint holds these parameters, in float32.

    Args:
      out: the workdir.
      params: parameters.
      step: step of the checkpoint.
      config: config that describes the model.
      class_names: as for `Manager`.

    Returns:
      The workdir as a path.

    Raises:
      UserError: the folder already has checkpoints, or cannot be written.
    """
    workdir = storage.place(out)
    check_place(workdir, '--out')
    float32_params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float32)), params)
    with ownership.own(workdir, '--out'):
        if steps(workdir):
            raise UserError(
                f'--out {workdir}: there are checkpoints in it already; name another folder'
            )
        with Manager(workdir, keep_last=1, class_names=class_names) as manager:
            step_leaf = jnp.asarray(step, jnp.int32)
            manager.save({'params': float32_params, 'step': step_leaf}, config, {})
    return workdir


def load_params(
    workdir: Place, step: int, which: str = 'params'
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loads parameters without a config, mesh or accelerator.

    Args:
      workdir: folder of the run.
      step: step of the checkpoint.
      which: 'params', or 'ema' for the averaged parameters.

    Returns:
      (parameters as nested NumPy arrays, sidecar).

    Raises:
      UserError: the checkpoint has no such part.
      CorruptCheckpointError: it is unreadable, or its bits are not those that were saved.
    """
    where = _folder(workdir, step)
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
    with _silence_orbax():
        import orbax.checkpoint as ocp

        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        request = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                tree = reader.restore(where / 'state', args=request)
        except Exception as error:
            raise CorruptCheckpointError(
                f'{where}: cannot be read: {storage.reason(error)}'
            ) from error
    flat = trees.flatten(tree)
    # The hash of an array says nothing of its shape.
    unlike = [
        name
        for name, like in trees.flatten(wanted).items()
        if name not in flat or (flat[name].shape, flat[name].dtype) != (like.shape, like.dtype)
    ]
    if unlike:
        raise CorruptCheckpointError(f'{where}: {unlike[0]} is not what was saved')
    _check_hashes({name: hash_array(leaf) for name, leaf in flat.items()}, sidecar, where)
    return tree[which], sidecar


def _check_hashes(actual: dict[str, str], sidecar: dict[str, Any], where: epath.Path) -> None:
    wrong = [name for name in actual if actual[name] != sidecar['leaves'][name]['hash']]
    if wrong:
        raise CorruptCheckpointError(
            f'{where}: {len(wrong)} of {len(actual)} arrays are not what was saved, '
            f'first {wrong[0]}'
        )
