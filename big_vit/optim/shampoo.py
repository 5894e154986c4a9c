"""Shampoo under `jit` on any mesh, as an optax transformation (arXiv 1802.09568, 2309.06497).

For a block G of a matrix, with L and R the averages of G G' and G' G, and M that of G as in Adam,
the direction is L^(-1/4) M R^(-1/4), rescaled to the norm of Adam's direction (grafting).

All state of blocks (blocks.py), including their moments, lies in stacks sharded over every device
of the mesh. Each device computes on its own blocks only; the directions are then gathered once per
step. Results do not depend on the number of devices; only the zero padding of stacks does.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from big_vit.optim import blocks, matrices, roots

GRAFTS = ('adam', 'sgd', 'none')

# A root is accepted if the norm of X^p A - 1 is below this, i.e. it is right to about 15 % in
# every direction. Float32 rounding alone gives 0.1 to 0.3 at a ridge of 1e-6; losing an
# eigenvalue gives 1.
TOLERANCE = 0.5
# Consecutive failures, each tried with ten times the previous ridge, after which the statistics
# of a matrix restart.
MAX_FAILURES = 3

SIDES = ('left', 'right')


class StackState(NamedTuple):
    """State of all blocks of one size [rows, columns].

    Attributes:
      mu, nu: averages of the gradient and of its square.
      left, right: averages of G G' and G' G.
      left_root, right_root: their latest inverse roots.
      error: errors of these roots, [left, right].
      failures: consecutive rejected roots, [left, right].
      work: if iterations are spread over steps, per side (A, scale, (M, X, error)): the matrix
        whose root is computed, its scale, and the state of the iteration.
    """

    mu: Float[Array, 'blocks rows columns']
    nu: Float[Array, 'blocks rows columns']
    left: Float[Array, 'blocks rows rows']
    right: Float[Array, 'blocks columns columns']
    left_root: Float[Array, 'blocks rows rows']
    right_root: Float[Array, 'blocks columns columns']
    error: Float[Array, 'blocks 2']
    failures: Int[Array, 'blocks 2']
    work: Any = ()


class Options(NamedTuple):
    """Options of Shampoo; `scale_by_shampoo` documents them."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    nesterov: bool = False
    block: int = 1024
    every: int = 20
    start: int = 100
    groups: int = 1
    sliced: bool = False
    root: str = 'newton'
    ridge: float = 1e-6
    exponent: float = -0.25
    graft: str = 'adam'
    mu_dtype: Any = jnp.float32
    stats_dtype: Any = jnp.float32
    root_dtype: Any = jnp.float32
    gather_dtype: Any = jnp.float32


def check(o: Options) -> list[tuple[str, str]]:
    """Lists invalid options as (option, what is wrong and how to fix it)."""
    wrong = blocks.check(o.block, o.every, o.groups, o.stats_dtype)
    for name, known in (('root', roots.METHODS), ('graft', GRAFTS)):
        if getattr(o, name) not in known:
            wrong.append((name, f'{getattr(o, name)!r} is none of {", ".join(known)}'))
    if not 0 < o.ridge <= 1 and (o.root == 'newton' or o.ridge):
        wrong.append(('ridge', f'{o.ridge:g} is not above 0 and at most 1; take 1e-6'))
    if o.start < 1:
        wrong.append(('start', f'{o.start} is no step; the first is 1'))
    if o.exponent >= 0:
        wrong.append(('exponent', f'{o.exponent:g} is not below 0; Shampoo has -0.25'))
        return wrong
    if o.root == 'newton' and roots.root_degree(o.exponent) is None:
        why = f"{o.exponent:g} is not -1 divided by a whole number, as root='newton' needs"
        wrong.append(('exponent', f"{why}; take root='eigh'"))
    if o.sliced and o.groups > 1:
        why = 'all roots are spread over all steps already'
        wrong.append(('sliced', f'{why}; take groups=1, not {o.groups}'))
    if o.sliced and o.root != 'newton':
        wrong.append(('sliced', "only root='newton' can be spread over steps"))
    return wrong


def scale_by_shampoo(
    mesh: Mesh | None = None, matrix: blocks.MatrixOf = matrices.matrix, **options: Any
) -> optax.GradientTransformation:
    """Scales gradients to Shampoo's direction, in the order of Meta's code (arXiv 2309.06497).

    Args:
      mesh: mesh whose devices share the blocks; None computes on one device.
      matrix: maps a path and its number of axes to the matrix view, or None for Adam.
      b1, b2, eps: Adam's, for the averaged gradient and for grafting; b2 also for L and R.
      nesterov: look ahead as NAdam does.
      block: largest side of a block.
      every: roots are computed at steps (from 1) that are multiples of this, and at `start`.
      start: first step with roots; earlier steps use the grafting direction.
      groups: split the blocks into this many groups and compute the roots of one of them every
        `every / groups` steps.
      sliced: spread the iterations of all roots over `every` steps, for when there are too few
        blocks for groups; roots are then `every` steps old when first used.
      root: 'newton', or 'eigh', which takes any exponent.
      ridge: added to L and R, relative to their largest eigenvalue.
      exponent: of L and R. -1/4 is Shampoo; -1/2 inverts the Kronecker product itself.
      graft: 'adam'; 'sgd' uses the norm of the averaged gradient M; 'none' does not rescale,
        and uses M before `start`.
      mu_dtype, stats_dtype, root_dtype: storage dtypes.
      gather_dtype: dtype in which directions travel between devices.

    Returns:
      A transformation with a `blocks.State`, whose `health` has the largest error of the roots
      in use.

    Raises:
      ValueError: options that `check` rejects.
    """
    o = Options(**options)
    for name, why in check(o):
        raise ValueError(f'{name}: {why}')
    return blocks.transformation(
        _adam(o),
        lambda stack, length: _init_stack(o, stack, length),
        lambda *now: _advance(o, *now),
        block=o.block,
        groups=o.groups,
        mesh=mesh,
        matrix=matrix,
        gather_dtype=o.gather_dtype,
    )


def _adam(o: Options) -> blocks.Adam:
    return blocks.Adam(o.b1, o.b2, o.eps, o.nesterov, o.mu_dtype, o.stats_dtype)


def _init_stack(o: Options, stack: blocks.BlockStack, length: int) -> StackState:
    r, c = stack.rows, stack.columns
    is_real = (jnp.arange(length) < stack.blocks)[:, None, None]

    def eye(side: int) -> Array:
        return jnp.where(is_real, jnp.eye(side, dtype=o.root_dtype)[None], 0)

    def work(side: int) -> Any:
        square = jnp.zeros((length, side, side), o.stats_dtype)
        line = jnp.zeros(length, o.stats_dtype)
        return square, line, (square, square, line)

    return StackState(
        mu=jnp.zeros((length, r, c), o.mu_dtype),
        nu=jnp.zeros((length, r, c), o.stats_dtype),
        left=jnp.zeros((length, r, r), o.stats_dtype),
        right=jnp.zeros((length, c, c), o.stats_dtype),
        left_root=eye(r),
        right_root=eye(c),
        error=jnp.zeros((length, 2), jnp.float32),
        failures=jnp.zeros((length, 2), jnp.int32),
        work={'left': work(r), 'right': work(c)} if o.sliced else (),
    )


def _advance(
    o: Options,
    grads: dict[str, Array],
    stacks: dict[str, StackState],
    step: Int[Array, ''],
    age: Int[Array, ''],
) -> tuple[dict[str, Array], dict[str, StackState], blocks.HealthStats]:
    """One step on the blocks of one device: statistics, roots that are due, directions."""
    averages: dict[str, Array] = {}
    new: dict[str, StackState] = {}
    health = blocks.zero_health()
    for name, g in grads.items():
        old = stacks[name]
        keep, g = blocks.usable(g)
        average, mu, nu = blocks.moments(_adam(o), g, old.mu, old.nu, step)
        left, right, restarted = blocks.statistics(o.b2, g, keep, old.left, old.right)
        mu, nu = jnp.where(keep, mu, old.mu), jnp.where(keep, nu, old.nu)
        new[name] = old._replace(mu=mu, nu=nu, left=left, right=right)
        averages[name] = jnp.where(keep, average, 0)
        health['ignored'] += blocks.count(~keep)
        health['restarted'] += restarted
    new, root_health = _advance_iterations(o, new, age) if o.sliced else _refresh(o, new, age)
    health = _sum(health, root_health)
    # Sliced iterations finish their first roots at step `every`.
    start = max(o.start, o.every) if o.sliced else o.start
    directions = {}
    for name, average in averages.items():
        graft_direction = average
        if o.graft == 'adam':
            graft_direction = blocks.adam(_adam(o), average, new[name].nu, step)
        preconditioned = _precondition(o, new[name], average, graft_direction)
        directions[name] = jnp.where(age >= start, preconditioned, graft_direction)
    errors = [jnp.max(stack.error, initial=0.0) for stack in new.values()]
    return directions, new, {**health, 'error': jnp.stack(errors).max()}


def _norm(x: Float[Array, 'blocks r c']) -> Float[Array, 'blocks 1 1']:
    """Frobenius norm of each block; scaled first, so that squares neither over- nor underflow."""
    largest = jnp.abs(x).max((1, 2), keepdims=True)
    unit = x / jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.square(unit).sum((1, 2), keepdims=True))


def _precondition(o: Options, stack: StackState, average: Array, plain: Array) -> Array:
    """Applies the roots and grafting; blocks whose result is not finite fall back to `plain`."""
    # Three bfloat16 passes: one costs accuracy here (cosine 0.994), six gain nothing.
    high = jax.lax.Precision.HIGH
    left, right = (x.astype(average.dtype) for x in (stack.left_root, stack.right_root))
    direction = jnp.einsum('nij,njk->nik', left, average, precision=high)
    direction = jnp.einsum('nij,njk->nik', direction, right, precision=high)
    if o.graft != 'none':
        norm = _norm(direction)
        direction = direction * (_norm(plain) / jnp.where(norm > 0, norm, 1))
    return jnp.where(jnp.isfinite(direction).all((1, 2), keepdims=True), direction, plain)


def _ridge(o: Options, failures: Int[Array, ' n']) -> Float[Array, ' n']:
    """Ridge per root: ten times larger after each consecutive failure."""
    return o.ridge * 10.0 ** failures.astype(o.stats_dtype)


def _sum(a: blocks.HealthStats, b: blocks.HealthStats) -> blocks.HealthStats:
    return {name: a[name] + b[name] for name in a}


def _is_real(root: Float[Array, 'n d d']) -> Bool[Array, ' n']:
    """Mask of blocks that are not padding at a stack's end; those have roots of zeros."""
    return jnp.trace(root, axis1=1, axis2=2) != 0


def _zero_padding(tree: Any, root: Float[Array, 'n d d']) -> Any:
    """Zeroes arrays at the padding of a stack's end, as checkpoints require.

    Iterations preserve these zeros: no step improves on an error of 0.
    """
    real = _is_real(root)
    return jax.tree.map(lambda x: jnp.where(real.reshape(-1, *[1] * (x.ndim - 1)), x, 0), tree)


def _accept(
    o: Options, stack: StackState, computed: dict[str, tuple[Array, Array]], group: Array | None
) -> tuple[StackState, blocks.HealthStats]:
    """Installs new (root, error) pairs of each side where they are accurate enough.

    A rejected root leaves the old one in use and raises the ridge of the next attempt. After
    MAX_FAILURES in a row the statistics restart as a multiple of the identity.
    """
    health, errors, new_failures = blocks.zero_health(), [], []
    fields: dict[str, Array] = {}
    for column, side in enumerate(SIDES):
        root, error = computed[side]
        old, stats, old_error, failures = (
            blocks.take(x, group, o.groups)
            for x in (
                getattr(stack, f'{side}_root'),
                getattr(stack, side),
                stack.error[:, column],
                stack.failures[:, column],
            )
        )
        is_real = _is_real(old)
        good = (error < TOLERANCE) & jnp.isfinite(root).all((1, 2))
        failures = jnp.where(good, 0, failures + 1)
        # Restart from a multiple of the identity, whose root is known in closed form.
        restart = ~good & (failures >= MAX_FAILURES)
        mean = jnp.trace(stats, axis1=1, axis2=2) / stats.shape[-1]
        mean = jnp.where(jnp.isfinite(mean) & (mean > 0), mean, 1)[:, None, None]
        eye = jnp.eye(stats.shape[-1], dtype=stats.dtype)[None]
        reset = restart[:, None, None]
        root = jnp.where(good[:, None, None], root, jnp.where(reset, mean**o.exponent * eye, old))
        root = jnp.where(is_real[:, None, None], root, 0).astype(o.root_dtype)
        stats = jnp.where(reset & is_real[:, None, None], mean * eye, stats)
        errors.append(jnp.where(is_real, jnp.where(good, error, old_error), 0).astype(jnp.float32))
        new_failures.append(jnp.where(restart | ~is_real, 0, failures))
        fields[side] = blocks.put(getattr(stack, side), stats, group, o.groups)
        fields[f'{side}_root'] = blocks.put(getattr(stack, f'{side}_root'), root, group, o.groups)
        counted = {'computed': is_real, 'refused': is_real & ~good, 'restarted': is_real & restart}
        health |= {name: health[name] + blocks.count(x) for name, x in counted.items()}
    fields['error'] = blocks.put(stack.error, jnp.stack(errors, 1), group, o.groups)
    fields['failures'] = blocks.put(stack.failures, jnp.stack(new_failures, 1), group, o.groups)
    return stack._replace(**fields), health


def _refresh(
    o: Options, stacks: dict[str, StackState], age: Int[Array, '']
) -> tuple[dict[str, StackState], blocks.HealthStats]:
    """Recomputes the roots that are due at this step."""

    def refresh_group(
        stacks: dict[str, StackState], group: Array | None
    ) -> tuple[dict[str, StackState], blocks.HealthStats]:
        # Matrices of one size are computed in one batch, whatever their stack and side.
        sizes: dict[int, list[tuple[str, str]]] = {}
        for name, stack in stacks.items():
            for side in SIDES:
                sizes.setdefault(getattr(stack, side).shape[-1], []).append((name, side))
        computed: dict[str, dict[str, tuple[Array, Array]]] = {name: {} for name in stacks}
        for keys in sizes.values():
            parts = [
                blocks.take(getattr(stacks[name], side), group, o.groups) for name, side in keys
            ]
            failures = [
                blocks.take(stacks[name].failures[:, SIDES.index(side)], group, o.groups)
                for name, side in keys
            ]
            root, error = roots.inverse_root(
                jnp.concatenate(parts) / blocks.correction(o.b2, age, o.stats_dtype),
                o.exponent,
                _ridge(o, jnp.concatenate(failures)),
                o.root,
                o.ridge,
            )
            ends = itertools.accumulate((part.shape[0] for part in parts), initial=0)
            for (name, side), (start, end) in zip(keys, itertools.pairwise(ends), strict=True):
                computed[name][side] = root[start:end], error[start:end]
        new, health = {}, blocks.zero_health()
        for name, stack in stacks.items():
            new[name], stack_health = _accept(o, stack, computed[name], group)
            health = _sum(health, stack_health)
        return new, health

    if o.groups == 1:
        due = (age == o.start) | ((age > o.start) & (age % o.every == 0))
        return jax.lax.cond(
            due, lambda s: refresh_group(s, None), lambda s: (s, blocks.zero_health()), stacks
        )
    # All groups at the first step with roots, afterwards one at a time.
    interval = o.every // o.groups
    group = (age // interval) % o.groups
    due = jnp.where((age > o.start) & (age % interval == 0), group + 1, group)
    first = jnp.where(age == o.start, 0, group)
    last = jnp.where(age == o.start, o.groups, due)

    def body(group: Array, carry: Any) -> Any:
        stacks, health = carry
        stacks, group_health = refresh_group(stacks, group)
        return stacks, _sum(health, group_health)

    return jax.lax.fori_loop(first, last, body, (stacks, blocks.zero_health()))


def _advance_iterations(
    o: Options, stacks: dict[str, StackState], age: Int[Array, '']
) -> tuple[dict[str, StackState], blocks.HealthStats]:
    """Advances all roots by a few iterations; new roots take effect when all are finished."""
    p = roots.root_degree(o.exponent)
    assert p is not None
    iterations = math.ceil(roots.newton_steps(p, o.ridge) / o.every)
    phase = (age - 1) % o.every

    def begin(stacks: dict[str, StackState]) -> dict[str, StackState]:
        new = {}
        for name, stack in stacks.items():
            work = {}
            for column, side in enumerate(SIDES):
                stats = getattr(stack, side) / blocks.correction(o.b2, age, o.stats_dtype)
                a, scale = roots.normalised(stats, _ridge(o, stack.failures[:, column]))
                started = a, scale, roots.newton_start(a, p)
                work[side] = _zero_padding(started, getattr(stack, f'{side}_root'))
            new[name] = stack._replace(work=work)
        return new

    def finish(stacks: dict[str, StackState]) -> tuple[dict[str, StackState], blocks.HealthStats]:
        new, health = {}, blocks.zero_health()
        for name, stack in stacks.items():
            computed = {}
            for side, (a, scale, (_, x, _)) in stack.work.items():
                error = roots.residual(x, a, p)
                computed[side] = roots.rescaled(x, scale, o.exponent), error
            new[name], stack_health = _accept(o, stack, computed, None)
            health = _sum(health, stack_health)
        return new, health

    stacks = jax.lax.cond(phase == 0, begin, lambda s: s, stacks)
    for name, stack in stacks.items():
        work = {}
        for side, (a, scale, iteration) in stack.work.items():
            for _ in range(iterations):
                iteration = roots.newton_step(iteration, p)
            work[side] = a, scale, iteration
        stacks[name] = stack._replace(work=work)
    last = phase == o.every - 1
    return jax.lax.cond(last, finish, lambda s: (s, blocks.zero_health()), stacks)
