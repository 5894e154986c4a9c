"""The figures of the benchmark of a slow store, and its links."""

import json
import multiprocessing
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import emulators, slow_store


def test_rates_are_those_of_the_batches_after_the_warm_up():
    # A batch each half second from the fourth second on, but for a pause.
    times = np.array([4.0, 4.5, 5.0, 5.5, 7.5, 8.0])
    assert slow_store.rates(times, warm=4.75) == {
        'first_s': 4.0,
        'images_per_s_from_start': pytest.approx(64 * 6 / 8),
        'images_per_s': pytest.approx(64 * 3 / 3),
        'longest_pause_s': 2.0,
    }


def test_medians_are_of_each_figure_and_contenders_without_all_places_are_left_out():
    rounds = {
        'a': {
            'local': [{'x': 1, 'traffic': {'bytes': 5}}, {'x': 9, 'traffic': {'bytes': 7}}],
            'store': [{'x': 2, 'traffic': {'bytes': 1}}],
        },
        'b': {'local': [{'x': 1}]},
    }
    assert slow_store.medians_of(rounds) == {
        'a': {
            'local': {'x': 5, 'traffic': {'bytes': 6}},
            'store': {'x': 2, 'traffic': {'bytes': 1}},
        }
    }


def test_a_link_has_one_bandwidth_for_all():
    link = emulators.Link(bytes_per_s=1e6)
    began = time.monotonic()
    for _ in range(4):
        link.pass_through(50_000)
    assert time.monotonic() - began >= 0.2


def test_faults_come_in_their_shares():
    faults = list(map(emulators.at_random(0.02, 0.01, 3.0), range(20_000)))
    for fault, share in (('refused', 0.01), ('lost', 0.01), (3.0, 0.01), (None, 0.97)):
        assert faults.count(fault) / len(faults) == pytest.approx(share, abs=0.003)


@pytest.mark.slow
def test_the_command(tmp_path):
    if emulators.lacking('s3'):
        pytest.skip(f'needs {" and ".join(emulators.lacking("s3"))}')
    command = ['--shards', '2', '--pictures', '40', '--warm', '0', '--seconds', '0.1']
    command += ['--rounds', '1', '--json', str(tmp_path / 'x'), '--peers']
    done = subprocess.run(
        [sys.executable, '-m', 'benchmarks.slow_store', *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    medians = json.loads((tmp_path / 'x').read_text())['median']
    assert list(medians) == list(slow_store.OURS)
    for by_place in medians.values():
        assert by_place['local']['traffic']['bytes'] == 0
        assert by_place['store']['traffic']['bytes'] > 1e6
    assert done.stdout.count('\n| big_vit, ') == 2


def _work(seconds, done, go):
    while time.process_time() < seconds:
        pass
    done.set()
    go.wait()


def test_processor_time_is_also_that_of_workers_that_have_not_ended():
    context = multiprocessing.get_context('spawn')
    done, go = context.Event(), context.Event()
    worker = context.Process(target=_work, args=(0.3, done, go))
    before, own = slow_store.processor_seconds(), time.process_time()
    worker.start()
    assert done.wait(120)
    spent = slow_store.processor_seconds() - before - (time.process_time() - own)
    go.set()
    worker.join()
    assert spent >= 0.25
