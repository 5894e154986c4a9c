"""SOAP: Adam in the basis of Shampoo's eigenvectors (arXiv 2409.11321), on stacks of blocks.

For a block G, with L and R the averages of G G' and G' G, and P and Q the matrices of their
eigenvectors: second moments are averages of the square of P' G Q, and the direction is Adam's on
P' M Q, rotated back as P (...) Q'. Bases are constant between refreshes; a refresh is one step of
power iteration. The first gradient only provides the first bases and moves no matrix. A matrix
whose first gradients are zero starts at the first refresh after them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from big_vit.optim import blocks, matrices, roots

SIDES = ('left', 'right')

# Height of the ramp, relative to the trace: over a thousand columns each of its steps is still a
# hundred times the rounding of float32.
_RAMP = 1e-2


class StackState(NamedTuple):
    """State of all blocks of one size [rows, columns].

    Attributes:
      mu: average of the gradient.
      nu: average of the squared gradient, in the bases.
      left, right: averages of G G' and G' G.
      left_basis, right_basis: their eigenvectors, as columns.
    """

    mu: Float[Array, 'blocks rows columns']
    nu: Float[Array, 'blocks rows columns']
    left: Float[Array, 'blocks rows rows']
    right: Float[Array, 'blocks columns columns']
    left_basis: Float[Array, 'blocks rows rows']
    right_basis: Float[Array, 'blocks columns columns']


class Options(NamedTuple):
    """Options of SOAP; `scale_by_soap` documents them."""

    b1: float = 0.95
    b2: float = 0.95
    b2_stats: float | None = None
    eps: float = 1e-8
    block: int = 1024
    every: int = 10
    groups: int = 1
    mu_dtype: Any = jnp.float32
    stats_dtype: Any = jnp.float32
    root_dtype: Any = jnp.float32
    gather_dtype: Any = jnp.float32


def scale_by_soap(
    mesh: Mesh | None = None, matrix: blocks.MatrixOf = matrices.matrix, **options: Any
) -> optax.GradientTransformation:
    """Scales gradients to SOAP's direction.

    Args:
      mesh: mesh whose devices share the blocks; None computes on one device.
      matrix: maps a path and its number of axes to the matrix view, or None for Adam.
      b1, b2, eps: Adam's; `b2_stats` is that of L and R, b2 by default.
      block: largest side of a block.
      every: steps between two refreshes of a basis.
      groups: split the blocks into this many groups and refresh one of them every
        `every / groups` steps.
      mu_dtype, stats_dtype, root_dtype: storage dtypes of M, of all other averages, and of the
        bases.
      gather_dtype: dtype in which directions travel between devices.

    Returns:
      A transformation with a `blocks.State`; the error in its `health` measures how far the bases
      refreshed at this step are from orthonormal.

    Raises:
      ValueError: invalid options.
    """
    o = Options(**options)
    for name, why in blocks.check(o.block, o.every, o.groups, o.stats_dtype):
        raise ValueError(f'{name}: {why}')
    return blocks.transformation(
        blocks.Adam(o.b1, o.b2, o.eps, False, o.mu_dtype, o.stats_dtype),
        lambda stack, length: _init_stack(o, stack, length),
        lambda *now: _advance(o, *now),
        block=o.block,
        groups=o.groups,
        mesh=mesh,
        matrix=matrix,
        gather_dtype=o.gather_dtype,
    )


def _init_stack(o: Options, stack: blocks.BlockStack, length: int) -> StackState:
    def zeros(rows: int, columns: int, dtype: Any) -> Array:
        return jnp.zeros((length, rows, columns), dtype)

    r, c = stack.rows, stack.columns
    return StackState(
        mu=zeros(r, c, o.mu_dtype),
        nu=zeros(r, c, o.stats_dtype),
        left=zeros(r, r, o.stats_dtype),
        right=zeros(c, c, o.stats_dtype),
        left_basis=zeros(r, r, o.root_dtype),
        right_basis=zeros(c, c, o.root_dtype),
    )


def _advance(
    o: Options,
    grads: dict[str, Array],
    stacks: dict[str, StackState],
    step: Int[Array, ''],
    age: Int[Array, ''],
) -> tuple[dict[str, Array], dict[str, StackState], blocks.HealthStats]:
    """One step on the blocks of one device: direction, statistics, bases that are due."""
    directions: dict[str, Array] = {}
    new: dict[str, StackState] = {}
    health = blocks.zero_health()
    b2_stats = o.b2 if o.b2_stats is None else o.b2_stats
    del step  # Second moments live in these bases, so they are as old as the bases.
    # Updates actually made: the first gradient makes none.
    updates = age - 1
    moves = updates > 0
    for name, g in grads.items():
        old = stacks[name]
        keep, g = blocks.usable(g)
        mu = o.b1 * old.mu.astype(g.dtype) + (1 - o.b1) * g
        nu = o.b2 * old.nu + (1 - o.b2) * jnp.square(_rotate(old, g))
        # Both bias corrections as one factor: eps is added to an uncorrected root, as in the
        # authors' code.
        size = jnp.sqrt(blocks.correction(o.b2, updates, g.dtype))
        size = size / jnp.where(moves, blocks.correction(o.b1, updates, g.dtype), 1)
        direction = _rotate(old, size * _rotate(old, mu) / (jnp.sqrt(nu) + o.eps), back=True)
        directions[name] = jnp.where(keep & moves & jnp.isfinite(direction), direction, 0)
        left, right, restarted = blocks.statistics(b2_stats, g, keep, old.left, old.right)
        mu = jnp.where(keep & moves, mu, old.mu).astype(o.mu_dtype)
        nu = jnp.where(keep & moves, nu, old.nu)
        new[name] = old._replace(mu=mu, nu=nu, left=left, right=right)
        health['ignored'] += blocks.count(~keep)
        health['restarted'] += restarted
    new, refresh_health = _refresh(o, new, age)
    return directions, new, {name: health[name] + refresh_health[name] for name in health}


def _rotate(stack: StackState, x: Array, back: bool = False) -> Array:
    """Rotates blocks into the bases, or back out of them."""
    high = jax.lax.Precision.HIGH
    p, q = stack.left_basis.astype(x.dtype), stack.right_basis.astype(x.dtype)
    first, second = ('nij,njk->nik', 'nij,nkj->nik') if back else ('nji,njk->nik', 'nij,njk->nik')
    return jnp.einsum(second, jnp.einsum(first, p, x, precision=high), q, precision=high)


def _has_begun(a: Float[Array, 'n d d']) -> Bool[Array, 'n 1 1']:
    """Whether there has been a gradient; always False for padding at a stack's end."""
    return jnp.trace(a, axis1=1, axis2=2)[:, None, None] > 0


def _first_basis(a: Float[Array, 'n d d'], other: Float[Array, 'n e e']) -> Float[Array, 'n d d']:
    """Initial eigenvectors, in order of descending eigenvalues.

    Zero rows, as padding has them, get eigenvectors of their own at the very end: mixed with
    others of eigenvalue zero, they would swallow a part of the direction. Where zero eigenvalues
    are inevitable (more rows than the other side has), rounding would pick their eigenvectors,
    differently for each number of devices; a small ramp on the diagonal decides instead.
    """
    scale = jnp.trace(a, axis1=1, axis2=2)[:, None]
    a = a / jnp.where(scale > 0, scale, 1)[..., None]
    empty, others = (jnp.diagonal(x, axis1=1, axis2=2) == 0 for x in (a, other))
    more = (~empty).sum(1, keepdims=True) > (~others).sum(1, keepdims=True)
    ramp = jnp.where(more, _RAMP * jnp.linspace(1, 0, a.shape[-1])[None], 0)
    lowest = jnp.where(empty, -1.0, ramp).astype(a.dtype)[..., None]
    _, v = roots.eigh(a + lowest * jnp.eye(a.shape[-1], dtype=a.dtype)[None])
    return v[..., ::-1]


def _next_basis(
    a: Float[Array, 'n d d'], basis: Float[Array, 'n d d']
) -> tuple[Float[Array, 'n d d'], Int[Array, 'n d']]:
    """One step of power iteration; returns (new basis, permutation applied to its columns)."""
    scale = jnp.trace(a, axis1=1, axis2=2)[:, None, None]
    a = a / jnp.where(scale > 0, scale, 1)
    turned = roots.product(a, basis)
    values = (basis * turned).sum(1)
    order = jnp.argsort(-values, axis=1)
    # The tiny ridge keeps columns of eigenvalue zero where they are; QR would make them up.
    turned = turned + jnp.finfo(a.dtype).eps / a.shape[-1] * basis
    return roots.orthonormal(jnp.take_along_axis(turned, order[:, None], axis=2)), order


def _refresh(
    o: Options, stacks: dict[str, StackState], age: Int[Array, '']
) -> tuple[dict[str, StackState], blocks.HealthStats]:
    """Refreshes the bases that are due after this step."""

    def begin(
        stacks: dict[str, StackState], _: Array
    ) -> tuple[dict[str, StackState], blocks.HealthStats]:
        new = {}
        for name, stack in stacks.items():
            bases = {}
            for side, a, other in (
                ('left', stack.left, stack.right),
                ('right', stack.right, stack.left),
            ):
                basis = jnp.where(_has_begun(a), _first_basis(a, other), 0)
                bases[f'{side}_basis'] = basis.astype(o.root_dtype)
            new[name] = stack._replace(**bases)
        return new, blocks.zero_health()

    def refresh_group(
        stacks: dict[str, StackState], group: Array
    ) -> tuple[dict[str, StackState], blocks.HealthStats]:
        new, health = {}, blocks.zero_health()
        for name, stack in stacks.items():
            fields = {}
            nu = blocks.take(stack.nu, group, o.groups)
            for axis, side in enumerate(SIDES, 1):
                old = blocks.take(getattr(stack, f'{side}_basis'), group, o.groups)
                stats = blocks.take(getattr(stack, side), group, o.groups)
                eye = jnp.eye(old.shape[-1], dtype=stats.dtype)[None]
                # Blocks whose gradients were zero at the first step have no basis yet.
                start = jnp.where(old.any((1, 2), keepdims=True), old.astype(stats.dtype), eye)
                basis, order = _next_basis(stats, start)
                error = jnp.abs(roots.product(jnp.swapaxes(basis, 1, 2), basis) - eye).max((1, 2))
                begun = _has_begun(stats)[:, 0, 0]
                # A basis further from orthonormal than 1 % would change the length of updates.
                refused = begun & ~(jnp.isfinite(basis).all((1, 2)) & (error < 0.01))
                good = begun & ~refused
                order = jnp.expand_dims(order, 3 - axis)
                moved = jnp.take_along_axis(nu, order, axis=axis)
                nu = jnp.where(good[:, None, None], moved, nu)
                # Second moments follow the columns of the basis that they belong to.
                basis = jnp.where(good[:, None, None], basis.astype(o.root_dtype), old)
                fields[f'{side}_basis'] = blocks.put(
                    getattr(stack, f'{side}_basis'), basis, group, o.groups
                )
                health['computed'] += blocks.count(begun)
                health['refused'] += blocks.count(refused)
                error = jnp.max(jnp.where(good, error, 0), initial=0.0).astype(jnp.float32)
                health['error'] = jnp.maximum(health['error'], error)
            fields['nu'] = blocks.put(stack.nu, nu, group, o.groups)
            new[name] = stack._replace(**fields)
        return new, health

    interval = o.every // o.groups
    updates = age - 1
    due = jnp.where(age == 1, 1, jnp.where((updates % interval == 0), 2, 0))
    branches = (lambda s, _: (s, blocks.zero_health()), begin, refresh_group)
    return jax.lax.switch(due, branches, stacks, (updates // interval) % o.groups)
