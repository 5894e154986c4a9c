"""Masked autoencoding (MAE, arXiv 2111.06377): most patches are hidden, and their pixels asked for.

The encoder sees the visible tokens alone; a small decoder gets them back with mask tokens in
between and predicts the pixels of each patch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from big_vit.errors import UserError
from big_vit.models import positions
from big_vit.models.encoder import Encoder, EncoderConfig
from big_vit.models.layers import Dense
from big_vit.models.tokenizers import grid_of
from big_vit.models.vit import ViT, select_tokens
from big_vit.tasks.batch import Batch, model_inputs
from big_vit.tasks.task import Aux, ExampleShape, Loss, Pictures, Task, Tree


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
    head = trunk.head
    if head.pool not in ('gap', 'cls', 'cls_gap') or head.norm_after_pool or head.representation:
        raise UserError(
            "config: task.name='masked' trains no pooling: set model.pool to 'gap', 'cls' or "
            "'cls_gap', without model.norm_after_pool and model.representation"
        )
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


@jax.custom_vjp
def permuted(
    x: Float[Array, 'batch tokens width'],
    order: Int[Array, 'batch tokens'],
    inverse: Int[Array, 'batch tokens'],
) -> Float[Array, 'batch tokens width']:
    """The tokens in another order; `inverse` puts them back.

    So the gradient is another permutation and not a sum into places, which accelerators make one
    by one.
    """
    return jnp.take_along_axis(x, order[..., None], axis=1)


def _permuted_forward(x: Array, order: Array, inverse: Array) -> tuple[Array, tuple[Array, Array]]:
    return permuted(x, order, inverse), (order, inverse)


def _permuted_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, None, None]:
    order, inverse = saved
    return permuted(g, inverse, order), None, None


permuted.defvjp(_permuted_forward, _permuted_backward)


class Decoder(nn.Module):
    """Encoded visible tokens, with mask tokens in between, as predictions of each patch."""

    encoder: EncoderConfig
    grid: tuple[int, int]
    outputs: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch visible width'],
        prefix: int,
        order: Int[Array, 'batch tokens'],
        restore: Int[Array, 'batch tokens'],
        deterministic: bool,
    ) -> Float[Array, 'batch tokens outputs']:
        width, style = self.encoder.width, self.encoder.style
        x = Dense((width,), dtype=style.dtype, gather=style.gather, name='embedding')(x)
        start = nn.initializers.normal(0.02)
        token = jnp.asarray(self.param('mask_token', start, (1, 1, width))).astype(x.dtype)
        before, visible = x[:, :prefix], x[:, prefix:]
        hidden = restore.shape[1] - visible.shape[1]
        tokens = jnp.concatenate(
            [visible, jnp.broadcast_to(token, (x.shape[0], hidden, width))], axis=1
        )
        tokens = permuted(tokens, restore, order)
        table = jnp.asarray(positions.sincos(self.grid, width, 'sincos2d_mae'))
        x = jnp.concatenate([before, tokens + table.astype(x.dtype)], axis=1)
        x, _ = Encoder(self.encoder, name='Transformer')(self.encoder.constrain(x), deterministic)
        predict = Dense((self.outputs,), dtype=jnp.float32, gather=style.gather, name='prediction')
        return predict(x[:, prefix:])


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

    def noise(self, batch: int, tokens: int) -> Float[Array, 'batch tokens']:
        """What decides which patches are hidden, from the random stream 'mask'."""
        if not self.has_rng('mask'):
            return jnp.broadcast_to(jnp.linspace(0, 1, tokens), (batch, tokens))
        return mask_noise(self.make_rng('mask'), batch, tokens)

    @nn.compact
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
        stream = self.trunk.single
        assert stream is not None
        image = inputs[stream.reads] if isinstance(inputs, dict) else inputs
        tokens, context = self.trunk.embed(image, train=train)
        batch, length = tokens.x.shape[:2]
        if noise is None:
            noise = self.noise(batch, length)
        order = jnp.argsort(noise, axis=1)
        restore = jnp.argsort(order, axis=1)
        kept = visible_tokens(length, self.mask_ratio)
        visible = select_tokens(tokens, order[:, :kept])
        visible = visible._replace(x=permuted(tokens.x, order, restore)[:, :kept])
        x, _ = self.trunk.encode(visible, context, train=train)
        rows, columns = grid_of(stream, image.shape[1:])
        pixels = stream.patch_size[0] * stream.patch_size[1] * image.shape[-1]
        decoder = Decoder(self.decoder_config, (rows, columns), pixels, name='decoder')
        predicted = decoder(x, self.trunk.prefix_tokens, order, restore, not train)
        return predicted, (restore >= kept).astype(jnp.float32)


def patchify(
    image: Float[Array, 'batch height width channels'], patch: tuple[int, int]
) -> Float[Array, 'batch tokens pixels']:
    """The pixels of each patch, by rows, channels last."""
    batch, height, width, channels = image.shape
    rows, columns = height // patch[0], width // patch[1]
    x = image.reshape(batch, rows, patch[0], columns, patch[1], channels).swapaxes(2, 3)
    return x.reshape(batch, rows * columns, patch[0] * patch[1] * channels)


def unpatchify(
    pixels: Float[Array, 'batch tokens pixels'], patch: tuple[int, int], size: tuple[int, int]
) -> Float[Array, 'batch height width channels']:
    """The image of this height and width that `patchify` cuts into these patches."""
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    x = pixels.reshape(len(pixels), rows, columns, patch[0], patch[1], -1).swapaxes(2, 3)
    return x.reshape(len(pixels), *size, -1)


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


def hidden_error(
    predicted: Float[Array, 'batch tokens pixels'],
    targets: Float[Array, 'batch tokens pixels'],
    hidden: Float[Array, 'batch tokens'],
) -> Float[Array, '']:
    """Mean squared error of the hidden patches of all examples."""
    return (jnp.square(predicted - targets).mean(-1) * hidden).sum() / hidden.sum()


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
        image = model_inputs({'image': batch['image']})
        # Cut once, for the embedding and for the targets: each by itself would lay out all pixels
        # with three channels innermost, which accelerators pad to whole lanes.
        pixels = jax.lax.optimization_barrier(patchify(image, stream.patch_size))
        # The embedding would round them to this type next; before, its layout is that of patches.
        rounded = pixels.astype(model.trunk.encoder.style.dtype)
        image = unpatchify(rounded, stream.patch_size, (image.shape[1], image.shape[2]))
        rngs, noise = {} if rng is None else _streams(rng), batch.get('drawn', {}).get('noise')
        predicted, hidden = _apply(model)(
            {'params': params}, image, train=rng is not None, rngs=rngs, noise=noise
        )
        error = hidden_error(predicted, pixel_targets(pixels, normalise_pixels), hidden)
        return error, Aux({'hidden': hidden.mean()})

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
