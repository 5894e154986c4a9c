"""Detection as set prediction (DETR, arXiv 2005.12872): each query is one object, or none.

Queries are matched to objects at the least total cost, so that no two of them answer for one
object and nothing need be suppressed afterwards.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from big_vit.errors import UserError
from big_vit.models.detector import Detector, Predictions
from big_vit.models.encoder import EncoderConfig, identity
from big_vit.models.tokenizers import chosen
from big_vit.models.vit import ViT
from big_vit.tasks import matching
from big_vit.tasks.batch import Batch, normalise
from big_vit.tasks.boxes import generalised_iou
from big_vit.tasks.task import Aux, Detections, ExampleShape, Loss, Run, Targets, Task, Tree
from big_vit.tasks.trunk_checks import need_all_patches, need_fixed_rotations, need_simple_pool


class Weights(NamedTuple):
    """What the parts of a loss count beside the class, which counts 1.

    l1, giou: of the boxes, in the costs of the matching too.
    no_object: of a query without object in the cross-entropy, beside 1 of one with an object.
    """

    l1: float = 5.0
    giou: float = 2.0
    no_object: float = 0.1


def detection(
    *,
    queries: int = 100,
    query_place: str = 'decoder',
    decoder_width: int | None = None,
    decoder_depth: int = 6,
    decoder_heads: int | None = None,
    class_layers: int = 1,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    no_object_weight: float = 0.1,
) -> Task:
    """Learns to find objects: their classes and boxes.

    Args:
      queries: how many objects can be found in a picture.
      query_place: in a 'decoder' that attends to the tokens of the trunk (DETR), or in the 'trunk'
        as tokens of its sequence (YOLOS).
      decoder_width, decoder_depth, decoder_heads: size of the decoder; width and heads by default
        those of the trunk. Its MLPs are as much wider as the trunk's.
      class_layers: dense layers of the head of classes.
      l1_weight, giou_weight, no_object_weight: see `Weights`.
    """
    weights = Weights(l1_weight, giou_weight, no_object_weight)

    def model(trunk: ViT, example: ExampleShape) -> Detector:
        config = None
        if query_place == 'decoder':
            config = _decoder(trunk, decoder_width, decoder_depth, decoder_heads)
        _check(trunk, example, queries, query_place)
        return Detector(trunk, config, queries, example.num_classes, class_layers)

    return Task(
        name='detection',
        model=model,
        loss=lambda model, run: detection_loss(model, run, weights),
        headline='found',
        provides=frozenset({'boxes', 'features'}),
        additions=('decoder', 'detection_tokens', 'class_head', 'box_head'),
        trunk=lambda model: model.trunk,
        least_classes=1,
        reads=('boxes', 'box_label'),
        targets=lambda model, run: objects_of_batch(),
        detect=detect,
    )


def _decoder(trunk: ViT, width: int | None, depth: int, heads: int | None) -> EncoderConfig:
    """The decoder of a trunk, with blocks like the trunk's."""
    own = trunk.encoder
    width, heads = width or own.width, heads or own.num_heads
    if width % heads or width % 4:
        raise UserError(
            f'config: task.decoder_width={width} must be divisible by 4 and by '
            f'task.decoder_heads={heads}'
        )
    return EncoderConfig(
        width=width,
        depth=depth,
        mlp_dim=round(own.mlp_dim * width / own.width),
        num_heads=heads,
        style=own.style,
        post_norm=own.post_norm,
        layer_scale=own.layer_scale,
        scan=own.scan,
        remat=own.remat,
        constrain=own.constrain,
    )


def _check(trunk: ViT, example: ExampleShape, queries: int, place: str) -> None:
    """Refuses what objects cannot be found with."""
    stream = trunk.single
    if stream is None or stream.reads != 'image':
        raise UserError(
            "config: task.name='detection' finds objects in images: set a model.tokenizer of "
            'images, without streams'
        )
    if stream.posemb == 'relative' and place == 'trunk':
        raise UserError(
            "config: model.posemb='relative' has no positions for queries: set "
            "task.query_place='decoder'"
        )
    if place == 'trunk':
        need_fixed_rotations(stream, "task.query_place='decoder'")
    need_simple_pool(trunk, 'detection')
    need_all_patches(trunk, 'detection')
    most = example.inputs.get('boxes', (0,))[0]
    if most > queries:
        raise UserError(
            f'config: data.transform gives up to {most} boxes of a picture, but task.queries='
            f'{queries} can find no more than {queries}: raise it, or lower boxes({most})'
        )


def _inputs(batch: Batch) -> dict[str, Array]:
    """What a detector reads of a batch."""
    given: Batch = {name: batch[name] for name in ('image', 'picture_size') if name in batch}
    return {**given, 'image': normalise(given['image'])}


def objects_of_batch() -> Targets:
    """How many objects the whole batch has, which all its losses are divided by."""

    def rows(state: Tree, batch: Batch, key: Array, step: Array) -> dict[str, Array]:
        return {'objects': (batch['box_label'] >= 0).sum(1)}

    def shared(state: Tree, rows: dict[str, Array], step: Array) -> Tree:
        return {'objects': rows['objects'].sum()}

    return Targets(rows, shared)


def detection_loss(model: Detector, run: Run, weights: Weights) -> Loss:
    """The sum of `set_loss` over all blocks of the decoder, each with a matching of its own.

    Its metrics are those of the last block.
    """

    def loss(
        params: Tree, state: Tree, batch: Batch, rng: Array | None, step: Array | int
    ) -> tuple[Array, Aux]:
        rngs: Any = {} if rng is None else {'dropout': rng}
        predicted: Any = model.apply(
            {'params': params}, _inputs(batch), train=rng is not None, rngs=rngs
        )
        label, boxes = batch['box_label'], batch['boxes'].astype(jnp.float32)
        # A microbatch counts as the part of the whole batch that it is.
        parts, objects = 1.0, (label >= 0).sum()
        if 'targets' in state:
            parts, objects = run.batch_size / len(label), state['targets']['objects']
        examples = round(len(label) * parts)
        given = label, boxes, objects, examples, weights, model.by_device
        values = jax.vmap(lambda one: set_loss(one, *given))(predicted)
        values = {name: parts * value for name, value in values.items()}
        total = values['class'] + weights.l1 * values['l1'] + weights.giou * values['giou']
        return total.sum(), Aux({name: value[-1] for name, value in values.items()})

    return loss


def set_loss(
    predicted: Predictions,
    label: Int[Array, 'batch objects'],
    boxes: Float[Array, 'batch objects 4'],
    objects: Int[Array, ''],
    examples: int,
    weights: Weights,
    by_device: Callable[..., Any] = identity,
) -> dict[str, Float[Array, '']]:
    """The losses of one block, as parts of those of a whole batch.

    The cross-entropy is a mean over queries, of which those without object count less. Distances
    of boxes, and 1 less overlaps, are summed over objects and divided by how many there are.

    Args:
      label: -1 where there is no object.
      objects, examples: how many of them the whole batch has.
      by_device: see `matching.assign`.

    Returns:
      Losses 'class', 'l1' and 'giou'; 'found', the share of objects whose query has their class;
      'unusable', how many costs of the matching were not finite.
    """
    logits, nothing, real = predicted.logits, predicted.logits.shape[-1] - 1, label >= 0
    queries = logits.shape[1]
    cost = matching.costs(logits, predicted.boxes, label, boxes, weights.l1, weights.giou)
    query, unusable = matching.assign(cost, real, by_device)
    wanted = jnp.full(logits.shape[:2], nothing)
    wanted = wanted.at[jnp.arange(len(label))[:, None], query].set(jnp.where(real, label, nothing))
    weight = jnp.where(wanted == nothing, weights.no_object, 1.0)
    surprise = -jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[..., None], axis=-1)[..., 0]
    matched = chosen(predicted.boxes, query)
    right = jnp.take_along_axis(logits[..., :-1].argmax(-1), query, axis=1) == label
    count = jnp.maximum(objects, 1).astype(jnp.float32)

    def of_objects(values: Array) -> Float[Array, '']:
        return jnp.where(real, values, 0).sum() / count

    weight_of_all = objects + weights.no_object * (examples * queries - objects)
    return {
        'class': (weight * surprise).sum() / weight_of_all,
        'l1': of_objects(jnp.abs(matched - boxes).sum(-1)),
        'giou': of_objects(1 - generalised_iou(matched, boxes)),
        'found': of_objects(right),
        'unusable': unusable.astype(jnp.float32),
    }


def detect(model: Detector) -> Callable[[Tree, Batch], Detections]:
    """`Task.detect`: of each query its most probable class, with neither threshold nor NMS."""

    def detections(params: Tree, batch: Batch) -> Detections:
        predicted: Any = model.apply({'params': params}, _inputs(batch))
        probabilities = jax.nn.softmax(predicted.logits[-1])[..., :-1]
        return Detections(
            probabilities.max(-1),
            probabilities.argmax(-1).astype(jnp.int32),
            predicted.boxes[-1],
        )

    return detections
