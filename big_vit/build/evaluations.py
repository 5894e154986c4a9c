"""The `evals` sections as evaluators: functions of the parameters that return metrics."""

import dataclasses
import difflib
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from big_vit import steps
from big_vit.build.data import (
    Data,
    completed_section,
    device_operations,
    eval_device_operations,
    sampled,
    text_data,
    views_data,
)
from big_vit.build.experiment import Experiment, all_batches
from big_vit.config import Config, registries
from big_vit.data.sources.base import select
from big_vit.errors import UserError
from big_vit.evaluators.confusion import Judge, Judged, make_judge
from big_vit.evaluators.evaluation import (
    Evaluation,
    Evaluator,
    Rows,
    SharedFeatures,
    Split,
    Sums,
)
from big_vit.evaluators.feature_extractor import FeatureExtractor
from big_vit.evaluators.features import Embedding, Features
from big_vit.evaluators.registry import EVALUATORS, requirements


def build_evaluators(config: Config, parts: Experiment) -> dict[str, Evaluator]:
    """Build the evaluator of each evaluation: a function of (params, shared features).

    Calls with the same params may share one dictionary of features, so that those of a split are
    computed once. All hosts must call an evaluator.

    Raises:
      UserError: a key does not fit the type of its evaluation, or the data does not; before
        anything is computed if that can be known.
    """
    extractor, compiled = FeatureExtractor(parts.abstract_state, parts.mesh), dict[Any, Any]()

    def compile_sums(key: Any, sums: Sums) -> Sums:
        if key not in compiled:
            compiled[key] = steps.make_eval_step(sums, parts.abstract_state, parts.mesh)
        return compiled[key]

    def compile_rows(key: Any, rows: Rows) -> Rows:
        if key not in compiled:
            compiled[key] = steps.make_rows_step(rows, parts.abstract_state, parts.mesh)
        return compiled[key]

    evaluators: dict[str, Evaluator] = {}
    for name in parts.evals:
        key, kind = f'evals.{name}', completed_section(config, 'evals', name).type
        settings = _settings(config, name, kind)
        _check_one_input(parts.task.trunk(parts.model), key, kind)
        compilers = compile_sums, compile_rows
        evaluation = _evaluation(config, parts, name, extractor, *compilers)
        evaluators[name] = EVALUATORS[kind](evaluation, **settings)
    return evaluators


def build_judges(
    config: Config, parts: Experiment, seconds: float | None = None
) -> dict[str, Callable[[Any], tuple[Judged, Data]]]:
    """Build for each evaluation of the head's accuracy what says which examples are mistaken.

    Args:
      seconds: for each; then examples come in a random order, so that those seen stand for all.

    Returns:
      {evaluation: params -> (what was answered, the data whose rows it is of)}.

    Raises:
      UserError: as `build_evaluators`.
    """
    extractor = FeatureExtractor(parts.abstract_state, parts.mesh)

    def compile_sums(key: Any, sums: Sums) -> Sums:
        return steps.make_eval_step(sums, parts.abstract_state, parts.mesh)

    def compile_rows(key: Any, rows: Rows) -> Rows:
        return steps.make_rows_step(rows, parts.abstract_state, parts.mesh)

    def judge(params: Any, name: str, make: Judge) -> tuple[Judged, Data]:
        data = parts.evals[name]
        if seconds is not None:
            order = np.random.default_rng(0).permutation(data.source.length)
            source = select(data.source, len(order), lambda index: order[index])
            data = data._replace(source=source)
        return make(params, all_batches(parts, data)), data

    judges: dict[str, Callable[[Any], tuple[Judged, Data]]] = {}
    for name in parts.evals:
        kind = completed_section(config, 'evals', name).type
        if requirements(kind).head_top1:
            compilers = compile_sums, compile_rows
            evaluation = _evaluation(config, parts, name, extractor, *compilers)
            settings = _settings(config, name, kind)
            make = make_judge(evaluation, seconds=seconds, **settings)
            judges[name] = functools.partial(judge, name=name, make=make)
    return judges


def _settings(config: Config, name: str, kind: str) -> dict[str, Any]:
    """Return the keys that a type reads: their values in the config, or the type's defaults.

    Raises:
      UserError: a key is set that this type does not read.
    """
    section, defaults = config.evals[name], registries.EVALUATORS.keys(kind)
    all_keys = {key for other in EVALUATORS for key in registries.EVALUATORS.keys(other)}
    for key in sorted(all_keys - set(defaults)):
        if section.peek(key) is not None:
            readers = ' or '.join(map(repr, registries.EVALUATORS.readers(key)))
            raise UserError(
                f'config: evals.{name}.{key} is read by type {readers}, but evals.{name}.type is '
                f'{kind!r}: remove it, or set that type'
            )
    return {
        key: default if section[key] is None else section[key] for key, default in defaults.items()
    }


def check_chosen(config: Config, parts: Experiment, key: str, metric: str) -> None:
    """Check that a metric such as 'val/top1' is one that the evaluations of a run measure.

    Args:
      key: in the config, whose value the metric is.

    Raises:
      UserError: it is not, and which one is near.
    """
    kinds = {name: completed_section(config, 'evals', name).type for name in parts.evals}
    known = [
        f'{name}/{score}'
        for name, kind in kinds.items()
        for score in requirements(kind).scores(**_settings(config, name, kind))
    ]
    if metric not in known:
        near = difflib.get_close_matches(metric, known, n=1, cutoff=0.0)
        hint = f'did you mean {near[0]!r}? There are {", ".join(known)}'
        raise UserError(
            f'config: {key}={metric!r} is measured by no evaluation of this run; '
            + (hint if known else 'it has none: set evals.val.split')
        )
    if not parts.intervals.evals[metric.partition('/')[0]]:
        raise UserError(f'config: {key}={metric!r} is never measured: its interval is 0')


def _check_one_input(model: Any, key: str, kind: str) -> None:
    """Raise `UserError` if features are wanted of examples that are packed together."""
    packed = any(stream.tokenizer == 'ragged' for stream in model.streams)
    if packed and requirements(kind).output == 'features':
        raise UserError(
            f'config: {key}.type={kind!r} is of one image an example, not of ragged ones'
        )


def _evaluation(
    config: Config,
    parts: Experiment,
    name: str,
    extractor: FeatureExtractor,
    compile_sums: Any,
    compile_rows: Any,
) -> Evaluation:
    task = parts.task
    key, reference, own = f'evals.{name}', parts.references.get(name), parts.evals[name]

    def compute_features(
        split: Split, embedding: Embedding, params: Any, shared: SharedFeatures
    ) -> Features:
        return extractor.compute(key, split, embedding, params, shared)

    def as_split(sentences: list[str]) -> Split:
        return _split(parts, text_data(config, sentences, key))

    def sample(count: int) -> Split:
        split = _split(parts, sampled(own, count))
        whole = count >= own.source.length
        return split if whole else split._replace(identity=(split.identity, count))

    def views(pictures: int, each: int, text: str | None) -> Split | None:
        try:
            data = views_data(config, own, key, pictures, each, text)
        except UserError as error:
            raise UserError(str(error).replace(f'{key}.transform', f'{key}.views')) from error
        return None if data is None else _views_split(parts, data, (pictures, each, text))

    return Evaluation(
        key=key,
        split=_split(parts, own),
        reference=None if reference is None else _split(parts, reference),
        training=parts.data.source,
        image_size=config.image_size,
        model=task.trunk(parts.model),
        detect=None if task.detect is None else task.detect(parts.model),
        segment=None if task.segment is None else task.segment(parts.model),
        loss=task.logits_loss,
        seed=config.seed,
        mesh=parts.mesh,
        compute_features=compute_features,
        compile_sums=compile_sums,
        compile_rows=compile_rows,
        as_split=as_split,
        sample=sample,
        views=views,
    )


def _views_split(parts: Experiment, data: Data, how: tuple[int, int, str | None]) -> Split:
    apply, key = device_operations(data), jax.random.key(0)

    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        # Labels are the numbers of rows: no two batches draw alike.
        return apply(batch, jax.random.fold_in(key, batch['label'].max())) if apply else batch

    split = _split(parts, data)
    return split._replace(identity=(split.identity, how), prepare=prepare)


def _split(parts: Experiment, data: Data) -> Split:
    # Sections of the config may name equal splits, so the section is no part of the identity.
    spec = dataclasses.replace(data.specs[0], key='')
    return Split(
        source=data.source,
        transform=data.transform,
        example_spec=data.example_spec,
        reads=data.reads,
        identity=(spec, data.skip_bad),
        device=data.device,
        prepare=eval_device_operations(data),
        batches=lambda: all_batches(parts, data),
    )
