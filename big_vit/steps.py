"""The train step and the evaluation step: the only places where a batch meets the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from big_vit import compiler, sharding, trees
from big_vit.augment import Mix
from big_vit.optim import factory, sam, schedule_free
from big_vit.state import WINDOW, State, shardings
from big_vit.tasks.batch import Batch
from big_vit.tasks.task import AfterUpdate, Loss, Targets

Metrics = dict[str, jax.Array]
# State of the task, and the step.
Extra = tuple[Any, jax.Array]

# Of the keys of a step those for mixing and for what the devices do to each example before; those
# of dropout have the numbers of microbatches.
_MIXING, _PREPARING = 2**31, 2**31 + 1
# What a spike is measured against: of the window of recent values the last ones, for loss and norms
# drift; least ratios to their median, from docs/optimizers.md.
_COMPARED, _NEWEST, _LEAST_KNOWN = 64, 8, 16
_LEAST_RATIO = {'loss': 2.0, 'grad_norm': 4.0}
_NORMAL_90 = 1.2816  # 90th percentile of the normal distribution.


def seen(
    batch: Batch, seed: int | jax.Array, step: jax.Array | int, prepare: Mix | None, mix: Mix | None
) -> Batch:
    """A batch as the model sees it at a step: prepared, then mixed, as a whole."""
    rng = jax.random.fold_in(jax.random.key(seed), step)
    if prepare is not None:
        batch = prepare(batch, jax.random.fold_in(rng, _PREPARING))
    if mix is not None:
        batch = mix(batch, jax.random.fold_in(rng, _MIXING))
    return batch


def _split(batch: Batch, parts: int, mesh: Mesh) -> Batch:
    """[batch, ...] as [parts, batch / parts, ...]; a part has rows of every device."""
    spec = jax.sharding.PartitionSpec(None, *sharding.BATCH)

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, jax.NamedSharding(mesh, spec))

    return jax.tree.map(split, batch)


def _joined(parts: Any, mesh: Mesh) -> Any:
    """The inverse of `_split`: [parts, batch / parts, ...] as [batch, ...]."""

    def join(x: jax.Array) -> jax.Array:
        x = x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])
        return jax.lax.with_sharding_constraint(x, sharding.batch_sharding(mesh))

    return jax.tree.map(join, parts)


def is_spike(
    recent: Float[Array, ' window'], value: Float[Array, ''], sigmas: float, least_ratio: float
) -> Bool[Array, '']:
    """Whether a value lies far above the last ones.

    Far is more than `sigmas` deviations above their median, where a deviation is what lies between
    median and 90th percentile, in units of the normal distribution: upward only, so that long tails
    count and falling values do not, and the same with one outlier among them as with none. And it
    is more than `least_ratio` times the median, or rounding would be a spike where values hardly
    vary. The median is that of the newest eight if they lie higher, so a lasting change is a spike
    five times at most. Nothing is a spike before 16 values are known.

    Args:
      recent: values of the steps before, the newest last; NaN where unknown.
    """
    centre = jnp.nanmedian(recent)
    deviation = (jnp.nanquantile(recent, 0.9) - centre) / _NORMAL_90
    centre = jnp.maximum(centre, jnp.nanmedian(recent[-_NEWEST:]))
    allowed = jnp.maximum(sigmas * deviation, (least_ratio - 1) * jnp.abs(centre))
    return (jnp.isfinite(recent).sum() >= _LEAST_KNOWN) & (value > centre + allowed)


def update(
    loss: Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[jax.Array], jax.Array],
    mesh: Mesh,
    *,
    prepare: Mix | None = None,
    mix: Mix | None = None,
    seed: int | jax.Array = 0,
    accumulation: int = 1,
    ema: float = 0.0,
    skip_sigmas: float = 0.0,
    frozen: frozenset[str] = frozenset(),
    sam_rho: float = 0.0,
    sam_adaptive: bool = False,
    after_update: AfterUpdate | None = None,
    teacher_rate: Callable[[jax.Array], jax.Array] | None = None,
    targets: Targets | None = None,
    draw: Callable[[Batch, jax.Array], dict[str, jax.Array]] | None = None,
    weight_decay: Callable[[jax.Array], jax.Array] | None = None,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The function `train_step(state, batch) -> (state, metrics)`, not jitted yet.

    Gradients are summed in float32 over `accumulation` microbatches inside
    the step. An update whose loss or gradient is not finite, or a spike, is
    skipped: only the step and the counters of skips advance. The average of
    parameters starts fast, with decay min(ema, (1 + step) / (10 + step)); with a
    schedule-free optimizer it is that optimizer's own, and with `teacher_rate` the
    teacher that the loss learns from, unless the state has a frozen one.

    Args:
      loss: of a task.
      after_update: moves the task's own state, `Task.after_update`.
      teacher_rate: step -> share of the new parameters that the average takes in.
      targets: of a task, computed once from the whole batch before its gradients.
      draw: of a task, random numbers of the whole batch, `Task.draw`.
      prepare: what is done to each example of the whole batch first: (batch, rng) -> batch.
      mix: what makes new examples of the whole batch, whatever the mesh and `accumulation`.
      seed: with the state's step, all that dropout and mixing depend on.
      skip_sigmas: deviations above the last steps' median at which a loss or a gradient norm is
        a spike, see `is_spike`; 0 is off.
      frozen: paths of parameters whose gradient is not asked for, and counts as 0.
      sam_rho: how far `sam.ascend` goes for the gradient that is used, 0 is off. Both
        gradients are of the same batch with the same dropout, and each of all microbatches;
        the loss is that of the parameters themselves.
      weight_decay: by step, to report it; None if it is constant.
    """

    def in_parts(function: Callable[[Batch, jax.Array], Any], batch: Batch, rng: jax.Array) -> Any:
        """Apply to each microbatch with its key; rows of the results are in the batch's order."""
        if accumulation == 1:
            return function(batch, rng)

        def apply(_: None, part: tuple[jax.Array, Batch]) -> tuple[None, Any]:
            return None, function(part[1], jax.random.fold_in(rng, part[0]))

        parts = _split(batch, accumulation, mesh)
        _, results = jax.lax.scan(apply, None, (jnp.arange(accumulation), parts))
        return _joined(results, mesh)

    def with_targets(batch: Batch, extra: Extra, rng: jax.Array) -> tuple[Batch, Extra]:
        if targets is None:
            return batch, extra
        task_state, step = extra
        rows = in_parts(lambda part, key: targets.rows(task_state, part, key, step), batch, rng)
        shared = targets.shared(task_state, rows, step)
        rows, shared = jax.lax.stop_gradient((rows, shared))
        return {**batch, 'targets': rows}, ({**(task_state or {}), 'targets': shared}, step)

    def gradient(params: Any, extra: Extra, batch: Batch, rng: jax.Array):
        task_state, step = extra
        result, grads = jax.value_and_grad(loss, has_aux=True)(params, task_state, batch, rng, step)
        return result, trees.map_with_name(
            lambda name, g: jnp.zeros_like(g) if name in frozen else g, grads
        )

    def gradients(params: Any, extra: Extra, batch: Batch, rng: jax.Array):
        if accumulation == 1:
            return gradient(params, extra, batch, rng)

        def add(total: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            index, microbatch = part
            now = gradient(params, extra, microbatch, jax.random.fold_in(rng, index))
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, now), None

        parts = _split(batch, accumulation, mesh)
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts)
        shapes = jax.eval_shape(gradient, params, extra, one, rng)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(accumulation), parts))
        return jax.tree.map(lambda x: x / accumulation, total)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        step, params = state['step'], state['params']
        rng = jax.random.fold_in(jax.random.key(seed), step)
        replaced = batch.get('replaced')
        batch = {name: x for name, x in batch.items() if name != 'replaced'}
        batch = seen(batch, seed, step, prepare, mix)
        if draw is not None:
            batch = {**batch, 'drawn': draw(batch, rng)}
        task_state = state.get('task', ())
        if teacher_rate is not None:
            teacher = state.get('teacher', state['ema'])
            task_state = {**(task_state or {}), 'teacher': teacher}
        batch, extra = with_targets(batch, (task_state, step), rng)
        (value, aux), grads = gradients(params, extra, batch, rng)
        if sam_rho:
            worst = sam.ascend(params, grads, sam_rho, sam_adaptive)
            _, grads = gradients(worst, extra, batch, rng)
        norm = optax.tree.norm(grads)
        watched = {'loss': value, 'grad_norm': norm}
        spikes = {
            name: is_spike(
                jnp.roll(state['recent'][name], -step)[-_COMPARED:],
                seen,
                skip_sigmas,
                _LEAST_RATIO[name],
            )
            & bool(skip_sigmas)
            for name, seen in watched.items()
        }
        good = jnp.isfinite(value) & jnp.isfinite(norm) & ~spikes['loss'] & ~spikes['grad_norm']
        updates, opt = optimizer.update(grads, state['opt'], params, step=step)
        new = {'params': optax.apply_updates(params, updates), 'opt': opt}
        average = schedule_free.evaluation_weights(opt, new['params'])
        if average is not None:
            new['ema'] = average
        elif 'ema' in state:
            if teacher_rate is None:
                rate = 1 - jnp.minimum(ema, (1.0 + step) / (10.0 + step))
            else:
                rate = teacher_rate(step)
            new['ema'] = jax.tree.map(lambda a, p: a + rate * (p - a), state['ema'], new['params'])
        if after_update is not None:
            given = state['task']
            if teacher_rate is not None:
                given = {**given, 'teacher': new['ema']}
            new['task'] = after_update(new['params'], given, aux.carried, step)
        old = {name: state[name] for name in new}
        new = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        # A spike is remembered too, so that a lasting change is soon no spike any more.
        new['recent'] = {
            name: state['recent'][name]
            .at[step % WINDOW]
            .set(jnp.where(jnp.isfinite(seen), seen, jnp.nan))
            for name, seen in watched.items()
        }
        if 'teacher' in state:
            new['teacher'] = state['teacher']
        new['step'] = step + 1
        new['skipped'] = state['skipped'] + ~good
        new['skipped_in_a_row'] = jnp.where(good, 0, state['skipped_in_a_row'] + 1)
        metrics = {
            'loss': value,
            **aux.metrics,
            'lr': schedule(step),
            **({} if weight_decay is None else {'weight_decay': weight_decay(step)}),
            'grad_norm': norm,
            'param_norm': optax.tree.norm(new['params']),
            'update_norm': jnp.where(good, optax.tree.norm(updates), 0.0),
            'skipped': new['skipped'],
            'skipped_in_a_row': new['skipped_in_a_row'],
            **factory.health(new['opt']),
            **{f'{name}_spike': found for name, found in spikes.items()},
        }
        if replaced is not None:
            metrics['replaced'] = replaced.astype(jnp.int32).sum()
        return new, metrics

    return train_step


def make_train_step(
    train_step: Callable[[State, Batch], tuple[State, Metrics]], abstract_state: State, mesh: Mesh
) -> Any:
    """The jitted step; the state is donated.

    Args:
      train_step: of `update`.
      like: abstract or real state; its shardings are those of the step.
    """
    where = shardings(abstract_state)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(where, sharding.batch_sharding(mesh)),
        out_shardings=(where, sharding.replicated(mesh)),
        compiler_options=compiler.options(mesh),
    )


def make_eval_step(
    sums: Callable[[Any, Batch], Metrics], abstract_state: State, mesh: Mesh
) -> Callable[[Any, Batch], Metrics]:
    """The jitted step `(params, batch) -> sums over the batch`."""
    return jax.jit(
        sums,
        in_shardings=(shardings(abstract_state)['params'], sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
        compiler_options=compiler.options(mesh),
    )


def make_rows_step(
    rows: Callable[[Any, Batch], tuple[Any, Any]], abstract_state: State, mesh: Mesh
) -> Callable[[Any, Batch], tuple[Any, Any]]:
    """The jitted step `(params, batch) -> (what every host gets, what stays with the rows)`."""
    where = sharding.batch_sharding(mesh)
    return jax.jit(
        rows,
        in_shardings=(shardings(abstract_state)['params'], where),
        out_shardings=(sharding.replicated(mesh), where),
        compiler_options=compiler.options(mesh),
    )
