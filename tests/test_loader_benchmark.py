"""The benchmark of loaders: its pictures, one measurement of ours and of a peer, its table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, environment

from benchmarks import loader
from big_vit.data import decode


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('jpegs')
    about = loader.write_images(folder, 24, 75, 100)
    assert about['files'] == 24
    assert about['mean_kilobytes'] > 3
    return folder


def test_the_pictures_are_photographs_of_the_size_asked_for(folder):
    files = loader.files_of(folder)
    assert len(files) == 24
    pixels = [decode.Encoded(Path(file).read_bytes()).pixels() for file in files[:4]]
    assert {image.shape for image in pixels} == {(75, 100, 3)}
    assert all(image.std() > 10 for image in pixels)


@pytest.mark.parametrize('name', ['big_vit, from cache=decoded at 256', 'Pillow, threads'])
def test_a_contender_is_measured_in_a_process_of_its_own(folder, name):
    command = [sys.executable, '-m', 'benchmarks.loader', '--contender', name]
    command += ['--folder', folder, '--cores', '1', '--seconds', '0.2']
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found['images_per_s'] > 10
    assert found['cpu_ms_per_image'] == pytest.approx(1e3 / found['images_per_s'], rel=0.8)


def test_a_peer_that_is_not_there_is_left_out(folder, capsys):
    if loader.run('tf.data, decode_and_crop_jpeg', sys.executable, folder, 1, 0.1) is None:
        assert 'left out: tf.data' in capsys.readouterr().err


def test_the_table_compares_with_tf_data():
    def row(rate):
        return {'images_per_s': rate, 'cpu_ms_per_image': 1e3 / rate, 'peak_memory_mb': 100.0}

    found = {
        'big_vit, inception_crop': {'1': row(500.0), '2': row(900.0)},
        'tf.data, decode_and_crop_jpeg': {'1': row(400.0), '2': row(600.0)},
    }
    ours, theirs = loader.table(found).splitlines()[2:]
    assert ours == '| big_vit, inception_crop | 500 | 1.25 | 900 | 1.80 | 2.000 | 100 |'
    assert '| 400 | 1.00 | 600 | 1.50 |' in theirs
