"""Contrastive learning of two streams: CLIP (arXiv 2103.00020) and SigLIP (2303.15343)."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, UInt

from big_vit.errors import UserError
from big_vit.models.two_towers import TwoTowers
from big_vit.models.vit import Head, Prefix, ViT
from big_vit.tasks.batch import Batch, model_inputs
from big_vit.tasks.task import Aux, ExampleShape, Loss, Task, Tree

# How the logits of pairs start, as CLIP's and as SigLIP's.
_LOGITS: dict[str, dict[str, Any]] = {
    'softmax': {'logit_scale': 1 / 0.07},
    'sigmoid': {'logit_scale': 10.0, 'logit_bias': -10.0},
}


def contrastive(*, loss: str = 'softmax', embedding_dim: int = 512) -> Task:
    """Learns which examples of two streams belong together.

    Args:
      loss: CLIP's 'softmax' over the batch, or SigLIP's 'sigmoid' of each pair.
      embedding_dim: dimension of the shared embedding.
    """

    def model(trunk: ViT, example: ExampleShape) -> TwoTowers:
        _check(trunk)
        # Features are of the first stream, so the one of words comes last.
        first, second = sorted(trunk.streams, key=lambda stream: stream.tokenizer == 'words')
        return TwoTowers(
            (first, second), trunk.encoder, embedding_dim, trunk.head.pool, **_LOGITS[loss]
        )

    return Task(
        name='contrastive',
        model=model,
        loss=lambda model, run: contrastive_loss(model, loss),
        headline='accuracy',
        provides=frozenset({'pairs', 'features'}),
    )


def _check(trunk: ViT) -> None:
    """Refuses settings that two towers have no place for."""
    if len(trunk.streams) != 2:
        there = 0 if trunk.single else len(trunk.streams)
        raise UserError(
            f"config: task.name='contrastive' compares two streams, and there are {there}: name "
            'two as streams.NAME.tokenizer'
        )
    if trunk.fusion != 'concat':
        raise UserError(
            f'config: model.fusion={trunk.fusion!r} joins streams, which '
            "task.name='contrastive' keeps apart: remove it"
        )
    if trunk.head.pool not in ('gap', 'map'):
        raise UserError(
            f"config: model.pool={trunk.head.pool!r}, but task.name='contrastive' pools each "
            "stream by 'gap' or 'map'"
        )
    settings = {**vars(trunk.prefix), **vars(trunk.head)}
    unused = {**vars(Prefix()), **vars(Head(pool=trunk.head.pool))}
    for name, value in settings.items():
        if value and value != unused[name]:
            raise UserError(f"config: model.{name} is not of task.name='contrastive': remove it")


def words_part(model: TwoTowers) -> str | None:
    """The part of a batch that a stream of words reads; None without one."""
    return next((s.reads for s in model.streams if s.tokenizer == 'words'), None)


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


def contrastive_loss(model: TwoTowers, kind: str) -> Loss:
    """Which examples of a batch belong together.

    'softmax' is CLIP's loss: for each example of one stream a softmax over those of the other, the
    mean of both ways. 'sigmoid' is SigLIP's: yes or no for each pair, summed over the pairs of an
    example. Unlike there, an equal text is no negative: examples with the same words belong
    together too, and share what a softmax wants of them.

    Its metric 'accuracy' is how often the most alike of the second stream belongs to an example
    of the first.
    """
    words = words_part(model)

    def loss(
        params: Tree, state: Tree, batch: Batch, rng: Array | None, step: Array | int
    ) -> tuple[Array, Aux]:
        rngs = {} if rng is None else {'dropout': rng}
        inputs = model_inputs(batch)
        logits, _ = model.apply({'params': params}, inputs, train=rng is not None, rngs=rngs)
        together = jnp.eye(len(logits), dtype=bool)
        if words is not None:
            hashes = row_hashes(batch[words])
            together |= (hashes[:, None] == hashes[None]).all(-1)
        best = jnp.take_along_axis(together, logits.argmax(-1)[:, None], axis=-1)
        aux = Aux({'accuracy': best.mean()})
        if kind == 'sigmoid':
            return optax.sigmoid_binary_cross_entropy(logits, together).sum(-1).mean(), aux
        # `together` is symmetric, so its rows are the shares both ways.
        wanted = together / together.sum(-1, keepdims=True)
        ways = (optax.softmax_cross_entropy(way, wanted).mean() for way in (logits, logits.T))
        return sum(ways, jnp.zeros(())) / 2, aux

    return loss
