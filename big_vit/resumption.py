"""Going on with a run under another config: where in the data, and at what rate."""

import contextlib
import os
from typing import Any, NamedTuple

from big_vit import checkpoint, storage
from big_vit import config as config_lib
from big_vit.build.experiment import Experiment, Seen
from big_vit.build.optimizer import rate_schedule, run_length
from big_vit.config import Config
from big_vit.data import shard_ledger
from big_vit.errors import UserError

# What the order of examples depends on, and what the rate does.
_ORDER = ('seed', 'data.', 'mixture.')
_NOT_ORDER = ('data.transform', 'data.workers', 'data.cache', 'data.on_error', 'data.max_error')
_RATE = ('total_', 'batch_size', 'lr:', 'schedule.')


class Begun(NamedTuple):
    """A run that is gone on with: how far it is, and its config until now, as dumped."""

    seen: Seen
    config: dict[str, Any]


def begun(path: str | os.PathLike[str], config: Config) -> Begun | None:
    """Read how far the run of a workdir is, or the one that `config.switch` names; None if new.

    It is the newest checkpoint whose sidecar can be read; see `check` for the others.
    """
    try:
        workdir = storage.place(path)
        steps = checkpoint.steps(workdir)
    except Exception:  # `check_workdir` says what is wrong with the folder.
        return None
    if not steps and config.switch:
        workdir, step = checkpoint.locate(config.switch, 'config: switch')
        steps = [step]
    for step in reversed(steps):
        with contextlib.suppress(checkpoint.CorruptCheckpointError):
            sidecar = checkpoint.read_sidecar(workdir, step)
            kept = {key: shard_ledger.parse(x) for key, x in sidecar.get('shards', {}).items()}
            return Begun(Seen(step, _position(sidecar), kept), sidecar['config'])
    return None


def _position(sidecar: dict[str, Any]) -> int:
    saved = sidecar['config']
    each = saved['batch_size'] // saved['data'].get('repeats', 1)
    return sidecar.get('position', sidecar['step'] * each)


def position(parts: Experiment, step: int) -> int | None:
    """Return what the sidecar of a step says of the data's order; None where the step says it."""
    order = parts.data.order
    assert order is not None
    return order.shift + step * order.positions if order.shift else None


def check(run: Begun | None, workdir: str | os.PathLike[str], step: int) -> None:
    """Check that a run goes on where `begun` said, also if its newest checkpoint was damaged.

    Raises:
      UserError: the batch size has changed since the checkpoint that it has to go on from.
    """
    if run is None or run.seen.step == step or step not in checkpoint.steps(workdir):
        return
    sidecar, saved = checkpoint.read_sidecar(workdir, step), run.config
    each = saved['batch_size'] // saved['data'].get('repeats', 1)
    if _position(sidecar) - step * each != run.seen.position - run.seen.step * each:
        raise UserError(
            f'{workdir}: the newest checkpoint was damaged and is set aside; start the same '
            f'command again, to count the examples from step {step}'
        )


def changes(run: Begun | None, config: Config, parts: Experiment) -> list[str]:
    """Say what a changed config repeats or skips, and what it does to the learning rate."""
    if run is None:
        return []
    at, order = run.seen.position, parts.data.order
    changed = config_lib.difference(run.config, config.to_dict())
    assert order is not None
    lines = []
    if any(line.startswith('batch_size') for line in changed):
        epochs = at / parts.data.source.length
        lines.append(
            f'batch   {run.config["batch_size"]} -> {config.batch_size} examples: goes on at '
            f'position {at:,} of the data ({epochs:.2f} epochs), so none is repeated or skipped; '
            'lr is not scaled'
        )
    told, is_same = _shard_changes(run, parts)
    lines += told
    moved = any(line.startswith(_ORDER) and not line.startswith(_NOT_ORDER) for line in changed)
    if moved or not is_same:
        lines.append(
            f'data    in another order from position {at:,} on: of the epoch that was begun, '
            'examples may come twice or not at all'
        )
    if any(line.startswith(_RATE) for line in changed):
        lines += _rate_lines(run, config, parts)
    return lines


def ledgers(parts: Experiment) -> dict[str, Any]:
    """Return what the sidecar of a checkpoint says of the shards of the data."""
    return {key: ledger.dump() for key, ledger in parts.data.ledgers.items()}


def _shard_changes(run: Begun, parts: Experiment) -> tuple[list[str], bool]:
    """Return (what happened to shards, whether the examples still come in the same order)."""
    assert parts.data.order is not None
    now, before = parts.data.ledgers, run.seen.ledgers
    if not before:  # Of a version that kept none, in which all was shuffled together.
        return [], not parts.data.order.shards
    found = {key: shard_ledger.changes(old, now.get(key)) for key, old in before.items()}
    lines = [
        f'data    {f"{key}: " if key != "data" else ""}{text}'
        for key, (told, _) in found.items()
        for text in told
    ]
    return lines, all(is_same for _, is_same in found.values())


def _rate_lines(run: Begun, config: Config, parts: Experiment) -> list[str]:
    step, at, source = run.seen.step, run.seen.position, parts.data.source
    try:
        old = config_lib.from_json(run.config)
        ahead = at * old.data.repeats / old.batch_size - step
        total = run_length(old, source, ahead)
        if total is None:
            return []
        before = float(rate_schedule(old, source, total, ahead=ahead)(step))
    except UserError:  # Of another version, or its schedule does not fit other data.
        return []
    after, end = float(parts.schedule(step)), parts.total_steps
    moved = 'goes on at' if abs(after - before) <= 1e-3 * abs(before) else f'{before:.3e} ->'
    lines = [f'rate    {moved} {after:.3e} at step {step}']
    if end != total:
        lines.append(f'length  ends at step {end} instead of {total}')
    if end <= step:
        lines.append(f'length  step {step} is there already: nothing is left to train')
    return lines
