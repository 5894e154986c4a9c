"""Trials that differ in learning rate and seed alone, trained at once in one program.

The step of `train.run` under `jax.vmap`: outside over seeds, which have batches of their own,
inside over rates, which share them. Arrays that no trial changes have no axis of trials, so a
frozen trunk computes its features once for all rates. Each trial leaves an ordinary workdir.
"""

import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from big_vit import checkpoint, ownership, runtime, sharding, state, training_loop, trees
from big_vit.build.evaluations import Evaluator, build_evaluators
from big_vit.build.experiment import (
    Experiment,
    abstract_batch,
    build_experiment,
    eval_batches,
    fresh_state,
    tracker_options,
    train_batches,
)
from big_vit.build.optimizer import Length, build_optimizer, rate_schedule
from big_vit.build.steps import build_train_step, build_update
from big_vit.config import Config
from big_vit.distributed import hosts
from big_vit.errors import UserError
from big_vit.evaluators import classification
from big_vit.evaluators.evaluation import BatchMeans, Sums
from big_vit.journal import Damage, max_damage_rate
from big_vit.optim import factory
from big_vit.sweeps.trial_journal import Place, Trial, TrialJournal
from big_vit.workdir import owned

# Share of a device's memory that trials may take together.
MEMORY_SHARE = 0.8
# Under vmap both branches of a condition are computed: their roots would be made at every step.
ONE_BY_ONE = ('shampoo', 'soap')
# The parts of a state that have a leaf for each parameter.
_PARAMETERS = ('params', 'ema')


class DoNotFit(Exception):
    """So many trials at once need more memory than there is."""


class Stopped(Exception):
    """A signal ended the trials; the same command resumes them."""


def memory_limit() -> int:
    """Return the bytes that trials may use on a device; on a CPU, a share of the free memory."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if 'bytes_limit' in stats:
        return int(MEMORY_SHARE * stats['bytes_limit'])
    free = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return int(MEMORY_SHARE * free / jax.local_device_count())


def bytes_needed(compiled: Any) -> int:
    """Return the bytes that a compiled step and its arguments take on each device."""
    stats = compiled.memory_analysis()
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return held + stats.temp_size_in_bytes


def _split(tree: Any, frozen: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split parameters into (those that are trained, those that are frozen), by path."""
    flat = trees.flatten(tree)
    trained = {name: leaf for name, leaf in flat.items() if name not in frozen}
    return trained, {name: leaf for name, leaf in flat.items() if name in frozen}


class VmappedTraining:
    """The train step and the evaluations of all trials in one program.

    Its states have leaves [seeds, rates, ...] of the trained parameters alone. Frozen parameters
    lie beside them, [seeds, ...], or without an axis where all seeds start from the same.

    Args:
      same_start: whether all seeds start from the same parameters.
    """

    def __init__(self, config: Config, parts: Experiment, same_start: bool):
        self.config, self.parts = config, parts
        self._frozen_paths = factory.frozen(parts.lr_factors)
        self._frozen_axis = None if same_start else 0
        self._shapes = state.abstract_params(parts.model, parts.data.inputs)
        self._length = Length(parts.data.source, parts.total_steps)
        self._unit_schedule = rate_schedule(config, parts.data.source, parts.total_steps, 1.0)
        self._replicated = sharding.replicated(parts.mesh)
        self._put: Callable[..., dict[str, Any]] | None = None

    def _joined(self, trained: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
        """Put the parameters of one trial back together."""
        flat = {**trained, **frozen}
        # In the order of the model's own tree, which sums over leaves depend on.
        return trees.unflatten(
            {name: flat[name] for name in trees.flatten(self.parts.abstract_state['params'])}
        )

    def _step(
        self,
        now: dict[str, Any],
        frozen: dict[str, Any],
        batch: dict[str, Array],
        seed: Int[Array, ''],
        rate: Float[Array, ''],
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Make one step of one trial."""

        def schedule(step: Any) -> Any:
            return rate * self._unit_schedule(step)

        mesh, length = self.parts.mesh, self._length
        optimizer = build_optimizer(self.config, self._shapes, schedule, mesh, length)
        step = build_update(self.config, self.parts, optimizer.transform, schedule, seed)
        joined: dict[str, Any] = {
            name: self._joined(now[name], frozen) for name in _PARAMETERS if name in now
        }
        new, values = step({**now, **joined}, batch)
        return {**new, **{n: _split(new[n], self._frozen_paths)[0] for n in joined}}, values

    def start(
        self, seeds: Sequence[int], rates: int, params: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Create the states at step 0, and the frozen parameters.

        Args:
          params: NumPy parameters to start from; None for random ones.
        """
        parts, paths = self.parts, self._frozen_paths
        created = [
            fresh_state(parts, seed, params)
            for seed in (seeds[:1] if self._frozen_axis is None else seeds)
        ]
        frozen = [_split(one['params'], paths)[1] for one in created]
        trained = [self.trained_part(one) for one in created]
        repeats = len(seeds) // len(created)

        def stacked(*leaves: Array) -> Array:
            by_seed = jnp.stack(leaves * repeats)[:, None]
            return jnp.broadcast_to(by_seed, (len(seeds), rates, *leaves[0].shape))

        where = jax.tree.map(lambda leaf: self._behind_axes(leaf, 2), trained[0])
        states = jax.jit(lambda t: jax.tree.map(stacked, *t), out_shardings=where)(trained)
        if self._frozen_axis is None:
            return states, frozen[0]
        with_seeds = jax.tree.map(lambda leaf: self._behind_axes(leaf, 1), frozen[0])
        return states, jax.jit(
            lambda f: jax.tree.map(lambda *leaves: jnp.stack(leaves), *f), out_shardings=with_seeds
        )(frozen)

    def trained_part(self, one: state.State) -> dict[str, Any]:
        """Take what a step changes from the state of one trial, as `states` have it."""
        paths = self._frozen_paths
        return {n: _split(x, paths)[0] if n in _PARAMETERS else x for n, x in one.items()}

    def with_trial(self, states: Any, one: state.State, seed: int, rate: int) -> dict[str, Any]:
        """Replace a trial's part of the states, which are donated; see `state_of`."""
        if self._put is None:

            def put(states: Any, one: Any, seed: Array, rate: Array) -> dict[str, Any]:
                return jax.tree.map(lambda all_, leaf: all_.at[seed, rate].set(leaf), states, one)

            where = jax.tree.map(lambda leaf: leaf.sharding, states)
            self._put = jax.jit(put, donate_argnums=0, out_shardings=where)
        at = jax.device_put((np.int32(seed), np.int32(rate)), self._replicated)
        return self._put(states, self.trained_part(one), *at)

    def _behind_axes(self, leaf: Array, axes: int) -> NamedSharding:
        """Shard a leaf as it is, behind leading axes of trials, which are not sharded."""
        assert isinstance(leaf.sharding, NamedSharding)
        return NamedSharding(self.parts.mesh, PartitionSpec(*(None,) * axes, *leaf.sharding.spec))

    def compile_step(self, states: Any, frozen: Any, seeds: int, rates: int) -> Any:
        """Compile (states, frozen, a batch of each seed, seeds, rates) -> (states, metrics)."""
        inner = jax.vmap(self._step, in_axes=(0, None, None, None, 0))
        outer = jax.vmap(inner, in_axes=(0, self._frozen_axis, 0, 0, None))

        def step(
            states: Any, frozen: Any, batches: Any, seeds: Array, rates: Array
        ) -> tuple[Any, Any]:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
            return outer(states, frozen, stacked, seeds, rates)

        jitted = jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, states), self._replicated),
        )
        batches = (abstract_batch(self.parts),) * seeds
        numbers = [
            jax.ShapeDtypeStruct((n,), t, sharding=self._replicated)
            for n, t in ((seeds, jnp.uint32), (rates, jnp.float32))
        ]
        return jitted.lower(states, frozen, batches, *numbers).compile()

    def numbers(
        self, seeds: Sequence[int], rates: Sequence[float]
    ) -> tuple[Int[Array, ' seeds'], Float[Array, ' rates']]:
        """Put seeds and rates on the devices, as the compiled step takes them."""
        return (
            jax.device_put(np.asarray(seeds, np.uint32), self._replicated),
            jax.device_put(np.asarray(rates, np.float32), self._replicated),
        )

    def eval_step(self, sums: Sums) -> Callable[[Any, Any, Any], dict[str, Array]]:
        """(parameters that move, frozen ones, batch) -> sums [seeds, rates]."""

        def one(trained: Any, frozen: Any, batch: Any) -> dict[str, Array]:
            return sums(self._joined(trained, frozen), batch)

        inner = jax.vmap(one, in_axes=(0, None, None))
        outer = jax.vmap(inner, in_axes=(0, self._frozen_axis, None))
        return jax.jit(outer, out_shardings=self._replicated)

    def state_of(self, states: Any, frozen: Any, seed: int, rate: int) -> state.State:
        """Take the state of one trial as `train.run` has it.

        Args:
          seed: place of the trial's seed among all.
          rate: place of its rate.
        """
        # Explicit, for within the training loop JAX refuses transfers that nobody asked for.
        at = jax.device_put((np.int32(seed), np.int32(rate)), self._replicated)
        return self._take(states, frozen, *at)

    @functools.cached_property
    def _take(self) -> Callable[..., state.State]:
        def take(states: Any, frozen: Any, seed: Array, rate: Array) -> state.State:
            now = jax.tree.map(lambda leaf: leaf[seed, rate], states)
            if self._frozen_axis is not None:
                frozen = jax.tree.map(lambda leaf: leaf[seed], frozen)
            return {**now, **{n: self._joined(now[n], frozen) for n in _PARAMETERS if n in now}}

        return jax.jit(take, out_shardings=state.shardings(self.parts.abstract_state))


def _evaluators(
    parts: Experiment,
    program: VmappedTraining,
    evaluators: dict[str, Evaluator],
    sizes: tuple[int, int],
) -> dict[str, Callable[[Any, Any], dict[str, np.ndarray]]]:
    """Build the evaluations of all trials: (states, frozen) -> scores [seeds, rates].

    Evaluators of means over examples score all trials at once, others score one by one.

    Args:
      evaluators: the evaluations of one trial.
      sizes: (seeds, rates).
    """

    def at_once(name: str, sums: Sums) -> Callable[[Any, Any], dict[str, np.ndarray]]:
        step = program.eval_step(sums)

        def scores(states: Any, frozen: Any) -> dict[str, np.ndarray]:
            params = states.get('ema', states['params'])
            batches = eval_batches(parts, name)
            total = classification.totals(step(params, frozen, batch) for batch in batches)
            count = total.pop('count')
            return {**{name: value / count for name, value in total.items()}, 'count': count}

        return scores

    def one_by_one(name: str) -> Callable[[Any, Any], dict[str, np.ndarray]]:
        def scores(states: Any, frozen: Any) -> dict[str, np.ndarray]:
            scored = []
            for i, j in np.ndindex(sizes):
                now = program.state_of(states, frozen, i, j)
                scored.append(evaluators[name](now.get('ema', now['params']), {}))
            return {
                metric: np.array([one[metric] for one in scored]).reshape(sizes)
                for metric in scored[0]
            }

        return scores

    return {
        name: at_once(name, evaluator.sums)
        if isinstance(evaluator, BatchMeans)
        else one_by_one(name)
        for name, evaluator in evaluators.items()
    }


def _common_steps(folders: Sequence[epath.Path]) -> list[int]:
    """List the steps of which every trial has a checkpoint, ascending."""
    saved = hosts.lead(lambda: [checkpoint.steps(folder) for folder in folders])
    return sorted(set.intersection(*map(set, saved)))


def _resumed(
    training: VmappedTraining, states: Any, folders: Sequence[epath.Path], sizes: tuple[int, int]
) -> tuple[Any, int]:
    """Restore all trials from the newest step that is intact in every one of their workdirs.

    Saves that a kill left with some of the trials alone are removed: they will be made again.

    Returns:
      The states and that step; 0 and the states as they were where there is none.

    Raises:
      UserError: there are such steps, but none can be read.
    """
    common, resumed = _common_steps(folders), 0
    damaged: list[tuple[epath.Path, int]] = []
    for step in reversed(common):
        try:
            for (i, j), folder in zip(np.ndindex(sizes), folders, strict=True):
                one = checkpoint.restore(folder, step, training.parts.abstract_state)
                states = training.with_trial(states, one, i, j)
        except checkpoint.CorruptCheckpointError as error:
            print(f'WARNING: {error}; falling back to the checkpoint before', file=sys.stderr)
            damaged.append((folder, step))
            continue
        resumed = step
        break
    if common and not resumed:
        raise UserError(
            f'{folders[0].parent}: none of the checkpoints of steps {common} can be read for all '
            'trials; remove the folders of these trials to train them afresh'
        )
    for folder, step in damaged:
        checkpoint.set_aside(folder, step)
    for folder in folders:
        checkpoint.remove_after(folder, resumed)
    return states, resumed


class _Program(NamedTuple):
    """The compiled step with its states at the step where the trials begin or go on."""

    training: VmappedTraining
    states: Any
    frozen: Any
    start: int
    step: Any
    lines: list[str]


def _prepared(
    config: Config,
    parts: Experiment,
    params: Any,
    seeds: Sequence[int],
    rates: Sequence[float],
    folders: Sequence[epath.Path],
) -> _Program:
    """Compile the step of all trials, and create or restore their states.

    Raises:
      DoNotFit: they need more memory than there is.
    """
    sizes, began = (len(seeds), len(rates)), time.perf_counter()
    training = VmappedTraining(config, parts, same_start=params is not None)
    states, frozen = training.start(seeds, len(rates), params)
    step = training.compile_step(states, frozen, *sizes)
    size = bytes_needed(step)
    if math.prod(sizes) > 1 and size > memory_limit():
        raise DoNotFit
    lines = [
        f'trials  {math.prod(sizes)} at once, {size / 1e6:,.0f} MB: '
        f'lr {", ".join(f"{rate:g}" for rate in rates)}; seed {", ".join(map(str, seeds))}',
        f'compile {time.perf_counter() - began:.1f}s',
    ]
    states, start = _resumed(training, states, folders, sizes)
    if start:
        lines.append(f'resume  from step {start} of {folders[0]} and the other trials')
    return _Program(training, states, frozen, start, step, lines)


def run(
    config: Config,
    seeds: Sequence[int],
    rates: Sequence[float],
    folder: Callable[[Trial], Place],
    *,
    start: Callable[[Config], Callable[[Experiment], Any] | None],
    label: str = 'trials',
) -> dict[Trial, dict[str, float]]:
    """Train every rate with every seed at once, each saving what it would alone, or resume them.

    A trial that diverges goes on without updates and does not disturb the others.

    Args:
      config: the config of all trials but for `lr` and `seed`.
      folder: gives the workdir of a trial.
      start: gives, for a config, the function that makes the NumPy parameters to start from; None
        for random ones.

    Returns:
      The last metrics of each trial.

    Raises:
      DoNotFit: they need more memory than there is; nothing was trained.
      Stopped: a signal ended them, and all are saved.
      UserError: anything the user can fix, such as too many damaged examples.
    """
    configs = [config.replacing({'seed': seed}) for seed in seeds]
    experiments = [build_experiment(seed_config) for seed_config in configs]
    parts, first = experiments[0], configs[0]
    make_params = start(first)
    params = None if make_params is None else make_params(parts)
    build_train_step(first, parts)  # Reads the keys that the step of each trial will.
    evaluators, trackers = build_evaluators(first, parts), tracker_options(first)
    damage = [Damage(max_damage_rate(first, parts)) for _ in seeds]
    first.audit()
    grid = [[Trial(rate, seed) for rate in rates] for seed in seeds]
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(owned(folder(trial))) for row in grid for trial in row]
        stack.enter_context(jax.set_mesh(parts.mesh))
        program = _prepared(first, parts, params, seeds, rates, folders)
        training, frozen = program.training, program.frozen
        scorers = _evaluators(parts, training, evaluators, (len(seeds), len(rates)))
        journal = stack.enter_context(
            TrialJournal(
                config,
                experiments,
                grid,
                folder,
                program.start,
                damage=damage,
                headline=parts.task.headline,
                label=label,
                trackers=trackers,
                state_of=lambda states, i, j: training.state_of(states, frozen, i, j),
            )
        )
        stop = stack.enter_context(runtime.stop_signals(ownership.ending))
        journal.console.say(*program.lines)
        loaders = [
            stack.enter_context(train_batches(seed_config, seed_parts, program.start))
            for seed_config, seed_parts in zip(configs, experiments, strict=True)
        ]
        numbers = training.numbers(seeds, rates)
        outcome = training_loop.run(
            program.states,
            program.start,
            parts.total_steps,
            parts.intervals,
            journal,
            evaluate=lambda name, states, _: scorers[name](states, frozen),
            batches=zip(*loaders, strict=True),
            train_step=lambda states, batches: program.step(states, frozen, batches, *numbers),
            stop=stop,
        )
        journal.console.say(f'time    {journal.clock.summary()}')
        if outcome.stopped:
            step = int(jax.device_get(outcome.state['step']).flat[0])
            training_loop.say_stopped(step, parts.total_steps, journal.console)
            raise Stopped
        return {trial: dict(writer.latest) for trial, writer in journal.writers.items()}
