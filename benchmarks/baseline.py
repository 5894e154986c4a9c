"""A plain train step to compare ours with: stock Flax layers, as most codebases use them.

It follows the ViT of google-research/big_vision, reimplemented: attention by
`nn.MultiHeadDotProductAttention` with separate kernels for queries, keys, values and output;
products and residual stream in bfloat16, norms in float32; unscanned blocks; Adam with its first
moment in bfloat16, clipping at 1, decoupled decay; parameters replicated, the batch split.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from big_vit import sharding
from big_vit.models import positions, variants

CLASSES = 1000


class Block(nn.Module):
    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attention = nn.MultiHeadDotProductAttention(
            self.num_heads,
            dtype=jnp.bfloat16,
            kernel_init=nn.initializers.xavier_uniform(),
            deterministic=True,
        )
        x = x + attention(nn.LayerNorm()(x))
        y = nn.Dense(self.mlp_dim, dtype=jnp.bfloat16)(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1], dtype=jnp.bfloat16)(nn.gelu(y))


class PlainViT(nn.Module):
    """Mean-pooled ViT from images [batch, height, width, 3] to logits [batch, 1000]."""

    patch_size: tuple[int, int]
    width: int
    depth: int
    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size = self.patch_size
        x = nn.Conv(self.width, size, size, padding='VALID', dtype=jnp.bfloat16)(images)
        batch, rows, columns, width = x.shape
        table = jnp.asarray(positions.sincos((rows, columns), width))
        x = x.reshape(batch, rows * columns, width) + table.astype(x.dtype)
        for _ in range(self.depth):
            x = Block(self.mlp_dim, self.num_heads)(x)
        x = nn.LayerNorm()(x).mean(1)
        return nn.Dense(CLASSES, kernel_init=nn.initializers.zeros)(x)


def lower(variant: str, mesh: Mesh, batch_size: int, size: int = 224) -> Any:
    """Lower the train step for a mesh, with donated state."""
    model = PlainViT(**variants.parse(variant))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(mu_dtype=jnp.bfloat16),
        optax.add_decayed_weights(1e-4),
        optax.scale_by_learning_rate(1e-3),
    )

    def init(key: jax.Array) -> Any:
        params = model.init(key, jnp.zeros((1, size, size, 3)))['params']
        return params, optimizer.init(params)

    def step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        params, opt = state

        def loss(params: Any) -> jax.Array:
            logits = model.apply({'params': params}, images)
            return optax.softmax_cross_entropy(logits, labels).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = optimizer.update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), value

    replicated, by_batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)

    def abstract(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    abstract_state = jax.tree.map(abstract, jax.eval_shape(init, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.float32, sharding=by_batch)
    labels = jax.ShapeDtypeStruct((batch_size, CLASSES), jnp.float32, sharding=by_batch)
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=0, out_shardings=(replicated, replicated)).lower(
            abstract_state, images, labels
        )
