"""LeJEPA (arXiv 2511.08544): views of a picture in one place, and all pictures normally spread.

There is no teacher and no stop of gradients: SIGReg keeps embeddings apart.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vit.models.layers import Dense
from big_vit.models.tokenizers import EmbeddingContext
from big_vit.models.vit import ViT
from big_vit.tasks.batch import Batch, normalise
from big_vit.tasks.sigreg import directions, sigreg
from big_vit.tasks.task import Aux, Loss, Tree

# In this order; the first are those whose mean is what all views shall be like.
VIEWS = ('global', 'local')


class BatchNorm(nn.Module):
    """Normalisation of features over all rows of the whole batch (arXiv 1502.03167).

    No averages are kept: what it is part of is thrown away after training.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, '*rows width']) -> Float[Array, '*rows width']:
        shape = (1,) * (x.ndim - 1) + x.shape[-1:]
        scale = jnp.asarray(self.param('scale', nn.initializers.ones, shape[-1:])).reshape(shape)
        bias = jnp.asarray(self.param('bias', nn.initializers.zeros, shape[-1:])).reshape(shape)
        rows = tuple(range(x.ndim - 1))
        x = x.astype(jnp.float32)
        x = x - x.mean(rows, keepdims=True)
        variance = jnp.square(x).mean(rows, keepdims=True)
        return x * jax.lax.rsqrt(variance + self.epsilon) * scale + bias


class Projector(nn.Module):
    """Three dense layers; behind the first two, batch normalisation and ReLU."""

    width: int
    outputs: int
    dtype: Any
    gather: Any

    @nn.compact
    def __call__(self, x: Float[Array, '*rows width']) -> Float[Array, '*rows outputs']:
        for i in range(2):
            dense = Dense((self.width,), dtype=self.dtype, gather=self.gather, name=f'Dense_{i}')
            x = jax.nn.relu(BatchNorm(name=f'BatchNorm_{i}')(dense(x)))
        return Dense((self.outputs,), dtype=jnp.float32, gather=self.gather, name='Dense_2')(x)


class ViewEmbedding(nn.Module):
    """A trunk, whose parameters stay at the root, and `projector` beside it.

    Attributes:
      width: hidden width of the projector.
      outputs: width of the embeddings that are compared.
      grid: of learned positions; those of smaller views are interpolated.
    """

    trunk: ViT
    width: int
    outputs: int
    grid: tuple[int, ...] | None = None

    def sequence_length(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Tokens of the longest view, for views of these shapes without the batch."""
        stream = self.trunk.single
        assert stream is not None
        return max(
            self.trunk.sequence_length({stream.reads: shapes[name][1:]})
            for name in VIEWS
            if name in shapes
        )

    def setup(self) -> None:
        nn.share_scope(self, self.trunk)

    @nn.compact
    def __call__(
        self,
        inputs: Mapping[str, Array],
        *,
        train: bool = False,
    ) -> Float[Array, 'batch views outputs']:
        """Embeddings of views [batch, views, height, width, channels], the first group's first."""
        pooled = []
        for name in VIEWS:
            if name in inputs:
                view = normalise(inputs[name])
                flat = view.reshape(-1, *view.shape[2:])
                context = EmbeddingContext(table=self.grid)
                tokens, attention = self.trunk.embed(flat, train=train, context=context)
                x, _ = self.trunk.encode(tokens, attention, train=train)
                vector = self.trunk.classify(self.trunk.pool(x, tokens))
                pooled.append(vector.reshape(*view.shape[:2], -1))
        style = self.trunk.encoder.style
        projector = Projector(self.width, self.outputs, style.dtype, style.gather, name='projector')
        return projector(jnp.concatenate(pooled, axis=1))


def invariance(embeddings: Float[Array, 'batch views width'], leading: int) -> Float[Array, '']:
    """Mean square distance of all views from the mean of the first `leading` of each example."""
    centre = embeddings[:, :leading].mean(1, keepdims=True)
    return jnp.square(embeddings - centre).mean()


def lejepa_loss(model: ViewEmbedding, weight: float, lines: int) -> Loss:
    """(1 - weight) * `invariance` + weight * `sigreg`, and both as metrics."""

    def loss(
        params: Tree, state: Tree, batch: Batch, rng: Array | None, step: Array | int
    ) -> tuple[Array, Aux]:
        inputs = {name: batch[name] for name in VIEWS if name in batch}
        rngs = {} if rng is None else {'dropout': rng}
        apply: Any = model.apply
        z = apply({'params': params}, inputs, train=rng is not None, rngs=rngs)
        apart = invariance(z, inputs[VIEWS[0]].shape[1])
        spread = sigreg(z, directions(step, z.shape[-1], lines))
        metrics = {'invariance': apart, 'sigreg': spread}
        return (1 - weight) * apart + weight * spread, Aux(metrics)

    return loss
