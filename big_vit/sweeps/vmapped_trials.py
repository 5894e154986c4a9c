"""Trials that differ in learning rate and seed alone, trained at once in one program.

The step of `train.run` under `jax.vmap`: outside over seeds, which have batches of their own,
inside over rates, which share them. Arrays that no trial changes have no axis of trials, so a
frozen trunk computes its features once for all rates. Each trial leaves an ordinary workdir.
"""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from big_vit import sharding, state, training_loop, trees
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
from big_vit.build.optimizer import build_optimizer, rate_schedule
from big_vit.build.steps import build_train_step, build_update
from big_vit.config import Config
from big_vit.evaluators import classification
from big_vit.evaluators.evaluation import BatchMeans, Sums
from big_vit.journal import Damage, max_damage_rate
from big_vit.optim import factory
from big_vit.sweeps.trial_journal import Place, Trial, TrialJournal

# Share of a device's memory that trials may take together.
MEMORY_SHARE = 0.8
# Under vmap both branches of a condition are computed: their roots would be made at every step.
ONE_BY_ONE = ('shampoo', 'soap')
# The parts of a state that have a leaf for each parameter.
_PARAMETERS = ('params', 'ema')


class DoNotFit(Exception):
    """So many trials at once need more memory than there is."""


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
        self._unit_schedule = rate_schedule(config, parts.data.source, parts.total_steps, 1.0)
        self._replicated = sharding.replicated(parts.mesh)

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

        optimizer = build_optimizer(self.config, self._shapes, schedule, self.parts.mesh)
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
        trained = [
            {n: _split(x, paths)[0] if n in _PARAMETERS else x for n, x in one.items()}
            for one in created
        ]
        repeats = len(seeds) // len(created)

        def stacked(*leaves: Array) -> Array:
            by_seed = jnp.stack(leaves * repeats)[:, None]
            return jnp.broadcast_to(by_seed, (len(seeds), rates, *leaves[0].shape))

        with_trials = jax.tree.map(lambda leaf: self._behind_axes(leaf, 2), trained[0])
        states = jax.jit(lambda t: jax.tree.map(stacked, *t), out_shardings=with_trials)(trained)
        if self._frozen_axis is None:
            return states, frozen[0]
        with_seeds = jax.tree.map(lambda leaf: self._behind_axes(leaf, 1), frozen[0])
        return states, jax.jit(
            lambda f: jax.tree.map(lambda *leaves: jnp.stack(leaves), *f), out_shardings=with_seeds
        )(frozen)

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


def run(
    config: Config,
    seeds: Sequence[int],
    rates: Sequence[float],
    folder: Callable[[Trial], Place],
    *,
    start: Callable[[Config], Callable[[Experiment], Any] | None],
    label: str = 'trials',
) -> dict[Trial, dict[str, float]]:
    """Train every rate with every seed at once; each leaves metrics and its last state.

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
    sizes = len(seeds), len(rates)
    with jax.set_mesh(parts.mesh), contextlib.ExitStack() as stack:
        program = VmappedTraining(first, parts, same_start=params is not None)
        states, frozen = program.start(seeds, len(rates), params)
        began = time.perf_counter()
        step = program.compile_step(states, frozen, *sizes)
        size = bytes_needed(step)
        if math.prod(sizes) > 1 and size > memory_limit():
            raise DoNotFit
        scorers = _evaluators(parts, program, evaluators, sizes)
        journal = stack.enter_context(
            TrialJournal(
                config,
                experiments,
                [[Trial(rate, seed) for rate in rates] for seed in seeds],
                folder,
                damage=damage,
                headline=parts.task.headline,
                label=label,
                trackers=trackers,
                state_of=lambda states, i, j: program.state_of(states, frozen, i, j),
            )
        )
        journal.console.say(
            f'trials  {math.prod(sizes)} at once, {size / 1e6:,.0f} MB: '
            f'lr {", ".join(f"{rate:g}" for rate in rates)}; seed {", ".join(map(str, seeds))}',
            f'compile {time.perf_counter() - began:.1f}s',
        )
        loaders = [
            stack.enter_context(train_batches(seed_config, seed_parts, 0))
            for seed_config, seed_parts in zip(configs, experiments, strict=True)
        ]
        numbers = program.numbers(seeds, rates)
        training_loop.run(
            states,
            0,
            parts.total_steps,
            parts.intervals._replace(save=0),  # Only at the end: no trial is resumed.
            journal,
            evaluate=lambda name, states, _: scorers[name](states, frozen),
            batches=zip(*loaders, strict=True),
            train_step=lambda states, batches: step(states, frozen, batches, *numbers),
        )
        journal.console.say(f'time    {journal.clock.summary()}')
        return {trial: dict(writer.latest) for trial, writer in journal.writers.items()}
