"""Shampoo under `jit` on any mesh, as an optax transformation (arXiv 1802.09568, 2309.06497).

For a block G of a matrix, with L and R averages of G G' and G' G and M one of G as in Adam,
the direction is L^(-1/4) M R^(-1/4), scaled to the length that Adam's would have (grafting).

All that belongs to blocks (blocks.py), also their moments, lies in stacks over all devices
of the mesh. A device computes on its own blocks only; the directions are then gathered, once
in a step. Nothing here depends on the number of devices but the zeros at a stack's end.
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

# A root is used if the norm of X^p A - 1 is below this: it is then right to some 15 % in every
# direction. The rounding of float32 alone gives 0.1 to 0.3 at a ridge of 1e-6; an eigenvalue
# that is lost gives 1.
TOLERANCE = 0.5
# After so many failures in a row, each with ten times the ridge of the one before, the
# statistics of a matrix start again.
MAX_FAILURES = 3

SIDES = ('left', 'right')


class StackState(NamedTuple):
    """The state of all blocks of one size [rows, columns].

    Attributes:
      mu, nu: averages of the gradient and of its square.
      left, right: averages of G G' and G' G.
      left_root, right_root: their roots as last computed.
      error: of these roots, left and right.
      failures: roots in a row that were refused, left and right.
      work: where a root takes several steps, for each side what it is of, its scale, and how
        far the iteration is: (A, scale, (M, X, error)).
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
    """See `scale_by_shampoo`."""

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
    """(option, what is wrong with it and what to do) for each that cannot be."""
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
    if o.root == 'newton' and roots.whole(o.exponent) is None:
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
    """Shampoo's direction, in the order of Meta's implementation (arXiv 2309.06497).

    Args:
      mesh: over all of whose axes blocks are spread; None computes on one device.
      matrix: says of a parameter's path and number of axes how it is a matrix.
      b1, b2, eps: Adam's, for the averaged gradient and for grafting; b2 also for L and R.
      nesterov: look ahead as NAdam does.
      block: largest side of a block.
      every: roots are computed at steps (from 1) that are multiples of this, and at `start`.
      start: the first step with roots; before it the direction is that of grafting.
      groups: compute the roots of one of so many parts every `every / groups` steps.
      sliced: spread the iterations of all roots over `every` steps, where there are not
        enough blocks for groups; roots are then `every` steps old when they are used first.
      root: 'newton', or 'eigh', which takes any exponent.
      ridge: added to L and R, relative to their largest eigenvalue.
      exponent: of L and R. -1/4 is Shampoo; -1/2 takes the Kronecker product as a whole.
      graft: 'adam'; 'sgd' takes the length of the averaged gradient, M; 'none' scales nothing,
        and is M before `start`.
      mu_dtype, stats_dtype, root_dtype: types that are kept.
      gather_dtype: type in which directions travel between devices.

    Returns:
      A transformation with a `blocks.State`; its `health` has the largest error of the roots
      in use.

    Raises:
      ValueError: options that `check` refuses.
    """
    o = Options(**options)
    for name, why in check(o):
        raise ValueError(f'{name}: {why}')
    return blocks.transformation(
        _adam(o),
        lambda stack, length: _empty(o, stack, length),
        lambda *now: _advance(o, *now),
        block=o.block,
        groups=o.groups,
        mesh=mesh,
        matrix=matrix,
        gather_dtype=o.gather_dtype,
    )


def _adam(o: Options) -> blocks.Adam:
    return blocks.Adam(o.b1, o.b2, o.eps, o.nesterov, o.mu_dtype, o.stats_dtype)


def _empty(o: Options, stack: blocks.BlockStack, length: int) -> StackState:
    r, c = stack.rows, stack.columns
    real = (jnp.arange(length) < stack.blocks)[:, None, None]

    def eye(side: int) -> Array:
        return jnp.where(real, jnp.eye(side, dtype=o.root_dtype)[None], 0)

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
    """One step of the blocks of one device: statistics, roots where due, directions."""
    averages: dict[str, Array] = {}
    new: dict[str, StackState] = {}
    told = blocks.nothing()
    for name, g in grads.items():
        old = stacks[name]
        keep, g = blocks.usable(g)
        average, mu, nu = blocks.moments(_adam(o), g, old.mu, old.nu, step)
        left, right, restarted = blocks.statistics(o.b2, g, keep, old.left, old.right)
        mu, nu = jnp.where(keep, mu, old.mu), jnp.where(keep, nu, old.nu)
        new[name] = old._replace(mu=mu, nu=nu, left=left, right=right)
        averages[name] = jnp.where(keep, average, 0)
        told['ignored'] += blocks.count(~keep)
        told['restarted'] += restarted
    new, more = _slices(o, new, age) if o.sliced else _refresh(o, new, age)
    told = _sum(told, more)
    start = max(o.start, o.every) if o.sliced else o.start
    directions = {}
    for name, average in averages.items():
        plain = average
        if o.graft == 'adam':
            plain = blocks.adam(_adam(o), average, new[name].nu, step)
        made = _precondition(o, new[name], average, plain)
        directions[name] = jnp.where(age >= start, made, plain)
    errors = [jnp.max(stack.error, initial=0.0) for stack in new.values()]
    return directions, new, {**told, 'error': jnp.stack(errors).max()}


def _length(x: Float[Array, 'blocks r c']) -> Float[Array, 'blocks 1 1']:
    largest = jnp.abs(x).max((1, 2), keepdims=True)
    unit = x / jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.square(unit).sum((1, 2), keepdims=True))


def _precondition(o: Options, stack: StackState, average: Array, plain: Array) -> Array:
    high = jax.lax.Precision.HIGH
    left, right = (x.astype(average.dtype) for x in (stack.left_root, stack.right_root))
    made = jnp.einsum('nij,njk->nik', left, average, precision=high)
    made = jnp.einsum('nij,njk->nik', made, right, precision=high)
    if o.graft != 'none':
        length = _length(made)
        made = made * (_length(plain) / jnp.where(length > 0, length, 1))
    return jnp.where(jnp.isfinite(made).all((1, 2), keepdims=True), made, plain)


def _ridge(o: Options, failures: Int[Array, ' n']) -> Float[Array, ' n']:
    return o.ridge * 10.0 ** failures.astype(o.stats_dtype)


def _sum(a: blocks.HealthStats, b: blocks.HealthStats) -> blocks.HealthStats:
    return {name: a[name] + b[name] for name in a}


def _real(root: Float[Array, 'n d d']) -> Bool[Array, ' n']:
    """Which blocks are none of the zeros at a stack's end: their roots are zeros too."""
    return jnp.trace(root, axis1=1, axis2=2) != 0


def _of_real(tree: Any, root: Float[Array, 'n d d']) -> Any:
    """Arrays with zeros for the zeros at a stack's end, as a checkpoint wants them.

    An iteration leaves them so: no step of it is better than an error of 0.
    """
    real = _real(root)
    return jax.tree.map(lambda x: jnp.where(real.reshape(-1, *[1] * (x.ndim - 1)), x, 0), tree)


def _accept(
    o: Options, stack: StackState, found: dict[str, tuple[Array, Array]], group: Array | None
) -> tuple[StackState, blocks.HealthStats]:
    """The stack with the (root, error) found for each side, where they are good enough."""
    told, errors, failed = blocks.nothing(), [], []
    fields: dict[str, Array] = {}
    for column, side in enumerate(SIDES):
        root, error = found[side]
        old, stats, kept, failures = (
            blocks.take(x, group, o.groups)
            for x in (
                getattr(stack, f'{side}_root'),
                getattr(stack, side),
                stack.error[:, column],
                stack.failures[:, column],
            )
        )
        real = _real(old)
        good = (error < TOLERANCE) & jnp.isfinite(root).all((1, 2))
        failures = jnp.where(good, 0, failures + 1)
        again = ~good & (failures >= MAX_FAILURES)
        mean = jnp.trace(stats, axis1=1, axis2=2) / stats.shape[-1]
        mean = jnp.where(jnp.isfinite(mean) & (mean > 0), mean, 1)[:, None, None]
        eye = jnp.eye(stats.shape[-1], dtype=stats.dtype)[None]
        reset = again[:, None, None]
        root = jnp.where(good[:, None, None], root, jnp.where(reset, mean**o.exponent * eye, old))
        root = jnp.where(real[:, None, None], root, 0).astype(o.root_dtype)
        stats = jnp.where(reset & real[:, None, None], mean * eye, stats)
        errors.append(jnp.where(real, jnp.where(good, error, kept), 0).astype(jnp.float32))
        failed.append(jnp.where(again | ~real, 0, failures))
        fields[side] = blocks.put(getattr(stack, side), stats, group, o.groups)
        fields[f'{side}_root'] = blocks.put(getattr(stack, f'{side}_root'), root, group, o.groups)
        counted = {'computed': real, 'refused': real & ~good, 'restarted': real & again}
        told |= {name: told[name] + blocks.count(x) for name, x in counted.items()}
    fields['error'] = blocks.put(stack.error, jnp.stack(errors, 1), group, o.groups)
    fields['failures'] = blocks.put(stack.failures, jnp.stack(failed, 1), group, o.groups)
    return stack._replace(**fields), told


def _refresh(
    o: Options, stacks: dict[str, StackState], age: Int[Array, '']
) -> tuple[dict[str, StackState], blocks.HealthStats]:
    """The stacks with the roots that are due at this step."""

    def one(
        stacks: dict[str, StackState], group: Array | None
    ) -> tuple[dict[str, StackState], blocks.HealthStats]:
        # All matrices of a size are computed on together, whichever stack and side they are of.
        sizes: dict[int, list[tuple[str, str]]] = {}
        for name, stack in stacks.items():
            for side in SIDES:
                sizes.setdefault(getattr(stack, side).shape[-1], []).append((name, side))
        found: dict[str, dict[str, tuple[Array, Array]]] = {name: {} for name in stacks}
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
                found[name][side] = root[start:end], error[start:end]
        new, told = {}, blocks.nothing()
        for name, stack in stacks.items():
            new[name], more = _accept(o, stack, found[name], group)
            told = _sum(told, more)
        return new, told

    if o.groups == 1:
        due = (age == o.start) | ((age > o.start) & (age % o.every == 0))
        return jax.lax.cond(due, lambda s: one(s, None), lambda s: (s, blocks.nothing()), stacks)
    # All groups at the first step, then one after the other: a loop over those that are due.
    each = o.every // o.groups
    group = (age // each) % o.groups
    due = jnp.where((age > o.start) & (age % each == 0), group + 1, group)
    first = jnp.where(age == o.start, 0, group)
    last = jnp.where(age == o.start, o.groups, due)

    def body(group: Array, carry: Any) -> Any:
        stacks, told = carry
        stacks, more = one(stacks, group)
        return stacks, _sum(told, more)

    return jax.lax.fori_loop(first, last, body, (stacks, blocks.nothing()))


def _slices(
    o: Options, stacks: dict[str, StackState], age: Int[Array, '']
) -> tuple[dict[str, StackState], blocks.HealthStats]:
    """The stacks a few iterations nearer to their next roots, which are used when all are made."""
    p = roots.whole(o.exponent)
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
                made = a, scale, roots.newton_start(a, p)
                work[side] = _of_real(made, getattr(stack, f'{side}_root'))
            new[name] = stack._replace(work=work)
        return new

    def finish(stacks: dict[str, StackState]) -> tuple[dict[str, StackState], blocks.HealthStats]:
        new, told = {}, blocks.nothing()
        for name, stack in stacks.items():
            found = {}
            for side, (a, scale, (_, x, _)) in stack.work.items():
                error = roots.residual(x, a, p)
                found[side] = roots.rescaled(x, scale, o.exponent), error
            new[name], more = _accept(o, stack, found, None)
            told = _sum(told, more)
        return new, told

    stacks = jax.lax.cond(phase == 0, begin, lambda s: s, stacks)
    for name, stack in stacks.items():
        work = {}
        for side, (a, scale, made) in stack.work.items():
            for _ in range(iterations):
                made = roots.newton_step(made, p)
            work[side] = a, scale, made
        stacks[name] = stack._replace(work=work)
    last = phase == o.every - 1
    return jax.lax.cond(last, finish, lambda s: (s, blocks.nothing()), stacks)
