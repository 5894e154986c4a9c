"""Pretrain: `python -m big_vit.train --config configs/x.py --config.lr=1e-3 --workdir W`.

    config -> mesh -> state -> data -> step -> metrics -> checkpoint

Started again on the same workdir, a run resumes with the same batches.
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the slow imports.
    command_line.answer_help(command_line.train())

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from etils import epath

from big_vit import (
    checkpoint,
    explain,
    interop,
    metrics,
    ownership,
    resumption,
    runtime,
    state,
    storage,
    training_loop,
)
from big_vit import config as config_lib
from big_vit.build.evaluations import build_evaluators, check_chosen
from big_vit.build.experiment import (
    Experiment,
    abstract_batch,
    build_experiment,
    fresh_state,
    tracker_options,
    train_batches,
)
from big_vit.build.steps import build_train_step
from big_vit.config import Config
from big_vit.distributed import hosts
from big_vit.errors import UserError
from big_vit.inspection import examples
from big_vit.journal import Choice, Damage, RunJournal, max_damage_rate
from big_vit.metrics import profiler
from big_vit.pretrained import switch_optimizer
from big_vit.pretrained.load import continued
from big_vit.pretrained.standardise import start_params
from big_vit.pretrained.teacher import load_teacher
from big_vit.workdir import check_workdir, known_classes, owned, restore_newest, write_config


class Result(NamedTuple):
    """The last step of a run, its newest metrics, and whether a signal ended it there."""

    step: int
    metrics: dict[str, float]
    stopped: bool


def run(
    config: Config,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    params: Callable[[Experiment], Any] | None = None,
    label: str = 'train',
) -> Result:
    """Train to the last step, resuming where the workdir has a checkpoint.

    Args:
      path: the workdir; with several processes, one that all of them see.
      force: go on although the workdir holds another config.
      params: gives the NumPy parameters to start from instead of random ones.
      label: name of the run on its progress lines.

    Raises:
      UserError: anything the user can fix, before anything is compiled where it can be known.
    """
    began = time.perf_counter()
    config_lib.check_names(config.evals)
    before = resumption.begun(path, config)
    seen = None if before is None else before.seen
    parts = build_experiment(config, known=known_classes(path, config, force), seen=seen)
    train_step, evaluators = build_train_step(config, parts), build_evaluators(config, parts)
    damage = Damage(max_damage_rate(config, parts))
    trackers, profiled, _ = tracker_options(config), config.profile, config.switch
    check_choice(config, parts)
    config.audit()  # Every key that is set must have been read by now.
    begun = checkpoint.steps(storage.place(path))
    first = None if params is None or begun else params(parts)
    total, intervals, clock = parts.total_steps, parts.intervals, metrics.Clock()
    active, dump = jax.process_index() == 0, config.to_dict()

    with shared_workdir(path, config, parts, force) as workdir, jax.set_mesh(parts.mesh):
        hosts.connect(parts.mesh)
        now, origin = starting_state(config, parts, workdir, first)
        start = int(now['step'])
        resumption.check(before, workdir, start)
        choice = choice_of(config, workdir, start)
        if choice is not None and hosts.lead(choice.is_over):
            total = start
        with (
            checkpoint.Manager(
                workdir,
                intervals.keep_last,
                intervals.keep,
                parts.class_names,
                resumption.ledgers(parts),
            ) as manager,
            metrics.Writer(workdir, start, active=active, config=dump, **trackers) as writer,
            metrics.Console(
                total, start, label=label, headline=parts.task.headline, active=active
            ) as console,
            runtime.stop_signals(ownership.ending) as stop,
            train_batches(config, parts, start) as batches,
            profiler.tracer(workdir / 'trace', start, profiled, console.say) as trace,
        ):
            peak_flops = introduce(config, parts, origin, console)
            console.say(*resumption.changes(before, config, parts))
            write_first_examples(parts, start, writer)
            if start < total:
                train_step = compile_step(train_step, now, parts, console)
            if active:
                write_config(workdir, config)  # Not before: a start that fails changes nothing.
            clock.add('start', time.perf_counter() - began)
            journal = RunJournal(
                config, parts, peak_flops, damage,
                clock, writer, console, manager, batches.meter, choice,
                metrics.Collapse(writer.rows),
            )  # fmt: skip
            outcome = training_loop.run(
                now, start, total, intervals, journal,
                evaluate=lambda name, now, shared: evaluators[name](
                    now.get('ema', now['params']), shared
                ),
                batches=batches, train_step=train_step, stop=stop, trace=trace,
            )  # fmt: skip
            return finish(outcome, journal, workdir)


def check_choice(config: Config, parts: Experiment) -> None:
    """Check the keys that choose a checkpoint, and may end the run.

    Raises:
      UserError: no evaluation measures the metric, or there is none to wait for.
    """
    metric, patience = config.checkpoint.best, config.early_stopping.patience
    if metric:
        check_chosen(config, parts, 'checkpoint.best', metric)
    elif patience:
        raise UserError(
            'config: early_stopping.patience counts evaluations without a better checkpoint: say '
            'by which metric, as in --config.checkpoint.best=val/top1'
        )


def choice_of(config: Config, workdir: epath.Path, start: int) -> Choice | None:
    """Make the choice that `checkpoint.best` asks for, with the scores up to the start."""
    if not config.checkpoint.best:
        return None
    rows = metrics.read(workdir, strict=False)
    return Choice(config, rows, start, checkpoint.steps(workdir))


@contextlib.contextmanager
def shared_workdir(
    path: str | os.PathLike[str], config: Config, parts: Experiment, force: bool
) -> Iterator[epath.Path]:
    """Context in which process 0 owns the workdir, which is the same one for every process."""
    with owned(path) as workdir:
        hosts.lead(lambda: check_workdir(workdir, config, parts.abstract_state, force))
        hosts.check_shared(workdir)
        hosts.register_saved_steps(lambda: checkpoint.steps(workdir))
        yield workdir


def starting_state(
    config: Config, parts: Experiment, workdir: epath.Path, params: Any
) -> tuple[state.State, str]:
    """Restore the newest checkpoint, or take over another run's state, or create a new one.

    Args:
      params: NumPy parameters of a new state; None for random ones.

    Returns:
      The state, and a console line that says where it comes from, '' for a new one.
    """
    teacher = parts.teacher
    frozen = {} if teacher is None else {'teacher': load_teacher(config, teacher, workdir)}
    restored = restore_newest(workdir, parts.abstract_state)
    if restored is not None:
        return {**restored, **frozen}, f'resume  from step {int(restored["step"])} of {workdir}'
    if config.switch:
        switched = switch_optimizer.state_of(config.switch, config, parts)
        line = f'switch  from step {int(switched["step"])} of {config.switch}'
        return {**switched, **frozen}, line
    return {**continued(config, parts, fresh_state(parts, config.seed, params)), **frozen}, ''


def introduce(
    config: Config, parts: Experiment, origin: str, console: metrics.Console
) -> float | None:
    """Say what is about to run, and where it starts.

    Returns:
      The peak operations per second of all devices together, which MFU is relative to; None on a
      CPU, which has other work to do.
    """
    console.say(f'run     {runtime.preflight()}', *explain.summary(config, parts))
    peak_flops = None
    if jax.default_backend() != 'cpu':
        of_one, source = runtime.device_peak_flops()
        peak_flops = of_one * parts.mesh.size
        console.say(f'MFU     relative to {peak_flops / 1e12:.2f} TFLOP/s ({source})')
    if origin:
        console.say(origin)
    return peak_flops


def write_first_examples(parts: Experiment, start: int, writer: metrics.Writer) -> None:
    """Show the trackers, where there are any, the first training images."""
    if writer.tracked:
        few = examples.first_examples(parts.data, 32)
        writer.pictures(start, 'train/images', examples.pictures(few))


def compile_step(
    train_step: Any, now: state.State, parts: Experiment, console: metrics.Console
) -> Any:
    """Compile the step ahead, so that it cannot compile again later: another shape is an error."""
    began = time.perf_counter()
    compiled = train_step.lower(now, abstract_batch(parts)).compile()
    console.say(f'compile {time.perf_counter() - began:.1f}s')
    hosts.gather('compiled')  # Who had it in its cache waits here, and not in a collective.
    return compiled


def finish(outcome: training_loop.Outcome, journal: RunJournal, workdir: epath.Path) -> Result:
    """Wait for the last checkpoint, and say where it is."""
    clock, console, writer = journal.clock, journal.console, journal.writer
    with clock.bucket('save'):
        journal.manager.wait()
    end = int(jax.device_get(outcome.state['step']))
    writer.checkpoint(workdir / 'checkpoints' / str(end), end)
    console.say(f'time    {clock.summary()}')
    if line := journal.damage.line(
        journal.meter.damaged, journal.parts.data.source, journal.meter.lost
    ):
        console.say(line)
    if outcome.stopped:
        training_loop.say_stopped(end, journal.parts.total_steps, console)
    else:
        # On all hosts: a supervisor of any one of them must know whether to start it again.
        if journal.choice is not None:
            console.say(*journal.choice.lines(end, journal.parts.total_steps, workdir))
        last = f'done    step {end}, checkpoint {workdir}/checkpoints/{end}'
        (console.say if jax.process_index() == 0 else print)(last)
    return Result(end, dict(writer.latest), outcome.stopped)


def run_sweep(config: Config, args: argparse.Namespace, same: dict[str, str]) -> None:
    """Train settings and seeds, and choose among them, as the command line says."""
    from big_vit.sweeps import sweep  # Not above: trials are trained by this module.

    place = storage.place(args.workdir)
    with hosts.session(args.distributed, same):
        interop.recall(args.workdir)
        results = sweep.run(
            config,
            place,
            args.sweep,
            args.seeds or 1,
            args.at_once,
            args.force,
            recipe=sweep.TRAIN,
        )
        first = jax.process_index() == 0
    if results is not None and first:
        sweep.show(config, place, results)


def main(argv: list[str]) -> None:
    args, overrides = command_line.parse(command_line.train(), argv)
    config = config_lib.load(args.config, overrides)
    runtime.start()
    if args.explain:
        print(explain.page(config))
        return
    same = {'config': config_lib.digest(config), 'workdir': args.workdir}
    if args.sweep or args.seeds:
        run_sweep(config, args, {**same, 'sweep': f'{args.sweep} x {args.seeds}'})
        return
    with hosts.session(args.distributed, same):
        interop.recall(args.workdir)
        params = start_params(config, keep_head=True)
        run(config, args.workdir, force=args.force, params=params)


if __name__ == '__main__':
    runtime.command(main)
