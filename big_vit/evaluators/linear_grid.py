"""Linear classifiers on frozen features for a grid of settings, all trained at once by SGD.

The law of DINOv2's linear evaluation (arXiv 2304.07193): for each learning rate, number of last
blocks and pooling a classifier x W + b of its own, W from a normal with deviation 0.01, b from 0;
SGD with momentum 0.9 and no decay, a cosine of the rate to 0 without warmup, rates times
batch / 256. With a class token, x is that of the last n blocks one after the other, and in half
of the grid also the mean of the last block's tokens; without one, the means of n blocks.

Two things are not as there: features are of the evaluation's transform (there each step draws
crops anew), and the best of the grid is chosen on a held-out share of the training split (there
on the test split).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32

from big_vit import sharding
from big_vit.errors import UserError
from big_vit.evaluators import heldout
from big_vit.evaluators.features import PRECISION, Features

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
MOMENTUM = 0.9

# Weights and momentum of one input, for all rates: [rates, width, classes], [rates, classes].
Heads = list[dict[str, jax.Array]]


def depths(last_blocks: tuple[int, ...] | None, depth: int, key: str) -> tuple[int, ...]:
    """How many last blocks; by default one and four, or all where there are fewer.

    Raises:
      UserError: the model has fewer blocks than asked for.
    """
    if last_blocks is None:
        return tuple(dict.fromkeys((1, min(4, depth))))
    if max(last_blocks) > depth:
        raise UserError(
            f'config: {key}.last_blocks={max(last_blocks)}, but the model has {depth} blocks'
        )
    return last_blocks


def inputs(
    values: Float[np.ndarray, 'examples joined'],
    last_blocks: tuple[int, ...],
    blocks: int,
    tokens: int,
) -> dict[tuple[int, bool], Float32[np.ndarray, 'examples width']]:
    """What the classifiers are given, by (last blocks, whether the mean is joined).

    Args:
      values: of each of `blocks` blocks the class token and the mean (`tokens` 2), or the mean.
    """
    each = values.reshape(len(values), blocks, tokens, -1)
    found = {}
    for count in last_blocks:
        first = each[:, -count:, 0].reshape(len(values), -1)
        found[count, False] = first
        if tokens == 2:
            found[count, True] = np.concatenate([first, each[:, -1, 1]], axis=1)
    return found


def _loss(head: dict[str, Array], x: Array, labels: Array) -> Array:
    logits = jnp.matmul(x, head['kernel'], precision=PRECISION) + head['bias'][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.cache
def _step(mesh: Mesh):
    """The jitted step of all classifiers: (heads, momenta, rates now, inputs, labels)."""
    over_rates = jax.vmap(jax.grad(_loss), in_axes=(0, None, None))

    def step(
        heads: Heads, momenta: Heads, rates: Array, xs: list[Array], labels: Array
    ) -> tuple[Heads, Heads]:
        new_heads, new_momenta = [], []
        for head, momentum, x in zip(heads, momenta, xs, strict=True):
            grads = over_rates(head, x, labels)
            momentum = jax.tree.map(lambda m, g: MOMENTUM * m + g, momentum, grads)
            new_momenta.append(momentum)
            new_heads.append(
                jax.tree.map(
                    lambda w, m: w - rates.reshape(-1, *(1,) * (w.ndim - 1)) * m, head, momentum
                )
            )
        return new_heads, new_momenta

    whole = sharding.replicated(mesh)
    return jax.jit(
        step,
        donate_argnums=(0, 1),
        in_shardings=(
            whole,
            whole,
            whole,
            sharding.batch_sharding(mesh),
            sharding.batch_sharding(mesh),
        ),
        out_shardings=whole,
    )


def fit(
    xs: list[Float32[np.ndarray, 'examples _']],
    labels: np.ndarray,
    classes: int,
    rates: tuple[float, ...],
    *,
    mesh: Mesh,
    steps: int,
    batch: int,
    seed: int,
) -> list[dict[str, np.ndarray]]:
    """{'kernel' [rates, width, classes], 'bias' [rates, classes]} for each input.

    A batch is the next of a permutation that is drawn anew for each epoch; one that does not
    divide by the devices is made smaller.
    """
    ways = mesh.shape['replica'] * mesh.shape['fsdp']
    batch = max(min(batch, len(labels)) // ways, 1) * ways
    rng = np.random.default_rng(seed)
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    zeros = np.zeros((len(rates), classes), np.float32)
    heads: Heads = []
    for x in xs:
        kernel = (0.01 * rng.standard_normal((x.shape[1], classes))).astype(np.float32)
        # All rates begin at the same weights, so that nothing but the rate tells them apart.
        kernels = np.broadcast_to(kernel, (len(rates), *kernel.shape))
        heads.append(
            {'kernel': sharding.place(kernels, whole), 'bias': sharding.place(zeros, whole)}
        )
    momenta = jax.tree.map(lambda w: sharding.place(np.zeros(w.shape, w.dtype), whole), heads)
    peak = np.asarray(rates) * batch / 256
    order = np.zeros(0, np.int64)
    step = _step(mesh)
    for number in range(steps):
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(len(labels))])
        rows, order = order[:batch], order[batch:]
        now = (peak * 0.5 * (1 + math.cos(math.pi * number / steps))).astype(np.float32)
        heads, momenta = step(
            heads,
            momenta,
            sharding.place(now, whole),
            [sharding.place(x[rows], split) for x in xs],
            sharding.place(labels[rows].astype(np.int32), split),
        )
        if number % 8 == 0:  # Steps that are only dispatched would pile up their batches.
            jax.block_until_ready(momenta)
    return jax.device_get(heads)


def scores(
    train: Features,
    test: Features,
    *,
    mesh: Mesh,
    rates: tuple[float, ...] = RATES,
    last_blocks: tuple[int, ...] | None = None,
    probe_updates: int = 12_500,
    probe_batch: int = 1024,
    held_out: float = 0.1,
    seed: int = 0,
    joined: int = 1,
    tokens: int = 1,
) -> dict[str, float]:
    """{'top1', 'held_out'} of the best of the grid, its {'rate', 'last_blocks', 'mean_joined'},
    and 'count'.

    Args:
      joined, tokens: how many blocks the features are of, and vectors of each, as for `inputs`;
        'mean_joined' says whether the mean of tokens is joined to the class token.
    """
    wanted = last_blocks or (joined,)
    learnt = inputs(train.values, wanted, joined, tokens)
    tested = inputs(test.values, wanted, joined, tokens)
    rest, held = heldout.split(len(train.labels), held_out, seed)
    classes = int(train.labels.max()) + 1
    heads = fit(
        [x[rest] for x in learnt.values()],
        train.labels[rest],
        classes,
        rates,
        mesh=mesh,
        steps=probe_updates,
        batch=probe_batch,
        seed=seed,
    )

    def share(x: np.ndarray, labels: np.ndarray, head: dict[str, np.ndarray], i: int) -> float:
        answers = (x @ head['kernel'][i] + head['bias'][i]).argmax(axis=1)
        return float((answers == labels).mean())

    trials = [
        (share(learnt[name][held], train.labels[held], head, i), name, head, i)
        for name, head in zip(learnt, heads, strict=True)
        for i in range(len(rates))
    ]
    best, (count, mean), head, i = max(trials, key=lambda trial: trial[0])
    return {
        'top1': share(tested[count, mean], test.labels, head, i),
        'held_out': best,
        'rate': rates[i],
        'last_blocks': float(count),
        'mean_joined': float(mean),
        'count': float(len(test.labels)),
    }
