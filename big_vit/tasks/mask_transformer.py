"""Segmentation by an encoder alone (EoMT, arXiv 2503.19108): queries among the tokens of a trunk.

Queries join the patches before the last blocks. Of each, a class and a mask are predicted, and a
picture's classes are matched to queries as in Mask2Former (arXiv 2112.01527). In training a query
attends, before each of these blocks, to the patches of its mask so far, less and less often, so
that at last, and in evaluation, blocks are those of a plain trunk.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from big_vit.models import layers
from big_vit.models.encoder import identity
from big_vit.models.layers import AttentionContext, Dense
from big_vit.models.tokenizers import grid_of, padded_rotation
from big_vit.models.vit import ViT
from big_vit.tasks import matching
from big_vit.tasks.batch import Batch, model_inputs
from big_vit.tasks.task import Aux, Loss, Run, Segment, Targets, Tree

IGNORED = 255
# Factors of the losses, and of their costs in the matching; what a query without class counts.
CLASS, MASK, DICE, NO_CLASS = 2.0, 5.0, 5.0, 0.1
# Of random points so many times as many are drawn as are wanted, and this share is taken where the
# mask is least certain.
OVERSAMPLED, UNCERTAIN = 3, 0.75
# How fast masked attention ends: its share is (1 - progress) to this power.
ANNEALING = 0.9


class Predictions(NamedTuple):
    """What queries stand for, before each of the last blocks and after them.

    Attributes:
      classes: logits, of no class last.
      masks: logits of pixels, at a quarter of the resolution for patches of 16.
    """

    classes: Float[Array, 'layers batch queries logits']
    masks: Float[Array, 'layers batch queries rows columns']


class MaskHead(nn.Module):
    """The queries, and classes and masks of encoded ones."""

    style: layers.Style
    width: int
    num_classes: int
    queries: int
    upscales: int

    def setup(self) -> None:
        start = nn.initializers.normal(1.0)
        self.query = self.param('query', start, (1, self.queries, self.width))
        dense: Any = lambda *shape, **more: Dense(  # noqa: E731
            shape, dtype=jnp.float32, gather=self.style.gather, **more
        )
        self.classifier = dense(self.num_classes + 1)
        self.mask_layers = [dense(self.width) for _ in range(3)]
        self.expansions = [dense(2, 2, self.width, use_bias=False) for _ in range(self.upscales)]
        self.biases = [
            self.param(f'expansion_bias_{i}', nn.initializers.zeros, (self.width,))
            for i in range(self.upscales)
        ]
        self.smoothers = [
            nn.Conv(self.width, (3, 3), feature_group_count=self.width, use_bias=False)
            for _ in range(self.upscales)
        ]
        self.norms = [layers.LayerNorm() for _ in range(self.upscales)]

    def __call__(
        self, x: Float[Array, 'batch tokens width'], prefix: int, grid: tuple[int, int]
    ) -> tuple[Float[Array, 'batch queries logits'], Float[Array, 'batch queries rows columns']]:
        """Logits of the classes and of the masks of normalised tokens.

        Args:
          x: queries, then `prefix` other tokens, then those of a grid of patches.
        """
        activation = layers.ACTIVATIONS[self.style.activation]
        x = x.astype(jnp.float32)
        queries, patches = x[:, : self.queries], x[:, self.queries + prefix :]
        classes, masks = self.classifier(queries), queries
        for number, layer in enumerate(self.mask_layers):
            masks = layer(activation(masks) if number else masks)
        image = patches.reshape(len(x), *grid, self.width)
        steps = zip(self.expansions, self.biases, self.smoothers, self.norms, strict=True)
        for expand, bias, smooth, norm in steps:
            batch, rows, columns = image.shape[:3]
            wide = expand(image).transpose(0, 1, 3, 2, 4, 5)
            image = wide.reshape(batch, 2 * rows, 2 * columns, self.width)
            image = norm(smooth(activation(image + jnp.asarray(bias).reshape(1, 1, 1, -1))))
        return classes, jnp.einsum('bqc,bhwc->bqhw', masks, image)


class MaskSegmenter(nn.Module):
    """A trunk, whose parameters stay at the root, and queries and heads in `decode_head`.

    Attributes:
      query_blocks: how many last blocks see the queries.
      by_device: see `matching.assign`; a mesh replaces it.
    """

    trunk: ViT
    num_classes: int
    queries: int
    query_blocks: int
    by_device: Callable[..., Any] = identity

    def sequence_length(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Tokens of the last blocks, for inputs of these shapes without the batch."""
        return self.trunk.sequence_length(shapes) + self.queries

    def setup(self) -> None:
        nn.share_scope(self, self.trunk)
        stream, encoder = self.trunk.single, self.trunk.encoder
        assert stream is not None
        upscales = max(1, int(math.log2(min(stream.patch_size))) - 2)
        self.decode_head = MaskHead(
            encoder.style, encoder.width, self.num_classes, self.queries, upscales
        )

    def __call__(
        self,
        inputs: Float[Array, 'batch height width channels'] | dict[str, Array],
        *,
        train: bool = False,
        masking: Float[Array, ' blocks'] | None = None,
    ) -> Predictions:
        """Classes and masks of the queries.

        Args:
          masking: for each of the last blocks, of which share of the queries attention is masked,
            drawn from the random stream 'mask', without which it is masked for all; None masks
            nothing, and gives the last predictions alone.
        """
        trunk, head, found = self.trunk, self.decode_head, list[tuple[Array, Array]]()
        stream, prefix = trunk.single, trunk.prefix_tokens
        assert stream is not None
        image = inputs[stream.reads] if isinstance(inputs, dict) else inputs
        rows, columns = grid_of(stream, image.shape[1:])
        first = trunk.encoder.depth - self.query_blocks

        def between(
            block: int, x: Array, context: AttentionContext, norm: Callable[[Array], Array]
        ) -> tuple[Array, AttentionContext]:
            if block < first:
                return x, context
            if block == first:
                x, context = self._joined(x, context)
            if masking is None:
                return x, context
            found.append(head(norm(x), prefix, (rows, columns)))
            mask = self._visible(found[-1][1], prefix, (rows, columns), masking[block - first])
            return x, context._replace(mask=mask)

        tokens, context = trunk.embed(image, train=train)
        x, _ = trunk.encode(tokens, context, train=train, between=between)
        found.append(head(x, prefix, (rows, columns)))
        classes, masks = zip(*found, strict=True)
        return Predictions(jnp.stack(classes), jnp.stack(masks))

    def _joined(self, x: Array, context: AttentionContext) -> tuple[Array, AttentionContext]:
        """Tokens with the queries, which have no place, in front."""
        query = jnp.asarray(self.decode_head.query).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(query, (len(x), *query.shape[1:])), x], axis=1)
        count, rotation, places = self.queries, context.rotation, context.positions
        if rotation is not None:
            rotation = padded_rotation(rotation, count, 0, self.trunk.encoder.head_dim)
        if places is not None:
            places = jnp.pad(places, ((0, 0), (count, 0), (0, 0)))
        return x, context._replace(rotation=rotation, positions=places)

    def _visible(
        self,
        masks: Float[Array, 'batch queries height width'],
        prefix: int,
        grid: tuple[int, int],
        share: Array,
    ) -> Bool[Array, 'batch 1 tokens tokens']:
        """Which tokens see which: all see all, but queries only the patches of their masks."""
        batch, queries = masks.shape[:2]
        size = (batch, queries, *grid)
        inside = jax.image.resize(masks, size, 'bilinear', antialias=False) > 0
        seen = inside.reshape(batch, queries, -1)
        if self.has_rng('mask'):
            draws = jax.random.uniform(self.make_rng('mask'), (batch, queries, 1))
            seen = seen | (draws > share)
        others, patches = queries + prefix, seen.shape[2]
        seen = jnp.pad(seen, ((0, 0), (0, 0), (others, 0)), constant_values=True)
        rest = ((0, 0), (0, prefix + patches), (0, 0))
        return jnp.pad(seen, rest, constant_values=True)[:, None]


def masking_shares(blocks: int, progress: Array | float) -> Float[Array, ' blocks']:
    """Return which share of the queries attends by its mask before each block, in training.

    It falls from 1 to 0 block after block, each in its own part of the run.

    Args:
      progress: of the run, from 0 to 1.
    """
    own = progress * (blocks + 2) - jnp.arange(1, blocks + 1)
    return (1 - jnp.clip(own, 0, 1)) ** ANNEALING


# Points, as shares (x, y) of a picture.


def neighbours(
    points: Float[Array, 'points 2'], size: tuple[int, int]
) -> tuple[Int[Array, 'points 4'], Int[Array, 'points 4'], Float[Array, 'points 4']]:
    """Return rows, columns and weights of the pixels that a point is interpolated from.

    What lies beyond the picture has the weight 0, as in torch's `grid_sample` with zeros.
    """
    place = points * jnp.array([size[::-1]]) - 0.5
    low = jnp.floor(place)
    part = place - low
    columns, rows, weights = [], [], []
    for down in (0, 1):
        for along in (0, 1):
            x, y = low[:, 0] + along, low[:, 1] + down
            weight = (part[:, 0] if along else 1 - part[:, 0]) * (
                part[:, 1] if down else 1 - part[:, 1]
            )
            real = (x >= 0) & (x < size[1]) & (y >= 0) & (y < size[0])
            columns.append(jnp.clip(x, 0, size[1] - 1))
            rows.append(jnp.clip(y, 0, size[0] - 1))
            weights.append(jnp.where(real, weight, 0))
    stack = lambda parts: jnp.stack(parts, axis=1)  # noqa: E731
    return stack(rows).astype(jnp.int32), stack(columns).astype(jnp.int32), stack(weights)


def at_points(
    masks: Float[Array, 'masks rows columns'], points: Float[Array, 'points 2']
) -> Float[Array, 'masks points']:
    """Interpolate masks at the same points."""
    rows, columns, weights = neighbours(points, (masks.shape[1], masks.shape[2]))
    return (masks[:, rows, columns] * weights[None]).sum(-1)


def labels_at_points(
    labels: Int[Array, 'height width'],
    classes: Int[Array, ' classes'],
    points: Float[Array, 'points 2'],
) -> Float[Array, 'classes points']:
    """Interpolate the masks that some classes have in a label map."""
    rows, columns, weights = neighbours(points, (labels.shape[0], labels.shape[1]))
    same = labels[rows, columns][None] == classes[:, None, None]
    return (same * weights[None]).sum(-1)


def uncertain_points(
    key: Array, masks: Float[Array, 'masks rows columns'], count: int
) -> Float[Array, 'masks points 2']:
    """Draw points for each mask, most of them where its logits are nearest to 0 (2112.01527)."""
    first, second = jax.random.split(key)
    chosen = int(UNCERTAIN * count)
    points = jax.random.uniform(first, (len(masks), OVERSAMPLED * count, 2))
    values = jax.vmap(lambda mask, own: at_points(mask[None], own)[0])(masks, points)
    _, index = jax.lax.top_k(-jnp.abs(values), chosen)
    taken = jnp.take_along_axis(points, index[..., None], axis=1)
    more = jax.random.uniform(second, (len(masks), count - chosen, 2))
    return jax.lax.stop_gradient(jnp.concatenate([taken, more], axis=1))


# The loss.


def present_classes(
    labels: Int[Array, 'batch height width'], classes: int, most: int
) -> tuple[Int[Array, 'batch most'], Bool[Array, 'batch most']]:
    """Return the classes of each label map, the present ones first, and which are present."""
    batch = len(labels)
    flat = labels.reshape(batch, -1)
    row = jnp.broadcast_to(jnp.arange(batch)[:, None], flat.shape)
    counts = jnp.zeros((batch, classes), jnp.int32).at[row, flat].add(1, mode='drop')
    order = jnp.argsort(counts == 0, axis=1, stable=True)[:, :most].astype(jnp.int32)
    return order, jnp.take_along_axis(counts, order, axis=1) > 0


def costs(
    classes: Float[Array, 'queries logits'],
    masks: Float[Array, 'queries points'],
    label: Int[Array, ' objects'],
    wanted: Float[Array, 'objects points'],
) -> Float[Array, 'objects queries']:
    """Return what each query costs as the answer for each class of a picture."""
    points = masks.shape[1]
    of_class = jax.nn.softmax(classes)[:, label].T
    right = wanted @ jax.nn.softplus(-masks).T + (1 - wanted) @ jax.nn.softplus(masks).T
    inside = jax.nn.sigmoid(masks)
    both = wanted.sum(1)[:, None] + inside.sum(1)[None]
    dice = 1 - (2 * wanted @ inside.T + 1) / (both + 1)
    return MASK * right / points + DICE * dice - CLASS * of_class


class Whole(NamedTuple):
    """Of the whole batch: how many classes its pictures have together, and how many they are."""

    classes: Array
    examples: int


def set_loss(
    classes: Float[Array, 'batch queries logits'],
    masks: Float[Array, 'batch queries rows columns'],
    labels: Int[Array, 'batch height width'],
    points: int,
    key: Array,
    whole: Whole,
    by_device: Callable[..., Any] = identity,
) -> dict[str, Float[Array, '']]:
    """The losses of one block, as parts of those of a whole batch.

    Args:
      labels: pixels that are ignored are in no mask.
      points: at how many masks are compared.
      by_device: see `matching.assign`.

    Returns:
      'class', a weighted mean over queries; 'mask' and 'dice', means over the classes of pictures.
    """
    batch, queries, nothing = *classes.shape[:2], classes.shape[2] - 1
    label, real = present_classes(labels, nothing, min(nothing, queries))
    first, second = jax.random.split(key)
    places = jax.random.uniform(first, (batch, points, 2))

    def cost(classes: Array, masks: Array, labels: Array, label: Array, own: Array) -> Array:
        wanted = labels_at_points(labels, label, own)
        return costs(classes, at_points(masks, own), label, wanted)

    given = jax.vmap(cost)(classes, masks, labels, label, places)
    query, _ = matching.assign(given, real, by_device)
    goal = jnp.full((batch, queries), nothing)
    goal = goal.at[jnp.arange(batch)[:, None], query].set(jnp.where(real, label, nothing))
    weight = jnp.where(goal == nothing, NO_CLASS, 1.0)
    surprise = -jnp.take_along_axis(jax.nn.log_softmax(classes), goal[..., None], axis=-1)[..., 0]

    def differences(
        masks: Array, labels: Array, label: Array, query: Array, key: Array
    ) -> tuple[Array, Array]:
        own = masks[query]
        places = uncertain_points(key, own, points)
        logits = jax.vmap(lambda mask, at: at_points(mask[None], at)[0])(own, places)
        pairs = jax.vmap(lambda one, at: labels_at_points(labels, one[None], at)[0])
        wanted, inside = pairs(label, places), jax.nn.sigmoid(logits)
        error = jax.nn.softplus(logits) - wanted * logits
        dice = 1 - (2 * (inside * wanted).sum(1) + 1) / (inside.sum(1) + wanted.sum(1) + 1)
        return error.mean(1), dice

    keys = jax.random.split(second, batch)
    error, dice = jax.vmap(differences)(masks, labels, label, query, keys)
    count = jnp.maximum(whole.classes, 1).astype(jnp.float32)
    of_all = whole.classes + NO_CLASS * (whole.examples * queries - whole.classes)
    return {
        'class': (weight * surprise).sum() / of_all,
        'mask': jnp.where(real, error, 0).sum() / count,
        'dice': jnp.where(real, dice, 0).sum() / count,
    }


def classes_of_batch(model: MaskSegmenter, run: Run) -> Targets:
    """How many classes the pictures of the whole batch have together."""

    def rows(state: Tree, batch: Batch, key: Array, step: Array) -> dict[str, Array]:
        labels, classes = batch['segmentation'], model.num_classes
        _, real = present_classes(labels, classes, min(classes, model.queries))
        return {'classes': real.sum(1)}

    def shared(state: Tree, rows: dict[str, Array], step: Array) -> Tree:
        return {'classes': rows['classes'].sum()}

    return Targets(rows, shared)


def mask_loss(model: MaskSegmenter, run: Run, points: int) -> Loss:
    """The sum of `set_loss` before each of the last blocks and after them.

    Its metrics are those of the last predictions.
    """

    def loss(
        params: Tree, state: Tree, batch: Batch, rng: Array | None, step: Array | int
    ) -> tuple[Array, Aux]:
        key = jax.random.key(0) if rng is None else rng
        dropout, mask, sampled = jax.random.split(key, 3)
        rngs: Any = {} if rng is None else {'dropout': dropout, 'mask': mask}
        predicted: Any = model.apply(
            {'params': params},
            model_inputs({'image': batch['image']}),
            train=rng is not None,
            rngs=rngs,
            masking=masking_shares(model.query_blocks, step / run.total_steps),
        )
        labels, parts = batch['segmentation'].astype(jnp.int32), 1.0
        most = min(model.num_classes, model.queries)
        classes = present_classes(labels, model.num_classes, most)[1].sum()
        if 'targets' in batch:
            parts, classes = run.batch_size / len(labels), state['targets']['classes']
        whole = Whole(classes, round(len(labels) * parts))

        def of_block(one: tuple[Array, Array, Array]) -> dict[str, Array]:
            return set_loss(one[0], one[1], labels, points, one[2], whole, model.by_device)

        keys = jax.random.split(sampled, len(predicted.classes))
        # One after the other: points of all at once would not fit.
        values = jax.lax.map(jax.checkpoint(of_block), (*predicted, keys))
        values = {name: parts * value for name, value in values.items()}
        total = CLASS * values['class'] + MASK * values['mask'] + DICE * values['dice']
        return total.sum(), Aux({name: value[-1] for name, value in values.items()})

    return loss


def segment(model: Any) -> Segment:
    """`Task.segment`: at each pixel the masks, weighted by the probabilities of their classes."""

    def scores(params: Tree, batch: Batch) -> Float[Array, 'batch rows columns classes']:
        image = batch['image']
        found = model.apply({'params': params}, model_inputs({'image': image}))
        size = (*found.masks.shape[1:3], *image.shape[1:3])
        masks = jax.image.resize(found.masks[-1], size, 'bilinear', antialias=False)
        classes = jax.nn.softmax(found.classes[-1])[..., :-1]
        return jnp.einsum('bqhw,bqk->bhwk', jax.nn.sigmoid(masks), classes)

    return scores
