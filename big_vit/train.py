"""Pretrain: `python -m big_vit.train --config configs/x.py --config.lr=1e-3 --workdir W`.

    config -> mesh -> state -> data -> step -> metrics -> checkpoint

Started again on the same workdir it resumes, with the same batches.
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the imports that take their time.
    command_line.answer_help(command_line.train())

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from big_vit import checkpoint, explain, metrics, runtime, state, steps, storage
from big_vit import config as config_lib
from big_vit.build.evaluations import SharedFeatures, build_evaluators
from big_vit.build.experiment import (
    Experiment,
    abstract_batch,
    build_experiment,
    example_indices,
    is_due,
    tracker_options,
    train_batches,
)
from big_vit.build.steps import build_train_step
from big_vit.config import Config
from big_vit.data import pipeline
from big_vit.distributed import hosts
from big_vit.errors import UserError
from big_vit.inspection import examples
from big_vit.metrics import profiler
from big_vit.pretrained import switch_optimizer
from big_vit.pretrained.load import initial_params
from big_vit.workdir import open_workdir, restore_newest

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


def report(
    step: int,
    values: steps.Metrics,
    config: Config,
    parts: Experiment,
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
        examples = ', '.join(map(str, example_indices(parts, step - 1)[:16]))
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
    if not is_due(parts.intervals.log, step, parts.total_steps):
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
    params: Callable[[Experiment], Any] | None = None,
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
    parts = build_experiment(config)
    train_step, evaluators = build_train_step(config, parts), build_evaluators(config, parts)
    log_targets, came_from, traced = tracker_options(config), config.switch, config.profile
    damage = Damage(config.data.max_error_rate if parts.data.skip_bad else 1.0)
    config.audit()
    fresh = params is not None and not checkpoint.steps(storage.place(path))
    first = params(parts) if fresh and params is not None else None
    hosts.lead(lambda: str(open_workdir(path, config, parts.abstract_state, force)))
    workdir = storage.place(path)
    hosts.check_shared(workdir)
    hosts.saves_in(lambda: checkpoint.steps(workdir))
    intervals, total, dump = parts.intervals, parts.total_steps, config.to_dict()
    active = jax.process_index() == 0

    with jax.set_mesh(parts.mesh):
        now = restored = restore_newest(workdir, parts.abstract_state)
        if now is None:
            shape, seed = parts.data.inputs, config.seed
            if came_from:
                now = switch_optimizer.state_of(came_from, config, parts)
            else:
                now = state.create(
                    parts.model, shape, parts.optimizer, seed, parts.abstract_state, first
                )
        start = int(now['step'])
        clock, stopped = metrics.Clock(), False
        pending: list[tuple[int, steps.Metrics]] = []
        with (
            checkpoint.Manager(workdir, intervals.keep_last, intervals.keep) as manager,
            metrics.Writer(workdir, start, active=active, config=dump, **log_targets) as writer,
            metrics.Console(total, start, label=label, active=active) as console,
            runtime.stop_signals() as stop,
            train_batches(config, parts, start) as batches,
            profiler.tracer(workdir / 'trace', start, traced, console.say) as trace,
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
                few = examples.first_examples(parts.data, 32)
                writer.pictures(start, 'train/images', examples.pictures(few))
            if start < total:
                compiling = time.perf_counter()
                # Compiled ahead, the step cannot compile again later: another shape is an error.
                train_step = train_step.lower(now, abstract_batch(parts)).compile()
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
                        evals = [n for n, k in intervals.evals.items() if is_due(k, step, total)]
                        save = stopped or step == total or is_due(intervals.save, step, total)
                        if evals or save:
                            with clock.bucket('step'):
                                jax.block_until_ready([values for _, values in pending])
                            write_pending()
                        shared: SharedFeatures = {}
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
                    with clock.bucket('step'), profiler.step(step):
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
        params = initial_params(config, keep_head=True) if config.init else None
        run(config, workdir, force=args.force, params=params)


if __name__ == '__main__':
    runtime.command(main)
