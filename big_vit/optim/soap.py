"""SOAP: Adam in the basis of Shampoo's eigenvectors (arXiv 2409.11321), on stacks of blocks.

For a block G, with L and R averages of G G' and G' G and columns of P and Q their
eigenvectors: the average of the squares is one of P' G Q, and the direction is P times Adam's
on P' M Q, times Q'. Between two refreshes the bases stand still; a refresh is one step of a
power iteration. The first gradient gives only the first bases, and moves no matrix; a matrix
whose first gradients are zeros begins at the first refresh after them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from big_vit.optim import blocks, matrices, roots

SIDES = ('left', 'right')

# Of the trace; over a thousand columns still a hundred times the rounding of float32.
_RAMP = 1e-2


class StackState(NamedTuple):
    """The state of all blocks of one size [rows, columns].

    Attributes:
      mu: average of the gradient.
      nu: average of its square in the bases.
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
    """See `scale_by_soap`."""

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
    """SOAP's direction.

    Args:
      mesh: over all of whose axes blocks are spread; None computes on one device.
      matrix: says of a parameter's path and number of axes how it is a matrix.
      b1, b2, eps: Adam's; `b2_stats` is that of L and R, b2 by default.
      block: largest side of a block.
      every: steps between two refreshes of a basis.
      groups: refresh one of so many parts every `every / groups` steps.
      mu_dtype, stats_dtype, root_dtype: types of M, of all averages else, and of the bases.
      gather_dtype: type in which directions travel between devices.

    Returns:
      A transformation with a `blocks.State`; the error in its `health` is how far the bases
      refreshed at this step are from orthonormal.

    Raises:
      ValueError: options that do not go together.
    """
    o = Options(**options)
    for name, why in blocks.check(o.block, o.every, o.groups, o.stats_dtype):
        raise ValueError(f'{name}: {why}')
    return blocks.transformation(
        blocks.Adam(o.b1, o.b2, o.eps, False, o.mu_dtype, o.stats_dtype),
        lambda stack, length: _empty(o, stack, length),
        lambda *now: _advance(o, *now),
        block=o.block,
        groups=o.groups,
        mesh=mesh,
        matrix=matrix,
        gather_dtype=o.gather_dtype,
    )


def _empty(o: Options, stack: blocks.BlockStack, length: int) -> StackState:
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
    """One step of the blocks of one device: direction, statistics, bases where due."""
    directions: dict[str, Array] = {}
    new: dict[str, StackState] = {}
    told = blocks.nothing()
    b2_stats = o.b2 if o.b2_stats is None else o.b2_stats
    del step  # Averages of squares in these bases are as old as the bases.
    # Of updates made: the first gradient makes none.
    updates = age - 1
    moves = updates > 0
    for name, g in grads.items():
        old = stacks[name]
        keep, g = blocks.usable(g)
        mu = o.b1 * old.mu.astype(g.dtype) + (1 - o.b1) * g
        nu = o.b2 * old.nu + (1 - o.b2) * jnp.square(_turn(old, g))
        size = jnp.sqrt(blocks.correction(o.b2, updates, g.dtype))
        size = size / jnp.where(moves, blocks.correction(o.b1, updates, g.dtype), 1)
        made = _turn(old, size * _turn(old, mu) / (jnp.sqrt(nu) + o.eps), back=True)
        directions[name] = jnp.where(keep & moves & jnp.isfinite(made), made, 0)
        left, right, restarted = blocks.statistics(b2_stats, g, keep, old.left, old.right)
        mu = jnp.where(keep & moves, mu, old.mu).astype(o.mu_dtype)
        nu = jnp.where(keep & moves, nu, old.nu)
        new[name] = old._replace(mu=mu, nu=nu, left=left, right=right)
        told['ignored'] += blocks.count(~keep)
        told['restarted'] += restarted
    new, more = _refresh(o, new, age)
    return directions, new, {name: told[name] + more[name] for name in told}


def _turn(stack: StackState, x: Array, back: bool = False) -> Array:
    """Into the bases, or out of them."""
    high = jax.lax.Precision.HIGH
    p, q = stack.left_basis.astype(x.dtype), stack.right_basis.astype(x.dtype)
    first, second = ('nij,njk->nik', 'nij,nkj->nik') if back else ('nji,njk->nik', 'nij,njk->nik')
    return jnp.einsum(second, jnp.einsum(first, p, x, precision=high), q, precision=high)


def _begun(a: Float[Array, 'n d d']) -> Bool[Array, 'n 1 1']:
    """Whether there has been a gradient; never for the zeros at a stack's end."""
    return jnp.trace(a, axis1=1, axis2=2)[:, None, None] > 0


def _first_basis(a: Float[Array, 'n d d'], other: Float[Array, 'n e e']) -> Float[Array, 'n d d']:
    """Eigenvectors, those of the largest eigenvalues first.

    Rows of zeros, as padding has them, become eigenvectors of their own behind all others:
    mixed with those that have an eigenvalue of zero, a part of the direction would be lost.
    Where there must be such (more rows than the other side has) their eigenvectors would be
    made by rounding, others on each number of devices: so a ramp is added, which decides.
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
    """(basis after a step of a power iteration, the order that its columns were put in)."""
    scale = jnp.trace(a, axis1=1, axis2=2)[:, None, None]
    a = a / jnp.where(scale > 0, scale, 1)
    turned = roots.product(a, basis)
    values = (basis * turned).sum(1)
    order = jnp.argsort(-values, axis=1)
    # The ridge keeps the columns of eigenvalue zero where they are.
    turned = turned + jnp.finfo(a.dtype).eps / a.shape[-1] * basis
    return roots.orthonormal(jnp.take_along_axis(turned, order[:, None], axis=2)), order


def _refresh(
    o: Options, stacks: dict[str, StackState], age: Int[Array, '']
) -> tuple[dict[str, StackState], blocks.HealthStats]:
    """The stacks with the bases that are due after this step."""

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
                basis = jnp.where(_begun(a), _first_basis(a, other), 0)
                bases[f'{side}_basis'] = basis.astype(o.root_dtype)
            new[name] = stack._replace(**bases)
        return new, blocks.nothing()

    def one(
        stacks: dict[str, StackState], group: Array
    ) -> tuple[dict[str, StackState], blocks.HealthStats]:
        new, told = {}, blocks.nothing()
        for name, stack in stacks.items():
            fields = {}
            nu = blocks.take(stack.nu, group, o.groups)
            for axis, side in enumerate(SIDES, 1):
                old = blocks.take(getattr(stack, f'{side}_basis'), group, o.groups)
                stats = blocks.take(getattr(stack, side), group, o.groups)
                eye = jnp.eye(old.shape[-1], dtype=stats.dtype)[None]
                start = jnp.where(old.any((1, 2), keepdims=True), old.astype(stats.dtype), eye)
                basis, order = _next_basis(stats, start)
                error = jnp.abs(roots.product(jnp.swapaxes(basis, 1, 2), basis) - eye).max((1, 2))
                begun = _begun(stats)[:, 0, 0]
                refused = begun & ~(jnp.isfinite(basis).all((1, 2)) & (error < 0.01))
                good = begun & ~refused
                order = jnp.expand_dims(order, 3 - axis)
                moved = jnp.take_along_axis(nu, order, axis=axis)
                nu = jnp.where(good[:, None, None], moved, nu)
                basis = jnp.where(good[:, None, None], basis.astype(o.root_dtype), old)
                fields[f'{side}_basis'] = blocks.put(
                    getattr(stack, f'{side}_basis'), basis, group, o.groups
                )
                told['computed'] += blocks.count(begun)
                told['refused'] += blocks.count(refused)
                error = jnp.max(jnp.where(good, error, 0), initial=0.0).astype(jnp.float32)
                told['error'] = jnp.maximum(told['error'], error)
            fields['nu'] = blocks.put(stack.nu, nu, group, o.groups)
            new[name] = stack._replace(**fields)
        return new, told

    each = o.every // o.groups
    updates = age - 1
    due = jnp.where(age == 1, 1, jnp.where((updates % each == 0), 2, 0))
    branches = (lambda s, _: (s, blocks.nothing()), begin, one)
    return jax.lax.switch(due, branches, stacks, (updates // each) % o.groups)
