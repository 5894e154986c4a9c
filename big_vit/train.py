"""Pretrain: `python -m big_vit.train --config configs/x.py --config.lr=1e-3 --workdir W`.

    config -> mesh -> state -> data -> step -> metrics -> checkpoint

Started again on the same workdir it resumes, with the same batches.
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the imports that take their time.
    command_line.answer_help(command_line.train())

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath

from big_vit import (
    build,
    checkpoint,
    explain,
    hosts,
    metrics,
    origin,
    runtime,
    sample,
    scoring,
    state,
    steps,
    storage,
    switch,
    tracing,
)
from big_vit import config as config_lib
from big_vit.config import Config
from big_vit.data import pipeline
from big_vit.errors import UserError

# A run whose updates are all skipped is lost; this many in a row are no accident.
MAX_SKIPPED_IN_A_ROW = 20


# Before so many examples, a few damaged ones say nothing about the rest.
LEAST_EXAMPLES_FOR_A_RATE = 1000


class Diverged(UserError):
    """The updates of a run are skipped for good."""


class Damage:
    """How many damaged examples were replaced since this process started, of how many."""

    def __init__(self, most: float) -> None:
        self._most, self._replaced, self._seen = most, 0, 0

    def add(self, replaced: int, batch_size: int) -> None:
        """Counts a step.

        Raises:
          UserError: the share of damaged examples is above the one that is allowed.
        """
        self._replaced += replaced
        self._seen += batch_size
        enough = self._seen >= LEAST_EXAMPLES_FOR_A_RATE
        if enough and self._replaced > self._most * self._seen:
            raise UserError(
                f'{self._replaced} of the last {self._seen} examples were damaged and replaced, '
                f'more than data.max_error_rate={self._most:g}: repair the data '
                "(data.on_error='stop' names the first of them)"
            )


class Result(NamedTuple):
    """How a run ended: at which step, with which newest metrics, and whether a signal ended it."""

    step: int
    metrics: dict[str, float]
    stopped: bool


def open_workdir(
    path: str | os.PathLike[str], config: Config, like: state.State, force: bool
) -> epath.Path:
    """Creates the workdir, or checks that the one there belongs to this config.

    Every process checks, process 0 writes.

    Args:
      path: a local folder, or a place in an object store such as gs://bucket/run.
      like: abstract state, which the checkpoints there must fit.
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
        there = file.read_text() if file.exists() else None
    except Exception as error:  # The errors of object stores have no class in common.
        if storage.is_local(workdir) and not isinstance(error, OSError):
            raise
        raise UserError(f'--workdir: cannot write to {workdir}: {storage.reason(error)}') from error
    if there is not None:
        try:
            old = json.loads(there)
        except ValueError as error:
            raise UserError(f'{file}: is not JSON ({error}); use another --workdir') from None
        changes = config_lib.difference(old, dump)
        refused = [line for line in changes if not line.startswith(config_lib.RESUMABLE)]
        if refused and not force:
            raise UserError(
                f'--workdir: {workdir} holds a run of another config ({"; ".join(refused[:8])}); '
                'use another --workdir, or --force to go on with the new config'
            )
        if changes:
            print(f'config  changed since the last start: {"; ".join(changes)}', flush=True)
    for step in checkpoint.steps(workdir)[-1:]:
        with contextlib.suppress(checkpoint.CorruptCheckpointError):  # `restore_newest` tells.
            sidecar = checkpoint.read_sidecar(workdir, step)
            checkpoint.check_leaves(sidecar, like, f'{workdir}/checkpoints/{step}')
    if jax.process_index() == 0:
        storage.write_text(file, json.dumps(dump, indent=2) + '\n')
    return workdir


def restore_newest(workdir: epath.Path, like: state.State) -> state.State | None:
    """The newest checkpoint that is intact; None where there is none at all.

    Damaged ones are moved to WORKDIR/damaged, out of the way of the new ones, once a
    good one is found.

    Raises:
      UserError: there are checkpoints, but none can be read.
    """
    found, damaged = checkpoint.steps(workdir), []
    for step in reversed(found):
        try:
            good = checkpoint.restore(workdir, step, like)
        except checkpoint.CorruptCheckpointError as error:
            print(f'WARNING: {error}; falling back to the checkpoint before', file=sys.stderr)
            damaged.append(step)
            continue
        for bad in damaged:
            checkpoint.set_aside(workdir, bad)
        return good
    if found:
        raise UserError(
            f'{workdir}/checkpoints: none of the checkpoints of steps {found} can be read; '
            'use another --workdir to start afresh'
        )
    return None


def report(
    step: int,
    values: steps.Metrics,
    config: Config,
    parts: build.Experiment,
    writer: metrics.Writer,
    console: metrics.Console,
    clock: metrics.Clock,
    manager: checkpoint.Manager,
    meter: pipeline.Meter,
    damage: Damage,
    peak_flops: float,
) -> None:
    """Writes the metrics of a step that is over, if it is one to log, and tells of skipped ones.

    Raises:
      UserError: the last updates were all skipped, and names the examples; or too many examples
        are damaged.
    """
    if 'replaced' in values:
        damage.add(int(jax.device_get(values['replaced'])), parts.batch_size)
    skipped_in_a_row = int(jax.device_get(values['skipped_in_a_row']))
    if skipped_in_a_row:
        examples = ', '.join(map(str, build.example_indices(parts, step - 1)[:16]))
        if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise Diverged(
                f'the last {MAX_SKIPPED_IN_A_ROW} updates up to step {step} were skipped: the loss '
                f'or the gradient is not finite; lower lr, or look at the examples {examples}, ...'
            )
        loss, norm = (float(jax.device_get(values[name])) for name in ('loss', 'grad_norm'))
        spikes = [
            f'the {what} lies over {config.skip_sigmas:g} standard deviations above the last ones'
            for name, what in (('loss', 'loss'), ('grad_norm', 'gradient norm'))
            if bool(jax.device_get(values[f'{name}_spike']))
        ]
        console.say(
            f'WARNING step {step}: update skipped, loss {loss:.4g}, gradient norm {norm:.4g}: '
            f'{" and ".join(spikes) or "not finite"}; its examples: {examples}, ...'
        )
    if not build.is_due(parts.due.log, step, parts.total_steps):
        return
    row = {f'train/{name}': float(value) for name, value in jax.device_get(values).items()}
    for name in ('skipped_in_a_row', 'loss_spike', 'grad_norm_spike'):
        del row[f'train/{name}']
    row |= clock.window(
        batch_size=parts.batch_size,
        flops_per_example=parts.flops_per_example,
        peak_flops=peak_flops,
        steps_left=parts.total_steps - step,
        loader_rate=meter.rate(),
    )
    row |= manager.timings()
    writer.write(step, row)
    console.training(step, row)


def run(
    config: Config,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    params: Callable[[build.Experiment], Any] | None = None,
    label: str = 'train',
) -> Result:
    """Trains to the end, or resumes and trains to the end; `transfer` walks the same path.

    Args:
      path: the workdir; with several processes, one that all of them see.
      force: go on although the workdir holds another config.
      params: what gives the NumPy parameters to start from instead of random ones.
      label: what the progress lines are called.

    Raises:
      UserError: whatever the user can fix, before anything is compiled where it can be known.
    """
    began = time.perf_counter()
    parts = build.experiment(config)
    train_step, evaluators = build.train_step(config, parts), scoring.evaluators(config, parts)
    log_targets, came_from, traced = build.log_targets(config), config.switch, config.profile
    damage = Damage(config.data.max_error_rate if parts.data.skip_bad else 1.0)
    config.audit()
    fresh = params is not None and not checkpoint.steps(storage.place(path))
    first = params(parts) if fresh and params is not None else None
    hosts.lead(lambda: str(open_workdir(path, config, parts.like, force)))
    workdir = storage.place(path)
    hosts.check_shared(workdir)
    hosts.saves_in(lambda: checkpoint.steps(workdir))
    due, total, dump = parts.due, parts.total_steps, config.to_dict()
    active = jax.process_index() == 0

    with jax.set_mesh(parts.mesh):
        now = restored = restore_newest(workdir, parts.like)
        if now is None:
            shape, seed = parts.data.inputs, config.seed
            if came_from:
                now = switch.state_of(came_from, config, parts)
            else:
                now = state.create(parts.model, shape, parts.optimizer, seed, parts.like, first)
        start = int(now['step'])
        clock, stopped = metrics.Clock(), False
        pending: list[tuple[int, steps.Metrics]] = []
        with (
            checkpoint.Manager(workdir, due.keep_last, due.keep) as manager,
            metrics.Writer(workdir, start, active=active, config=dump, **log_targets) as writer,
            metrics.Console(total, start, label=label, active=active) as console,
            runtime.stop_signals() as stop,
            build.train_batches(config, parts, start) as batches,
            tracing.tracer(workdir / 'trace', start, traced, console.say) as trace,
        ):
            peak, peak_source = runtime.device_peak_flops()
            peak *= parts.mesh.size
            console.say(f'run     {runtime.preflight()}', *explain.summary(config, parts))
            console.say(f'MFU     relative to {peak / 1e12:.2f} TFLOP/s ({peak_source})')
            if restored is not None:
                console.say(f'resume  from step {start} of {workdir}')
            elif came_from:
                console.say(f'switch  from step {start} of {came_from}')
            if writer.tracked:
                few = sample.first(parts.data, 32)
                writer.pictures(start, 'train/images', sample.pictures(few))
            if start < total:
                compiling = time.perf_counter()
                # Compiled ahead, the step cannot compile again later: another shape is an error.
                train_step = train_step.lower(now, build.abstract_batch(parts)).compile()
                console.say(f'compile {time.perf_counter() - compiling:.1f}s')
            clock.add('start', time.perf_counter() - began)

            def write_pending() -> None:
                if pending:
                    step, values = pending.pop()
                    report(
                        step,
                        values,
                        config,
                        parts,
                        writer,
                        console,
                        clock,
                        manager,
                        batches.meter,
                        damage,
                        peak,
                    )

            # The order is fixed: evaluate, save, next batch, step, write. So a checkpoint
            # never misses a metric of its step, and no batch is drawn that a stop would lose.
            with jax.transfer_guard('disallow'):
                for step in range(start, total + 1):
                    if step > start:
                        stopped = stop(step) and step < total
                        evals = [n for n, k in due.evals.items() if build.is_due(k, step, total)]
                        save = stopped or step == total or build.is_due(due.save, step, total)
                        if evals or save:
                            with clock.bucket('step'):
                                jax.block_until_ready([values for _, values in pending])
                            write_pending()
                        shared: scoring.Shared = {}
                        for name in evals:
                            with clock.bucket('eval'):
                                scores = evaluators[name](now.get('ema', now['params']), shared)
                            writer.write(step, {f'{name}/{k}': v for k, v in scores.items()})
                            console.evaluation(step, name, scores)
                            hosts.progress(step)
                        if save:
                            with clock.bucket('save'):
                                writer.flush()  # A checkpoint promises the rows before it.
                                manager.save(now, dump, writer.latest)
                        if stopped:
                            break
                    if step == total:
                        break
                    trace(step, [values for _, values in pending])
                    with clock.bucket('data'):
                        batch = next(batches)
                    with clock.bucket('step'), tracing.step(step):
                        now, values = train_step(now, batch)
                        if pending:  # One step in flight: the devices never wait for the host.
                            jax.block_until_ready(pending[0][1])
                            hosts.progress(step)
                    clock.count_step()
                    manager.check()
                    write_pending()
                    pending.append((step + 1, values))
                    console.step(step + 1)
            with clock.bucket('save'):
                manager.wait()
            end = int(jax.device_get(now['step']))
            writer.checkpoint(workdir / 'checkpoints' / str(end), end)
            console.say(f'time    {clock.summary()}')
            if stopped:
                last = f'stopped by a signal: saved step {end} of {total}; '
                last += 'the same command resumes there'
            else:
                last = f'done    step {end}, checkpoint {workdir}/checkpoints/{end}'
            # On all hosts: what supervises one of them must know whether to start it again.
            (console.say if active else print)(last)
            return Result(end, dict(writer.latest), stopped)


def main(argv: list[str]) -> None:
    args, overrides = command_line.parse(command_line.train(), argv)
    spec = command_line.require_flag(args.config, '--config', 'configs/fashion_mnist.py')
    config = config_lib.load(spec, overrides)
    runtime.start()
    if args.explain:
        print(explain.page(config))
        return
    workdir = command_line.require_flag(args.workdir, '--workdir', 'runs/first')
    same = {'config': config_lib.digest(config), 'workdir': workdir}
    with hosts.session(args.distributed, same):
        params = origin.starting(config, keep_head=True) if config.init else None
        run(config, workdir, force=args.force, params=params)


if __name__ == '__main__':
    runtime.command(main)
