"""Features of a frozen model: how examples are embedded, and the features of a whole split."""

import operator
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int

from big_vit import sharding
from big_vit.errors import UserError
from big_vit.models import heads, layers, vit
from big_vit.models.two_towers import TwoTowers
from big_vit.state import State, shardings
from big_vit.tasks.batch import Batch, model_inputs

# Products of features decide ties and ranks, so accelerators must not round them to bfloat16.
PRECISION = jax.lax.Precision.HIGHEST

# A function of (params, inputs) that returns a vector for each example.
Embed = Callable[[Any, Any], Float[Array, 'batch width']]
LABEL = operator.itemgetter('label')


class Features(NamedTuple):
    """Features of the examples of a split, in its order, and their labels."""

    values: Float32[np.ndarray, 'examples width']
    labels: Int[np.ndarray, ' examples']


class Embedding(NamedTuple):
    """A way to embed examples.

    Attributes:
      name: what tells embeddings of the same model apart; equal names share features.
      embed: the function.
      label: the label that goes with a feature, [batch] or [batch, numbers], from the batch.
    """

    name: Hashable
    embed: Embed
    label: Callable[[Batch], Array] = LABEL


def choose_embedding(
    model: vit.ViT | TwoTowers, blocks: tuple[int, ...] | None, pool: str | None, key: str
) -> Embedding:
    """Return the embedding by pooled blocks, or by the vector before the head.

    Args:
      blocks: numbers of blocks; None for the vector before the head.
      pool: how to pool their tokens; None for `default_pool`.
      key: of the evaluation in the config, for messages.

    Raises:
      UserError: `blocks` or `pool` do not fit the model.
    """
    if blocks is None:
        if pool is not None:
            raise UserError(f'config: {key}.pool is of {key}.blocks, which is not set')
        return Embedding(None, before_head(model))
    numbers = block_numbers(blocks, model.encoder.depth, f'{key}.blocks')
    chosen = choose_pool(model, pool, f'{key}.pool')
    assert isinstance(model, vit.ViT)  # Others were refused.
    return pooled_blocks(model, numbers, chosen)


def pooled_blocks(model: vit.ViT, blocks: tuple[int, ...], pool: str) -> Embedding:
    """Return the embedding that `of_blocks` computes."""
    return Embedding((blocks, pool), of_blocks(model, blocks, pool))


def choose_pool(model: vit.ViT | TwoTowers, pool: str | None, key: str) -> str:
    """Return how tokens are pooled: as asked, or by `default_pool`.

    Raises:
      UserError: the model does not have such tokens.
    """
    stream = model.streams[0]
    unfit = bool(stream.name) or stream.tokenizer in ('ragged', 'words')
    if isinstance(model, TwoTowers) or unfit:
        raise UserError(
            f'config: {key.rpartition(".")[0]}: blocks are pooled where all tokens are of one '
            f'image, video or sound, not for model.tokenizer={stream.tokenizer!r} or streams'
        )
    default = default_pool(model)
    if pool is not None and 'cls' in pool and default == 'gap':
        raise UserError(f"config: {key}={pool!r}, but the model has no class token: set 'gap'")
    return pool or default


def block_numbers(blocks: tuple[int, ...], depth: int, key: str) -> tuple[int, ...]:
    """Count block numbers from the first block; negative ones count from the last.

    Raises:
      UserError: the model has no such block.
    """
    for number in blocks:
        if not -depth <= number < depth:
            raise UserError(
                f'config: {key}: there is no block {number}: the {depth} blocks of the model have '
                f'the numbers 0 to {depth - 1}, or -{depth} to -1'
            )
    return tuple(number % depth for number in blocks)


def default_pool(model: vit.ViT) -> str:
    """Return 'cls' if the model has a class token or reads from it, else 'gap'."""
    return 'cls' if model.has_class_token else 'gap'


def of_blocks(model: vit.ViT, blocks: tuple[int, ...], pool: str) -> Embed:
    """Make a function of (params, inputs) that pools the tokens of blocks and concatenates them.

    The last norm of the model is applied to the tokens of each block, as DINOv2 does.

    Args:
      blocks: numbers from 0, as `block_numbers` returns them.
      pool: 'gap' (the mean of all tokens except class token and registers), 'cls', or 'cls_gap'.
    """
    last = layers.norm(model.encoder.style, 'encoder_norm')

    def embed(params: Any, given: Any) -> Float[Array, 'batch width']:
        _, extra = model.apply({'params': params}, given, capture=('blocks',))
        pooled = []
        for number in blocks:
            tokens = extra['blocks'][number]
            if not model.head.norm_after_pool:
                tokens = last.apply({'params': params['Transformer']['encoder_norm']}, tokens)
            tokens = tokens.astype(jnp.float32)
            if 'cls' in pool:
                pooled.append(tokens[:, 0])
            if 'gap' in pool:
                pooled.append(heads.mean_pool(tokens[:, model.prefix_tokens :], None))
        return jnp.concatenate(pooled, axis=-1)

    return embed


def before_head(model: vit.ViT | TwoTowers) -> Embed:
    """Make a function of (params, inputs) that returns the pooled vector before the head."""

    def embed(params: Any, given: Any) -> Float[Array, 'batch width']:
        _, extra = model.apply({'params': params}, given)
        return extra['pre_logits'].reshape(extra['pre_logits'].shape[0], -1)

    return embed


def stream_vectors(
    model: TwoTowers, names: tuple[str, ...], label: Callable[[Batch], Array] = LABEL
) -> Embedding:
    """Return the embedding of streams that stay apart, their vectors concatenated."""

    def embed(params: Any, given: Any) -> Float[Array, 'batch width']:
        _, extra = model.apply({'params': params}, given)
        return jnp.concatenate([extra[name] for name in names], axis=-1)

    return Embedding(names, embed, label)


def make_step(
    embed: Embed,
    prepare: Callable[[Batch], Batch],
    abstract_state: State,
    mesh: Mesh,
    label: Callable[[Batch], Array] = LABEL,
) -> Callable[[Any, Batch], dict[str, Array]]:
    """Jit the step (params, batch) -> {'values', 'label', 'mask'}, replicated on all devices.

    Args:
      label: as in `Embedding`.
    """

    def step(params: Any, batch: Batch) -> dict[str, Array]:
        values = embed(params, model_inputs(prepare(batch)))
        return {
            'values': values.astype(jnp.float32),
            'label': label(batch),
            'mask': batch['mask'],
        }

    return jax.jit(
        step,
        in_shardings=(shardings(abstract_state)['params'], sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
    )


def gather(
    step: Callable[[Any, Batch], dict[str, Array]], params: Any, batches: Iterable[Batch], key: str
) -> Features:
    """Compute the features of all real examples, in the order of the split, on every host.

    Args:
      step: from `make_step`.
      batches: padded ones, with 'mask'; global arrays if there are several hosts.
      key: of the config, for messages.

    Raises:
      UserError: a feature is not finite, or there is no example.
    """
    waiting: list[dict[str, Array]] = []
    parts: list[dict[str, np.ndarray]] = []

    def fetch(outputs: dict[str, Array]) -> None:
        rows = jax.device_get(outputs)
        real = rows['mask'] > 0
        parts.append({name: rows[name][real] for name in ('values', 'label')})

    for batch in batches:
        waiting.append(step(params, batch))
        if len(waiting) > 2:
            fetch(waiting.pop(0))
    for outputs in waiting:
        fetch(outputs)
    if not parts or not sum(len(part['label']) for part in parts):
        raise UserError(f'config: {key}: the split has no example')
    values = np.concatenate([part['values'] for part in parts])
    if not np.isfinite(values).all():
        raise UserError(f'config: {key}: the model makes features that are not finite')
    return Features(values, np.concatenate([part['label'] for part in parts]))
