"""Linear classifiers on frozen features for a grid of settings, all trained at once by SGD.

As in DINOv2's linear evaluation (arXiv 2304.07193), there is a classifier x W + b for each
learning rate, number of last blocks and pooling. W starts from a normal distribution with deviation
0.01, b from 0; SGD has momentum 0.9, no decay, and a cosine of the rate to 0 without warmup; rates
are multiplied by batch / 256. With a class token, x concatenates the class tokens of the last n
blocks, and in half of the grid also the mean of the last block's tokens; without one, x
concatenates the means of n blocks.

Two things differ from DINOv2: features come from the evaluation's transform (DINOv2 draws new crops
in each step), and the best of the grid is chosen on a held-out share of the training split (DINOv2
chooses on the test split).
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
from big_vit.evaluators import held_out_split
from big_vit.evaluators.evaluation import Evaluation, Evaluator
from big_vit.evaluators.features import PRECISION, Features, choose_pool, pooled_blocks
from big_vit.evaluators.requirements import requires
from big_vit.evaluators.two_splits import check_classes, compare_splits

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
MOMENTUM = 0.9

# Weights or momenta of one input, for all rates: [rates, width, classes], [rates, classes].
Heads = list[dict[str, jax.Array]]


@requires('features', reference='train_split', scores=lambda **_: ('top1', 'held_out'))
def linear_grid(
    evaluation: Evaluation,
    *,
    train_split: str | None = None,
    last_blocks: tuple[int, ...] | None = None,
    rates: tuple[float, ...] = RATES,
    probe_updates: int = 12_500,
    probe_batch: int = 1024,
    held_out: float = 0.1,
) -> Evaluator:
    """Score the best of a grid of linear classifiers on a training split.

    Args:
      train_split: the split of `evaluation.reference`.
      last_blocks: how many last blocks to concatenate; None for 1 and 4, or all if there are fewer.
      rates: learning rates for a batch of 256.
      probe_updates: updates by SGD.
      probe_batch: examples in a batch.
      held_out: the share of the training split to choose on.

    Raises:
      UserError: the model has fewer blocks, or the training split is too small.
    """
    key, model = evaluation.key, evaluation.model
    counts = depths(last_blocks, model.encoder.depth, key)
    pool = choose_pool(model, None, key)
    blocks = tuple(range(model.encoder.depth - max(counts), model.encoder.depth))
    embedding = pooled_blocks(model, blocks, 'cls_gap' if pool == 'cls' else 'gap')

    def check(labels: np.ndarray) -> None:
        check_classes(labels, key)
        held_out_split.check(len(labels), held_out, key)

    score = functools.partial(
        scores,
        mesh=evaluation.mesh,
        last_blocks=counts,
        rates=rates,
        probe_updates=probe_updates,
        probe_batch=probe_batch,
        held_out=held_out,
        seed=evaluation.seed,
        blocks=len(blocks),
        tokens=1 + (pool == 'cls'),
    )
    return compare_splits(evaluation, embedding, score, check)


def depths(last_blocks: tuple[int, ...] | None, depth: int, key: str) -> tuple[int, ...]:
    """Return how many last blocks to take; by default one and four, or all if there are fewer.

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
    """Make the inputs of the classifiers, by (last blocks, whether the mean is joined).

    Args:
      values: class token and mean (`tokens` 2), or the mean alone, of each of `blocks` blocks.
    """
    by_block = values.reshape(len(values), blocks, tokens, -1)
    made = {}
    for count in last_blocks:
        first = by_block[:, -count:, 0].reshape(len(values), -1)
        made[count, False] = first
        if tokens == 2:
            made[count, True] = np.concatenate([first, by_block[:, -1, 1]], axis=1)
    return made


def _loss(head: dict[str, Array], x: Array, labels: Array) -> Array:
    logits = jnp.matmul(x, head['kernel'], precision=PRECISION) + head['bias'][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.cache
def _step(mesh: Mesh):
    """Jit the step of all classifiers: (heads, momenta, current rates, inputs, labels)."""
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

    everywhere, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    return jax.jit(
        step,
        donate_argnums=(0, 1),
        in_shardings=(everywhere, everywhere, everywhere, split, split),
        out_shardings=everywhere,
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
    """Train {'kernel' [rates, width, classes], 'bias' [rates, classes]} for each input.

    Each epoch is a new permutation, cut into batches. A batch size that the devices do not divide
    is rounded down.
    """
    ways = mesh.shape['replica'] * mesh.shape['fsdp']
    batch = max(min(batch, len(labels)) // ways, 1) * ways
    rng = np.random.default_rng(seed)
    everywhere, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    zeros = np.zeros((len(rates), classes), np.float32)
    heads: Heads = []
    for x in xs:
        kernel = (0.01 * rng.standard_normal((x.shape[1], classes))).astype(np.float32)
        # All rates start from the same weights, so that they differ in the rate alone.
        kernels = np.broadcast_to(kernel, (len(rates), *kernel.shape))
        heads.append(
            {
                'kernel': sharding.place(kernels, everywhere),
                'bias': sharding.place(zeros, everywhere),
            }
        )
    momenta = jax.tree.map(lambda w: sharding.place(np.zeros(w.shape, w.dtype), everywhere), heads)
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
            sharding.place(now, everywhere),
            [sharding.place(x[rows], split) for x in xs],
            sharding.place(labels[rows].astype(np.int32), split),
        )
        if number % 8 == 0:  # Else the batches of steps that wait would pile up.
            jax.block_until_ready(momenta)
    return jax.device_get(heads)


def scores(
    train: Features,
    test: Features,
    *,
    mesh: Mesh,
    last_blocks: tuple[int, ...],
    rates: tuple[float, ...],
    probe_updates: int,
    probe_batch: int,
    held_out: float,
    seed: int,
    blocks: int,
    tokens: int,
) -> dict[str, float]:
    """Compute the metrics of the best of the grid.

    Args:
      blocks, tokens: how many blocks the features hold, and vectors of each, as for `inputs`.

    Returns:
      {'top1', 'held_out', 'rate', 'last_blocks', 'mean_joined', 'count'}; 'mean_joined' is 1 if
      the mean of tokens is joined to the class token.
    """
    learned = inputs(train.values, last_blocks, blocks, tokens)
    tested = inputs(test.values, last_blocks, blocks, tokens)
    rest, held = held_out_split.split(len(train.labels), held_out, seed)
    classes = int(train.labels.max()) + 1
    heads = fit(
        [x[rest] for x in learned.values()],
        train.labels[rest],
        classes,
        rates,
        mesh=mesh,
        steps=probe_updates,
        batch=probe_batch,
        seed=seed,
    )

    def accuracy(x: np.ndarray, labels: np.ndarray, head: dict[str, np.ndarray], i: int) -> float:
        answers = (x @ head['kernel'][i] + head['bias'][i]).argmax(axis=1)
        return float((answers == labels).mean())

    trials = [
        (accuracy(learned[name][held], train.labels[held], head, i), name, head, i)
        for name, head in zip(learned, heads, strict=True)
        for i in range(len(rates))
    ]
    best, (count, mean), head, i = max(trials, key=lambda trial: trial[0])
    return {
        'top1': accuracy(tested[count, mean], test.labels, head, i),
        'held_out': best,
        'rate': rates[i],
        'last_blocks': float(count),
        'mean_joined': float(mean),
        'count': float(len(test.labels)),
    }
