"""Semantic segmentation: the class of each pixel, from the patch tokens of a trunk."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from big_vit.errors import UserError
from big_vit.models import heads, layers
from big_vit.models.tokenizers import grid_of
from big_vit.models.vit import ViT
from big_vit.tasks import mask_transformer
from big_vit.tasks.batch import Batch, model_inputs
from big_vit.tasks.mask_transformer import IGNORED
from big_vit.tasks.task import Aux, ExampleShape, Loss, Run, Segment, Targets, Task, Tree
from big_vit.tasks.trunk_checks import need_all_patches, need_fixed_rotations, need_simple_pool


def segmentation(
    *,
    head: str = 'linear',
    last_blocks: int | None = None,
    dropout: float | None = None,
    queries: int | None = None,
    query_blocks: int | None = None,
    points: int | None = None,
) -> Task:
    """Learns the class of each pixel.

    Args:
      head: a 'linear' layer on patch tokens (DINOv2's protocol), or 'mask': queries among the
        tokens of the last blocks, with a mask each (EoMT).
      last_blocks: of the linear head, how many last blocks give the features, joined; 1.
      dropout: share of these that are left out of all patches of an image; 0.
      queries: of the mask transformer, how many; 100.
      query_blocks: how many last blocks see the queries; 4.
      points: at how many points masks are compared in training; 12,544.

    Raises:
      UserError: an option is of the other head.
    """
    of_head: dict[str, dict[str, Any]] = {
        'linear': {'last_blocks': last_blocks, 'dropout': dropout},
        'mask': {'queries': queries, 'query_blocks': query_blocks, 'points': points},
    }
    (other,) = of_head.keys() - {head}
    strange = next((name for name, value in of_head[other].items() if value is not None), None)
    if strange is not None:
        raise UserError(
            f'config: task.{strange} is read with task.head={other!r}, but it is {head!r}: remove '
            'it, or set that head'
        )
    task = Task(
        name='segmentation',
        model=lambda trunk, example: _linear(trunk, example, last_blocks or 1, dropout or 0.0),
        loss=lambda model, run: segmentation_loss(model),
        headline='pixel_accuracy',
        provides=frozenset({'pixels', 'features'}),
        additions=('decode_head',),
        trunk=lambda model: model.trunk,
        reads=('segmentation',),
        targets=valid_pixels,
        segment=segment,
    )
    if head == 'linear':
        return task
    return task._replace(
        model=lambda trunk, example: _mask(trunk, example, queries or 100, query_blocks or 4),
        loss=lambda model, run: mask_transformer.mask_loss(model, run, points or 12_544),
        headline='mask',
        targets=mask_transformer.classes_of_batch,
        segment=mask_transformer.segment,
    )


def _linear(trunk: ViT, example: ExampleShape, last_blocks: int, dropout: float) -> Any:
    check_trunk(trunk, example)
    if last_blocks > trunk.encoder.depth:
        raise UserError(
            f'config: task.last_blocks={last_blocks}, but the model has {trunk.encoder.depth} '
            'block(s)'
        )
    return LinearSegmenter(trunk, example.num_classes, last_blocks, dropout)


def _mask(trunk: ViT, example: ExampleShape, queries: int, blocks: int) -> Any:
    check_trunk(trunk, example)
    stream, encoder = trunk.single, trunk.encoder
    assert stream is not None
    if blocks > encoder.depth:
        raise UserError(
            f'config: task.query_blocks={blocks}, but the model has {encoder.depth} block(s)'
        )
    if encoder.scan:
        raise UserError(
            "config: task.head='mask' has queries in the last blocks alone, which are not scanned "
            'with the others: set model.scan=false'
        )
    if stream.posemb == 'relative' or encoder.post_norm:
        raise UserError(
            "config: task.head='mask': queries have no relative positions, and need the last norm: "
            "take another model.posemb than 'relative', without model.post_norm"
        )
    need_fixed_rotations(stream, "task.head='linear'")
    return mask_transformer.MaskSegmenter(trunk, example.num_classes, queries, blocks)


def check_trunk(trunk: ViT, example: ExampleShape) -> None:
    """Raise UserError for a model whose tokens are no grid of one image, or too many classes."""
    stream = trunk.single
    if stream is None or stream.reads != 'image' or stream.tokenizer == 'ragged':
        raise UserError(
            "config: task.name='segmentation' is of the patches of one image: set "
            "model.tokenizer='patches', without streams"
        )
    need_simple_pool(trunk, 'segmentation')
    need_all_patches(trunk, 'segmentation')
    if example.num_classes > IGNORED:
        raise UserError(
            f'config: data: {example.num_classes} classes of pixels, but {IGNORED} stands for '
            f'what is ignored: the most are {IGNORED}'
        )


class LinearHead(nn.Module):
    """Logits of each patch: a norm, dropout of whole features, a linear layer."""

    style: layers.Style
    num_classes: int
    dropout: float

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch patches features'], deterministic: bool
    ) -> Float[Array, 'batch patches classes']:
        x = layers.LayerNorm(name='norm')(x.astype(jnp.float32))
        x = nn.Dropout(self.dropout, broadcast_dims=(1,))(x, deterministic)
        return heads.Classifier(self.num_classes, self.style.gather, name='classifier')(x)


class LinearSegmenter(nn.Module):
    """A trunk, whose parameters stay at the root, and `decode_head` on its patch tokens.

    Attributes:
      last_blocks: how many last blocks give the features; each goes through the last norm.
    """

    trunk: ViT
    num_classes: int
    last_blocks: int
    dropout: float

    def sequence_length(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Tokens of the trunk, for inputs of these shapes without the batch."""
        return self.trunk.sequence_length(shapes)

    def setup(self) -> None:
        nn.share_scope(self, self.trunk)
        self.decode_head = LinearHead(self.trunk.encoder.style, self.num_classes, self.dropout)

    def __call__(
        self,
        inputs: Float[Array, 'batch height width channels'] | dict[str, Array],
        *,
        train: bool = False,
    ) -> Float[Array, 'batch rows columns classes']:
        """Logits of each patch, in float32."""
        stream, several = self.trunk.single, self.last_blocks > 1
        assert stream is not None
        image = inputs[stream.reads] if isinstance(inputs, dict) else inputs
        tokens, context = self.trunk.embed(image, train=train)
        capture = ('blocks',) if several else ()
        x, captured = self.trunk.encode(tokens, context, train=train, capture=capture)
        if several:
            blocks: list[Any] = list(captured['blocks'][-self.last_blocks :])
            x = jnp.concatenate([*map(self._normed, blocks[:-1]), x], axis=-1)
        rows, columns = grid_of(stream, image.shape[1:])
        logits = self.decode_head(x[:, self.trunk.prefix_tokens :], not train)
        return logits.reshape(len(logits), rows, columns, -1)

    def _normed(self, x: Float[Array, 'batch tokens width']) -> Float[Array, 'batch tokens width']:
        """Tokens of a block through the last norm, unless its blocks end with one."""
        config = self.trunk.encoder
        if config.post_norm:
            return x
        weights: Any = self.get_variable('params', 'Transformer')['encoder_norm']
        scale, style = jnp.asarray(weights['scale']), config.style
        if style.norm == 'rmsnorm':
            return layers.rms_norm(x, scale, style.norm_eps, style.dtype)
        bias = jnp.asarray(weights['bias'])
        return layers.layer_norm(x, scale, bias, style.norm_eps, style.dtype)


def upsample(
    logits: Float[Array, 'batch rows columns classes'], size: tuple[int, int]
) -> Float[Array, 'batch height width classes']:
    """Resize bilinearly as torch does without align_corners and antialias."""
    shape = (logits.shape[0], *size, logits.shape[3])
    return jax.image.resize(logits, shape, 'bilinear', antialias=False)


def valid_pixels(model: Any, run: Run) -> Targets:
    """`Targets` that tell the mean number of pixels of an example, of the whole batch, that count.

    So the loss is a mean over the pixels of the whole batch on any mesh and in any parts of it.
    """

    def rows(state: Tree, batch: Batch, key: Array, step: Array) -> dict[str, Array]:
        return {'pixels': count_valid(batch['segmentation'])}

    def shared(state: Tree, rows: dict[str, Array], step: Array) -> Tree:
        return {'pixels': rows['pixels'].mean()}

    return Targets(rows, shared)


def count_valid(labels: Int[Array, 'batch height width']) -> Float[Array, ' batch']:
    """Return how many pixels of each label map count."""
    return (labels != IGNORED).sum((1, 2)).astype(jnp.float32)


def segmentation_loss(model: Any) -> Loss:
    """Mean cross-entropy of the pixels of a batch {'image', 'segmentation'} that are not ignored.

    Its metric 'pixel_accuracy' is the share of them whose highest logit is that of their class.
    """

    def loss(
        params: Tree, state: Tree, batch: Batch, rng: Array | None, step: Array | int
    ) -> tuple[Array, Aux]:
        rngs = {} if rng is None else {'dropout': rng}
        image, labels = model_inputs({'image': batch['image']}), batch['segmentation']
        logits = model.apply({'params': params}, image, train=rng is not None, rngs=rngs)
        logits = upsample(logits, (labels.shape[1], labels.shape[2]))
        valid = labels != IGNORED
        label = jnp.where(valid, labels, 0).astype(jnp.int32)[..., None]
        # A label that is no class gives NaN, so that nothing is learned from it unnoticed.
        own = jnp.take_along_axis(logits, label, axis=-1, mode='fill')[..., 0]
        error = jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) - own, 0)
        hit = valid & (logits.argmax(-1) == label[..., 0])
        whole = 'targets' in batch
        pixels = state['targets']['pixels'] if whole else count_valid(labels).mean()
        pixels = jnp.maximum(pixels, 1e-9)  # None may count.

        def mean(values: Array) -> Array:
            return values.sum((1, 2)).mean() / pixels

        return mean(error), Aux({'pixel_accuracy': mean(hit.astype(jnp.float32))})

    return loss


def segment(model: Any) -> Segment:
    """`Task.segment` of logits of patches."""

    def logits(params: Tree, batch: Batch) -> Float[Array, 'batch rows columns classes']:
        return model.apply({'params': params}, model_inputs({'image': batch['image']}))

    return logits
