"""What a trained model computes, as plain functions of its parameters and inputs.

They compute in float32 on one device, whatever the run did, and nothing in them is random.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from big_vit import checkpoint, sharding, state, trees
from big_vit.build.data import train_data
from big_vit.build.model import build_scored_model, build_streams
from big_vit.build.task import build_task
from big_vit.config import Config
from big_vit.errors import UserError
from big_vit.inspection.loaded_model import LoadedModel
from big_vit.models.encoder import merge_lora, unstack_blocks
from big_vit.models.placement import unplaced
from big_vit.models.tokenizers import PICTURES, Stream
from big_vit.models.two_towers import MOST_SCALE, TwoTowers
from big_vit.models.vit import make_vit
from big_vit.pretrained.load import task_parameters
from big_vit.tasks.batch import TARGETS

# By name: the shape without the batch, and the type.
Inputs = dict[str, tuple[tuple[int, ...], np.dtype]]


class Function(NamedTuple):
    """A function of arrays by name to arrays by name, each with the batch first.

    Attributes:
      name: 'model', or that of a tower.
      apply: of (parameters by path, inputs).
      params: by path.
      inputs: pictures are [height, width, channels], normalised.
      outputs: names of the results.
    """

    name: str
    apply: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Array]]
    params: dict[str, np.ndarray]
    inputs: Inputs
    outputs: tuple[str, ...]


def functions_of(loaded: LoadedModel, unrolled: bool) -> list[Function]:
    """Return what a model computes: logits and features, or the embedding of each tower.

    Args:
      unrolled: write out scanned blocks one by one.

    Raises:
      UserError: the shape of an input is only known from data that are not here, or parameters are
        not finite.
    """
    model, params, inputs = _parts(loaded, unrolled)
    if isinstance(model, TwoTowers):
        return [_tower(model, stream, params, inputs) for stream in model.streams]
    outputs = ('logits', 'features') if 'head/kernel' in params else ('features',)

    def apply(params: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Array]:
        given = {'params': trees.unflatten(dict(params))}
        logits, extra = model.apply(given, dict(inputs))
        features = extra['pre_logits']
        features = features.reshape(features.shape[0], math.prod(features.shape[1:]))
        results = {'logits': logits, 'features': features}
        return {name: results[name] for name in outputs}

    return [Function('model', apply, params, inputs, outputs)]


def _tower(
    model: TwoTowers, stream: Stream, params: dict[str, np.ndarray], inputs: Inputs
) -> Function:
    parts = {stream.reads} | ({'text_mask'} if stream.tokenizer == 'words' else set())
    other = next(s for s in model.streams if s is not stream)
    left = {other.name, f'shared_{other.name}'}

    def apply(params: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Array]:
        given = {'params': trees.unflatten(dict(params))}
        return {'embedding': model.apply(given, dict(inputs))[1][stream.name]}  # type: ignore[index]

    own = {name: x for name, x in params.items() if name.partition('/')[0] not in left}
    given = {name: spec for name, spec in inputs.items() if name in parts}
    return Function(stream.name, apply, own, given, ('embedding',))


def _parts(loaded: LoadedModel, unrolled: bool) -> tuple[Any, dict[str, np.ndarray], Inputs]:
    """Return the module, its parameters by path, and its inputs."""
    params = loaded.params
    if loaded.config is None:
        assert loaded.foreign_weights is not None
        settings = {**loaded.foreign_weights.settings, 'attention': 'fused'}
        model: Any = make_vit(**{**settings, 'dtype': jnp.float32, 'scan': False})
        inputs: Inputs = {'image': ((*loaded.image_size, loaded.channels), np.dtype(np.float32))}
    else:
        config = loaded.config.without('model.lora').replacing(
            {
                'model.dtype': 'float32',
                'model.attention': 'fused',
                'model.remat': 'none',
                **({'model.scan': False} if unrolled else {}),
            }
        )
        params = merge_lora(params)
        params = unstack_blocks(params) if unrolled else params
        inputs = {
            name: (shape, np.dtype(np.float32) if name in PICTURES else dtype)
            for name, (shape, dtype) in _inputs(loaded, config).items()
        }
        flat = trees.flatten(params)
        classes = flat['head/kernel'].shape[-1] if 'head/kernel' in flat else 0
        mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
        task = build_task(config.task)
        shapes = {name: shape for name, (shape, _) in inputs.items()}
        scored = build_scored_model(config, classes, shapes, mesh)
        params, _ = task_parameters(params, task)
        checkpoint.check_params(params, state.abstract_params(scored, inputs), loaded.path)
        model = unplaced(scored)
    flat = {name: np.asarray(x, np.float32) for name, x in trees.flatten(params).items()}
    for name, x in flat.items():
        if not np.isfinite(x).all():
            raise UserError(
                f'{loaded.path}: has NaN or infinite numbers in {name}: its run had diverged; name '
                'an earlier checkpoint'
            )
    return model, flat, inputs


def _inputs(loaded: LoadedModel, config: Config) -> Inputs:
    """Return the inputs of a run's model; those that no parameter tells, from its data."""
    found: Inputs = {}
    for stream in build_streams(config):
        params = loaded.params[stream.name] if stream.name else loaded.params
        if stream.reads == 'image':
            shape = (*loaded.image_size, replace(loaded, params=params).channels)
            found['image'] = (shape, np.dtype(np.uint8))
        elif stream.tokenizer == 'words' and 'pos_embedding' in params:
            length = params['pos_embedding'].shape[1] - stream.posemb_prefix
            found[stream.reads] = ((length,), np.dtype(np.int32))
            found['text_mask'] = ((length,), np.dtype(np.uint8))
        elif stream.tokenizer == 'ragged':
            found |= _cut(loaded)
        else:
            parts = train_data(config, to_train=False).example_spec.parts
            return {n: spec for n, spec in parts.items() if n not in TARGETS}
    return found


def _cut(loaded: LoadedModel) -> Inputs:
    """Return what the evaluation's transform makes of a picture."""
    prepared = loaded.preparation()
    shape = (1, *loaded.image_size, loaded.channels)
    columns = {'image': np.zeros(shape, np.uint8), 'label': np.zeros(1, np.int32)}
    parts = prepared(columns, np.zeros(1, np.uint64))
    return {n: (x.shape[1:], x.dtype) for n, x in parts.items() if n not in TARGETS}


def pair_logits(loaded: LoadedModel) -> dict[str, float]:
    """Return by what factor cosines of two towers become logits, and what is added; or nothing."""
    params = trees.flatten(loaded.params)
    if 'logit_scale' not in params:
        return {}
    scale = math.exp(float(params['logit_scale']))
    if 'logit_bias' not in params:
        return {'logit_scale': min(scale, MOST_SCALE)}
    return {'logit_scale': scale, 'logit_bias': float(params['logit_bias'])}
