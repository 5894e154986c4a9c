"""What surrounds JAX: errors as a user sees them, and what devices can do."""

import glob
import subprocess
import sys

import pytest
from commands import environment
from gate import mostly_slow

from big_vit import runtime
from big_vit.errors import UserError
from big_vit.planning import topology


def ended(capsys, error):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as end:
        runtime.command(main)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    'message, holder',
    [
        ('The TPU is already in use by process with pid 4242. Not attempting', 'process 4242'),
        ('Internal error when accessing libtpu multi-process lockfile.', 'another process'),
    ],
)
def test_tpus_that_another_process_holds_are_one_line(capsys, message, holder):
    status, said = ended(capsys, RuntimeError(f"Unable to initialize backend 'tpu': {message}"))
    assert status == 2 and said.startswith('error: ') and said.count('\n') == 1
    assert holder in said and 'libtpu_lockfile' in said


def test_too_little_memory_is_one_line(capsys):
    error = RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBacktrace')
    status, said = ended(capsys, error)
    assert status == 2 and said.count('\n') == 1 and 'lower batch_size' in said


@pytest.mark.parametrize('platform', mostly_slow(['cuda', 'cdua', 'cpu,tqu'], 'cuda'))
@pytest.mark.slow
def test_a_platform_that_is_not_there_is_one_line_that_says_what_is(platform):
    text = 'from big_vit import runtime; import jax; runtime.command(lambda argv: jax.devices())'
    variables = {**environment(), 'JAX_PLATFORMS': platform}
    done = subprocess.run(
        [sys.executable, '-c', text], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert f'JAX_PLATFORMS={platform}: ' in done.stderr and 'only cpu: unset it' in done.stderr


def test_mistakes_are_status_2_and_bugs_are_not_hidden(capsys):
    assert ended(capsys, UserError('no such file')) == (2, 'error: no such file\n')
    with pytest.raises(RuntimeError, match='a bug'):
        runtime.command(lambda argv: (_ for _ in ()).throw(RuntimeError('a bug')))


@pytest.mark.skipif(
    sys.platform != 'linux' or any(map(glob.glob, runtime._ACCELERATORS)),
    reason='only where Linux shows no accelerator',
)
def test_a_machine_without_accelerator_is_not_told_so_by_libtpu():
    text = 'from big_vit import runtime; runtime.start(); import jax; print(jax.devices())'
    plain = {k: v for k, v in environment().items() if k != 'JAX_PLATFORMS'}
    done = subprocess.run([sys.executable, '-c', text], env=plain, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '') and 'CpuDevice' in done.stdout


@pytest.mark.parametrize(
    'kind, chip, devices',
    [
        ('TPU v4', 'v4', 1),
        ('TPU v5 lite', 'v5e', 1),
        ('TPU v5', 'v5p', 1),
        ('TPU v6 lite', 'v6e', 1),
        ('TPU7x', 'tpu7x', 2),
    ],
)
def test_planning_and_training_know_the_same_peaks(kind, chip, devices):
    assert runtime.PEAK_FLOPS[kind] * devices == topology.CHIPS[chip].peak_flops
