"""The table of evaluators: what its entries declare fits the schema and what a run provides."""

import re

import jax
import pytest

from big_vit import config, state
from big_vit.build.data import eval_data
from big_vit.build.evaluations import build_evaluators
from big_vit.build.experiment import build_experiment
from big_vit.build.task import build_task
from big_vit.config import registries, schema
from big_vit.errors import UserError
from big_vit.evaluators import registry
from big_vit.evaluators.evaluation import BatchMeans
from big_vit.evaluators.features import Embedding
from big_vit.evaluators.requirements import requires
from big_vit.evaluators.two_splits import compare_splits
from big_vit.tasks.registry import TASKS

TINY = {
    'total_steps': 1,
    'batch_size': 8,
    'image_size': 8,
    'lr': 0.0,
    'model.variant': 'mu/4',
    'model.depth': 1,
    'data.name': 'digits',
    'data.split': 'train[:40]',
    'data.transform': 'resize(size)',
    'evals.x.split': 'test[:20]',
}


def provided(settings):
    return build_task(settings.task).provides


@pytest.mark.parametrize('name', registry.EVALUATORS)
def test_every_key_is_in_the_schema_and_its_default_passes_the_check(name):
    keys = registries.EVALUATORS.keys(name)
    for key, default in keys.items():
        assert default is not registries.REQUIRED
        field = schema.SCHEMA[f'evals.*.{key}']
        # None there, for else every type would have the same default.
        assert field.default is None
        assert default is None or field.check(default) == default
    reference = registry.requirements(name).reference
    assert (reference is None) == (not {'train_split', 'gallery_split'} & set(keys))
    assert reference is None or reference in keys


def test_every_task_provides_what_some_evaluator_needs():
    whole = config.resolve(TINY)
    assert build_task(whole.task).provides == {'logits', 'features'}
    apart = config.load('configs/contrastive.py')
    assert build_task(apart.task).provides == {'pairs', 'features'}
    needed = {registry.requirements(name).output for name in registry.EVALUATORS}
    assert needed == frozenset().union(*(make().provides for make in TASKS.values()))


REFUSED = [
    (whole, name)
    for whole in (config.resolve(TINY), config.load('configs/contrastive.py'))
    for name in registry.EVALUATORS
    if registry.requirements(name).output not in build_task(whole.task).provides
]


@pytest.mark.parametrize('whole, name', REFUSED, ids=lambda x: x if isinstance(x, str) else '')
def test_a_type_is_refused_before_data_is_opened_where_the_task_lacks_its_output(whole, name):
    settings = whole.replacing({'evals.x.type': name, 'evals.x.path': 'nowhere'})
    with pytest.raises(UserError, match=rf"evals\.x\.type='{name}' .*set it to one of") as caught:
        eval_data(settings, 'x', None)
    types, _, tasks = str(caught.value).partition('set it to one of')[2].partition(', or ')
    allowed = re.findall(r"'(\w+)'", types)
    providers = re.findall(r"task\.name='(\w+)'", tasks)
    output = registry.requirements(name).output
    assert providers == [task for task, make in TASKS.items() if output in make().provides]
    outputs = {registry.requirements(other).output for other in allowed}
    assert outputs == build_task(whole.task).provides and name not in allowed


@pytest.mark.slow
def test_means_over_examples_are_vmapped_only_without_options():
    def built(**options):
        settings = config.resolve(TINY | {f'evals.x.{key}': v for key, v in options.items()})
        return build_evaluators(settings, build_experiment(settings))['x']

    assert isinstance(built(), BatchMeans)
    for options in ({'per_class': 'mean'}, {'subset': (0, 1)}, {'type': 'knn', 'k': 1}):
        assert not isinstance(built(**options), BatchMeans)


def test_a_line_in_the_table_is_all_that_a_new_evaluator_needs(monkeypatch):
    @requires('features', reference='gallery_split')
    def toy(evaluation, *, gallery_split=None, ranks=(3,)):
        def embed(params, given):
            return given.reshape(len(given), -1) + ranks[0]

        def scores(gallery, queries):
            return {'gallery': float(len(gallery.labels)), 'mean': float(queries.values.mean())}

        return compare_splits(evaluation, Embedding('toy', embed), scores)

    monkeypatch.setitem(registry.EVALUATORS, 'toy', toy)
    settings = config.resolve(TINY | {'evals.x.type': 'toy', 'evals.x.gallery_split': 'train[:7]'})
    parts = build_experiment(settings)
    evaluator = build_evaluators(settings, parts)['x']
    params = state.create(parts.model, parts.data.inputs, parts.optimizer, 0, parts.abstract_state)[
        'params'
    ]
    with jax.set_mesh(parts.mesh):
        found = evaluator(params, {})
    assert found['gallery'] == 7 and 2 < found['mean'] < 4
    wrong = settings.replacing({'evals.x.k': 3})
    with pytest.raises(UserError, match=r"evals\.x\.k is read by type 'knn', .* is 'toy'"):
        build_evaluators(wrong, parts)
    assert registries.EVALUATORS.readers('ranks')['toy'] == (3,)
