"""Set prediction of objects: a trunk, a decoder of object queries, heads of classes and boxes.

DETR (arXiv 2005.12872), and without a decoder YOLOS (arXiv 2106.00666), whose queries are tokens of
the trunk's own sequence.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from big_vit.models import positions
from big_vit.models.encoder import Encoder, EncoderConfig, identity
from big_vit.models.layers import AttentionContext, Dense, Style, norm, torch_bias, torch_uniform
from big_vit.models.tokenizers import Tokens, real_tokens
from big_vit.models.vit import ViT


class Predictions(NamedTuple):
    """What each query says after each block of the decoder, the last one last, in float32.

    Attributes:
      logits: of the classes and, last, of no object.
      boxes: (centre x, centre y, width, height) in shares of the picture without its padding.
    """

    logits: Float[Array, 'blocks batch queries logits']
    boxes: Float[Array, 'blocks batch queries 4']


class QueryDecoder(nn.Module):
    """Learned queries that attend to each other and to the tokens of a picture.

    They are the positions of tokens that are zero at first. All blocks' outputs go through one
    norm, and what the next block reads has not.
    """

    config: EncoderConfig
    queries: int

    @nn.compact
    def __call__(
        self,
        memory: Float[Array, 'batch tokens width'],
        memory_positions: Float[Array, '#batch tokens queries_width'],
        mask: Bool[Array, 'batch tokens'] | None,
        deterministic: bool,
    ) -> Float[Array, 'blocks batch queries queries_width']:
        width, style = self.config.width, self.config.style
        queries = self.param('queries', nn.initializers.normal(1.0), (1, self.queries, width))
        if memory.shape[-1] != width:
            memory = Dense((width,), dtype=style.dtype, gather=style.gather, name='memory')(memory)
        context = AttentionContext(
            memory=memory,
            memory_mask=None if mask is None else mask[:, None, None],
            memory_positions=memory_positions,
            positions=jnp.asarray(queries),
        )
        x = jnp.zeros((memory.shape[0], self.queries, width), style.dtype)
        blocks = Encoder(
            self.config, cross=True, final_norm=False, capture=('blocks',), name='Transformer'
        )
        _, captured = blocks(x, deterministic, context)
        return norm(style, 'norm')(captured['blocks'])


class Head(nn.Module):
    """Dense layers with ReLU between them, in float32, that start as PyTorch's."""

    outputs: int
    layers: int
    style: Style

    @nn.compact
    def __call__(self, x: Float[Array, '*lead width']) -> Float[Array, '*lead outputs']:
        x = x.astype(jnp.float32)
        for i in range(self.layers):
            last = i == self.layers - 1
            dense = Dense(
                (self.outputs if last else x.shape[-1],),
                kernel_init=torch_uniform,
                bias_init=torch_bias(x.shape[-1]),
                gather=self.style.gather,
                name=f'Dense_{i}',
            )
            x = dense(x) if last else jax.nn.relu(dense(x))
        return x


class Detector(nn.Module):
    """A trunk, whose parameters stay at the root, and what finds objects beside it.

    Attributes:
      decoder_config: of the decoder; None has the queries in the trunk's sequence instead.
      queries: how many objects can be found.
      num_classes: without the one that means no object.
      class_layers: dense layers of the head of classes.
      by_device: applied to functions of rows that devices need not wait for each other in; a mesh
        replaces it.
    """

    trunk: ViT
    decoder_config: EncoderConfig | None
    queries: int
    num_classes: int
    class_layers: int = 1
    by_device: Callable[..., Any] = identity

    def sequence_length(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Tokens that the trunk sees, for inputs of these shapes without the batch."""
        own = self.queries if self.decoder_config is None else 0
        return self.trunk.sequence_length(shapes) + own

    def setup(self) -> None:
        nn.share_scope(self, self.trunk)
        style = self.trunk.encoder.style
        if self.decoder_config is not None:
            self.decoder = QueryDecoder(self.decoder_config, self.queries)
        else:
            shape = (1, self.queries, self.trunk.encoder.width)
            self.tokens = self.param('detection_tokens', nn.initializers.normal(0.02), shape)
        self.class_head = Head(self.num_classes + 1, self.class_layers, style)
        self.box_head = Head(4, 3, style)

    def __call__(
        self,
        inputs: Float[Array, 'batch height width channels'] | dict[str, Array],
        *,
        train: bool = False,
    ) -> Predictions:
        """Predictions for an image, or for the 'image' and the 'picture_size' of a batch.

        Where pictures do not fill their canvas, its pixels beyond them count as 0 and tokens that
        begin there are not attended to.
        """
        parts = inputs if isinstance(inputs, dict) else {'image': inputs}
        parts = {name: x for name, x in parts.items() if name in ('image', 'picture_size')}
        if 'picture_size' in parts:
            parts['image'] = cleared(parts['image'], parts['picture_size'])
        tokens, context = self.trunk.embed(parts, train=train)
        if self.decoder_config is None:
            length = tokens.x.shape[1]
            tokens = self._with_queries(tokens)
            x, _ = self.trunk.encode(tokens, context, train=train)
            found = x[None, :, self.trunk.prefix_tokens + length :]
        else:
            x, _ = self.trunk.encode(tokens, context, train=train)
            memory = x[:, self.trunk.prefix_tokens :]
            found = self.decoder(memory, self._positions(tokens, parts), tokens.mask, not train)
        return Predictions(self.class_head(found), jax.nn.sigmoid(self.box_head(found)))

    def _positions(self, tokens: Tokens, parts: dict[str, Array]) -> Float[Array, '...']:
        """DETR's positions of the trunk's tokens, as wide as the decoder."""
        assert self.decoder_config is not None and tokens.grid is not None
        grid, size = tokens.grid, parts.get('picture_size')
        seen = (
            jnp.ones((1, *grid), bool)
            if size is None
            else real_tokens(size, parts['image'].shape[1:3], grid)
        )
        return positions.sincos_of_pictures(seen, self.decoder_config.width)

    def _with_queries(self, tokens: Tokens) -> Tokens:
        """The trunk's tokens and behind them those of the queries, which have no other position."""
        own = jnp.asarray(self.tokens).astype(tokens.x.dtype)
        own = jnp.broadcast_to(own, (len(tokens.x), *own.shape[1:]))
        placed = tokens.positions
        if placed is not None:
            placed = jnp.pad(placed, ((0, 0), (0, self.queries), (0, 0)))
        mask, rotation = tokens.mask, tokens.rotation
        if rotation is not None:  # They are not turned.
            pad = ((0, 0), (0, self.queries), (0, 0), (0, 0))
            rotation = jnp.pad(rotation[0], pad), jnp.pad(rotation[1], pad, constant_values=1)
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, self.queries)), constant_values=True)
        return tokens._replace(
            x=jnp.concatenate([tokens.x, own], axis=1),
            grid=None,
            mask=mask,
            rotation=rotation,
            places=None,
            positions=placed,
        )


def cleared(
    image: Float[Array, 'batch height width channels'], size: Array
) -> Float[Array, 'batch height width channels']:
    """Images with zeros beyond the (height, width) of each picture."""
    rows, columns = (
        jnp.arange(image.shape[axis + 1])[None] < size[:, axis, None] for axis in (0, 1)
    )
    return jnp.where((rows[:, :, None] & columns[:, None])[..., None], image, 0)
