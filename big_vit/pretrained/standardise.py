"""Frozen features with mean 0 and deviation 1 before a head: what a BatchNorm there would estimate.

Features of a frozen trunk do not change, so their statistics are measured once and folded into the
scale and bias of the trunk's last norm. The model stays a plain one, in training as in evaluation.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float32

from big_vit import sharding, state, steps, trees
from big_vit.build.data import device_operations
from big_vit.build.experiment import Experiment, train_batches
from big_vit.config import Config
from big_vit.errors import UserError
from big_vit.evaluators import features
from big_vit.models.vit import ViT
from big_vit.optim import factory
from big_vit.pretrained.load import initial_params
from big_vit.tasks.batch import model_inputs

# Examples that are looked at, rounded up to whole batches: statistics are off by 0.8 % of a
# deviation, as those of a batch of a linear probe are in each step.
EXAMPLES = 16_384
# Added to variances, as in the linear probes of MoCo v3 and MAE.
EPSILON = 1e-6


def start_params(config: Config, keep_head: bool) -> Callable[[Experiment], dict[str, Any]] | None:
    """What gives the parameters that a run of the config starts from; None for random ones.

    Args:
      keep_head: as for `initial_params`.
    """
    load = initial_params(config, keep_head=keep_head) if config.init else None
    return standardised(config, load) if config.init_standardise else load


def standardised(
    config: Config, make: Callable[[Experiment], dict[str, Any]] | None
) -> Callable[[Experiment], dict[str, Any]]:
    """What gives parameters whose features are standardised, once the experiment is known.

    Args:
      make: gives the parameters to start from; None for random ones.
    """

    def load(parts: Experiment) -> dict[str, Any]:
        trunk = parts.task.trunk(parts.model)
        prefix = _last_norm(trunk, parts)
        params = make(parts) if make is not None else _random(config, parts)
        values = _features(config, parts, trunk, params)
        mean, deviation = values.mean(0, np.float64), np.sqrt(values.var(0, np.float64) + EPSILON)
        flat = trees.flatten(params)
        scale, bias = (np.asarray(flat[prefix + name], np.float64) for name in ('scale', 'bias'))
        flat[prefix + 'scale'] = (scale / deviation).astype(np.float32)
        flat[prefix + 'bias'] = ((bias - mean) / deviation).astype(np.float32)
        print(f'init    features standardised by {len(values):,} training examples')
        return trees.unflatten(flat)

    return load


def _last_norm(trunk: Any, parts: Experiment) -> str:
    """The path of the norm whose scale and bias act on each feature by itself.

    Raises:
      UserError: there is none, or features are not frozen.
    """
    key = 'config: init_standardise'
    frozen = factory.frozen(parts.lr_factors)
    moving = [n for n in parts.lr_factors if n not in frozen and not parts.task.is_addition(n)]
    if moving:
        raise UserError(
            f'{key} is for frozen features, and {moving[0]} is trained: set transfer.train=head'
        )
    fits = isinstance(trunk, ViT) and trunk.head.pool in ('cls', 'gap')
    if not fits or trunk.encoder.style.norm != 'layernorm' or trunk.head.representation:
        raise UserError(
            f"{key} scales a layer norm before a pool of 'cls' or 'gap', which this model has not"
        )
    return 'encoder_norm/' if trunk.head.norm_after_pool else 'Transformer/encoder_norm/'


def _random(config: Config, parts: Experiment) -> dict[str, Any]:
    names = list(trees.flatten(parts.abstract_state['params']))
    return trees.unflatten(state.initial_leaves(parts.model, parts.data.inputs, config.seed, names))


def _features(
    config: Config, parts: Experiment, trunk: ViT, params: dict[str, Any]
) -> Float32[np.ndarray, 'examples width']:
    """Those of the first examples of training, as training shows them, on every host."""
    embed, prepare = features.before_head(trunk), device_operations(parts.data)
    placed = jax.device_put(params, state.shardings(parts.abstract_state)['params'])

    @functools.partial(jax.jit, out_shardings=sharding.replicated(parts.mesh))
    def step(params: Any, batch: dict[str, Array], number: Array) -> Array:
        batch = steps.seen(batch, config.seed, number, prepare, None)
        return embed(params, model_inputs({name: batch[name] for name in parts.data.reads}))

    found: list[np.ndarray] = []
    with train_batches(config, parts, 0) as batches:
        for number, batch in enumerate(batches):
            found.append(np.asarray(step(placed, batch, np.int32(number))))
            if len(found) * config.batch_size >= min(EXAMPLES, parts.data.source.length):
                break
    return np.concatenate(found)
