"""A linear classifier on frozen features: multinomial logistic regression, by L-BFGS.

    minimise  mean over examples of the cross-entropy of softmax(x W + b)  +  l2 / 2 |W|^2

(the penalty is scikit-learn's with C = 1 / (l2 n)). Features are standardised by the training
split. Examples are spread over all devices, and the whole minimisation is one program.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from big_vit import sharding
from big_vit.evaluators import held_out_split
from big_vit.evaluators.evaluation import Evaluation, Evaluator
from big_vit.evaluators.features import PRECISION, Features, choose_embedding
from big_vit.evaluators.requirements import requires
from big_vit.evaluators.two_splits import check_classes, compare_splits

# Stop after so many steps in a row that lower the loss by no more than rounding.
STALLS = 10

Weights = dict[str, jax.Array]


@requires(
    'features',
    reference='train_split',
    scores=lambda l2, **_: ('top1', 'held_out') if len(l2) > 1 else ('top1',),
)
def linear_probe(
    evaluation: Evaluation,
    *,
    train_split: str | None = None,
    blocks: tuple[int, ...] | None = None,
    pool: str | None = None,
    l2: tuple[float, ...] = (1e-6, 1e-4, 1e-2, 1.0),
    held_out: float = 0.1,
    iterations: int = 1000,
) -> Evaluator:
    """Score logistic regression on the features of a training split.

    Args:
      train_split: the split of `evaluation.reference`.
      blocks, pool: the features, as for `choose_embedding`.
      l2: penalties, of which the best on the held-out share is taken.
      held_out: the share of the training split to choose on.
      iterations: the most iterations of L-BFGS.

    Raises:
      UserError: `blocks` or `pool` do not fit the model, or the training split is too small.
    """
    key = evaluation.key
    embedding = choose_embedding(evaluation.model, blocks, pool, key)

    def check(labels: np.ndarray) -> None:
        check_classes(labels, key)
        held_out_split.check(len(labels), held_out, key)

    score = functools.partial(
        scores,
        mesh=evaluation.mesh,
        l2=l2,
        held_out=held_out,
        iterations=iterations,
        seed=evaluation.seed,
    )
    return compare_splits(evaluation, embedding, score, check)


def _loss(
    weights: Weights,
    x: Float[Array, 'examples width'],
    labels: Int[Array, ' examples'],
    mask: Float[Array, ' examples'],
    l2: Float[Array, ''],
) -> Float[Array, '']:
    logits = jnp.matmul(x, weights['kernel'], precision=PRECISION) + weights['bias'][None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (losses * mask).sum() / mask.sum() + l2 / 2 * jnp.square(weights['kernel']).sum()


@functools.cache
def _minimise(mesh: Mesh, classes: int, iterations: int, tolerance: float):
    """Jit the minimisation: (x, labels, mask, l2) -> (weights, iterations)."""
    solver = optax.lbfgs()

    def minimise(x: Array, labels: Array, mask: Array, l2: Array) -> tuple[Weights, Array]:
        loss = functools.partial(_loss, x=x, labels=labels, mask=mask, l2=l2)
        value_and_grad = optax.value_and_grad_from_state(loss)
        start = {
            'kernel': jnp.zeros((x.shape[1], classes), x.dtype),
            'bias': jnp.zeros(classes, x.dtype),
        }

        def step(carry):
            weights, state, count, stalls, _ = carry
            value, grad = value_and_grad(weights, state=state)
            updates, state = solver.update(
                grad, state, weights, value=value, grad=grad, value_fn=loss
            )
            fell = value - optax.tree.get(state, 'value')
            stalls = jnp.where(fell > jnp.finfo(x.dtype).eps * jnp.abs(value), 0, stalls + 1)
            largest = jnp.max(jnp.stack([jnp.abs(g).max() for g in jax.tree.leaves(grad)]))
            return optax.apply_updates(weights, updates), state, count + 1, stalls, largest

        def goes_on(carry) -> Array:
            _, _, count, stalls, largest = carry
            return (count < iterations) & (stalls < STALLS) & (largest > tolerance)

        zero = jnp.asarray(0)
        first = start, solver.init(start), zero, zero, jnp.asarray(jnp.inf, x.dtype)
        weights, _, count, _, _ = jax.lax.while_loop(goes_on, step, first)
        return weights, count

    return jax.jit(minimise, out_shardings=sharding.replicated(mesh))


def fit(
    x: Float[np.ndarray, 'examples width'],
    labels: Int[np.ndarray, ' examples'],
    classes: int,
    l2: float,
    mesh: Mesh,
    *,
    iterations: int = 1000,
    tolerance: float = 1e-5,
) -> tuple[Float[np.ndarray, 'width classes'], Float[np.ndarray, ' classes'], int]:
    """Fit the classifier: (kernel, bias, number of iterations), in the dtype of the features.

    Args:
      iterations: the most iterations.
      tolerance: stop when no component of the gradient is larger.
    """
    padding = -len(x) % mesh.size
    split = jax.NamedSharding(mesh, PartitionSpec(sharding.AXES))
    columns = (
        np.pad(x, ((0, padding), (0, 0))),
        np.pad(labels.astype(np.int32), (0, padding)),
        np.pad(np.ones(len(x), x.dtype), (0, padding)),
    )
    placed = (sharding.place(column, split) for column in columns)
    penalty = sharding.place(np.asarray(l2, x.dtype), sharding.replicated(mesh))
    with jax.set_mesh(mesh):
        weights, count = jax.device_get(
            _minimise(mesh, classes, iterations, tolerance)(*placed, penalty)
        )
    return weights['kernel'], weights['bias'], int(count)


def standardised(train: Features, *others: Features) -> list[Float[np.ndarray, 'examples width']]:
    """Standardise the values of all to mean 0 and deviation 1 per feature of the first."""
    wide = train.values.astype(np.float64)
    mean, std = wide.mean(axis=0), wide.std(axis=0) + 1e-6
    return [((f.values - mean) / std).astype(np.float32) for f in (train, *others)]


def accuracy(
    x: Float[np.ndarray, 'examples width'],
    labels: Int[np.ndarray, ' examples'],
    kernel: Float[np.ndarray, 'width classes'],
    bias: Float[np.ndarray, ' classes'],
) -> float:
    """Compute the share of examples whose class has the largest logit."""
    answers = (x.astype(np.float64) @ kernel + bias).argmax(axis=1)
    return float((answers == labels).mean())


def scores(
    train: Features,
    test: Features,
    *,
    mesh: Mesh,
    l2: tuple[float, ...],
    held_out: float,
    iterations: int,
    seed: int,
) -> dict[str, float]:
    """Compute {'top1', 'l2', 'iterations', 'count'}, and 'held_out', the accuracy that chose l2.

    The l2 that is best on the held-out share of the training split, the largest among equals, is
    then fitted to all of it. A single l2 needs no held-out share.
    """
    x, tested = standardised(train, test)
    classes = int(train.labels.max()) + 1
    best, chosen_by = max(l2), {}
    if len(l2) > 1:
        rest, held = held_out_split.split(len(x), held_out, seed)
        accuracies = {}
        for penalty in sorted(l2, reverse=True):
            kernel, bias, _ = fit(
                x[rest], train.labels[rest], classes, penalty, mesh, iterations=iterations
            )
            accuracies[penalty] = accuracy(x[held], train.labels[held], kernel, bias)
        best = max(accuracies, key=lambda penalty: accuracies[penalty])
        chosen_by['held_out'] = accuracies[best]
    kernel, bias, count = fit(x, train.labels, classes, best, mesh, iterations=iterations)
    return {
        'top1': accuracy(tested, test.labels, kernel, bias),
        **chosen_by,
        'l2': best,
        'iterations': float(count),
        'count': float(len(tested)),
    }
