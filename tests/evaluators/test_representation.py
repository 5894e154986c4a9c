"""Ranks and spectra of features: against SciPy in float64, closed forms, and any mesh."""

import itertools

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import linalg, stats

from big_vit import config, sharding, state
from big_vit.build.data import _of_a_view, completed_section, views_data
from big_vit.build.evaluations import build_evaluators
from big_vit.build.experiment import build_experiment
from big_vit.errors import UserError
from big_vit.evaluators import representation
from big_vit.evaluators.features import Features

RNG = np.random.default_rng(0)


def with_singular(values, rows=300):
    """Rows whose singular values are these exactly, in float32."""
    left = np.linalg.qr(RNG.standard_normal((rows, len(values))))[0]
    right = np.linalg.qr(RNG.standard_normal((len(values), len(values))))[0]
    return ((left * values) @ right).astype(np.float32)


def test_rankme_counts_equal_directions_and_is_one_for_one():
    assert representation.rankme(with_singular(np.ones(24))) == pytest.approx(24, abs=1e-3)
    half = np.concatenate([np.ones(12), np.full(12, 1e-12)])
    assert representation.rankme(with_singular(half)) == pytest.approx(12, rel=1e-3)
    same = np.tile(RNG.standard_normal(24), (50, 1)).astype(np.float32)
    assert representation.rankme(same) == pytest.approx(1, abs=1e-3)
    assert representation.rankme(np.zeros((5, 3), np.float32)) == 1
    # Not centred: a common mean takes most of the spectrum.
    values = RNG.standard_normal((400, 24)).astype(np.float32)
    assert representation.rankme(values + 100) < 3 < 23 < representation.rankme(values)


def test_rankme_is_the_entropy_of_scipys_singular_values():
    values = (RNG.standard_normal((200, 40)) * np.arange(1, 41) ** -0.7).astype(np.float32)
    gram = values.astype(np.float64).T @ values.astype(np.float64)
    singular = np.sqrt(np.maximum(linalg.eigvalsh(gram), 0))
    shares = singular / singular.sum() + 1e-7
    want = np.exp(-(shares * np.log(shares)).sum())
    assert representation.rankme(values) == pytest.approx(want, rel=1e-9)
    # The epsilon of some implementations (1e-5) would show: it is no part of this law.
    assert abs(np.exp(stats.entropy(singular)) - want) < 2e-3


@pytest.mark.parametrize('decay', [0.5, 1.0, 2.2])
def test_alpha_is_the_exponent_of_a_power_law(decay):
    count = 64
    basis = RNG.standard_normal((500, count))
    left = np.linalg.qr(basis - basis.mean(0))[0]  # Columns stay centred.
    values = left * np.arange(1, count + 1) ** (-decay / 2) + 3.0
    found = representation.alpha(values.astype(np.float32))
    assert found['alpha'] == pytest.approx(decay, abs=2e-3)
    assert found['alpha_r2'] == pytest.approx(1, abs=1e-4)
    assert (found['alpha_first'], found['alpha_last']) == (5, 32)


def test_alpha_is_the_least_squares_line_of_the_covariance_in_its_window():
    values = RNG.standard_normal((90, 30)) @ RNG.standard_normal((30, 30))
    found = representation.alpha(values.astype(np.float32), (3, 20))
    eigenvalues = np.linalg.eigvalsh(np.cov(values.astype(np.float32).astype(np.float64).T))[::-1]
    line = stats.linregress(np.log(np.arange(3, 21)), np.log(eigenvalues[2:20]))
    assert found['alpha'] == pytest.approx(-line.slope, rel=1e-6)
    assert found['alpha_r2'] == pytest.approx(line.rvalue**2, rel=1e-6)
    # Beyond the rank there is rounding alone, which no line may be drawn through.
    low = (RNG.standard_normal((90, 4)) @ RNG.standard_normal((4, 30))).astype(np.float32)
    assert representation.alpha(low + 5, (1, 30))['alpha_last'] == 4
    assert np.isnan(representation.alpha(low, (3, 20))['alpha'])
    assert np.isnan(representation.alpha(np.ones((9, 5), np.float32))['alpha'])


def test_deviation_and_cosine_by_loops():
    values = (RNG.standard_normal((40, 7)) + 0.5).astype(np.float32)
    wide = values.astype(np.float64)
    pairs = [
        wide[i] @ wide[j] / np.linalg.norm(wide[i]) / np.linalg.norm(wide[j])
        for i in range(40)
        for j in range(40)
        if i != j
    ]
    assert representation.mean_cosine(values) == pytest.approx(np.mean(pairs), abs=1e-12)
    want = np.mean([np.std(wide[:, c]) for c in range(7)]) / np.sqrt(np.mean(wide**2))
    assert representation.deviation(values) == pytest.approx(want, abs=1e-12)
    assert representation.deviation(7 * values) == pytest.approx(want, abs=1e-6)
    same = np.tile(values[:1], (9, 1))
    assert representation.deviation(same) == pytest.approx(0, abs=1e-7)
    assert representation.mean_cosine(same) == pytest.approx(1, abs=1e-9)
    around = RNG.standard_normal((5000, 16)).astype(np.float32)
    assert representation.deviation(around) == pytest.approx(1, abs=0.02)
    nothing = np.zeros((4, 3), np.float32)
    assert representation.deviation(nothing) == 0 and representation.mean_cosine(nothing) == 1


def test_lidar_is_the_entropy_of_scipys_generalised_eigenvalues():
    pictures, views, width = 30, 6, 12
    values = RNG.standard_normal((pictures, 1, width)) * np.arange(1, 13)
    values = (values + 0.3 * RNG.standard_normal((pictures, views, width))).astype(np.float32)
    wide = values.astype(np.float64)
    between = np.cov(wide.mean(1).T)
    within = sum(np.cov(picture.T) for picture in wide) / pictures + 1e-4 * np.eye(width)
    eigenvalues = linalg.eigh(between, within, eigvals_only=True)
    shares = eigenvalues / eigenvalues.sum() + 1e-8
    want = np.exp(-(shares * np.log(shares)).sum())
    assert representation.lidar_rank(values) == pytest.approx(want, rel=1e-9)
    # Views of one picture must be told from those of others.
    shuffled = RNG.permutation(values.reshape(-1, width)).reshape(values.shape)
    assert abs(representation.lidar_rank(shuffled) - want) > 0.1


def test_lidar_is_at_most_the_pictures_less_one_and_counts_equal_directions():
    few = RNG.standard_normal((6, 1, 40)) + 1e-3 * RNG.standard_normal((6, 5, 40))
    assert 4 < representation.lidar_rank(few.astype(np.float32)) <= 5.01
    corners = np.concatenate([np.eye(8), -np.eye(8)])[:, None]
    spread = np.concatenate([np.eye(8), -np.eye(8)])[None] * 0.1
    equal = (corners + spread).astype(np.float32)
    assert representation.lidar_rank(equal) == pytest.approx(8, abs=1e-3)
    assert representation.lidar_rank(np.ones((4, 3, 5), np.float32)) == 1


def test_pictures_with_a_missing_view_are_left_out():
    rows = np.array([0, 1, 2, 3, 5, 6, 7, 8])  # Of three pictures; row 4 could not be read.
    values = np.repeat(rows[:, None], 2, 1).astype(np.float32)
    found = representation.by_picture(Features(values, rows), 3, 'evals.x')
    assert found[..., 0].tolist() == [[0, 1, 2], [6, 7, 8]]
    with pytest.raises(UserError, match=r'evals\.x\.views changes labels'):
        representation.by_picture(Features(values, rows % 3), 3, 'evals.x')
    with pytest.raises(UserError, match='1 of them can be read'):
        representation.by_picture(Features(values[:4], rows[:4]), 3, 'evals.x')


# In a run.


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """A flat folder of pictures of several sizes without labels, one of them broken."""
    folder = tmp_path_factory.mktemp('photos')
    rng = np.random.default_rng(3)
    for i in range(23):
        coarse = rng.integers(0, 255, (3 + i % 4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((20 + i, 31 - i)).save(folder / f'{i:02}.png')
    (folder / '07.png').write_bytes((folder / '07.png').read_bytes()[:60])
    return folder


def settings(photos, **changes):
    return config.resolve(
        {
            'total_steps': 1,
            'batch_size': 8,
            'image_size': 8,
            'lr': 0.0,
            'model.variant': 'mu/4',
            'model.depth': 1,
            'model.dtype': 'float32',
            'task.name': 'masked',
            'task.decoder_width': 8,
            'task.decoder_depth': 1,
            'task.decoder_heads': 2,
            'data.name': 'folder',
            'data.path': str(photos),
            'data.split': 'train',
            'data.on_error': 'skip',
            'data.transform': 'inception_crop(size) | flip_lr',
            'evals.x.type': 'representation',
            'evals.x.lidar': (9, 3),
        }
        | changes
    )


def measured(whole, devices=None):
    parts = build_experiment(whole)
    if devices is not None:
        parts = parts._replace(mesh=sharding.make_mesh(1, 1, 1, devices))
    evaluator = build_evaluators(whole, parts)['x']
    params = state.create(
        parts.model, parts.data.inputs, parts.optimizer, 0, parts.abstract_state, None,
        parts.task.state,
    )['params']  # fmt: skip
    with jax.set_mesh(parts.mesh):
        return evaluator(params, {}), parts


def test_unlabelled_pictures_are_measured_and_broken_ones_left_out(photos):
    found, parts = measured(settings(photos))
    # By default the split of the data, and the views of its transform.
    assert parts.evals['x'].source.length == 23 and found['count'] == 22
    names = ['rankme', 'lidar', 'std', 'cosine', 'alpha', 'alpha_r2', 'alpha_first', 'alpha_last']
    assert list(found) == [*names, 'count']
    assert 1 < found['lidar'] <= 8.01 and 1 < found['rankme'] < 20
    assert 0 < found['std'] < 1 and 0 < found['cosine'] < 1


@pytest.mark.slow
def test_batches_and_devices_change_nothing(photos):
    want, _ = measured(settings(photos))
    few, _ = measured(settings(photos, **{'evals.x.examples': 5}))
    assert few['count'] == 5 and few['lidar'] == pytest.approx(want['lidar'], rel=1e-4)
    for size, mesh in ((8, {}), (24, {}), (8, {'mesh.fsdp': 4, 'mesh.tensor': 2})):
        found, _ = measured(settings(photos, batch_size=size, **mesh))
        assert found == pytest.approx(want, rel=2e-4), (size, mesh)


def test_views_are_of_one_picture_in_turn_and_drawn_anew(photos):
    whole = settings(photos)
    parts = build_experiment(whole)
    data = views_data(
        whole, parts.evals['x'], 'evals.x', 4, 3, 'resize(size) | color_jitter(0.4, 0.0, 0.0, 0.0)'
    )
    assert data.source.length == 12
    columns = data.source.load(np.arange(12))
    assert columns['label'].tolist() == list(range(12))
    places = [data.source.place(row) for row in range(12)]
    assert [place[-6:] for place in places[::3]] == ['00.png', '05.png', '11.png', '17.png']
    assert all(places[row] == places[row - row % 3] for row in range(12))
    from big_vit.data import pipeline

    (batch,) = pipeline.eval_batches(data.source, data.transform, batch_size=12)
    views = batch['image'].reshape(4, 3, -1).astype(float)
    assert all((a != b).any() for picture in views for a, b in itertools.pairwise(picture))
    near = [np.corrcoef(picture)[0, 1:].min() for picture in views]
    assert min(near) > 0.9


def test_a_transform_without_chance_makes_no_views(photos):
    plain = settings(photos, **{'data.transform': 'resize(size)'})
    parts = build_experiment(plain)
    assert views_data(plain, parts.evals['x'], 'evals.x', 9, 3, None) is None
    for views, message in (
        ('resize(size)', r'config: evals\.x\.views: is not random'),
        ('resize(16) | flip_lr', r'evals\.x\.views gives 16x16 images but image_size is 8x8'),
        ('resize(size) | grayscale | flip_lr', r'evals\.x\.views gives images of 1 channel'),
    ):
        with pytest.raises(UserError, match=message):
            build_evaluators(plain.replacing({'evals.x.views': views}), parts)


def test_the_split_is_by_default_that_of_the_data_and_of_others_test(photos):
    own = settings(photos, **{'evals.y.type': 'representation', 'evals.y.path': '/elsewhere'})
    assert completed_section(own, 'evals', 'x').split == 'train'
    assert completed_section(own, 'evals', 'y').split == 'test'
    labelled = settings(photos, **{'evals.z.every_steps': 5})
    assert completed_section(labelled, 'evals', 'z').split == 'test'


def test_what_needs_labels_says_so_and_names_what_does_not(photos):
    near = {'evals.x.type': 'knn', 'evals.x.split': 'train'}
    with pytest.raises(UserError) as caught:
        build_experiment(settings(photos, **near))
    line = str(caught.value)
    assert line.startswith("config: evals.x.type='knn' needs labels, which are not there (")
    assert 'has no folders' in line and '\n' not in line
    assert line.endswith(
        'set evals.x.name and evals.x.path to a labelled dataset, or '
        "evals.x.type='representation', which needs none"
    )
    with pytest.raises(UserError, match=r"needs logits .*; 'representation' needs no labels"):
        build_experiment(settings(photos, **{'evals.x.type': 'classification'}))


def test_labelled_pictures_elsewhere_are_scored_beside_unlabelled_ones(photos, tmp_path):
    for split, count in (('train', 4), ('test', 2)):
        for i in range(2 * count):
            path = tmp_path / split / f'class{i % 2}' / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (12, 9), (i, 9, 200)).save(path)
    elsewhere = {'type': 'knn', 'name': 'folder', 'path': str(tmp_path), 'split': 'test'}
    whole = settings(photos, **{f'evals.near.{key}': value for key, value in elsewhere.items()})
    parts = build_experiment(whole)
    assert parts.evals['near'].source.class_names == ('class0', 'class1')
    assert parts.references['near'].source.labels().tolist() == [0] * 4 + [1] * 4
    assert parts.evals['x'].source.length == 23 and parts.data.source.num_classes == 1


def test_views_are_by_default_those_of_training_or_the_first_of_several(photos):
    text = 'decode ; global: 2 * inception_crop(size) | flip_lr ; local: rrc(4)'
    for given, names in (
        ('inception_crop(size) | flip_lr', ('inception_crop', 'flip_lr')),
        (text, ('decode', 'inception_crop', 'flip_lr')),
    ):
        whole = settings(photos, **{'data.transform': given})
        assert _of_a_view(whole, 'evals.x', None).names == names
    assert _of_a_view(whole, 'evals.x', 'flip_ud').names == ('flip_ud',)
