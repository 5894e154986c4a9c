"""The frozen features of a split: each example once, in its order, on every host."""

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int

from big_vit import sharding
from big_vit.errors import UserError
from big_vit.models import heads, layers, vit
from big_vit.state import State, shardings
from big_vit.tasks.batch import Batch, model_inputs

# Products of features decide ties and ranks, so accelerators must not round them to bfloat16.
PRECISION = jax.lax.Precision.HIGHEST

# A function of (params, inputs) that gives a vector for each example.
Embed = Callable[[Any, Any], Float[Array, 'batch width']]
LABEL = operator.itemgetter('label')


class Features(NamedTuple):
    """What a frozen model makes of a split, and what is known of its examples."""

    values: Float32[np.ndarray, 'examples width']
    labels: Int[np.ndarray, ' examples']


def block_numbers(blocks: tuple[int, ...], depth: int, key: str) -> tuple[int, ...]:
    """The numbers counted from the first block.

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
    """The class token, where the model has one and reads from it."""
    return 'cls' if model.class_token or model.pool in vit.OF_CLASS_TOKEN else 'gap'


def of_blocks(model: vit.ViT, blocks: tuple[int, ...], pool: str) -> Embed:
    """A function of (params, inputs): tokens after some blocks, pooled, one after the other.

    The last norm of the model is applied to the tokens of each block, as DINOv2 does.

    Args:
      blocks: from 0, as `block_numbers` gives them.
      pool: 'gap' (mean of the tokens but class token and registers), 'cls', or 'cls_gap'.
    """
    last = layers.norm(model.style(), 'encoder_norm')

    def embed(params: Any, given: Any) -> Float[Array, 'batch width']:
        _, extra = model.apply({'params': params}, given, capture=('blocks',))
        found = []
        for number in blocks:
            tokens = extra['blocks'][number]
            if not model.norm_after_pool:
                tokens = last.apply({'params': params['Transformer']['encoder_norm']}, tokens)
            tokens = tokens.astype(jnp.float32)
            if 'cls' in pool:
                found.append(tokens[:, 0])
            if 'gap' in pool:
                found.append(heads.mean_pool(tokens[:, model.prefix() :], None))
        return jnp.concatenate(found, axis=-1)

    return embed


def before_head(model: vit.ViT) -> Embed:
    """A function of (params, inputs): the pooled vector; of two tokens, one after the other."""

    def embed(params: Any, given: Any) -> Float[Array, 'batch width']:
        _, extra = model.apply({'params': params}, given)
        return extra['pre_logits'].reshape(extra['pre_logits'].shape[0], -1)

    return embed


def of_streams(model: vit.ViT, names: tuple[str, ...]) -> Embed:
    """A function of (params, inputs): vectors of streams apart, one after the other."""

    def embed(params: Any, given: Any) -> Float[Array, 'batch width']:
        _, extra = model.apply({'params': params}, given)
        return jnp.concatenate([extra[name] for name in names], axis=-1)

    return embed


def make_step(
    embed: Embed,
    prepare: Callable[[Batch], Batch],
    abstract_state: State,
    mesh: Mesh,
    label: Callable[[Batch], Array] = LABEL,
) -> Callable[[Any, Batch], dict[str, Array]]:
    """The jitted step (params, batch) -> {'values', 'label', 'mask'}, whole on every device.

    Args:
      label: what is known of each example, [batch] or [batch, numbers].
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
    """The features of all real examples, in the order of the split, on every host.

    Args:
      step: from `make_step`.
      batches: padded ones, with 'mask'; on several hosts each has its own rows.
      key: of the config, for messages.

    Raises:
      UserError: a feature is not finite, or there is no example.
    """
    waiting: list[dict[str, Array]] = []
    parts: list[dict[str, np.ndarray]] = []

    def fetch(found: dict[str, Array]) -> None:
        rows = jax.device_get(found)
        real = rows['mask'] > 0
        parts.append({name: rows[name][real] for name in ('values', 'label')})

    for batch in batches:
        waiting.append(step(params, batch))
        if len(waiting) > 2:
            fetch(waiting.pop(0))
    for found in waiting:
        fetch(found)
    if not parts or not sum(len(part['label']) for part in parts):
        raise UserError(f'config: {key}: the split has no example')
    values = np.concatenate([part['values'] for part in parts])
    if not np.isfinite(values).all():
        raise UserError(f'config: {key}: the model makes features that are not finite')
    return Features(values, np.concatenate([part['label'] for part in parts]))
