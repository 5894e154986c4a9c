"""Masked autoencoding (MAE, arXiv 2111.06377): most patches are hidden, and their pixels asked for.

The encoder sees the visible tokens alone; a small decoder gets them back with mask tokens in
between and predicts the pixels of each patch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vit.errors import UserError
from big_vit.models import positions
from big_vit.models.encoder import Encoder, EncoderConfig
from big_vit.models.layers import Dense
from big_vit.models.tokenizers import (
    Cut,
    EmbeddingContext,
    chosen,
    grid_of,
    patchify,
    unpatchify,
)
from big_vit.models.vit import ViT
from big_vit.tasks.batch import Batch, model_inputs
from big_vit.tasks.task import Aux, ExampleShape, Loss, Pictures, Task, Tree
from big_vit.tasks.trunk_checks import need_simple_pool


def masked(
    *,
    mask_ratio: float = 0.75,
    decoder_width: int = 512,
    decoder_depth: int = 8,
    decoder_heads: int = 16,
    normalise_pixels: bool = True,
) -> Task:
    """Learns to predict hidden patches.

    Args:
      mask_ratio: share of the patches that are hidden.
      decoder_width, decoder_depth, decoder_heads: size of the decoder; its MLPs are four times
        as wide.
      normalise_pixels: predict each patch less its mean, by its standard deviation.
    """

    def model(trunk: ViT, example: ExampleShape) -> MaskedAutoencoder:
        _check(trunk, example, mask_ratio, decoder_width, decoder_heads)
        decoder = EncoderConfig(
            width=decoder_width,
            depth=decoder_depth,
            mlp_dim=4 * decoder_width,
            num_heads=decoder_heads,
            style=trunk.encoder.style,
            scan=trunk.encoder.scan,
            remat=trunk.encoder.remat,
            constrain=trunk.encoder.constrain,
        )
        return MaskedAutoencoder(trunk, decoder, mask_ratio)

    return Task(
        name='masked',
        model=model,
        loss=lambda model, run: masked_loss(model, normalise_pixels),
        headline='loss',
        provides=frozenset({'features'}),
        additions=('decoder',),
        trunk=lambda model: model.trunk,
        draw=draw_masks,
        pictures=lambda model: reconstructions(model, normalise_pixels),
    )


def _check(trunk: ViT, example: ExampleShape, ratio: float, width: int, heads: int) -> None:
    """Refuses what masked autoencoding cannot be done with."""
    stream = trunk.single
    if (
        stream is None
        or stream.tokenizer != 'patches'
        or stream.stride
        not in (
            None,
            stream.patch_size,
        )
    ):
        raise UserError(
            "config: task.name='masked' hides patches of one image, which do not overlap: set "
            "model.tokenizer='patches', without model.stride and streams"
        )
    if stream.posemb == 'relative':
        raise UserError(
            "config: model.posemb='relative' needs all tokens of a grid, and task.name='masked' "
            'hides some: take another'
        )
    need_simple_pool(trunk, 'masked')
    if trunk.prefix.patch_dropout:
        raise UserError(
            "config: task.name='masked' leaves out patches itself: set task.mask_ratio and no "
            'model.patch_dropout'
        )
    rows, columns = grid_of(stream, example.inputs[stream.reads])
    patches = rows * columns
    visible = visible_tokens(patches, ratio)
    if not 0 < visible < patches:
        most = math.floor(1000 * (1 - 1 / patches)) / 1000
        hint = f'take one from {1 / patches:.3g} to {most:g}'
        if patches == 1:
            hint = 'take smaller patches (model.variant) or a larger image_size'
        raise UserError(
            f'config: task.mask_ratio={ratio:g} of {patches} patches leaves none '
            f'{"hidden" if visible else "visible"}: {hint}'
        )
    if width % heads or not positions.divides(width, 2):
        raise UserError(
            f'config: task.decoder_width={width} must be divisible by 4 and by '
            f'task.decoder_heads={heads}'
        )


def visible_tokens(tokens: int, ratio: float) -> int:
    """How many tokens stay, rounded as MAE does."""
    return int(tokens * (1 - ratio))


def mask_noise(key: Array, batch: int, tokens: int) -> Float[Array, 'batch tokens']:
    """What decides which patches of each example are hidden: those of the largest numbers."""
    return jax.random.uniform(key, (batch, tokens))


class Order(NamedTuple):
    """Indices of the patches that are hidden, and of those that are not, [batch, patches]."""

    hidden: Array
    visible: Array


class Decoder(nn.Module):
    """Encoded visible tokens, with mask tokens for hidden patches, as predictions of pixels.

    Hidden patches come first and others last: attention knows patches by their positions, so
    that none need be put back into its place.
    """

    encoder: EncoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch visible width'],
        order: Order,
        grid: tuple[int, int],
        pixels: int,
        everything: bool,
        deterministic: bool,
    ) -> Float[Array, 'batch patches pixels']:
        """Predictions of hidden patches and, if asked for, of visible ones behind them.

        Args:
          x: visible patches, behind tokens that are none.
          pixels: how many numbers are predicted of each patch.
        """
        width, style = self.encoder.width, self.encoder.style
        hidden, before = order.hidden.shape[1], x.shape[1] - order.visible.shape[1]
        x = Dense((width,), dtype=style.dtype, gather=style.gather, name='embedding')(x)
        start = nn.initializers.normal(0.02)
        token = jnp.asarray(self.param('mask_token', start, (1, 1, width))).astype(x.dtype)
        table = jnp.asarray(positions.sincos(grid, width, 'sincos2d_mae')).astype(x.dtype)
        placed = chosen(table, jnp.concatenate(order, axis=1))
        x = x + jnp.pad(placed[:, hidden:], ((0, 0), (before, 0), (0, 0)))
        x = jnp.concatenate([token + placed[:, :hidden], x], axis=1)
        outputs = 0 if everything else hidden
        encoder = Encoder(self.encoder, outputs=outputs, name='Transformer')
        x, _ = encoder(self.encoder.constrain(x), deterministic)
        if everything:
            x = jnp.concatenate([x[:, :hidden], x[:, hidden + before :]], axis=1)
        predict = Dense((pixels,), dtype=jnp.float32, gather=style.gather, name='prediction')
        return predict(x)


class MaskedAutoencoder(nn.Module):
    """A trunk, whose parameters stay at the root, and `decoder` beside it.

    Attributes:
      decoder_config: sizes of the decoder.
      mask_ratio: share of the patches that are hidden.
    """

    trunk: ViT
    decoder_config: EncoderConfig
    mask_ratio: float

    def sequence_length(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Tokens that the encoder sees, for inputs of these shapes without the batch."""
        prefix = self.trunk.prefix_tokens
        tokens = self.trunk.sequence_length(shapes) - prefix
        return prefix + visible_tokens(tokens, self.mask_ratio)

    def setup(self) -> None:
        nn.share_scope(self, self.trunk)
        self.decoder = Decoder(self.decoder_config)

    def noise(self, batch: int, tokens: int) -> Float[Array, 'batch tokens']:
        """What decides which patches are hidden, from the random stream 'mask'."""
        if not self.has_rng('mask'):
            return jnp.broadcast_to(jnp.linspace(0, 1, tokens), (batch, tokens))
        return mask_noise(self.make_rng('mask'), batch, tokens)

    def __call__(
        self,
        inputs: Float[Array, 'batch height width channels'] | dict[str, Array],
        *,
        train: bool = False,
        noise: Float[Array, 'batch tokens'] | None = None,
    ) -> tuple[Float[Array, 'batch tokens pixels'], Float[Array, 'batch tokens']]:
        """The predicted pixels of each patch, and a mask that is 1 for hidden patches.

        Args:
          noise: of each example the patches with the largest numbers are hidden; by default drawn
            from the random stream 'mask', and without it the last patches are hidden.
        """
        predicted, order, _ = self._predict(inputs, train, noise, everything=True)
        hidden = order.hidden.shape[1]
        place = jnp.argsort(jnp.concatenate(order, axis=1), axis=1)
        predicted = jnp.take_along_axis(predicted, place[..., None], axis=1)
        return predicted, (place < hidden).astype(jnp.float32)

    def hidden_patches(
        self,
        inputs: Float[Array, 'batch height width channels'] | dict[str, Array],
        *,
        train: bool = False,
        noise: Float[Array, 'batch tokens'] | None = None,
    ) -> tuple[Float[Array, 'batch hidden pixels'], Float[Array, 'batch hidden pixels']]:
        """The pixels of hidden patches as predicted, and as they are; arguments are those above."""
        predicted, order, pixels = self._predict(inputs, train, noise, everything=False)
        return predicted, chosen(pixels, order.hidden)

    def _predict(
        self, inputs: Any, train: bool, noise: Array | None, everything: bool
    ) -> tuple[Array, Order, Array]:
        """What the decoder predicts, of which patches, and the pixels of all patches."""
        stream = self.trunk.single
        assert stream is not None
        image = inputs[stream.reads] if isinstance(inputs, dict) else inputs
        # Cut once, for tokens and for targets: each by itself would lay out all pixels with three
        # channels innermost, which accelerators pad to whole lanes.
        pixels = jax.lax.optimization_barrier(patchify(image, stream.patch_size))
        batch, length = pixels.shape[:2]
        if noise is None:
            noise = self.noise(batch, length)
        kept, indices = visible_tokens(length, self.mask_ratio), jnp.argsort(noise, axis=1)
        order = Order(indices[:, kept:], indices[:, :kept])
        seen = chosen(pixels.astype(self.trunk.encoder.style.dtype), order.visible)
        cut = EmbeddingContext(cut=Cut(seen, order.visible))
        tokens, context = self.trunk.embed(image, train=train, context=cut)
        x, _ = self.trunk.encode(tokens, context, train=train)
        grid = grid_of(stream, image.shape[1:])
        predicted = self.decoder(
            x, order, (grid[0], grid[1]), pixels.shape[2], everything, not train
        )
        return predicted, order, pixels


def pixel_targets(
    pixels: Float[Array, 'batch tokens pixels'], normalise: bool
) -> Float[Array, 'batch tokens pixels']:
    """What is to be predicted of each patch: its pixels, maybe standardised by themselves."""
    if not normalise:
        return pixels
    mean, deviation = patch_statistics(pixels)
    return (pixels - mean) / deviation


def patch_statistics(
    pixels: Float[Array, 'batch tokens pixels'],
) -> tuple[Float[Array, 'batch tokens 1'], Float[Array, 'batch tokens 1']]:
    """Mean and deviation of each patch, as targets are standardised with."""
    # Unbiased, as in the authors' code.
    variance = pixels.var(-1, keepdims=True, ddof=1)
    return pixels.mean(-1, keepdims=True), jnp.sqrt(variance + 1e-6)


def _streams(rng: Array) -> dict[str, Array]:
    dropout, mask = jax.random.split(rng)
    return {'dropout': dropout, 'mask': mask}


def _apply(model: MaskedAutoencoder) -> Any:
    return model.apply  # Flax types its result as one value or a pair.


def draw_masks(model: MaskedAutoencoder) -> Callable[[Batch, Array], dict[str, Array]]:
    """`Task.draw` of the noise that a loss of the whole batch would draw."""
    stream = model.trunk.single
    assert stream is not None

    def draw(batch: Batch, key: Array) -> dict[str, Array]:
        rows, columns = grid_of(stream, batch['image'].shape[1:])
        sizes = len(batch['image']), rows * columns
        return {'noise': _apply(model)({}, *sizes, rngs=_streams(key), method='noise')}

    return draw


def masked_loss(model: MaskedAutoencoder, normalise_pixels: bool = True) -> Loss:
    """Mean squared error of the pixels of hidden patches; its metric 'hidden' is their share."""
    stream = model.trunk.single
    assert stream is not None

    def loss(
        params: Tree, state: Tree, batch: Batch, rng: Array | None, step: Array | int
    ) -> tuple[Array, Aux]:
        rngs, noise = {} if rng is None else _streams(rng), batch.get('drawn', {}).get('noise')
        predicted, pixels = _apply(model)(
            {'params': params},
            model_inputs({'image': batch['image']}),
            train=rng is not None,
            rngs=rngs,
            noise=noise,
            method='hidden_patches',
        )
        error = jnp.square(predicted - pixel_targets(pixels, normalise_pixels)).mean()
        rows, columns = grid_of(stream, batch['image'].shape[1:])
        hidden = jnp.float32(pixels.shape[1] / (rows * columns))
        return error, Aux({'hidden': hidden})

    return loss


def reconstructions(model: MaskedAutoencoder, normalise_pixels: bool = True) -> Pictures:
    """Images with patches hidden, and with predictions in their place.

    Predictions of normalised pixels get the mean and deviation of the true patch, which nothing
    predicts: without these they look like coloured noise.
    """
    stream = model.trunk.single
    assert stream is not None

    def pictures(params: Tree, images: Array, key: Array) -> dict[str, Array]:
        predicted, hidden = _apply(model)({'params': params}, images, rngs={'mask': key})
        pixels = patchify(images, stream.patch_size)
        if normalise_pixels:
            mean, deviation = patch_statistics(pixels)
            predicted = predicted * deviation + mean
        is_hidden = hidden[..., None] > 0
        shown = {
            'what it sees': jnp.where(is_hidden, jnp.nan, pixels),
            'reconstruction': jnp.where(is_hidden, predicted, pixels),
        }
        size = images.shape[1], images.shape[2]
        return {name: unpatchify(x, stream.patch_size, size) for name, x in shown.items()}

    return pictures
