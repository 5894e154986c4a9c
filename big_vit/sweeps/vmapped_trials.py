"""Trials: trainings that differ in learning rate and seed alone, all in one program.

The step is that of `train.run`, under `jax.vmap`: outside over seeds, which have batches of their
own, inside over rates, which share them. What no trial changes has no axis of trials, so a frozen
trunk computes its features once for all rates. Each trial leaves an ordinary workdir.
"""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from big_vit import checkpoint, metrics, sharding, state, storage, trees
from big_vit.build.evaluations import Evaluator, build_evaluators
from big_vit.build.experiment import (
    Experiment,
    abstract_batch,
    build_experiment,
    eval_batches,
    is_due,
    tracker_options,
    train_batches,
)
from big_vit.build.optimizer import build_optimizer, rate_schedule
from big_vit.build.steps import build_train_step, build_update
from big_vit.config import Config
from big_vit.distributed import hosts
from big_vit.evaluators import classification
from big_vit.evaluators.evaluation import BatchMeans, Sums
from big_vit.optim import factory

Place = str | os.PathLike[str]
# Of what a device has, the share that trials may take together.
MEMORY_SHARE = 0.8
# Under vmap both branches of a condition are computed: their roots would be made at each step.
ONE_BY_ONE = ('shampoo', 'soap')
# The parts of a state that have a leaf for each parameter.
WEIGHTS = ('params', 'ema')


class Trial(NamedTuple):
    """One training of several that are alike."""

    lr: float
    seed: int


class DoNotFit(Exception):
    """So many trials at once need more memory than there is."""


def memory_limit() -> int:
    """Bytes that one device may use for trials; on a CPU, its share of the host's free memory."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if 'bytes_limit' in stats:
        return int(MEMORY_SHARE * stats['bytes_limit'])
    free = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return int(MEMORY_SHARE * free / jax.local_device_count())


def needed(compiled: Any) -> int:
    """Bytes a device that a compiled step takes with its arguments."""
    found = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return held + found.temp_size_in_bytes


def _split(tree: Any, still: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leaves that move and those that are frozen, by path."""
    flat = trees.flatten(tree)
    moving = {name: leaf for name, leaf in flat.items() if name not in still}
    return moving, {name: leaf for name, leaf in flat.items() if name in still}


class Batched:
    """The step and the evaluations of all trials, compiled for one set of rates and seeds.

    A state of it has leaves [seeds, rates, ...]; frozen parameters lie beside it, [seeds, ...]
    or, where all trials start from the same, without an axis.

    Args:
      shared: whether all seeds start from the same parameters.
    """

    def __init__(self, config: Config, parts: Experiment, shared: bool):
        self.config, self.parts = config, parts
        self.still = factory.frozen(parts.lr_factors)
        self._seeds = None if shared else 0
        self._shapes = state.abstract_params(parts.model, parts.data.inputs)
        self._unit = rate_schedule(config, parts.data.source, parts.total_steps, 1.0)

    def _whole(self, moving: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
        flat = {**moving, **frozen}
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
        """Of one trial."""

        def schedule(step: Any) -> Any:
            return rate * self._unit(step)

        made = build_optimizer(self.config, self._shapes, schedule, self.parts.mesh)
        step = build_update(self.config, self.parts, made.transform, schedule, seed)
        averaged: dict[str, Any] = {n: self._whole(now[n], frozen) for n in WEIGHTS if n in now}
        new, values = step({**now, **averaged}, batch)
        return {**new, **{n: _split(new[n], self.still)[0] for n in averaged}}, values

    def start(
        self, seeds: Sequence[int], rates: int, params: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The states at step 0, and what is frozen."""
        parts, abstract_state = self.parts, self.parts.abstract_state
        made = [
            state.create(
                parts.model, parts.data.inputs, parts.optimizer, seed, abstract_state, params
            )
            for seed in (seeds[:1] if self._seeds is None else seeds)
        ]
        frozen = [_split(one['params'], self.still)[1] for one in made]
        moving = [
            {n: _split(x, self.still)[0] if n in WEIGHTS else x for n, x in one.items()}
            for one in made
        ]
        each = len(seeds) // len(made)

        def stacked(*leaves: Array) -> Array:
            whole = jnp.stack(leaves * each)[:, None]
            return jnp.broadcast_to(whole, (len(seeds), rates, *leaves[0].shape))

        with_trials = jax.tree.map(lambda leaf: self._where(leaf, 2), moving[0])
        now = jax.jit(lambda m: jax.tree.map(stacked, *m), out_shardings=with_trials)(moving)
        if self._seeds is None:
            return now, frozen[0]
        where = jax.tree.map(lambda leaf: self._where(leaf, 1), frozen[0])
        return now, jax.jit(
            lambda f: jax.tree.map(lambda *leaves: jnp.stack(leaves), *f), out_shardings=where
        )(frozen)

    def _where(self, leaf: Array, axes: int) -> NamedSharding:
        """The leaf's own sharding behind axes of trials."""
        assert isinstance(leaf.sharding, NamedSharding)
        return NamedSharding(self.parts.mesh, PartitionSpec(*(None,) * axes, *leaf.sharding.spec))

    def compiled_step(self, now: Any, frozen: Any, seeds: int, rates: int) -> Any:
        """(states, frozen, a batch of each seed, seeds, rates) -> (states, metrics)."""
        inner = jax.vmap(self._step, in_axes=(0, None, None, None, 0))
        outer = jax.vmap(inner, in_axes=(0, self._seeds, 0, 0, None))

        def step(
            now: Any, frozen: Any, batches: Any, seeds: Array, rates: Array
        ) -> tuple[Any, Any]:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
            return outer(now, frozen, stacked, seeds, rates)

        everywhere = sharding.replicated(self.parts.mesh)
        jitted = jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, now), everywhere),
        )
        batches = (abstract_batch(self.parts),) * seeds
        numbers = [
            jax.ShapeDtypeStruct((n,), t, sharding=everywhere)
            for n, t in ((seeds, jnp.int32), (rates, jnp.float32))
        ]
        return jitted.lower(now, frozen, batches, *numbers).compile()

    def eval_step(self, sums: Sums) -> Callable[[Any, Any, Any], dict[str, Array]]:
        """(parameters that move, frozen ones, batch) -> sums [seeds, rates]."""

        def one(moving: Any, frozen: Any, batch: Any) -> dict[str, Array]:
            return sums(self._whole(moving, frozen), batch)

        inner = jax.vmap(one, in_axes=(0, None, None))
        outer = jax.vmap(inner, in_axes=(0, self._seeds, None))
        return jax.jit(outer, out_shardings=sharding.replicated(self.parts.mesh))

    @functools.cached_property
    def one(self) -> Callable[[Any, Any, int, int], state.State]:
        """(states, frozen, place of the seed, of the rate) -> the state that `train.run` has."""

        def take(now: Any, frozen: Any, seed: Array, rate: Array) -> state.State:
            own = jax.tree.map(lambda leaf: leaf[seed, rate], now)
            rest = frozen if self._seeds is None else jax.tree.map(lambda leaf: leaf[seed], frozen)
            return {**own, **{n: self._whole(own[n], rest) for n in WEIGHTS if n in own}}

        return jax.jit(take, out_shardings=state.shardings(self.parts.abstract_state))


class _Journal:
    """The metrics of all trials, each in its own workdir, and one line for all on the console."""

    def __init__(
        self,
        grid: list[list[Trial]],
        folder: Callable[[Trial], Place],
        total: int,
        label: str,
        stack: contextlib.ExitStack,
        dumps: dict[Trial, dict[str, Any]],
        targets: dict[str, Any],
    ):
        active = jax.process_index() == 0
        self.grid = grid
        self.console = stack.enter_context(metrics.Console(total, 0, label=label, active=active))
        self.writers = {}
        for trial in (trial for row in grid for trial in row):
            storage.place(folder(trial)).mkdir(parents=True, exist_ok=True)
            writer = metrics.Writer(folder(trial), 0, active=active, config=dumps[trial], **targets)
            self.writers[trial] = stack.enter_context(writer)

    def write(self, step: int, prefix: str, found: dict[str, np.ndarray]) -> None:
        """A row for each trial, of values [seeds, rates]."""
        for i, row in enumerate(self.grid):
            for j, trial in enumerate(row):
                values = {f'{prefix}/{name}': float(v[i, j]) for name, v in found.items()}
                self.writers[trial].write(step, values)

    def training(
        self, step: int, values: dict[str, Array], timings: Callable[[], dict[str, float]]
    ) -> None:
        hidden = ('skipped_in_a_row', 'loss_spike', 'grad_norm_spike')
        found = {n: np.asarray(v) for n, v in jax.device_get(values).items() if n not in hidden}
        self.write(step, 'train', found)
        middle = {f'train/{name}': float(np.median(v)) for name, v in found.items()}
        self.console.training(step, {**middle, **timings()})

    def evaluation(self, step: int, name: str, found: dict[str, np.ndarray]) -> None:
        self.write(step, name, found)
        judged = found.get('top1', next(iter(found.values())))
        ranked = np.where(np.isfinite(judged), judged, -np.inf)
        i, j = (int(n) for n in np.unravel_index(ranked.argmax(), ranked.shape))
        best = {key: float(value[i, j]) for key, value in found.items()}
        self.console.evaluation(step, f'{name}, best of all (lr {self.grid[i][j].lr:g})', best)


def _evaluators(
    parts: Experiment,
    batched: Batched,
    alone: dict[str, Evaluator],
    sizes: tuple[int, int],
) -> dict[str, Callable[[Any, Any], dict[str, np.ndarray]]]:
    """Functions of (states, frozen) that give arrays [seeds, rates].

    Evaluators of means over examples score all trials at once, others score one by one.
    """

    def at_once(name: str, sums: Sums) -> Callable[[Any, Any], dict[str, np.ndarray]]:
        step = batched.eval_step(sums)

        def scores(now: Any, frozen: Any) -> dict[str, np.ndarray]:
            weights = now.get('ema', now['params'])
            batches = eval_batches(parts, name)
            total = classification.totals(step(weights, frozen, batch) for batch in batches)
            count = total.pop('count')
            return {**{name: value / count for name, value in total.items()}, 'count': count}

        return scores

    def one_by_one(name: str) -> Callable[[Any, Any], dict[str, np.ndarray]]:
        def scores(now: Any, frozen: Any) -> dict[str, np.ndarray]:
            found = []
            for i, j in np.ndindex(sizes):
                one = batched.one(now, frozen, i, j)
                found.append(alone[name](one.get('ema', one['params']), {}))
            return {k: np.array([each[k] for each in found]).reshape(sizes) for k in found[0]}

        return scores

    return {
        name: at_once(name, evaluator.sums)
        if isinstance(evaluator, BatchMeans)
        else one_by_one(name)
        for name, evaluator in alone.items()
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
    """Trains every rate with every seed at once; each leaves metrics and its last state.

    A trial that diverges goes on without updates and does not disturb the others.

    Args:
      config: of all trials, but for `lr` and `seed`.
      folder: the workdir of each.
      start: by the config, what gives the NumPy parameters to start from; None for random ones.

    Returns:
      The last metrics of each trial.

    Raises:
      DoNotFit: they need more memory than there is; nothing was trained.
    """
    configs = [config.replacing({'seed': seed}) for seed in seeds]
    every = [build_experiment(one) for one in configs]
    parts, total, intervals = every[0], every[0].total_steps, every[0].intervals
    given = start(configs[0])
    first = None if given is None else given(parts)
    build_train_step(configs[0], parts)  # Reads what the step of each trial will.
    alone, targets = build_evaluators(configs[0], parts), tracker_options(configs[0])
    configs[0].audit()
    grid = [[Trial(rate, seed) for rate in rates] for seed in seeds]
    dumps = {
        trial: config.replacing({'seed': trial.seed, 'lr': trial.lr}).to_dict()
        for row in grid
        for trial in row
    }
    clock = metrics.Clock()

    def timings(step: int) -> dict[str, float]:
        found = clock.window(
            batch_size=parts.batch_size * len(seeds) * len(rates),
            flops_per_example=parts.flops_per_example,
            peak_flops=math.inf,  # Of a frozen trunk no one knows how much is computed.
            steps_left=total - step,
        )
        found.pop(f'{metrics.TIMING}mfu', None)
        return found

    with jax.set_mesh(parts.mesh), contextlib.ExitStack() as stack:
        batched = Batched(configs[0], parts, shared=first is not None)
        now, frozen = batched.start(seeds, len(rates), first)
        began = time.perf_counter()
        step = batched.compiled_step(now, frozen, len(seeds), len(rates))
        bytes_ = needed(step)
        if len(seeds) * len(rates) > 1 and bytes_ > memory_limit():
            raise DoNotFit
        evaluators = _evaluators(parts, batched, alone, (len(seeds), len(rates)))
        journal = _Journal(grid, folder, total, label, stack, dumps, targets)
        journal.console.say(
            f'trials  {len(seeds) * len(rates)} at once, {bytes_ / 1e6:,.0f} MB: '
            f'lr {", ".join(f"{rate:g}" for rate in rates)}; seed {", ".join(map(str, seeds))}',
            f'compile {time.perf_counter() - began:.1f}s',
        )
        loaders = [
            stack.enter_context(train_batches(one, own, 0))
            for one, own in zip(configs, every, strict=True)
        ]
        where = sharding.replicated(parts.mesh)
        numbers = [
            jax.device_put(np.asarray(seeds, np.int32), where),
            jax.device_put(np.asarray(rates, np.float32), where),
        ]
        before: Any = None
        for number in range(1, total + 1):
            with clock.bucket('data'):
                batches = tuple(next(loader) for loader in loaders)
            with clock.bucket('step'):
                now, values = step(now, frozen, batches, *numbers)
                if before is not None:  # One step in flight, as in a run.
                    jax.block_until_ready(before)
                    hosts.progress(number)
            before = values
            clock.count_step()
            journal.console.step(number)
            if is_due(intervals.log, number, total):
                with clock.bucket('step'):
                    jax.block_until_ready(values)
                journal.training(number, values, functools.partial(timings, number))
            for name in (n for n, k in intervals.evals.items() if is_due(k, number, total)):
                with clock.bucket('eval'):
                    found = evaluators[name](now, frozen)
                journal.evaluation(number, name, found)
                hosts.progress(number)
        with clock.bucket('save'):
            for i, row in enumerate(grid):
                for j, trial in enumerate(row):
                    own, latest = batched.one(now, frozen, i, j), journal.writers[trial].latest
                    journal.writers[trial].flush()
                    with checkpoint.Manager(folder(trial), 1) as manager:
                        manager.save(own, dumps[trial], latest)
        journal.console.say(f'time    {clock.summary()}')
        return {trial: dict(writer.latest) for trial, writer in journal.writers.items()}
