"""Contrastive learning of two streams: CLIP (arXiv 2103.00020) and SigLIP (2303.15343)."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, UInt

from big_vit.tasks.batch import Batch, Loss, model_inputs


def row_hashes(words: Int[Array, 'batch length']) -> UInt[Array, 'batch 2']:
    """Two numbers that rows have in common where they are equal (and by chance of 2**-64)."""
    place = jnp.arange(1, words.shape[1] + 1, dtype=jnp.uint32)[None]
    value = words.astype(jnp.uint32)
    sums = []
    for factor in (0x9E3779B1, 0xC2B2AE3D):
        mixed = (value + place * jnp.uint32(factor)) * jnp.uint32(0x85EBCA77)
        mixed = (mixed ^ (mixed >> jnp.uint32(15))) * jnp.uint32(factor)
        sums.append((mixed ^ (mixed >> jnp.uint32(13))).sum(axis=1, dtype=jnp.uint32))
    return jnp.stack(sums, axis=1)


def contrastive_loss(apply: Callable[..., Any], kind: str, words: str | None = None) -> Loss:
    """Which of a batch belong together, of a model with two streams apart.

    'softmax' is CLIP's loss (arXiv 2103.00020): for each example of one stream a softmax over
    those of the other, the mean of both ways. 'sigmoid' is SigLIP's (arXiv 2303.15343): yes or no
    for each pair, summed over the pairs of an example. Unlike there, an equal text is no negative:
    examples with the same words belong together too, and share what a softmax wants of them.

    Args:
      apply: `ViT.apply`, whose logits are [batch, batch].
      words: the part of a batch that says which examples are the same; None: no two are.

    Returns:
      A function of (params, batch, rng) that gives the loss and {'accuracy'}: how often the
      most alike of the second stream belongs to an example of the first.
    """

    def loss(params: Any, batch: Batch, rng: Array | None) -> tuple[Array, dict[str, Array]]:
        rngs = {} if rng is None else {'dropout': rng}
        logits, _ = apply({'params': params}, model_inputs(batch), train=rng is not None, rngs=rngs)
        together = jnp.eye(len(logits), dtype=bool)
        if words is not None:
            one = row_hashes(batch[words])
            together |= (one[:, None] == one[None]).all(-1)
        best = jnp.take_along_axis(together, logits.argmax(-1)[:, None], axis=-1)
        aux = {'accuracy': best.mean()}
        if kind == 'sigmoid':
            return optax.sigmoid_binary_cross_entropy(logits, together).sum(-1).mean(), aux
        # `together` is symmetric, so its rows are the shares both ways.
        wanted = together / together.sum(-1, keepdims=True)
        ways = (optax.softmax_cross_entropy(way, wanted).mean() for way in (logits, logits.T))
        return sum(ways, jnp.zeros(())) / 2, aux

    return loss
