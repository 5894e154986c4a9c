"""A trace of some steps of a run."""

import gzip
import json

import pytest
from commands import error_line, run
from test_train import TINY
from tiny import flags

from big_vit import config as config_lib
from big_vit import train
from big_vit.metrics import profiler

RUN = {**TINY, 'total_steps': 15, 'log.every_steps': 100, 'checkpoint.every_steps': 100}


def traced_steps(workdir):
    """The numbers of the steps that a trace marks."""
    (file,) = (workdir / 'trace').rglob('perfetto_trace.json.gz')
    assert list((workdir / 'trace').rglob('*.xplane.pb'))
    events = json.loads(gzip.decompress(file.read_bytes()))['traceEvents']
    return [int(e['args']['step_num']) for e in events if 'step_num' in e.get('args', {})]


@pytest.mark.parametrize(
    'total, count, seen',
    [(13, 2, [10, 11]), pytest.param(12, 50, [10, 11], marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_a_trace_has_the_steps_that_were_asked_for(tmp_path, capsys, total, count, seen):
    config = config_lib.resolve({**RUN, 'total_steps': total, 'profile': count})
    train.run(config, tmp_path)
    assert sorted(traced_steps(tmp_path)) == seen
    said = f'trace   from step {profiler.WARMUP_STEPS} on: {tmp_path}/trace'
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_without_it_leaves_none_and_a_resumed_one_may_ask_for_it(tmp_path):
    train.run(config_lib.resolve({**RUN, 'total_steps': 3}), tmp_path / 'a')
    assert not (tmp_path / 'a' / 'trace').exists()
    changed = {'a': {'profile': 0}, 'b': {'profile': 5}}
    (line,) = config_lib.difference(changed['a'], changed['b'])
    assert line.startswith(config_lib.RESUMABLE)


@pytest.mark.slow
def test_a_run_too_short_for_a_trace_says_so(tmp_path, capsys):
    train.run(config_lib.resolve({**RUN, 'total_steps': 10, 'profile': 5}), tmp_path)
    assert 'trace   none: this start ended before step 11' in capsys.readouterr().out


def test_a_wrong_number_is_named(tmp_path):
    config = ('--config', 'configs/fashion_mnist.py', *flags({'profile': '-1'}))
    said = error_line(run('train', *config, '--workdir', tmp_path))
    assert 'config: profile must be a whole number from 0 to' in said
