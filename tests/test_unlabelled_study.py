"""The study without labels: what is learned from and chosen on, its figures by hand, a restart."""

import collections
import json

import cv2
import numpy as np
import pytest
from commands import error_line, run_module

from benchmarks import emoji, frozen_features, picture_sets
from benchmarks import unlabelled as study
from benchmarks.picture_sets import Pictures
from benchmarks.unlabelled import Run
from big_vit.errors import UserError


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode('.png', pixels)[1].tobytes())


def test_a_picture_is_put_on_white_and_padded_before_it_is_averaged(tmp_path):
    pixels = np.zeros((4, 8, 4), np.uint8)  # OpenCV writes blue, green, red, alpha.
    pixels[:, :4] = (0, 0, 200, 255)
    pixels[:, 4:] = (0, 100, 0, 51)  # A fifth of it, on white: 0.2 * 100 + 0.8 * 255.
    write(tmp_path / 'a.png', pixels)
    square = picture_sets.square(tmp_path / 'a.png', 4)
    assert square.tolist() == [
        [[255] * 3] * 4,
        [[200, 0, 0]] * 2 + [[204, 224, 204]] * 2,
        [[200, 0, 0]] * 2 + [[204, 224, 204]] * 2,
        [[255] * 3] * 4,
    ]


def test_a_folder_is_read_once_and_what_is_no_picture_is_left_out(tmp_path):
    for name in ('b/duck_01.png', 'b/duck_02.png', 'a/x/star.png'):
        write(tmp_path / 'pictures' / name, np.full((3, 3, 4), 9, np.uint8))
    (tmp_path / 'pictures' / 'a' / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n')
    cache = tmp_path / 'kept.npz'
    read = picture_sets.folder(tmp_path / 'pictures', 'drawings', cache)
    assert read.labels.tolist() == [0, 1, 1]
    assert read.families == ('a/x/star', 'b/duck', 'b/duck')
    assert read.images.shape == (3, 32, 32, 3)
    (tmp_path / 'pictures' / 'b' / 'duck_01.png').unlink()
    again = picture_sets.folder(tmp_path / 'pictures', 'drawings', cache)
    assert again.families == read.families
    assert (again.images == read.images).all()
    with pytest.raises(UserError, match='has no pictures: apt-get install drawings'):
        picture_sets.folder(tmp_path / 'none', 'drawings', tmp_path / 'none.npz')


def test_a_tenth_is_held_out_by_families_and_no_large_one():
    rng = np.random.default_rng(0)
    families = ['stars'] * 300 + [f'f{number}' for number in rng.integers(0, 400, 1200)]
    rng.shuffle(families)
    learned, chosen = study.divide(tuple(families))
    assert sorted([*learned, *chosen]) == list(range(1500))
    sides = [{families[row] for row in rows} for rows in (learned, chosen)]
    assert not sides[0] & sides[1]
    assert 'stars' in sides[0]
    most = max(count for name, count in collections.Counter(families).items() if name != 'stars')
    assert 150 <= len(chosen) < 150 + most


def test_nothing_is_chosen_on_copies_of_what_is_learned():
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
    images[4] = images[1]  # A copy in another folder; the last but for one level is none.
    images[5] = images[2]
    images[5, 0, 0, 0] ^= 1
    labels, names = np.arange(6), tuple('abcdef')
    pictures = Pictures(images, labels, names)
    learned, chosen = (study.rows_of(pictures, np.arange(*rows)) for rows in ((0, 3), (3, 6)))
    left = study.unseen(chosen, learned)
    assert left.families == ('d', 'f') and left.labels.tolist() == [3, 5]
    assert (left.images == images[[3, 5]]).all()


def test_colours_are_roots_of_the_shares_of_a_histogram():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    for image, row in zip(images, frozen_features.colours(images, 2), strict=True):
        corner = image[:4, 4:].reshape(-1, 3)
        counts = np.histogramdd(corner, bins=(4, 4, 4), range=[(0, 256)] * 3)[0]
        np.testing.assert_allclose(row[64:128] ** 2, counts.ravel() / 16, atol=1e-6)
        assert np.square(row).sum() == pytest.approx(4)


def test_pictures_are_found_again_by_cosine():
    values = np.array([[1.0, 0], [0, 2], [3, 3]])
    altered = np.array([[9.0, 1], [1, 0.1], [1, 1]])  # The second lies near the first.
    assert frozen_features.found_again(values, altered) == pytest.approx(2 / 3)


def test_folds_score_features_that_tell_classes_apart_and_those_that_do_not():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 40)
    apart = np.eye(3)[labels] + 0.01 * rng.normal(size=(120, 3))
    nothing = rng.normal(size=(120, 3))
    for score in (frozen_features.neighbours, frozen_features.logistic, frozen_features.ridge):
        assert score(apart, labels) == 1
        assert score(nothing, labels) < 0.55


def test_margins_are_in_standard_errors_of_the_difference():
    results = [
        {'start': 'pixels', 'mean': {'category': 0.5}, 'error': {'category': None}},
        {'start': 'supervised', 'mean': {'category': 0.55}, 'error': {'category': 0.04}},
        {'start': 'dino', 'mean': {'category': 0.6}, 'error': {'category': 0.03}},
        {'start': 'mae', 'mean': {'category': 0.59}, 'error': {'category': 0.001}},
    ]
    assert study.margins(results) == [
        'category: dino, +10.0 over pixels (3.3 s.e.), +5.0 over supervised (1.0 s.e.)'
    ]


@pytest.mark.slow
def test_every_start_learns_for_the_same_operations_from_what_it_is_told(tmp_path):
    images = np.zeros((130, 32, 32, 3), np.uint8)
    labels = np.arange(130) % 22
    np.savez(tmp_path / 'learned.npz', train_images=images, train_labels=labels)
    steps = {}
    for start in study.TRAINED:
        config = study.config_of(Run(start, 'learned', 1, 3.0), tmp_path, 1e12)
        assert config.lr == pytest.approx(0.03)
        assert config.optim.name == 'muon'
        assert config.data.name == ('fdsl' if start == 'fdsl' else 'arrays')
        steps[start] = config.total_steps
    # A view of a picture costs the supervised start one pass: those with more views take fewer.
    assert steps['dino'] < steps['jepa'] < steps['supervised'] < steps['mae']
    assert abs(steps['fdsl'] - steps['supervised']) <= 1  # Another head.


def test_data_that_is_not_there_is_told_before_anything_is_read(tmp_path):
    ran = run_module('benchmarks.unlabelled', '--data', tmp_path / 'none', '--workdir', tmp_path)
    assert 'npm install --prefix' in error_line(ran)
    assert not list(tmp_path.glob('*.npz'))


def sets(rng):
    def pictures(count, classes, channels=3):
        images = rng.integers(0, 256, (count, 32, 32, channels), np.uint8)
        families = tuple(map(str, range(count)))
        return Pictures(images, np.arange(count, dtype=np.int32) % classes, families)

    groups = tuple(f'g{number}' for number in range(200))
    large = {name: rng.integers(0, 256, (200, 64, 64, 3), np.uint8) for name in emoji.SETS}
    categories = np.arange(200, dtype=np.int32) % 2
    one = emoji.Emoji(groups, categories, categories, ('a', 'b'), groups, large)
    return study.Sets(
        pictures(128, 3),
        pictures(60, 3),
        pictures(80, 4),
        one,
        pictures(1200, 10, 1),
        pictures(10_000, 10, 1),
    )


@pytest.mark.slow
def test_a_study_is_judged_everywhere_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, 'STARTS', ('pixels', 'random', 'mae'))
    monkeypatch.setattr(study, 'SELF_SUPERVISED', ('mae',))
    monkeypatch.setattr(study, 'BUDGET', 12e11)
    monkeypatch.setattr(study, 'TUNED_STEPS', 3)
    monkeypatch.setattr(study, 'BANK', 100)
    small = sets(np.random.default_rng(0))
    for name, images in (('learned', small.learned), ('fashion', small.fashion)):
        arrays = {'train_images': images.images, 'train_labels': images.labels}
        np.savez(tmp_path / f'{name}.npz', **arrays)
    first = study.Study(small, tmp_path, quick=True)
    first.all()
    results = {result['start']: result for result in first.results()}
    assert list(results) == ['pixels', 'random', 'mae']
    tuned = {'tuned_10', 'tuned_100'}
    assert set(results['pixels']['mean']) == set(study.QUESTIONS) - tuned
    for start in ('random', 'mae'):
        assert set(results[start]['mean']) == set(study.QUESTIONS)
    assert all(0 <= x <= 1 for result in results.values() for x in result['mean'].values())
    study.draw(first.results(), tmp_path / 'figure.png')
    assert cv2.imread(str(tmp_path / 'figure.png')).shape[1] > 1000
    assert study.table(first.results()).count('\n') == 4

    rows = (tmp_path / 'runs.jsonl').read_text().splitlines()
    # Of the last line only what was learned from openclipart is there; one is of another config.
    changed = json.loads(rows[5]) | {'config': 'other'}
    (tmp_path / 'runs.jsonl').write_text('\n'.join([*rows[:5], json.dumps(changed)]) + '\n')
    capsys.readouterr()
    again = study.Study(small, tmp_path, quick=True)
    again.all()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(rows) - 5
    kept = [json.loads(text) for text in (tmp_path / 'runs.jsonl').read_text().splitlines()]
    assert kept[:5] == [json.loads(text) for text in rows[:5]]
    for name, mean in results['mae']['mean'].items():
        again_mean = {r['start']: r for r in again.results()}['mae']['mean'][name]
        assert again_mean == pytest.approx(mean, abs=1e-6)


def test_readouts_fit_the_tokens_of_the_network():
    side = picture_sets.SIDE // study.PATCH
    for start in ('random', *study.TRAINED):
        for block, grid in study.places(start):
            assert block < study.MODEL['model.depth']
            assert not grid or side % grid == 0
