"""The emoji benchmark: what is split and chosen on what, its figures by hand, and bad input."""

import json
import math

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from commands import error_line, run_module

from benchmarks import emoji as study
from benchmarks.emoji import Run

CATEGORIES = ('Animals & Nature', 'Flags', 'Objects')


def run(*more):
    return run_module('benchmarks.emoji', *more, timeout=900)


def entry(name, unified, category, image):
    return {
        'name': name,
        'short_name': name.lower(),
        'unified': unified,
        'category': category,
        'subcategory': name.lower(),
        'image': image,
        'has_img_google': True,
        'has_img_twitter': True,
    }


@pytest.fixture
def make(tmp_path):
    """Writes a folder as npm does; each picture a blot of its own, the same in both sets."""

    def write(entries, size=64):
        rng = np.random.default_rng(1)
        for one in entries:
            small = rng.integers(0, 256, (8, 8, 4), np.uint8)
            picture = cv2.resize(small, (size, size), interpolation=cv2.INTER_NEAREST)
            for name, shift in (('google', 0), ('twitter', 20)):
                folder = tmp_path / 'node_modules' / f'emoji-datasource-{name}'
                file = folder / 'img' / name / '64' / one['image']
                file.parent.mkdir(parents=True, exist_ok=True)
                shifted = np.clip(picture.astype(int) + shift, 0, 255).astype(np.uint8)
                file.write_bytes(cv2.imencode('.png', shifted)[1].tobytes())
                (folder / 'emoji.json').write_text(json.dumps(entries))
        return tmp_path

    return write


def test_genders_skin_and_pictures_that_come_twice_are_left_out(make):
    data = make(
        [
            entry('FARMER', '1F9D1-200D-1F33E', 'People & Body', 'a.png'),
            entry('MAN FARMER', '1F468-200D-1F33E', 'People & Body', 'b.png'),
            entry('WOMAN GUARD', '1F482-200D-2640-FE0F', 'People & Body', 'c.png'),
            entry('FEMALE SIGN', '2640-FE0F', 'Symbols', 'd.png'),
            entry('Norway Flag', '1F1F3-1F1F4', 'Flags', 'e.png'),
            entry('Bouvet Island Flag', '1F1E7-1F1FB', 'Flags', 'f.png'),
            entry('SKIN', '1F3FB', 'Component', 'g.png'),
        ]
    )
    folder = data / 'node_modules' / 'emoji-datasource-google' / 'img' / 'google' / '64'
    (folder / 'f.png').write_bytes((folder / 'e.png').read_bytes())
    found = study.read(data)
    assert found.names == ('FARMER', 'FEMALE SIGN', 'Norway Flag')
    assert found.subcategories.tolist() == [1, 2, 0]
    assert [found.category_names[i] for i in found.categories] == [
        'People & Body',
        'Symbols',
        'Flags',
    ]
    assert found.images['twitter'].shape == (3, 64, 64, 3)


def test_pictures_lie_on_white(make):
    data = make([entry('BALL', '26BD', 'Objects', 'a.png')])
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, 32:] = (10, 20, 200, 255)
    pixels[0, 63, 3] = 51
    file = data / 'node_modules/emoji-datasource-google/img/google/64/a.png'
    file.write_bytes(cv2.imencode('.png', pixels)[1].tobytes())
    found = study.read(data).images['google'][0]
    assert (found[:, :32] == 255).all() and tuple(found[5, 40]) == (200, 20, 10)
    assert tuple(found[0, 63]) == (244, 208, 206)


def test_variants_of_one_thing_are_a_group():
    same = [
        ('BLUE HEART', 'GREEN HEART'),
        ('CLOCK FACE ONE OCLOCK', 'CLOCK FACE TWO-THIRTY'),
        ('PREGNANT WOMAN', 'PREGNANT MAN'),
        ('LEFTWARDS HAND', 'RIGHTWARDS HAND'),
        ('WOMAN', 'MAN'),
    ]
    assert all(study.group_of(a) == study.group_of(b) for a, b in same)
    assert study.group_of('CAT FACE') != study.group_of('DOG FACE')


def test_the_split_keeps_groups_whole_and_is_always_the_same():
    groups = tuple(f'group {i // 3}' for i in range(300))
    sides = study.divide(groups)
    assert sorted(np.concatenate(list(sides.values()))) == list(range(300))
    found = [{groups[i] for i in rows} for rows in sides.values()]
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
    assert len(sides['test']) == pytest.approx(120, abs=3)
    assert len(sides['val']) == pytest.approx(36, abs=5)
    again = study.divide(groups)
    assert all((again[name] == rows).all() for name, rows in sides.items())


def test_what_chooses_never_sees_what_it_chooses_on_or_what_is_held_out(tmp_path):
    first = study.config_of('google', 0, tmp_path / 'google.npz', 70, False)
    assert first.data.split == 'train[:70]'
    assert study.config_of('google', 1, tmp_path / 'google.npz', 70, False).data.split == 'train'
    count = 100
    pictures = np.zeros((count, 64, 64, 3), np.uint8)
    pictures[:, 0, 0, 0] = np.arange(count)
    emoji = study.Emoji(
        tuple(map(str, range(count))),
        np.zeros(count, np.int32),
        np.zeros(count, np.int32),
        (study.FLAGS,),
        tuple(map(str, range(count))),
        {'google': pictures, 'twitter': 255 - pictures},
    )
    study.Study(emoji, tmp_path)
    written = np.load(tmp_path / 'google.npz')
    sides = study.divide(emoji.groups)
    learnt = written['train_images'][:, 0, 0, 0]
    assert set(learnt[: len(sides['fit'])]) == set(sides['fit'])
    assert set(learnt) == set(sides['fit']) | set(sides['val'])
    assert not set(learnt) & set(sides['test'])


@pytest.mark.parametrize('width', [3, 50])
def test_whitening_is_of_what_is_known_alone(width):
    rng = np.random.default_rng(0)
    known = rng.standard_normal((20, width)) * np.arange(1, width + 1)
    centre, matrix = study.whitening(known, 0.5, ridge=0.0)
    rows = (known - centre) @ matrix
    there = rows.shape[1]
    assert there == min(width, 19)
    np.testing.assert_allclose(rows.T @ rows / 20, np.eye(there), atol=1e-6)
    assert study.whitening(known, 0.0)[1] is None


def test_retrieval_and_category_by_hand():
    google = np.eye(4, 6)
    twitter = google.copy()
    twitter[3] = google[0] * 0.9 + google[3] * 0.1  # The fourth is found as the first.
    values = {'google': google, 'twitter': twitter}
    assert study.recall(values, np.arange(4)) == 1.0
    assert study.recall(values, np.arange(4), both=True) == pytest.approx((1 + 3 / 4) / 2)
    rng = np.random.default_rng(0)
    kinds = np.repeat([0, 1, 2], [20, 20, 4])
    rows = rng.standard_normal((44, 5)) + 50 * np.eye(5)[kinds]
    values = {'twitter': rows, 'mirrored': rows}
    assert study.categorised(values, kinds, np.arange(44), 10, 2) == 1.0
    noise = {name: rng.standard_normal((44, 5)) for name in values}
    assert study.categorised(noise, kinds, np.arange(44), 10) < 0.75


def test_the_objective_wants_views_of_one_identity_and_pictures_of_one_kind_alike():
    # The first two pictures are alike, and so are the last two.
    rows = jnp.eye(8)[jnp.array([0, 0, 1, 1])]
    tokens = jnp.broadcast_to(rows[:, None], (4, 16, 8))

    def apply(variables, images, **more):
        return None, {'blocks': [tokens, tokens]}

    def loss(label, *kinds):
        batch = {'image': jnp.zeros((4, 8, 8, 3), jnp.uint8), 'label': jnp.array(label)}
        return float(study.objective(apply, np.array(kinds).T)({}, (), batch, None, 0)[0])

    sharp, weight = 1 / study.TEMPERATURE, study.BY_KIND
    found = math.log(1 + 2 * math.exp(-sharp))
    assert loss([0, 0, 1, 1], [5, 6]) == pytest.approx((1 + weight) * found, abs=1e-5)
    # All of one kind: of the three others one is near, and the two that are far count as well.
    spread = math.log(math.exp(sharp) + 2) - sharp / 3
    assert loss([0, 0, 1, 1], [5, 5]) == pytest.approx(found + weight * spread, abs=1e-4)
    both = loss([0, 0, 1, 1], [5, 5], [5, 6])
    assert both == pytest.approx((1 + weight) * found + weight * spread, abs=1e-4)
    assert loss([0, 1, 0, 1], [5, 6]) > 5


def test_bad_folders_are_one_line_with_the_fix(tmp_path, make):
    assert 'npm install --prefix' in error_line(run('--data', tmp_path / 'none'))
    data = make([entry('BALL', '26BD', 'Objects', 'a.png')], size=65)
    assert '65x65 pixels, not 64x64' in error_line(run('--data', data))
    folder = data / 'node_modules/emoji-datasource-google'
    (folder / 'img/google/64/a.png').write_bytes(b'\x89PNG\r\n\x1a\n broken')
    assert 'install it again' in error_line(run('--data', data))
    (folder / 'emoji.json').write_text('[{"name": 3}]')
    assert 'is not the list of emoji' in error_line(run('--data', data))


@pytest.mark.slow
def test_it_makes_a_table_and_a_picture_and_does_nothing_twice(tmp_path, make):
    # Enough of each category for twenty shots among the 40 % that are held out.
    entries = [
        entry(f'THING {i}', f'{0x1F000 + i:X}', CATEGORIES[i % 3], f'{i:x}.png') for i in range(360)
    ]
    args = ['--quick', '--data', make(entries), '--workdir', tmp_path / 'runs']
    first = run(*args)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / 'runs' / 'quick'
    rows = [json.loads(text) for text in (folder / 'runs.jsonl').read_text().splitlines()]
    assert [(row['start'], row['seed']) for row in rows] == [
        (start, seed) for start in study.STARTS for seed in (0, 1)
    ]
    written = json.loads((folder / 'emoji.json').read_text())
    assert [one['start'] for one in written['results']] == list(study.STARTS)
    for one in written['results']:
        own = next(row for row in rows if row['start'] == one['start'] and row['seed'])
        assert one['scores'] == {name: [score] for name, score in own['test'].items()}
        best = max(one['validation'], key=lambda tried: tried['retrieval'])
        assert one['readouts']['retrieval'] == best['how']
    assert (folder / 'emoji.png').stat().st_size > 5_000
    again = run(*args)
    table = again.stdout[again.stdout.index('| ') :]
    assert ' seed ' not in again.stdout and first.stdout.endswith(table)


def test_a_finished_run_of_another_config_does_not_count(tmp_path):
    pictures = np.zeros((30, 64, 64, 3), np.uint8)
    names = tuple(map(str, range(30)))
    images = dict.fromkeys(study.SETS, pictures)
    emoji = study.Emoji(
        names, np.zeros(30, np.int32), np.zeros(30, np.int32), (study.FLAGS,), names, images
    )
    begun = study.Study(emoji, tmp_path)
    digest = study.config_lib.digest(begun.config(Run('google', 1)))
    row = {'start': 'google', 'seed': 1, 'config': digest}
    (tmp_path / 'runs.jsonl').write_text(json.dumps(row) + '\n')
    assert study.Study(emoji, tmp_path).done(Run('google', 1)) == row
    assert study.Study(emoji, tmp_path, quick=True).done(Run('google', 1)) is None
    assert study.Study(emoji, tmp_path).done(Run('google', 2)) is None
