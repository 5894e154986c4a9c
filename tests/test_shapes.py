"""Arrays have the shapes of their annotations: some tests of each room again, with checks on.

`make test-all` checks in every test, `make test` in these.
"""

import subprocess
import sys

import jax.numpy as jnp
import pytest
from commands import ROOT, environment
from jaxtyping import TypeCheckError

from big_vit.models import layers

AGAIN = (
    'test_shapes.py::test_other_shapes_are_refused',
    'models/test_models.py::test_forward_pass_is_that_of_the_paper[map-sincos2d-image_shape5-patch5]',
    'tasks/test_classification.py',
    'evaluators/test_evaluators.py::test_shots_are_drawn_by_class_and_seed_and_averaged',
    'data/test_pipeline.py::test_both_paths_give_the_same_batches',
)
WRONG = jnp.zeros((2, 3, 4))


def are_checked() -> bool:
    try:
        layers.quick_gelu(jnp.zeros(2, int))
    except TypeCheckError:
        return True
    return False


def test_other_shapes_are_refused():
    if not are_checked():
        pytest.skip('shapes are not checked in this run')
    with pytest.raises(TypeCheckError, match='query'):
        layers.attention_weights(WRONG, WRONG)


def test_arrays_have_the_shapes_of_their_annotations():
    if are_checked():
        pytest.skip('shapes are checked in all of this run')
    tests = (f'tests/{name}' for name in AGAIN)
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *tests],
        cwd=ROOT,
        env=environment(8),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'skipped' not in result.stdout.splitlines()[-1], result.stdout
