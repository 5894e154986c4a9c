"""Joint embedding: I-JEPA (arXiv 2301.08243), and LeJEPA (2511.08544; `lejepa.py`).

I-JEPA encodes a block of an image without some smaller blocks in it, and predicts of each of these
what another encoder makes of them that sees the whole image: the average of the first.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from big_vit.errors import UserError
from big_vit.models import positions
from big_vit.models.encoder import Encoder, EncoderConfig
from big_vit.models.layers import NO_CONTEXT, Dense
from big_vit.models.tokenizers import grid_of
from big_vit.models.vit import ViT, select_tokens
from big_vit.tasks import block_targets, lejepa
from big_vit.tasks.batch import Batch, model_inputs
from big_vit.tasks.block_targets import Blocks, MultiBlock, Pair
from big_vit.tasks.task import Aux, ExampleShape, Loss, Targets, Task, Tree

# A context of fewer tokens says too little; the authors draw again below it.
_LEAST_CONTEXT = 10


def joint_embedding(
    *,
    method: str = 'ijepa',
    target_blocks: int = 4,
    target_scale: Pair = (0.15, 0.2),
    target_aspect: Pair = (0.75, 1.5),
    context_scale: Pair = (0.85, 1.0),
    context_tokens: int | None = None,
    whole_grid: bool = False,
    predictor_width: int = 384,
    predictor_depth: int = 6,
    predictor_heads: int | None = None,
    momentum: Pair = (0.996, 1.0),
    projector_width: int = 2048,
    projection_dim: int = 128,
    sigreg_weight: float = 0.02,
    sigreg_directions: int = 1024,
) -> Task:
    """Learns to predict embeddings.

    Args:
      method: 'ijepa', of blocks of an image from the rest of it, or 'lejepa', of views of an image
        from each other, which reads the last four keys alone.
      target_blocks: number of blocks of an image to predict.
      target_scale, target_aspect: range of the share of the image that a block covers, and of its
        height by its width.
      context_scale: range of the share that the square of the context covers, before the blocks
        are taken out of it.
      context_tokens: tokens of each context; by default what the authors' code leaves on average.
      whole_grid: blocks reach the last row and column, unlike in the authors' code.
      predictor_width, predictor_depth: size of the predictor; its MLPs are four times as wide.
      predictor_heads: attention heads of the predictor, by default those of the model.
      momentum: of the teacher's average at the start and at the end, on a line.
      projector_width, projection_dim: hidden and last width of the projector.
      sigreg_weight: share of the loss that is SIGReg.
      sigreg_directions: random directions of SIGReg in each step.
    """
    given = locals()
    own = _LEJEPA if method == 'lejepa' else _IJEPA
    defaults = inspect.signature(joint_embedding).parameters
    for key in {*_IJEPA, *_LEJEPA} - own:
        if given[key] != defaults[key].default:
            raise UserError(f'config: task.{key} is not read by task.method={method!r}: remove it')
    if method == 'lejepa':
        return Task(
            name='joint_embedding',
            model=lambda trunk, example: _views_model(
                trunk, example, projector_width, projection_dim
            ),
            loss=lambda model, run: lejepa.lejepa_loss(model, sigreg_weight, sigreg_directions),
            headline='invariance',
            provides=frozenset({'features'}),
            additions=('projector',),
            trunk=lambda model: model.trunk,
            views=lejepa.VIEWS,
            whole_batch=True,
        )

    def model(trunk: ViT, example: ExampleShape) -> JointEmbedding:
        rows, columns = _check(trunk, example)
        law = MultiBlock(
            (rows, columns), target_blocks, target_scale, target_aspect, context_scale, whole_grid
        )
        stream = trunk.single
        assert stream is not None
        length = _context_length(law, context_tokens, stream.patch_size)
        heads = predictor_heads or trunk.encoder.num_heads
        if predictor_width % heads or not positions.divides(predictor_width, 2):
            raise UserError(
                f'config: task.predictor_width={predictor_width} must be divisible by 4 and by '
                f'the {heads} heads of the predictor (task.predictor_heads)'
            )
        predictor = EncoderConfig(
            width=predictor_width,
            depth=predictor_depth,
            mlp_dim=4 * predictor_width,
            num_heads=heads,
            style=replace(trunk.encoder.style, head_dim=None, lora=0),
            scan=trunk.encoder.scan,
            remat=trunk.encoder.remat,
            constrain=trunk.encoder.constrain,
        )
        return JointEmbedding(trunk, predictor, law, length)

    return Task(
        name='joint_embedding',
        model=model,
        loss=lambda model, run: ijepa_loss(model),
        headline='target_std',
        provides=frozenset({'features'}),
        additions=('predictor',),
        trunk=lambda model: model.trunk,
        teacher_rate=lambda step, total: (
            (1 - momentum[0]) + (momentum[0] - momentum[1]) * (step / total)
        ),
        targets=lambda model, run: ijepa_targets(model),
        draw=draw_places,
    )


_LEJEPA = {'projector_width', 'projection_dim', 'sigreg_weight', 'sigreg_directions'}
_IJEPA = set(inspect.signature(joint_embedding).parameters) - _LEJEPA - {'method'}


def _check(trunk: ViT, example: ExampleShape) -> tuple[int, int]:
    """Refuses what I-JEPA cannot be done with; the grid of patches."""
    stream = trunk.single
    if (
        stream is None
        or stream.tokenizer != 'patches'
        or stream.stride not in (None, stream.patch_size)
    ):
        raise UserError(
            "config: task.method='ijepa' leaves out patches of one image, which do not overlap: "
            "set model.tokenizer='patches', without model.stride and streams"
        )
    if stream.posemb == 'relative':
        raise UserError(
            "config: model.posemb='relative' needs all tokens of a grid, and task.method='ijepa' "
            'leaves out some: take another'
        )
    head = trunk.head
    if (
        head.pool != 'gap'
        or trunk.prefix.class_token
        or head.norm_after_pool
        or head.representation
    ):
        raise UserError(
            "config: task.method='ijepa' trains patch tokens alone, no class token and no pooling: "
            "set model.pool='gap', without model.class_token, model.norm_after_pool and "
            'model.representation'
        )
    if trunk.prefix.patch_dropout:
        raise UserError(
            "config: task.method='ijepa' leaves out patches itself: set no model.patch_dropout"
        )
    rows, columns = grid_of(stream, example.inputs[stream.reads])
    return rows, columns


def _views_model(
    trunk: ViT, example: ExampleShape, width: int, outputs: int
) -> lejepa.ViewEmbedding:
    """The model of LeJEPA; refuses a trunk that cannot read the views."""
    stream = trunk.single
    if stream is None or stream.reads != 'image':
        raise UserError(
            "config: task.method='lejepa' compares views of one image: set "
            "model.tokenizer='patches', without streams"
        )
    if trunk.prefix.patch_dropout:
        raise UserError(
            "config: task.method='lejepa' embeds whole views: set no model.patch_dropout"
        )
    grids, count = [], 0
    for name in lejepa.VIEWS:
        if name in example.inputs:
            number, *shape = example.inputs[name]
            count += number
            try:
                grids.append(grid_of(stream, tuple(shape)))
            except ValueError as error:
                raise UserError(f'config: data.transform: views {name!r}: {error}') from error
    if count < 2:
        raise UserError(
            "config: task.method='lejepa' compares views of an image, and data.transform makes "
            "one: write it as in 'decode ; global: 2 * rrc(size) | flip_lr'"
        )
    if len(set(grids)) > 1 and stream.posemb == 'relative':
        shown = ' and '.join('x'.join(map(str, grid)) for grid in grids)
        raise UserError(
            f"config: model.posemb='relative' is of one grid, and the views have grids of {shown} "
            "patches: take 'learned', 'sincos2d', 'sincos2d_mae' or 'rope'"
        )
    return lejepa.ViewEmbedding(trunk, width, outputs, grids[0])


def _context_length(law: MultiBlock, given: int | None, patch: tuple[int, int]) -> int:
    """The length of contexts: as given, or the usual one.

    Raises:
      UserError: no contexts of that length can be drawn; says which sizes do.
    """
    usual, shown = block_targets.usual_context(law), 'x'.join(map(str, law.grid))
    half = int(np.median(block_targets.context_lengths(law)))
    most = min(half, law.least_context())
    if most < 1:
        raise UserError(
            f'config: of {shown} patches the target blocks may leave no context: take smaller '
            'patches, larger images or a smaller task.target_scale'
        )
    if given is None and usual < _LEAST_CONTEXT:
        grids = ((law.grid[0] + n, law.grid[1] + n) for n in range(1, 64))
        enough = (
            'x'.join(str(n * side) for n, side in zip(grid, patch, strict=True))
            for grid in grids
            if block_targets.usual_context(replace(law, grid=grid)) >= _LEAST_CONTEXT
        )
        pixels = next(enough, None)
        raise UserError(
            f'config: of {shown} patches the target blocks leave contexts of {usual} tokens, fewer '
            f'than {_LEAST_CONTEXT}: '
            + (f'set image_size to {pixels} or more, ' if pixels else '')
            + 'take smaller patches, or set task.whole_grid=True or task.context_tokens'
        )
    length = usual if given is None else given
    if length > most:
        why = f'half of the contexts have fewer than {half + 1}'
        if most < half:
            why = f'the target blocks may take all but {most}'
        raise UserError(
            f'config: task.context_tokens={length}: of {shown} patches {why}: take at most {most}'
        )
    return length


class Predictor(nn.Module):
    """An encoded context as predictions of what is encoded at each target block.

    Each block is a sequence of its own: the context, then mask tokens at the block's positions.
    """

    encoder: EncoderConfig
    grid: tuple[int, int]
    outputs: int

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch context width'], blocks: Blocks, deterministic: bool
    ) -> Float[Array, 'batch blocks tokens outputs']:
        width, style = self.encoder.width, self.encoder.style
        x = Dense((width,), dtype=style.dtype, gather=style.gather, name='embedding')(x)
        table = jnp.asarray(positions.sincos(self.grid, width, 'sincos2d_mae'))[0].astype(x.dtype)
        x = x + table[blocks.context]
        start = nn.initializers.truncated_normal(0.02)
        token = jnp.asarray(self.param('mask_token', start, (1, 1, width))).astype(x.dtype)
        asked = token[None] + table[blocks.target]
        batch, count, tokens = blocks.target.shape
        length = x.shape[1]
        known = jnp.broadcast_to(x[:, None], (batch, count, length, width))
        x = jnp.concatenate([known, asked], axis=2).reshape(batch * count, -1, width)
        seen = jnp.concatenate([jnp.ones(length, bool), blocks.real]).reshape(1, 1, 1, -1)
        x, _ = Encoder(self.encoder, name='Transformer')(
            self.encoder.constrain(x), deterministic, NO_CONTEXT._replace(mask=seen)
        )
        predict = Dense((self.outputs,), dtype=jnp.float32, gather=style.gather, name='prediction')
        return predict(x[:, length:]).reshape(batch, count, tokens, -1)


class JointEmbedding(nn.Module):
    """A trunk, whose parameters stay at the root, and `predictor` beside it.

    Attributes:
      predictor_config: sizes of the predictor.
      law: of blocks.
      context_tokens: length of each context.
    """

    trunk: ViT
    predictor_config: EncoderConfig
    law: MultiBlock
    context_tokens: int

    def sequence_length(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Tokens of the longest sequence, that of the targets' encoder."""
        return self.trunk.sequence_length(shapes)

    def setup(self) -> None:
        nn.share_scope(self, self.trunk)

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, 'batch height width channels'] | dict[str, Array],
        blocks: Blocks | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, 'batch blocks tokens features']:
        """Predictions of the encoded target blocks, of the encoded context alone."""
        image = inputs['image'] if isinstance(inputs, dict) else inputs
        if blocks is None:
            key = jax.random.key(0)
            blocks = block_targets.draw(self.law, self.context_tokens, 0, key, len(image))
        tokens, context = self.trunk.embed(image, train=train)
        x, _ = self.trunk.encode(select_tokens(tokens, blocks.context), context, train=train)
        width = self.trunk.encoder.width
        predictor = Predictor(self.predictor_config, self.law.grid, width, name='predictor')
        return predictor(x[:, self.trunk.prefix_tokens :], blocks, not train)

    def encoded(
        self, image: Float[Array, 'batch height width channels']
    ) -> Float[Array, 'batch tokens features']:
        """All tokens of the whole image, encoded."""
        x, _ = self.trunk.encode(*self.trunk.embed(image))
        return x[:, self.trunk.prefix_tokens :]


def normalised(x: Float[Array, '*tokens width']) -> Float[Array, '*tokens width']:
    """Each token less its mean, by its standard deviation: a LayerNorm without parameters."""
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)


def smooth_l1(difference: Float[Array, '...']) -> Float[Array, '...']:
    """Half the square up to 1, and from there on a line (Huber's loss)."""
    size = jnp.abs(difference)
    return jnp.where(size < 1, 0.5 * jnp.square(size), size - 0.5)


# (model, step, places of the examples) -> blocks.
Choose = Callable[[JointEmbedding, Array | int, Array], Blocks]


def _chosen(model: JointEmbedding, step: Array | int, place: Array) -> Blocks:
    return block_targets.blocks_at(model.law, model.context_tokens, step, place)


def draw_places(model: JointEmbedding) -> Callable[[Batch, Array], dict[str, Array]]:
    """`Task.draw` of where blocks lie."""

    def draw(batch: Batch, key: Array) -> dict[str, Array]:
        return {'places': block_targets.places(model.law, _keys(key)[1], len(batch['image']))}

    return draw


def _keys(rng: Array | None) -> Array:
    """Those of dropout and of the places."""
    return jax.random.split(jax.random.key(0) if rng is None else rng)


def ijepa_targets(model: JointEmbedding) -> Targets:
    """All tokens of the whole image as the teacher encodes them, normalised."""

    def rows(state: Tree, batch: Batch, key: Array, step: Array | int) -> dict[str, Array]:
        image = model_inputs({'image': batch['image']})
        apply: Any = model.apply
        tokens = apply({'params': state['teacher']}, image, method='encoded')
        return {'tokens': normalised(tokens.astype(jnp.float32))}

    return Targets(rows, lambda state, rows, step: ())


def ijepa_loss(model: JointEmbedding, choose: Choose = _chosen) -> Loss:
    """Smooth L1 distance of predictions from the targets' tokens.

    Metrics: 'target_std', the standard deviation of the teacher's normalised tokens over the batch
    and the image, mean of channels, which falls to 0 when the teacher says the same of everything;
    and 'cosine' of predictions and targets.
    """

    def loss(
        params: Tree, state: Tree, batch: Batch, rng: Array | None, step: Array | int
    ) -> tuple[Array, Aux]:
        image, tokens = model_inputs({'image': batch['image']}), batch['targets']['tokens']
        dropout, key = _keys(rng)
        place = batch.get('drawn', {}).get('places')
        if place is None:
            place = block_targets.places(model.law, key, len(image))
        blocks = choose(model, step, place)
        rngs = {} if rng is None else {'dropout': dropout}
        apply: Any = model.apply
        predicted = apply({'params': params}, image, blocks, train=rng is not None, rngs=rngs)
        index = blocks.target.reshape(len(image), -1, 1)
        wanted = jnp.take_along_axis(tokens, index, axis=1).reshape(predicted.shape)
        share = blocks.real / (blocks.real.sum() * blocks.target[..., 0].size)

        def mean(values: Float[Array, 'batch blocks tokens']) -> Array:
            return (values * share.reshape(1, 1, -1)).sum()

        cosine = (predicted * wanted).sum(-1) / (_length(predicted) * _length(wanted))
        metrics = {'target_std': tokens.std((0, 1)).mean(), 'cosine': mean(cosine)}
        return mean(smooth_l1(predicted - wanted).mean(-1)), Aux(metrics)

    return loss


def _length(x: Float[Array, '*tokens width']) -> Float[Array, '*tokens']:
    return jnp.sqrt(jnp.square(x).sum(-1) + 1e-12)
