"""Trials: trainings that differ in learning rate and seed alone, all in one program.

The step is that of `train.run`, under `jax.vmap`: outside over seeds, which have batches of their
own, inside over rates, which share them. What no trial changes has no axis of trials, so a frozen
trunk computes its features once for all rates. Each trial leaves an ordinary workdir.
"""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from big_vit import build, checkpoint, metrics, sharding, state, storage, trees
from big_vit.config import Config
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

    def __init__(self, config: Config, parts: build.Experiment, shared: bool):
        self.config, self.parts = config, parts
        self.still = factory.frozen(parts.lr_factors)
        self._seeds = None if shared else 0
        self._shapes = state.abstract_params(parts.model, parts.data.inputs)
        self._unit = build.rate_schedule(config, parts.data.source, parts.total_steps, 1.0)

    def _whole(self, moving: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
        flat = {**moving, **frozen}
        # In the order of the model's own tree, which sums over leaves depend on.
        return trees.unflatten(
            {name: flat[name] for name in trees.flatten(self.parts.like['params'])}
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

        made = build.optimizer(self.config, self._shapes, schedule, self.parts.mesh)
        step = build.update(self.config, self.parts, made.transform, schedule, seed)
        averaged: dict[str, Any] = {n: self._whole(now[n], frozen) for n in WEIGHTS if n in now}
        new, values = step({**now, **averaged}, batch)
        return {**new, **{n: _split(new[n], self.still)[0] for n in averaged}}, values

    def start(
        self, seeds: Sequence[int], rates: int, params: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The states at step 0, and what is frozen."""
        parts, like = self.parts, self.parts.like
        made = [
            state.create(parts.model, parts.data.inputs, parts.optimizer, seed, like, params)
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
        batches = (build.abstract_batch(self.parts),) * seeds
        numbers = [
            jax.ShapeDtypeStruct((n,), t, sharding=everywhere)
            for n, t in ((seeds, jnp.int32), (rates, jnp.float32))
        ]
        return jitted.lower(now, frozen, batches, *numbers).compile()

    def eval_step(self, name: str) -> Callable[[Any, Any, Any], dict[str, Array]]:
        """(parameters that move, frozen ones, batch) -> sums [seeds, rates]."""
        sums = build.eval_sums(self.config, self.parts, self.parts.evals[name])

        def one(moving: Any, frozen: Any, batch: Any) -> dict[str, Array]:
            return sums(self._whole(moving, frozen), batch)

        inner = jax.vmap(one, in_axes=(0, None, None))
        outer = jax.vmap(inner, in_axes=(0, self._seeds, None))
        return jax.jit(outer, out_shardings=sharding.replicated(self.parts.mesh))

    def one(self, now: Any, frozen: Any, seed: int, rate: int) -> state.State:
        """The state of one trial, as `train.run` would have it."""

        def take(now: Any, frozen: Any) -> state.State:
            own = jax.tree.map(lambda leaf: leaf[seed, rate], now)
            rest = frozen if self._seeds is None else jax.tree.map(lambda leaf: leaf[seed], frozen)
            return {
                **own,
                **{n: self._whole(own[n], rest) for n in WEIGHTS if n in own},
            }

        return jax.jit(take, out_shardings=state.shardings(self.parts.like))(now, frozen)


def _scores(
    step: Any, moving: Any, frozen: Any, batches: Any
) -> tuple[dict[str, np.ndarray], float]:
    """The means [seeds, rates] over a split, and its examples."""
    parts = [step(moving, frozen, batch) for batch in batches]
    fetched = jax.device_get(parts)
    sums = {name: sum(np.asarray(p[name], np.float64) for p in fetched) for name in fetched[0]}
    count = np.asarray(sums.pop('count'))
    return {name: value / count for name, value in sums.items()}, float(count.flat[0])


def run(
    config: Config,
    seeds: Sequence[int],
    rates: Sequence[float],
    folder: Callable[[Trial], Place],
    *,
    params: Callable[[build.Experiment], Any] | None = None,
    label: str = 'trials',
) -> dict[Trial, dict[str, float]]:
    """Trains every rate with every seed at once; each leaves config, metrics and its last state.

    Args:
      config: of all trials, but for `lr` and `seed`.
      folder: the workdir of each.
      params: what gives the NumPy parameters to start from instead of random ones.

    Returns:
      The last metrics of each trial.

    Raises:
      DoNotFit: they need more memory than there is; nothing was trained.
    """
    configs = [config.replacing({'seed': seed}) for seed in seeds]
    every = [build.experiment(one) for one in configs]
    parts, total, due = every[0], every[0].total_steps, every[0].due
    first = None if params is None else params(parts)
    grid = [[Trial(rate, seed) for rate in rates] for seed in seeds]
    flat = [trial for row in grid for trial in row]
    active = jax.process_index() == 0
    with jax.set_mesh(parts.mesh), contextlib.ExitStack() as stack:
        batched = Batched(configs[0], parts, shared=first is not None)
        now, frozen = batched.start(seeds, len(rates), first)
        began = time.perf_counter()
        step = batched.compiled_step(now, frozen, len(seeds), len(rates))
        if len(flat) > 1 and needed(step) > memory_limit():
            raise DoNotFit
        console = stack.enter_context(metrics.Console(total, 0, label=label, active=active))
        console.say(
            f'trials  {len(flat)} at once: rates {", ".join(f"{r:g}" for r in rates)}; '
            f'seeds {", ".join(map(str, seeds))}'
        )
        console.say(f'compile {time.perf_counter() - began:.1f}s')
        dumps = {t: config.replacing({'seed': t.seed, 'lr': t.lr}).to_dict() for t in flat}
        for trial in flat:
            storage.place(folder(trial)).mkdir(parents=True, exist_ok=True)
        writers = {
            t: stack.enter_context(metrics.Writer(folder(t), 0, active=active)) for t in flat
        }
        loaders = [
            stack.enter_context(build.train_batches(one, own, 0))
            for one, own in zip(configs, every, strict=True)
        ]
        evals = {name: batched.eval_step(name) for name in parts.evals}
        where = sharding.replicated(parts.mesh)
        numbers = [
            jax.device_put(np.asarray(seeds, np.int32), where),
            jax.device_put(np.asarray(rates, np.float32), where),
        ]
        clock, values = metrics.Clock(), None
        for number in range(1, total + 1):
            with clock.bucket('data'):
                batches = tuple(next(loader) for loader in loaders)
            before = values
            with clock.bucket('step'):
                now, values = step(now, frozen, batches, *numbers)
                if before is not None:
                    jax.block_until_ready(before)
            clock.count_step()
            console.step(number)
            if build.is_due(due.log, number, total):
                with clock.bucket('step'):
                    found = jax.device_get(values)
                for i, row in enumerate(grid):
                    for j, trial in enumerate(row):
                        own = {f'train/{n}': float(v[i, j]) for n, v in found.items()}
                        for name in ('skipped_in_a_row', 'loss_spike', 'grad_norm_spike'):
                            del own[f'train/{name}']
                        writers[trial].write(number, own)
                middle = {f'train/{n}': float(np.median(v)) for n, v in found.items()}
                middle |= clock.window(
                    batch_size=parts.batch_size * len(flat),
                    flops_per_example=parts.flops_per_example,
                    peak_flops=float('inf'),
                    steps_left=total - number,
                )
                console.training(number, middle)
            for name in [n for n, k in due.evals.items() if build.is_due(k, number, total)]:
                with clock.bucket('eval'):
                    scored = now.get('ema', now['params'])
                    scores, count = _scores(
                        evals[name], scored, frozen, build.eval_batches(parts, name)
                    )
                for i, row in enumerate(grid):
                    for j, trial in enumerate(row):
                        own = {f'{name}/{k}': float(v[i, j]) for k, v in scores.items()}
                        writers[trial].write(number, {**own, f'{name}/count': count})
                best = np.unravel_index(np.nanargmax(scores['top1']), scores['top1'].shape)
                console.evaluation(
                    number,
                    f'{name} (best: lr {rates[best[1]]:g})',
                    {k: float(v[best]) for k, v in scores.items()},
                )
        for i, row in enumerate(grid):
            for j, trial in enumerate(row):
                writers[trial].flush()
                with checkpoint.Manager(folder(trial), 1) as manager:
                    own_state = batched.one(now, frozen, i, j)
                    manager.save(own_state, dumps[trial], writers[trial].latest)
        console.say(f'time    {clock.summary()}')
        return {trial: dict(writers[trial].latest) for trial in flat}
