"""From the evaluations of a config to functions of the parameters."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from big_vit.build.data import (
    Data,
    completed_section,
    eval_device_operations,
    subset_of,
    text_data,
)
from big_vit.build.experiment import Experiment, all_batches, eval_batches
from big_vit.build.model import words_of
from big_vit.build.steps import build_eval_steps
from big_vit.config import Config
from big_vit.config.schema_evals import EVALUATORS
from big_vit.data import dataset
from big_vit.errors import UserError
from big_vit.evaluators import (
    classification,
    features,
    fewshot,
    heldout,
    knn,
    linear_grid,
    linear_probe,
    matching,
    retrieval,
    robustness,
    zero_shot,
)
from big_vit.evaluators.features import Features
from big_vit.models import vit
from big_vit.tasks.contrastive import row_hashes

# Features that evaluations of the same parameters share, by what they are of.
SharedFeatures = dict[Any, Features]
Evaluator = Callable[[Any, SharedFeatures], dict[str, float]]

# Functions of two splits' features; their arguments by keyword are keys of the config.
_OF_FEATURES: dict[str, Callable[..., dict[str, float]]] = {
    'fewshot': fewshot.scores,
    'knn': knn.scores,
    'linear_probe': linear_probe.scores,
    'linear_grid': linear_grid.scores,
    'retrieval': retrieval.scores,
}
# Arguments that are the run's, not the evaluation's.
_OF_THE_RUN = ('seed', 'same', 'mesh', 'joined', 'tokens')


def evaluation_keys(kind: str) -> dict[str, Any]:
    """The keys that a type of evaluation reads beside those of its data, with their defaults."""
    if kind == 'zero_shot':
        return {'prompts': ('{}',)}
    if kind == 'matching':
        return {'ranks': (1, 5, 10)}
    if kind == 'classification':
        return {'calibration': False, 'per_class': 'none', 'subset': None, 'skip_unlabelled': False}
    function = robustness.scores if kind == 'robustness' else _OF_FEATURES[kind]
    own = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind == parameter.KEYWORD_ONLY and name not in _OF_THE_RUN
    }
    if kind == 'robustness':
        return own
    split = {'gallery_split' if kind == 'retrieval' else 'train_split': None}
    return split | ({} if kind == 'linear_grid' else {'blocks': None, 'pool': None}) | own


@functools.cache
def _all_keys() -> frozenset[str]:
    """Those of the schema that only some types read."""
    return frozenset(key for kind in EVALUATORS for key in evaluation_keys(kind))


def _settings(config: Config, name: str, kind: str) -> dict[str, Any]:
    """The values of the keys of a type, given or its own defaults.

    Raises:
      UserError: a key is set that this type does not read.
    """
    section, own = config.evals[name], evaluation_keys(kind)
    for key in sorted(_all_keys() - set(own)):
        if section.peek(key) is not None:
            users = ' or '.join(
                repr(other) for other in EVALUATORS if key in evaluation_keys(other)
            )
            raise UserError(
                f'config: evals.{name}.{key} is read by type {users}, but evals.{name}.type is '
                f'{kind!r}: remove it, or set that type'
            )
    return {key: default if section[key] is None else section[key] for key, default in own.items()}


def build_evaluators(config: Config, parts: Experiment) -> dict[str, Evaluator]:
    """A function of (parameters, `Shared`) for each evaluation of the config, that gives floats.

    Those with the same `Shared` compute the features of a split once. On several hosts all have
    to call it.

    Raises:
      UserError: a key does not fit the type of its evaluation, or the data does not; before
        anything is computed where that can be known.
    """
    heads, embedders = build_eval_steps(config, parts), _Embedders(parts)
    made: dict[str, Evaluator] = {}
    for name in parts.evals:
        section = completed_section(config, 'evals', name)
        settings = _settings(config, name, section.type)
        if section.type == 'classification':
            made[name] = _classification(parts, name, heads[name], settings)
        elif section.type == 'robustness':
            made[name] = _robustness(parts, name, heads[name], settings, config.seed)
        elif section.type == 'zero_shot':
            made[name] = _zero_shot(config, parts, name, settings, embedders)
        elif section.type == 'matching':
            made[name] = _matching(parts, name, settings, embedders)
        else:
            made[name] = _of_features(config, parts, name, section.type, settings, embedders)
    return made


def _class_names(found: Data) -> tuple[str, ...]:
    return found.source.class_names or tuple(map(str, range(found.source.num_classes)))


def _classification(parts: Experiment, name: str, step: Any, settings: dict[str, Any]) -> Evaluator:
    names: tuple[str, ...] = ()
    if settings['per_class'] == 'all':
        names = _class_names(parts.data)
        if settings['subset'] is not None:
            chosen = subset_of(settings['subset'], parts.evals[name], parts.data, f'evals.{name}')
            names = tuple(names[number] for number in chosen)

    def run(params: Any, shared: SharedFeatures) -> dict[str, float]:
        return classification.run(step, params, eval_batches(parts, name), names)

    return run


def _robustness(
    parts: Experiment, name: str, step: Any, settings: dict[str, Any], seed: int
) -> Evaluator:
    key, found = f'evals.{name}', parts.evals[name]
    shape, dtype = found.example_spec.parts.get('image', ((), None))
    if found.reads != ('image',) or len(shape) != 3:
        raise UserError(f'config: {key}: robustness is of images, the model takes {found.reads}')
    if dtype != np.uint8:
        raise UserError(
            f'config: {key}: robustness corrupts images of bytes (uint8), these are {dtype}; what '
            'makes floats of them belongs behind to_device'
        )
    channels = shape[-1]
    chosen = robustness.chosen(settings['corruptions'], channels, key)
    corrupt = robustness.make_corrupt(parts.mesh, seed)

    def run(params: Any, shared: SharedFeatures) -> dict[str, float]:
        with jax.transfer_guard('allow'):
            return robustness.scores(
                step,
                params,
                eval_batches(parts, name),
                corrupt,
                corruptions=chosen,
                severities=settings['severities'],
            )

    return run


def _zero_shot(
    config: Config,
    parts: Experiment,
    name: str,
    settings: dict[str, Any],
    embedders: '_Embedders',
) -> Evaluator:
    key, found, model = f'evals.{name}', parts.evals[name], parts.model
    kinds = [stream.tokenizer == 'words' for stream in model.streams]
    if sorted(kinds) != [False, True]:
        raise UserError(
            f'config: {key}.type=zero_shot needs one stream of words and one of something else'
        )
    words, other = model.streams[kinds.index(True)].name, model.streams[kinds.index(False)].name
    names = found.source.class_names
    if not names:
        raise UserError(
            f'config: {key}: the classes of {found.source.name} have no names, so there are no '
            'sentences for them: give the data classes with names'
        )
    prompts = settings['prompts']
    texts = text_data(config, parts.data, zero_shot.sentences(names, prompts, key), key)

    def run(params: Any, shared: SharedFeatures) -> dict[str, float]:
        with jax.transfer_guard('allow'):
            said = embedders.vectors(texts, (words,), params, shared, key)
            seen = embedders.vectors(found, (other,), params, shared, key)
        classes = said.values.reshape(len(names), len(prompts), -1)
        return zero_shot.scores(seen.values, seen.labels, zero_shot.ensemble(classes))

    return run


def _matching(
    parts: Experiment, name: str, settings: dict[str, Any], embedders: '_Embedders'
) -> Evaluator:
    both = tuple(stream.name for stream in parts.model.streams)
    words = words_of(parts.model)

    def which(batch: dict[str, jax.Array]) -> jax.Array:
        return batch['mask'] if words is None else row_hashes(batch[words])

    def run(params: Any, shared: SharedFeatures) -> dict[str, float]:
        with jax.transfer_guard('allow'):
            key = f'evals.{name}'
            pairs = embedders.vectors(parts.evals[name], both, params, shared, key, which)
            if words is None:  # Nothing says that two examples are the same.
                pairs = pairs._replace(labels=np.arange(len(pairs.labels))[:, None])
            return matching.scores(pairs, parts.mesh, settings['ranks'])

    return run


class _Embedders:
    """The steps that make features, one for all evaluations that make them alike."""

    def __init__(self, parts: Experiment):
        self._parts = parts
        self._steps: dict[Any, Any] = {}

    def compute(
        self,
        found: Data,
        chosen: tuple[tuple[int, ...], str] | None,
        params: Any,
        shared: SharedFeatures,
        key: str,
    ) -> Features:
        """The features of a split, by blocks and pooling or, with None, before the head."""

        def make(model: vit.ViT) -> features.Embed:
            return features.of_blocks(model, *chosen) if chosen else features.before_head(model)

        return self._gathered(found, chosen, make, params, shared, key)

    def vectors(
        self,
        found: Data,
        streams: tuple[str, ...],
        params: Any,
        shared: SharedFeatures,
        key: str,
        label: Callable[[Any], jax.Array] = features.LABEL,
    ) -> Features:
        """The vectors of streams apart, one after the other; `label` as in `features.make_step`."""

        def make(model: vit.ViT) -> features.Embed:
            return features.of_streams(model, streams)

        return self._gathered(found, streams, make, params, shared, key, label)

    def _gathered(
        self,
        found: Data,
        chosen: Any,
        make: Callable[[vit.ViT], features.Embed],
        params: Any,
        shared: SharedFeatures,
        key: str,
        label: Any = features.LABEL,
    ) -> Features:
        alike = found.device, chosen
        if alike not in self._steps:
            self._steps[alike] = features.make_step(
                make(self._parts.model),
                eval_device_operations(found),
                self._parts.abstract_state,
                self._parts.mesh,
                label,
            )
        what = _same_split(found), found.skip_bad, alike
        if what not in shared:
            batches = all_batches(self._parts, found)
            shared[what] = features.gather(self._steps[alike], params, batches, key)
        return shared[what]


def _same_split(found: Data) -> dataset.Spec:
    """Equal for equal splits, whichever section of the config they are from."""
    return dataclasses.replace(found.specs[0], key='')


def _pooled_blocks(
    model: vit.ViT, settings: dict[str, Any], key: str
) -> tuple[tuple[int, ...], str] | None:
    """The blocks and the pooling that make the features; None for what the head is given."""
    if settings['blocks'] is None:
        if settings['pool'] is not None:
            raise UserError(f'config: {key}.pool is of {key}.blocks, which is not set')
        return None
    numbers = features.block_numbers(settings['blocks'], model.depth, f'{key}.blocks')
    return numbers, _pool(model, settings['pool'], f'{key}.pool')


def _pool(model: vit.ViT, chosen: str | None, key: str) -> str:
    """How tokens are pooled, checked against what tokens there are."""
    if model.streams or model.tokenizer in ('ragged', 'words'):
        raise UserError(
            f'config: {key.rpartition(".")[0]}: blocks are pooled where all tokens are of one '
            f'image, video or sound, not for model.tokenizer={model.tokenizer!r} or streams'
        )
    own = features.default_pool(model)
    if chosen is not None and 'cls' in chosen and own == 'gap':
        raise UserError(f"config: {key}={chosen!r}, but the model has no class token: set 'gap'")
    return chosen or own


def _of_features(
    config: Config,
    parts: Experiment,
    name: str,
    kind: str,
    settings: dict[str, Any],
    embedders: _Embedders,
) -> Evaluator:
    key, model = f'evals.{name}', parts.model
    if model.tokenizer == 'ragged' and not model.streams:
        raise UserError(
            f'config: {key}.type={kind!r} is of one image an example, not of ragged ones'
        )
    found, reference = parts.evals[name], parts.references[name]
    function, more = _OF_FEATURES[kind], {}
    if kind == 'linear_grid':
        settings['last_blocks'] = linear_grid.depths(settings['last_blocks'], model.depth, key)
        pool = _pool(model, None, key)
        blocks = tuple(range(model.depth - max(settings['last_blocks']), model.depth))
        chosen: Any = blocks, 'cls_gap' if pool == 'cls' else 'gap'
        more = {'tokens': 1 + (pool == 'cls'), 'joined': len(blocks)}
    else:
        chosen = _pooled_blocks(model, settings, key)
    own = {n: x for n, x in settings.items() if n not in ('train_split', 'blocks', 'pool')}
    own.pop('gallery_split', None)
    if kind == 'retrieval':
        more = {'same': _same_split(found) == _same_split(reference)}
    if kind in ('linear_probe', 'linear_grid'):
        more |= {'seed': config.seed}
    if kind != 'fewshot':
        function = functools.partial(function, mesh=parts.mesh)

    def check(labels: np.ndarray) -> None:
        if kind == 'knn':
            knn.check(len(labels), key, **own)
        if kind == 'retrieval':
            return
        if len(np.unique(labels)) < 2:
            raise UserError(
                f'config: {key}.train_split has examples of class {labels[0]} alone: there is '
                'nothing to tell apart; set a train_split with two classes'
            )
        if kind == 'fewshot':
            fewshot.check(labels, own['shots'], reference.source.class_names, key)
        if kind in ('linear_probe', 'linear_grid'):
            heldout.check(len(labels), own['held_out'], key)

    listed = reference.source.labels
    if listed is not None:
        check(listed())

    def run(params: Any, shared: SharedFeatures) -> dict[str, float]:
        with jax.transfer_guard('allow'):
            learnt = embedders.compute(reference, chosen, params, shared, key)
            check(learnt.labels)
            seen = embedders.compute(found, chosen, params, shared, key)
            return function(learnt, seen, **own, **more)

    return run
