"""From inputs to tokens: images, videos, spectrograms, words, and images of any shape.

`TOKENIZERS` is the table of them. A spectrogram is an image of one channel, [time, frequency, 1] or
the other way round, for 'patches' that may overlap (AST, arXiv 2104.01778).
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from big_vit.models import positions, stems
from big_vit.models.encoder import EncoderConfig
from big_vit.models.layers import PLAIN, LayerNorm, Style
from big_vit.models.positions import Grid

# Parts of a batch that are numbers of pixels.
PICTURES = ('image', 'video', 'patches')


@dataclass(frozen=True)
class Stream:
    """One kind of input and how it becomes tokens.

    Attributes:
      name: of its parameters, where there are several streams.
      part: of the batch; by default what the tokenizer reads.
      tokenizer: a name in `TOKENIZERS`.
      patch_size: (height, width) in pixels of a patch; of stems that shrink the image, by how
        much they do in all.
      stride: (height, width) between overlapping patches; None is the patch's size.
      tubelet: frames of a tubelet.
      vocab: words that there are.
      resnet: units of each stage of the hybrid's ResNet.
      embedding_bias: whether the projection has a bias.
      posemb: 'sincos2d', 'sincos2d_mae', 'sincos2d_detr', 'learned', 'rope', 'relative' or 'none'.
      posemb_per_block: add them to queries and keys of each block, and not once to the tokens.
      posemb_prefix: prefix tokens that have a row of their own in front of a learned table.
      posemb_grid: (rows, columns) of the learned table of 'ragged', whose images have any.
      rope_theta: see `positions.rotation`.
      rope_shift, rope_jitter, rope_rescale: see `positions.Variation`; None does not vary.
      depth: blocks of its own, before it is attended to by another stream.
    """

    name: str = ''
    part: str = ''
    tokenizer: str = 'patches'
    patch_size: tuple[int, int] = (16, 16)
    stride: tuple[int, int] | None = None
    tubelet: int = 2
    vocab: int = 0
    resnet: tuple[int, ...] = ()
    embedding_bias: bool = True
    posemb: str = 'sincos2d'
    posemb_per_block: bool = False
    posemb_prefix: int = 0
    posemb_grid: tuple[int, int] = (16, 16)
    rope_theta: float = 100.0
    rope_shift: float | None = None
    rope_jitter: float | None = None
    rope_rescale: float | None = None
    depth: int = 0

    @property
    def reads(self) -> str:
        return self.part or TOKENIZERS[self.tokenizer].reads


class Tokens(NamedTuple):
    """Tokens [batch, tokens, width], and what attention needs to know.

    grid: how they lie, where that is the same in all examples.
    mask: which of them are real, [batch, tokens].
    segment: of 'ragged', which image each belongs to, from 1; 0 is padding.
    rotation, places: of rotary positions, see `positions.rotation`.
    positions: what is added in each block, [1 or batch, tokens, width]; None where they are added
      to the tokens already.
    """

    x: Array
    grid: Grid | None = None
    mask: Array | None = None
    segment: Array | None = None
    rotation: tuple[Array, Array] | None = None
    places: Array | None = None
    positions: Array | None = None


class Cut(NamedTuple):
    """Some patches of images, in any order.

    pixels: of each patch, as `patchify` has them, [batch, kept, pixels].
    place: their indices in the grid, [batch, kept].
    """

    pixels: Array
    place: Array


class EmbeddingContext(NamedTuple):
    """What embedding depends on beside the input; None where there is nothing.

    hidden: which patches a mask token takes the place of, [batch, tokens], before positions are
      added, as in BEiT (arXiv 2106.08254).
    mask_token: the token, [1, 1, width].
    table: the grid of learned positions, where it may be another than the input's: then they are
      interpolated.
    offset: what interpolation adds to the grid's size, see `positions.resize_matrix`.
    cut: patches that are embedded in place of the image, of which only the size is read then.
    real: (height, width) in pixels of each picture, [batch, 2], on a canvas that it does not fill:
      tokens that begin beyond it are padding.
    canvas: (height, width) of the canvas.
    """

    hidden: Array | None = None
    mask_token: Array | None = None
    table: Grid | None = None
    offset: float = 0.0
    cut: Cut | None = None
    real: Array | None = None
    canvas: Grid = ()


NO_EMBEDDING_CONTEXT = EmbeddingContext()


class Tokenizer(NamedTuple):
    """One way to make tokens.

    reads: the part of a batch that it takes, unless the stream names another.
    grid: how many tokens an input gives along each axis, of (stream, shape without the batch);
      ValueError where the input does not divide, saying which sizes would.
    tokens: makes `Tokens`, of (scope, inputs) and keyword arguments that are keys of the config
      with their defaults; parameters go into the scope's module.
    """

    reads: str
    grid: Callable[[Stream, tuple[int, ...]], Grid]
    tokens: Callable[..., Tokens]


class Scope(NamedTuple):
    """Where a tokenizer makes its parameters, and how."""

    module: nn.Module
    stream: Stream
    encoder: EncoderConfig
    context: EmbeddingContext = NO_EMBEDDING_CONTEXT

    @property
    def style(self) -> Style:
        return self.encoder.style

    @property
    def width(self) -> int:
        return self.encoder.width


def grid_of(stream: Stream, shape: tuple[int, ...]) -> Grid:
    """How many tokens an input of this shape (without the batch) gives along each axis.

    Raises:
      ValueError: the input does not divide into patches; says which sizes would.
    """
    return TOKENIZERS[stream.tokenizer].grid(stream, shape)


def _sequence_grid(stream: Stream, shape: tuple[int, ...]) -> Grid:
    return (shape[0],)


def _patch_grid(stream: Stream, shape: tuple[int, ...]) -> Grid:
    return _rows(stream, shape[:2])


def _tubelet_grid(stream: Stream, shape: tuple[int, ...]) -> Grid:
    frames = shape[0]
    if frames % stream.tubelet:
        low = frames // stream.tubelet * stream.tubelet
        raise ValueError(
            f'{frames} frames do not divide into tubelets of {stream.tubelet}: '
            f'take {low or stream.tubelet} or {low + stream.tubelet}'
        )
    return (frames // stream.tubelet, *_rows(stream, shape[1:3]))


def _rows(stream: Stream, size: tuple[int, ...]) -> tuple[int, int]:
    step = stream.stride or stream.patch_size
    found = []
    for pixels, patch, every in zip(size, stream.patch_size, step, strict=True):
        if pixels < patch or (pixels - patch) % every:
            low = max((pixels - patch) // every, 0) * every + patch
            near = f'{low}' if pixels < patch else f'{low} or {low + every}'
            shown, each = ('x'.join(map(str, s)) for s in (size, stream.patch_size))
            strided = '' if stream.stride is None else f' every {"x".join(map(str, step))}'
            raise ValueError(
                f'{shown} pixels do not divide into {each} patches{strided}: of {pixels}, '
                f'{near} would'
            )
        found.append((pixels - patch) // every + 1)
    return found[0], found[1]


def _projected(
    module: nn.Module,
    x: Array,
    patch: tuple[int, ...],
    channels: int,
    width: int,
    style: Style,
    use_bias: bool,
    product: Callable[[Array, Array], Array],
) -> Array:
    """x times the kernel [*patch, channels, width] of `module`, and a bias; [..., width]."""
    pixels, laws = math.prod(patch) * channels, style.laws

    def init(key: Array, shape: tuple[int, ...]) -> Array:
        # The fan is that of the flattened patch, as the papers have it.
        return laws.patches(key, (pixels, width)).reshape(shape)

    kernel = jnp.asarray(module.param('kernel', init, (*patch, channels, width)))
    x, kernel = x.astype(style.dtype), kernel.astype(style.dtype)
    tokens = style.gather('/'.join((*module.path, 'kernel')), product, x, kernel)
    if not use_bias:
        return tokens
    bias = jnp.asarray(module.param('bias', laws.patch_bias(pixels), (width,)))
    return tokens + bias.astype(style.dtype).reshape((1,) * (tokens.ndim - 1) + bias.shape)


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


@jax.jit
def chosen(
    x: Float[Array, '#batch tokens features'], index: Int[Array, 'batch chosen']
) -> Float[Array, 'batch chosen features']:
    """The tokens of an index, as a product with ones and zeros, to the bit.

    TPUs gather tokens, and sum gradients into their places, one by one. `flops` does not count it.
    """
    ones = jax.nn.one_hot(index, x.shape[1], dtype=x.dtype)
    where = 'bkn,nf->bkf' if len(x) == 1 else 'bkn,bnf->bkf'
    x = x[0] if len(x) == 1 else x
    return jnp.einsum(where, ones, x, precision=jax.lax.Precision.HIGHEST)


class Patches(nn.Module):
    """Patches, each projected to `width` (arXiv 2010.11929).

    The kernel has the layout of a convolution, [height, width, channels, out]; patches that do
    not overlap are applied as a reshape and one matrix product.
    """

    width: int
    patch_size: tuple[int, int]
    style: Style = PLAIN
    stride: tuple[int, int] | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(
        self, image: Float[Array, 'batch height width channels']
    ) -> Float[Array, 'batch rows columns features']:
        batch, height, width, channels = image.shape
        ph, pw = self.patch_size
        rows, columns = _rows(
            Stream(patch_size=self.patch_size, stride=self.stride), (height, width)
        )
        if self.stride is None or self.stride == self.patch_size:
            image = image.reshape(batch, rows, ph, columns, pw, channels)

            def product(patches: Array, kernel: Array) -> Array:
                return jnp.einsum('brpcqi,pqio->brco', patches, kernel)
        else:
            product = partial(stems.convolve, stride=self.stride, padding='VALID')
        how = self.width, self.style, self.use_bias
        return _projected(self, image, self.patch_size, channels, *how, product)


class Tubelets(nn.Module):
    """Boxes of several frames, each projected to `width` (ViViT, arXiv 2103.15691)."""

    width: int
    tubelet: tuple[int, int, int]
    style: Style
    use_bias: bool = True

    @nn.compact
    def __call__(
        self, video: Float[Array, 'batch frames height width channels']
    ) -> Float[Array, 'batch times rows columns features']:
        batch, frames, height, width, channels = video.shape
        t, ph, pw = self.tubelet
        shape = (batch, frames // t, t, height // ph, ph, width // pw, pw, channels)

        def product(boxes: Array, kernel: Array) -> Array:
            return jnp.einsum('btarpcqi,apqio->btrco', boxes, kernel)

        how = self.width, self.style, self.use_bias
        return _projected(self, video.reshape(shape), self.tubelet, channels, *how, product)


class RaggedPatches(nn.Module):
    """The projection of `Patches` for patches that were cut out already."""

    width: int
    patch_size: tuple[int, int]
    style: Style
    use_bias: bool = True

    @nn.compact
    def __call__(
        self, patches: Float[Array, 'batch tokens pixels']
    ) -> Float[Array, 'batch tokens features']:
        channels = patches.shape[-1] // math.prod(self.patch_size)

        def product(patches: Array, kernel: Array) -> Array:
            return jnp.matmul(patches, kernel.reshape(-1, kernel.shape[-1]))

        how = self.width, self.style, self.use_bias
        return _projected(self, patches, self.patch_size, channels, *how, product)


class ShiftedPatches(nn.Module):
    """The image beside four copies shifted by half a patch diagonally (SPT, arXiv 2112.13492).

    Patches of all five are normalised and projected.
    """

    width: int
    patch_size: tuple[int, int]
    style: Style
    use_bias: bool = True

    @nn.compact
    def __call__(
        self, image: Float[Array, 'batch height width channels']
    ) -> Float[Array, 'batch rows columns features']:
        batch, height, width, channels = image.shape
        ph, pw = self.patch_size
        down, right = ph // 2, pw // 2
        padded = jnp.pad(image, ((0, 0), (down, down), (right, right), (0, 0)))
        shifts = [
            padded[:, top : top + height, left : left + width]
            for top in (0, 2 * down)
            for left in (0, 2 * right)
        ]
        x = jnp.concatenate([image, *shifts], axis=-1)
        x = x.reshape(batch, height // ph, ph, width // pw, pw, 5 * channels).swapaxes(2, 3)
        x = x.reshape(batch, height // ph, width // pw, -1)
        x = LayerNorm(self.style.norm_eps, self.style.dtype, name='norm')(x)
        # As an image of one pixel a patch, its kernel needs no form of its own.
        return Patches(self.width, (1, 1), self.style, use_bias=self.use_bias, name='projection')(x)


def tokenize(
    module: nn.Module,
    stream: Stream,
    encoder: EncoderConfig,
    inputs: dict[str, Array],
    context: EmbeddingContext = NO_EMBEDDING_CONTEXT,
) -> Tokens:
    """The tokens of one stream, with their positions; parameters go into `module`'s scope.

    Raises:
      ValueError: the input does not divide into patches.
    """
    shape = inputs[stream.reads].shape[1:]
    grid_of(stream, shape)  # Its error says which sizes would do.
    if 'picture_size' in inputs and stream.reads == 'image':
        context = context._replace(real=inputs['picture_size'], canvas=shape[:2])
    tokens = TOKENIZERS[stream.tokenizer].tokens
    keys = list(inspect.signature(tokens).parameters)[2:]
    options = {key: getattr(stream, key) for key in keys}
    return tokens(Scope(module, stream, encoder, context), inputs, **options)


def _with_positions(scope: Scope, x: Float[Array, 'batch *grid width']) -> Tokens:
    """Flattens a grid of tokens and adds its positions."""
    grid, context = x.shape[1:-1], scope.context
    x = x.reshape(x.shape[0], math.prod(grid), x.shape[-1])
    if context.hidden is not None:
        assert context.mask_token is not None
        x = jnp.where(context.hidden[..., None], context.mask_token.astype(x.dtype), x)
    mask = None if context.real is None else real_tokens(context.real, context.canvas, grid)
    table = _table(scope, grid, x.shape[-1], mask)
    if scope.stream.posemb_per_block:
        tokens = Tokens(x, grid, positions=table)
    else:
        tokens = Tokens(x if table is None else x + table.astype(x.dtype), grid)
    if mask is not None:
        tokens = tokens._replace(mask=mask.reshape(len(mask), -1))
    if scope.stream.posemb == 'rope':
        return _turned(scope, tokens, jnp.asarray(positions.centres(grid)))
    return tokens


def patches(
    scope: Scope,
    inputs: dict[str, Array],
    *,
    stride: tuple[int, int] | None = None,
    embedding_bias: bool = True,
) -> Tokens:
    """Plain patches (arXiv 2010.11929), which may overlap (AST, arXiv 2104.01778)."""
    size = scope.stream.patch_size
    if scope.context.cut is not None:
        grid = _rows(scope.stream, inputs[scope.stream.reads].shape[1:3])
        return _of_cut(scope, scope.context.cut, grid, embedding_bias)
    embedding = Patches(scope.width, size, scope.style, stride, embedding_bias, name='embedding')
    return _with_positions(scope, embedding(inputs[scope.stream.reads]))


def _of_cut(scope: Scope, cut: Cut, grid: Grid, embedding_bias: bool) -> Tokens:
    """Tokens of patches that were cut out already, with the positions of their places."""
    embedding = RaggedPatches(
        scope.width, scope.stream.patch_size, scope.style, embedding_bias, name='embedding'
    )
    x = embedding(cut.pixels)
    tokens, table = Tokens(x), _table(scope, grid, x.shape[-1])
    if table is not None:
        placed = chosen(table.astype(x.dtype), cut.place)
        per_block = scope.stream.posemb_per_block
        tokens = Tokens(x, positions=placed) if per_block else Tokens(x + placed)
    if scope.stream.posemb == 'rope':
        return _turned(scope, tokens, jnp.asarray(positions.centres(grid))[0][cut.place])
    return tokens


def spt(scope: Scope, inputs: dict[str, Array], *, embedding_bias: bool = True) -> Tokens:
    """Shifted patches (SPT, arXiv 2112.13492)."""
    size = scope.stream.patch_size
    embedding = ShiftedPatches(scope.width, size, scope.style, embedding_bias, name='embedding')
    return _with_positions(scope, embedding(inputs[scope.stream.reads]))


def cct(scope: Scope, inputs: dict[str, Array]) -> Tokens:
    """The convolutional tokenizer of compact transformers (CCT, arXiv 2104.05704)."""
    layers = _halvings(scope.stream)
    stem = stems.CctStem(scope.width, layers, scope.style, name='stem')
    return _with_positions(scope, stem(inputs[scope.stream.reads]))


def conv(scope: Scope, inputs: dict[str, Array], *, embedding_bias: bool = True) -> Tokens:
    """A convolutional stem (arXiv 2106.14881)."""
    layers = _halvings(scope.stream)
    stem = stems.ConvStem(scope.width, layers, scope.style, name='stem')
    return _after_stem(scope, stem(inputs[scope.stream.reads]), (1, 1), embedding_bias)


def resnet(
    scope: Scope,
    inputs: dict[str, Array],
    *,
    resnet: tuple[int, ...] = (),
    embedding_bias: bool = True,
) -> Tokens:
    """The hybrid: stages of a ResNet, then patches of its features (arXiv 2010.11929)."""
    stem = stems.ResNet(resnet, scope.style, name='stem')
    return _hybrid(scope, stem, inputs, embedding_bias)


def frozen_resnet(
    scope: Scope,
    inputs: dict[str, Array],
    *,
    resnet: tuple[int, ...] = (),
    embedding_bias: bool = True,
) -> Tokens:
    """Stages of torchvision's ResNet, then patches of its features, as in DETR (2005.12872)."""
    stem = stems.FrozenResNet(resnet, scope.style, name='stem')
    return _hybrid(scope, stem, inputs, embedding_bias)


def _hybrid(
    scope: Scope,
    stem: stems.ResNet | stems.FrozenResNet,
    inputs: dict[str, Array],
    embedding_bias: bool,
) -> Tokens:
    stride, (height, width) = stems.resnet_stride(stem.layers), scope.stream.patch_size
    x = stem(inputs[scope.stream.reads])
    return _after_stem(scope, x, (height // stride, width // stride), embedding_bias)


def _halvings(stream: Stream) -> int:
    return round(math.log2(stream.patch_size[0]))


def _after_stem(scope: Scope, x: Array, patch: tuple[int, int], bias: bool) -> Tokens:
    embedding = Patches(scope.width, patch, scope.style, None, bias, name='embedding')
    return _with_positions(scope, embedding(x))


def tubelets(
    scope: Scope, inputs: dict[str, Array], *, tubelet: int = 2, embedding_bias: bool = True
) -> Tokens:
    """Boxes of several frames of a video (ViViT, arXiv 2103.15691)."""
    box = (tubelet, *scope.stream.patch_size)
    embedding = Tubelets(scope.width, box, scope.style, embedding_bias, name='embedding')
    return _with_positions(scope, embedding(inputs[scope.stream.reads]))


def words(scope: Scope, inputs: dict[str, Array], *, vocab: int = 259) -> Tokens:
    """Rows of a table of embeddings; `inputs['text_mask']` says which words are real."""
    indices, mask = inputs[scope.stream.reads], inputs.get('text_mask')
    # As large as learned positions, or these would hide the words at first.
    init = nn.initializers.normal(scope.width**-0.5)
    table = jnp.asarray(scope.module.param('word_embedding', init, (vocab, scope.width)))
    x = jnp.take(table, indices, axis=0, mode='clip').astype(scope.style.dtype)
    return _with_positions(scope, x)._replace(mask=None if mask is None else mask > 0)


def ragged(scope: Scope, inputs: dict[str, Array], *, embedding_bias: bool = True) -> Tokens:
    """Patches of images of any shape, several in a row (NaViT, arXiv 2307.06304; NaFlex).

    Beside 'patches' [batch, tokens, pixels] the inputs are 'segment' [batch, tokens] (which
    image; 0 is padding), 'place' [batch, tokens, 2] (row and column) and 'grid' [batch, tokens,
    2] (how many of each the token's image has).
    """
    stream, width, style = scope.stream, scope.width, scope.style
    embedding = RaggedPatches(width, stream.patch_size, style, embedding_bias, name='embedding')
    x = embedding(inputs[stream.reads])
    segment = inputs['segment'].astype(jnp.int32)
    place = inputs['place'].astype(jnp.float32)
    sizes = jnp.maximum(inputs['grid'].astype(jnp.float32), 1)
    if stream.posemb == 'learned':
        init = nn.initializers.normal(width**-0.5)
        shape = (1, math.prod(stream.posemb_grid), width)
        table = jnp.asarray(scope.module.param('pos_embedding', init, shape))
        share = place / jnp.maximum(sizes - 1, 1)
        x = x + positions.positions_at(table, stream.posemb_grid, share).astype(style.dtype)
    elif stream.posemb in positions.LAWS:
        x = x + positions.sincos_at(place, width, stream.posemb).astype(style.dtype)
    tokens = Tokens(x, mask=segment > 0, segment=segment)
    if stream.posemb == 'rope':
        return _turned(scope, tokens, (place + 0.5) / sizes * 2 - 1)
    return tokens


TOKENIZERS = {
    'patches': Tokenizer('image', _patch_grid, patches),
    'conv': Tokenizer('image', _patch_grid, conv),
    'resnet': Tokenizer('image', _patch_grid, resnet),
    'frozen_resnet': Tokenizer('image', _patch_grid, frozen_resnet),
    'cct': Tokenizer('image', _patch_grid, cct),
    'spt': Tokenizer('image', _patch_grid, spt),
    'tubelets': Tokenizer('video', _tubelet_grid, tubelets),
    'words': Tokenizer('tokens', _sequence_grid, words),
    'ragged': Tokenizer('patches', _sequence_grid, ragged),
}


def real_tokens(
    real: Int[Array, 'batch 2'], canvas: Grid, grid: Grid
) -> Bool[Array, 'batch rows columns']:
    """Which tokens of a grid begin within the picture, whose (height, width) is `real`.

    A token's first pixel decides, as where a mask of pixels is resized by nearest neighbours.
    """
    rows, columns = (
        (jnp.arange(tokens) * pixels // tokens)[None] < real[:, axis, None]
        for axis, (tokens, pixels) in enumerate(zip(grid, canvas, strict=True))
    )
    return rows[:, :, None] & columns[:, None]


def _table(
    scope: Scope, grid: Grid, width: int, real: Array | None = None
) -> Float[Array, '#batch tokens width'] | None:
    """The positions of a grid; None where they are not added.

    Args:
      real: which tokens are of the picture, [batch, *grid]; None is all.
    """
    stream = scope.stream
    if stream.posemb == 'learned':
        init, own = nn.initializers.normal(width**-0.5), scope.context.table or grid
        shape = (1, stream.posemb_prefix + math.prod(own), width)
        table = jnp.asarray(scope.module.param('pos_embedding', init, shape))
        table = table[:, stream.posemb_prefix :]
        if own != grid:
            table = positions.interpolated(table, own, grid, scope.context.offset)
        return table
    if stream.posemb == 'sincos2d_detr':
        if real is not None:
            return positions.sincos_of_pictures(real, width)
        with jax.ensure_compile_time_eval():
            return positions.sincos_of_pictures(jnp.ones((1, *grid), bool), width)
    if stream.posemb in positions.LAWS:
        return jnp.asarray(positions.sincos(grid, width, stream.posemb))
    return None


def _turned(scope: Scope, tokens: Tokens, places: Float[Array, 'batch tokens axes']) -> Tokens:
    """Tokens with rotary positions at these places."""
    rotation = positions.rotation(places, scope.encoder.head_dim, scope.stream.rope_theta)
    return tokens._replace(rotation=rotation, places=places)


def padded_rotation(
    turns: tuple[Array, Array] | None, before: int, tokens: int, head_dim: int
) -> tuple[Array, Array]:
    """Rotations with `before` tokens in front that stay as they are; None is `tokens` of them."""
    if turns is None:
        sin = jnp.zeros((1, before + tokens, 1, head_dim), jnp.float32)
        return sin, sin + 1
    sin, cos = turns
    pad = ((0, 0), (before, 0), (0, 0), (0, 0))
    return jnp.pad(sin, pad), jnp.pad(cos, pad, constant_values=1)


def real(mask: Array | None, x: Array) -> Bool[Array, 'batch tokens']:
    """Which tokens are real, where all are if nothing is said."""
    return jnp.ones(x.shape[:2], bool) if mask is None else mask
