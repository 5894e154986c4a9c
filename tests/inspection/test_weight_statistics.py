"""Differences, spectra, attention: against SVDs, hand-made cases and the papers' formulas."""

import numpy as np
import pytest

from big_vit import trees
from big_vit.errors import UserError
from big_vit.inspection import weight_statistics
from big_vit.models import encoder

WIDTH, HEADS, HIDDEN, DEPTH = 8, 2, 12, 11


def tree(seed=0, scan=False, width=WIDTH, **more):
    rng = np.random.default_rng(seed)
    blocks = {}
    attention = 'MultiHeadDotProductAttention_0'
    for i in range(DEPTH):
        name = f'Transformer/encoderblock_{i}'
        blocks[f'{name}/{attention}/query/kernel'] = rng.normal(size=(width, HEADS, 3))
        blocks[f'{name}/{attention}/out/kernel'] = rng.normal(size=(HEADS, 3, width))
        blocks[f'{name}/MlpBlock_0/Dense_0/kernel'] = rng.normal(size=(width, HIDDEN))
        blocks[f'{name}/LayerNorm_0/scale'] = np.full(width, float(i))
    flat = {**blocks, 'head/kernel': rng.normal(size=(width, 5)), **more}
    params = trees.unflatten(flat)
    return encoder.stack_blocks(params) if scan else params


def test_blocks_are_in_the_order_of_their_numbers_scanned_or_not():
    for scan in (False, True):
        flat = weight_statistics.unrolled(tree(scan=scan))
        found = [
            weight_statistics.split_block(n)[1] for n in flat if n.endswith('LayerNorm_0/scale')
        ]
        assert found == list(range(DEPTH))
        scales = weight_statistics.by_block({n: float(x.ravel()[0]) for n, x in flat.items()})
        np.testing.assert_array_equal(scales['LayerNorm_0/scale'], range(DEPTH))


def test_scanned_and_unrolled_parameters_are_alike():
    found = weight_statistics.compare(tree(), tree(scan=True), ('a', 'b'))
    assert found.overall == weight_statistics.Difference(0.0, pytest.approx(1.0), 0.0)
    assert not (found.only_first or found.only_second or found.other_shape)
    one, other = weight_statistics.spectra(tree()), weight_statistics.spectra(tree(scan=True))
    for part in one:
        np.testing.assert_array_equal(one[part], other[part])


def test_differences_are_those_of_vectors():
    a, b = tree(0), tree(1)
    found = weight_statistics.compare(a, b, ('a', 'b'))
    name = 'Transformer/encoderblock_10/MlpBlock_0/Dense_0/kernel'
    x, y = trees.flatten(a)[name].ravel(), trees.flatten(b)[name].ravel()
    each = found.both[name]
    assert each.relative == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x))
    assert each.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert each.largest == pytest.approx(np.abs(x - y).max())
    x, y = (np.concatenate([v.ravel() for v in trees.flatten(t).values()]) for t in (a, b))
    assert found.overall.relative == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x))


def test_arrays_of_zeros_have_no_angle():
    a = tree(**{'head/bias': np.zeros(5), 'cls': np.zeros(3)})
    b = tree(**{'head/bias': np.ones(5), 'cls': np.zeros(3)})
    found = weight_statistics.compare(a, b, ('a', 'b')).both
    assert found['head/bias'].relative == np.inf and np.isnan(found['head/bias'].cosine)
    assert found['cls'] == weight_statistics.Difference(0.0, 1.0, 0.0)


def test_what_has_no_counterpart_is_listed():
    a = tree(**{'pre_logits/bias': np.ones(2), 'pos_embedding': np.ones((1, 4, 8))})
    b = tree(cls=np.ones(2), pos_embedding=np.ones((1, 9, 8)))
    found = weight_statistics.compare(a, b, ('a', 'b'))
    assert found.only_first == ['pre_logits/bias'] and found.only_second == ['cls']
    assert found.other_shape == {'pos_embedding': ((1, 4, 8), (1, 9, 8))}


def test_other_architectures_are_named():
    with pytest.raises(UserError, match=r'a and b are of different architectures: Transformer/'):
        weight_statistics.compare(tree(), tree(width=10), ('a', 'b'))
    with pytest.raises(UserError, match=r'x is 2 and missing; y is missing and 3'):
        weight_statistics.compare({'x': np.ones(2)}, {'y': np.ones(3)}, ('a', 'b'))


def test_spectra_are_singular_values():
    params = tree()
    found = weight_statistics.spectra(params)
    assert list(found) == ['query', 'out', 'mlp in']
    flat = trees.flatten(params)
    for part, name in (
        ('query', 'MultiHeadDotProductAttention_0/query'),
        ('mlp in', 'MlpBlock_0/Dense_0'),
    ):
        kernel = flat[f'Transformer/encoderblock_10/{name}/kernel'].reshape(WIDTH, -1)
        values = np.linalg.svd(kernel, compute_uv=False)
        np.testing.assert_allclose(found[part][10], values, rtol=1e-6)
        rank = (values**2).sum() / values[0] ** 2
        assert weight_statistics.stable_rank(found[part])[10] == pytest.approx(rank)
        size = np.sqrt(np.square(kernel).mean())
        assert weight_statistics.sizes(params)[part][10] == pytest.approx(size)
    out = flat['Transformer/encoderblock_10/MultiHeadDotProductAttention_0/out/kernel']
    values = np.linalg.svd(out.reshape(-1, WIDTH), compute_uv=False)
    np.testing.assert_allclose(found['out'][10], values, rtol=1e-6)


def test_blocks_of_several_streams_stay_apart():
    params = {'sound': tree(0), **tree(1)}
    found = weight_statistics.matrices(params)
    assert set(found) == {'query', 'out', 'mlp in', 'sound/query', 'sound/out', 'sound/mlp in'}
    assert len(found['sound/query']) == DEPTH


def attention(depth=3, heads=2, tokens=5):
    weights = np.random.default_rng(0).random((depth, heads, tokens, tokens)).astype(np.float32)
    return weights / weights.sum(-1, keepdims=True)


def test_rollout_is_that_of_the_paper():
    weights = attention()
    mixed = np.eye(5)
    for block in weights:
        mixed = (0.5 * block.mean(0) + 0.5 * np.eye(5)) @ mixed
    np.testing.assert_allclose(weight_statistics.rollout(weights), mixed, rtol=1e-5)
    np.testing.assert_allclose(weight_statistics.rollout(weights).sum(-1), 1, rtol=1e-5)


def test_looks_are_of_the_class_token_or_of_all_patches():
    matrix = np.diag([0.0, 1, 2, 3, 4])
    matrix[0] = [5.0, 1, 1, 1, 1]
    np.testing.assert_allclose(
        weight_statistics.patch_attention(matrix, 1, (2, 2)), np.full((2, 2), 0.25)
    )
    plain = weight_statistics.patch_attention(matrix[1:, 1:], 0, (2, 2))
    np.testing.assert_allclose(plain, np.array([[1, 2], [3, 4]]) / 10)


def test_distances_of_a_head_that_looks_at_itself_and_of_one_that_looks_aside():
    # A class token and a grid of 2x3: head 0 looks at its own place, head 1 at the column aside.
    weights = np.zeros((1, 2, 7, 7), np.float32)
    for i in range(6):
        row, column = divmod(i, 3)
        weights[0, 0, 1 + i, 1 + i] = 1
        weights[0, 1, 1 + i, 1 + 3 * row + (column + 1) % 3] = 0.5
        weights[0, 1, 1 + i, 0] = 0.5  # What goes to the class token has no distance.
    found = weight_statistics.distances(weights, 1, (2, 3), (10.0, 4.0))
    np.testing.assert_allclose(found, [[0.0, (4 + 4 + 8) / 3]], rtol=1e-6)


def test_positions_of_one_direction_are_alike():
    table = np.array([[1.0, 0], [2, 0], [0, 1], [-1, 0]])
    found = weight_statistics.position_similarity(table, (2, 2))
    np.testing.assert_allclose(found[0, 0], [[1, 1], [0, -1]])


def test_components_explain_the_kernels_of_one_pattern():
    pattern = np.random.default_rng(0).normal(size=(4, 4, 3))
    kernel = pattern[..., None] * np.linspace(-1, 1, 7)
    found = weight_statistics.components(kernel, count=2)
    assert found.shape == (2, 4, 4, 3)
    cosine = (found[0] * pattern).sum() / np.linalg.norm(pattern)
    assert abs(cosine) == pytest.approx(1)
