"""Runs of several real processes: the same numbers, and a clear end whatever is lost."""

import contextlib
import json
import shutil
import signal
import socket
import sys
import threading
import time

import jax
import numpy as np
import pytest
from commands import ROOT, Processes, error_line, free_port, run, run_many
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import hashes, rows_without_timing

from big_vit import checkpoint, metrics
from big_vit.distributed import hosts
from big_vit.distributed.cluster import Cluster
from big_vit.distributed.roll_call import (
    LOST,
    Roll,
    answer_roll,
    bind_address,
    call_roll,
    difference,
    timeout_seconds,
)
from big_vit.distributed.watchdog import is_lost_peer
from big_vit.distributed.wire import run_secret
from big_vit.errors import UserError

TOTAL = 40
CONFIG = f"""
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({{
        'total_steps': {TOTAL}, 'batch_size': 16, 'image_size': 8, 'lr': 1e-2, 'ema': 0.9,
        'model': {{'variant': 'mu/4', 'dtype': 'float32', 'dropout': 0.05}},
        'mesh': {{'min_shard_size': 0}},
        'data': {{'name': 'digits', 'transform': 'random_crop(size, 1)'}},
        'evals': {{'test': {{'split': 'test[:50]', 'every_steps': 20}}}},
        'optim': {{'weight_decay': 0.1}},
        'schedule': {{'warmup_steps': 20}},
        'checkpoint': {{'every_steps': 12}}, 'log': {{'every_steps': 1}},
    }})
"""
# How long after a loss the others may take to end; they need about a second.
SOON = 15


@pytest.fixture(scope='module')
def command(tmp_path_factory):
    path = tmp_path_factory.mktemp('config') / 'tiny.py'
    path.write_text(CONFIG)
    return 'train', '--config', path, '--workdir'


@pytest.fixture(scope='module')
def alone(tmp_path_factory, command):
    """One process with four devices."""
    workdir = tmp_path_factory.mktemp('alone') / 'w'
    result = run(*command, workdir, devices=4)
    assert result.returncode == 0, result.stdout + result.stderr
    return workdir


@pytest.fixture(scope='module')
def pair(tmp_path_factory, command):
    """Two processes with two devices each."""
    workdir = tmp_path_factory.mktemp('pair') / 'w'
    return workdir, run_many(*command, workdir)


def assert_same_run(workdir, other, steps=TOTAL, rtol=1e-5):
    """Rows of the same steps with the same losses; other metrics may round a little more."""
    got, want = (
        [row for row in rows_without_timing(path) if row['step'] <= steps]
        for path in (workdir, other)
    )
    assert [row.keys() for row in got] == [row.keys() for row in want]
    assert [row['step'] for row in got] == [row['step'] for row in want]
    for ours, theirs in zip(got, want, strict=True):
        for name, value in theirs.items():
            # What counts examples jumps where a rounding turns one of them over.
            near = rtol if name.endswith('loss') else max(rtol, 1e-3)
            if rtol < 1e-3 or name.endswith('loss'):
                np.testing.assert_allclose(ours[name], value, near, 1e-6, err_msg=name)


def wait_for_step(processes, workdir, step):
    until = time.monotonic() + 120
    while time.monotonic() < until and all(p.poll() is None for p in processes.all):
        rows = metrics.read(workdir)
        if rows and rows[-1]['step'] >= step:
            return
        time.sleep(0.01)
    raise AssertionError([r.stdout + r.stderr for r in processes.wait(1)])


@pytest.mark.slow
def test_two_processes_see_what_one_sees_and_only_the_first_speaks(alone, pair):
    workdir, (first, second) = pair
    assert_same_run(workdir, alone, steps=20)
    assert json.loads((workdir / 'config.json').read_text())['ema'] == 0.9
    assert f'done    step {TOTAL}' in first.stdout
    assert '2 processes (JAX_* variables)' in first.stdout
    assert '2 x cpu on 2 process(es)' in first.stdout
    assert 'loss' not in second.stdout
    assert 'process 1 of 2' in second.stdout and 'waits for the coordinator' in second.stdout


@pytest.fixture(scope='module')
def stopped(tmp_path_factory, command):
    """Two processes of which one got SIGTERM; the workdir and the step that it holds."""
    workdir = tmp_path_factory.mktemp('stopped') / 'w'
    with Processes(*command, workdir) as processes:
        wait_for_step(processes, workdir, 13)
        processes.all[1].send_signal(signal.SIGTERM)
        first, second = processes.wait()
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    saved = checkpoint.steps(workdir)[-1]
    assert 13 <= saved < TOTAL
    assert f'stopped by a signal: saved step {saved} of {TOTAL}' in first.stdout
    return workdir, saved


@pytest.mark.slow
def test_what_two_saved_at_sigterm_one_continues_on_another_mesh(tmp_path, command, stopped, alone):
    workdir = shutil.copytree(stopped[0], tmp_path / 'w')
    other = ('--config.mesh.replica=-1', '--config.mesh.fsdp=1', '--config.model.remat=full')
    result = run(*command, workdir, *other, devices=2)
    assert f'resume  from step {stopped[1]}' in result.stdout, result.stdout + result.stderr
    changes = "mesh.fsdp: -1 -> 1; mesh.replica: 1 -> -1; model.remat: 'none' -> 'full'"
    assert f'config  changed since the last start: {changes}\n' in result.stdout
    assert_same_run(workdir, alone, steps=20)
    assert_same_run(workdir, alone, rtol=1e-2)


@pytest.mark.slow
def test_what_two_saved_at_sigterm_four_continue_on_another_mesh(tmp_path, command, stopped, alone):
    workdir = shutil.copytree(stopped[0], tmp_path / 'w')
    other = ('--config.mesh.fsdp=2', '--config.mesh.tensor=2')
    (result, *_) = run_many(*command, workdir, *other, processes=4, devices=1)
    assert f'resume  from step {stopped[1]}' in result.stdout
    assert_same_run(workdir, alone, steps=20)
    assert_same_run(workdir, alone, rtol=1e-2)


@pytest.mark.slow
def test_four_processes_see_what_one_sees(tmp_path, command, alone):
    run_many(*command, tmp_path / 'w', processes=4, devices=1)
    assert_same_run(tmp_path / 'w', alone, steps=20)


@pytest.mark.slow
def test_ctrl_c_on_one_saves_on_all(tmp_path, command):
    workdir = tmp_path / 'w'
    with Processes(*command, workdir) as processes:
        wait_for_step(processes, workdir, 13)
        processes.all[0].send_signal(signal.SIGINT)
        first, second = processes.wait()
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert f'stopped by a signal: saved step {checkpoint.steps(workdir)[-1]} of' in first.stdout


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_kill_9_of_one_ends_the_other_and_the_same_command_goes_on(tmp_path, command, pair, victim):
    workdir = tmp_path / 'w'
    with Processes(*command, workdir) as processes:
        wait_for_step(processes, workdir, 15)
        processes.all[victim].kill()
        began = time.monotonic()
        other = processes.wait(SOON)[1 - victim]
    assert time.monotonic() - began < SOON
    assert other.returncode == LOST, other.stderr
    saved = checkpoint.steps(workdir)[-1]
    assert saved < TOTAL, 'killed too late to show anything'
    errors = [line for line in other.stderr.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and 'Traceback' not in other.stderr
    assert f'error: process {victim} (' in errors[0] and ') is gone' in errors[0]
    assert f'The same command on all hosts resumes from step {saved}' in errors[0]
    run_many(*command, workdir)
    assert rows_without_timing(workdir) == rows_without_timing(pair[0])
    assert hashes(workdir, TOTAL) == hashes(pair[0], TOTAL)


# A process whose disk gives back something else than the others', for the newest checkpoint.
HALF_BLIND = """
import os, sys
from big_vit import checkpoint, train

whole = checkpoint.read_sidecar

def read(workdir, step):
    if os.environ['JAX_PROCESS_ID'] == '1' and step == int(sys.argv[1]):
        raise checkpoint.CorruptCheckpointError('input/output error')
    return whole(workdir, step)

checkpoint.read_sidecar = read
train.main(sys.argv[2:])
"""


@pytest.mark.slow
def test_what_one_process_cannot_read_no_process_resumes_from(tmp_path, command, pair):
    workdir = shutil.copytree(pair[0], tmp_path / 'w')
    argv = [sys.executable, '-c', HALF_BLIND, str(TOTAL), *map(str, command[1:]), str(workdir)]
    (first, _) = run_many(argv)
    assert 'falling back to the checkpoint before' in first.stderr
    assert f'resume  from step {checkpoint.steps(pair[0])[-2]}' in first.stdout
    assert hashes(workdir, TOTAL) == hashes(pair[0], TOTAL)


# A process that compiles what the other has in its cache, or whose data opens late; Gloo gives up
# when two processes come to their first collective 30 seconds apart.
LATE = """
import os, sys, time
import jax
from big_vit import train

compile_step, open_batches = jax.stages.Lowered.compile, train.train_batches

def late(what):
    if os.environ['JAX_PROCESS_ID'] == '1' and what == sys.argv[1]:
        time.sleep(35)

def compiled(lowered, *args, **options):
    late('compile' if 'train_step' in lowered.as_text()[:200] else 'another program')
    return compile_step(lowered, *args, **options)

def opened(*args):
    late('data')
    return open_batches(*args)

jax.stages.Lowered.compile, train.train_batches = compiled, opened
train.main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize('what', ['compile', 'data'])
def test_one_that_comes_much_later_to_the_first_step_is_waited_for(tmp_path, command, pair, what):
    workdir = tmp_path / 'w'
    began = time.monotonic()
    run_many([sys.executable, '-c', LATE, what, *map(str, command[1:]), str(workdir)])
    assert time.monotonic() - began > 35
    assert hashes(workdir, TOTAL) == hashes(pair[0], TOTAL)


# A process that leaves the first collective as Gloo does when its peers do not come.
UNREACHABLE = """
import os, sys
import jax
from big_vit import train

def lost(*_):
    raise jax.errors.JaxRuntimeError('UNKNOWN: Gloo all-reduce failed: Read timeout')

if os.environ['JAX_PROCESS_ID'] == '0':
    train.starting_state = lost
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_collective_that_fails_is_a_lost_process_for_all(tmp_path, command):
    argv = [sys.executable, '-c', UNREACHABLE, *map(str, command[1:]), str(tmp_path / 'w')]
    with Processes(argv) as processes:
        lines = ends_alike(processes.wait(90), LOST)
    for line in lines:
        assert 'the processes lost each other: UNKNOWN: Gloo all-reduce failed' in line
        assert 'The same command on all hosts resumes' in line


@pytest.mark.parametrize(
    ('text', 'lost'),
    [
        ('UNKNOWN: Gloo all-reduce failed: [tcp/pair.cc:598] Connection closed by peer', True),
        ('UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED: GetKeyValue()', True),
        ('UNAVAILABLE: Failed to send RPC to coordination service', True),
        ('INTERNAL: NCCL operation ncclAllReduce failed: remote process exited', True),
        ('RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes', False),
        ('INTERNAL: NCCL operation failed: Cuda failure: out of memory', False),
        ('INVALID_ARGUMENT: Executable expected parameter 0 of size 4', False),
        ('INTERNAL: Generated function failed: CpuCallback error', False),
    ],
)
def test_which_errors_of_jax_mean_a_lost_process(text, lost):
    assert is_lost_peer(jax.errors.JaxRuntimeError(text)) == lost
    assert not is_lost_peer(RuntimeError(text))


@pytest.mark.slow
def test_transfer_and_evaluate_as_two_processes(tmp_path, pair):
    init = f'--config.init={pair[0]}'
    config = ('--config', 'configs/transfer_digits.py', init, '--workdir', tmp_path / 'w')
    small = (
        '--config.total_steps=4',
        '--config.batch_size=16',
        '--config.log.every_steps=1',
        '--config.image_size=12',
        '--config.evals.test.split=test[:50]',
    )
    first, second = run_many('transfer', *config, *small)
    assert 'control: same recipe from random' in first.stdout and 'top-1' not in second.stdout
    (scored, _) = run_many('evaluate', '--checkpoint', tmp_path / 'w' / 'pretrained', '--json')
    got = json.loads(scored.stdout.splitlines()[-1])['test']
    want = json.loads((tmp_path / 'w' / 'transfer.json').read_text())['pretrained']
    assert got['count'] == want['test/count'] == 50
    assert got['loss'] == pytest.approx(want['test/loss'], rel=1e-5)


def ends_alike(results, status=2):
    """The error line of each process, which all end with this status and without a traceback."""
    lines = []
    for result in results:
        assert result.returncode == status, result.stdout + result.stderr
        assert 'Traceback' not in result.stderr
        (line,) = (x for x in result.stderr.splitlines() if x.startswith('error: '))
        lines.append(line)
    return lines


@pytest.mark.slow
def test_other_sources_on_one_host_stop_all_at_once(tmp_path, command):
    other = tmp_path / 'other'
    shutil.copytree(ROOT / 'big_vit', other / 'big_vit')
    with (other / 'big_vit' / 'steps.py').open('a') as file:
        file.write('# A local change.\n')
    changed = {2: {'PYTHONPATH': str(other)}}
    folders = [ROOT, ROOT, other]  # Python looks in the current folder first.
    with Processes(*command, tmp_path / 'w', processes=3, each=changed, cwd=folders) as processes:
        lines = ends_alike(processes.wait(60))
    assert lines[0] == lines[1] == lines[2]
    assert 'code is ' in lines[0] and 'on process 2 (' in lines[0]
    assert not (tmp_path / 'w').exists()


def test_another_config_on_one_host_stops_all_at_once(tmp_path, command):
    # What differs is in a file here, for all processes get the same command line.
    folders = [tmp_path / 'a', tmp_path / 'b']
    for lr, folder in enumerate(folders, 1):
        folder.mkdir()
        (folder / 'c.py').write_text(CONFIG.replace("'lr': 1e-2", f"'lr': {lr}e-2"))
    arguments = ('train', '--config', 'c.py', '--workdir', tmp_path / 'w')
    with Processes(*arguments, cwd=folders) as processes:
        lines = ends_alike(processes.wait(60))
    assert lines[0] == lines[1]
    assert 'the processes of this run are not alike: config is ' in lines[0]
    assert not (tmp_path / 'w').exists()


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_stops_all(tmp_path, command):
    folders = [tmp_path / 'a', tmp_path / 'b']
    for folder in folders:
        folder.mkdir()
    paths = {'cwd': folders, 'BIG_VIT_START_TIMEOUT': '10'}
    with Processes(*command, 'here', **paths) as processes:
        lines = ends_alike(processes.wait(120))
    for line in lines:
        assert '--workdir: here of process 0' in line and 'that all hosts share' in line


@pytest.mark.parametrize('shared', [True, False], ids=['shared', 'of its own'])
@pytest.mark.slow
def test_two_processes_whose_programs_are_in_the_cache_see_the_same(tmp_path, command, shared):
    """Only process 0 writes to JAX's cache: with caches of their own the other one compiles."""
    each = {
        process: {
            'JAX_COMPILATION_CACHE_DIR': str(tmp_path / ('cache' if shared else f'{process}'))
        }
        for process in range(2)
    }
    told = {
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_DEBUG_LOG_MODULES': 'jax._src.compiler',
    }
    runs, hits = {}, 'Persistent compilation cache hit for'
    for state in ('cold', 'warm'):
        results = run_many(*command, tmp_path / state, each=each, **told)
        assert (hits in results[0].stderr) == (state == 'warm')
        # Whether JAX finds process 0's programs for process 1 is JAX's affair.
        assert shared or hits not in results[1].stderr
        runs[state] = rows_without_timing(tmp_path / state), hashes(tmp_path / state, TOTAL)
    assert runs['warm'] == runs['cold']


@pytest.mark.slow
def test_processes_that_miss_each_other_end_in_time_and_say_who_is_missing(tmp_path, command):
    began = time.monotonic()
    each = {1: {'JAX_PROCESS_ID': '2'}, 2: {'JAX_COORDINATOR_ADDRESS': 'localhost:1'}}
    each = {process: {'JAX_NUM_PROCESSES': '4', **each.get(process, {})} for process in range(3)}
    limit = {'BIG_VIT_START_TIMEOUT': '6'}
    with Processes(*command, tmp_path / 'w', processes=3, each=each, **limit) as processes:
        first, third, stray = processes.wait(60)
    assert time.monotonic() - began < 30
    # The missing host may only be late, as one that is being replaced: the same command goes on.
    lines = ends_alike([first, third, stray], LOST)
    assert lines[0] == lines[1]
    assert 'after 6 s process(es) 1, 3 of 4 have not reached process 0' in lines[0]
    assert 'could not join in 6 s the coordinator (process 0) at localhost:1' in lines[2]
    assert 'nothing answers there yet (Connection refused)' in lines[2]
    for line in lines:
        assert 'JAX_COORDINATOR_PORT' in line and 'started on every host' in line
    assert 'process 0 of 4' in first.stdout and 'waits for the 3 other(s)' in first.stdout


def test_on_needs_a_cluster(tmp_path, command):
    line = error_line(run(*command, tmp_path / 'w', '--distributed=on'))
    assert '--distributed=on: the environment shows no cluster' in line
    assert not (tmp_path / 'w').exists()


# Without JAX, for the watch needs none: processes of which one does something at step 2.
WATCHED = """
import os, signal, sys, time
from big_vit.distributed import cluster, hosts

found = cluster.detect('on')
call = hosts.answer_roll if found.process else hosts.call_roll
watch = hosts.Watch(found, call(found, {'hostname': f'host-{found.process}'}, 20))
watch.connected = True
watch.saved = lambda: [3]
assert watch.gather(found.process * 10) == [0, 10, 20]
actions = {
    'freeze': lambda: os.kill(os.getpid(), signal.SIGSTOP),
    'hang': lambda: time.sleep(99),
    'mistake': lambda: watch.fail(hosts.UserError('the disk is full')),
    'bug': lambda: watch.fail(ZeroDivisionError('x')),
}
for step in range(5):
    watch.progress(step)
    time.sleep(0.5)
    if step == 2 and found.process == int(sys.argv[1]):
        actions[sys.argv[2]]()
while True:
    time.sleep(0.1)
"""


def watched(who, does, *, but=(), timeout=60, **limits):
    command = [sys.executable, '-c', WATCHED, str(who), does]
    variables = {f'BIG_VIT_{name}': str(seconds) for name, seconds in limits.items()}
    with Processes(command, processes=3, **variables) as processes:
        return processes.wait(timeout, but)


def test_a_frozen_process_is_named_by_all_others():
    results = watched(2, 'freeze', but=[2], PEER_TIMEOUT=3)
    for line in ends_alike(results[:2], LOST):
        assert 'process 2 (host-2) is gone or frozen: not a word for 3 s' in line
        assert 'resumes from step 3' in line


@pytest.mark.slow
def test_a_frozen_first_process_is_noticed_too():
    results = watched(0, 'freeze', but=[0], PEER_TIMEOUT=3)
    for line in ends_alike(results[1:], LOST):
        assert 'process 0 (host-0) is gone or frozen: not a word for 3 s' in line


@pytest.mark.slow
def test_a_hang_ends_all_and_names_who_is_behind_also_before_that():
    results = watched(1, 'hang', STEP_TIMEOUT=9, HEARTBEAT=2)
    for line in ends_alike(results, LOST):
        assert 'no step finished in' in line
        assert 'the furthest is at step 4, behind it from step 2 on: process 1 (host-1)' in line
    for number in (0, 2):
        assert f'process {number} of 3 (host-{number}): step 4, ' in results[number].stdout
        assert 'behind it from step 2 on: process 1 (host-1)' in results[number].stdout


def test_an_error_of_one_process_ends_all_with_its_status():
    first, second, third = watched(1, 'mistake')
    lines = ends_alike([first, second, third])
    assert lines[1] == 'error: the disk is full'
    assert lines[0] == lines[2] == 'error: process 1 (host-1): the disk is full'


@pytest.mark.slow
def test_a_bug_in_one_process_shows_its_traceback_there_and_one_line_elsewhere():
    first, second, third = watched(0, 'bug')
    assert {first.returncode, second.returncode, third.returncode} == {1}
    assert 'Traceback' not in second.stderr + third.stderr
    assert 'error: process 0 (host-0): ZeroDivisionError: x' in third.stderr


# In threads of this process.


SECRET = b'0123456789abcdef'


def rolls(*members, seconds=10, before=None, secrets=()):
    """What each (process, processes, facts) of a roll call gets: a Roll or an error."""
    address = f'localhost:{free_port()}'
    results = [None] * len(members)

    def join(slot, process, processes, facts):
        place = Cluster('test', address, processes, process)
        call = answer_roll if process else call_roll
        try:
            secret = secrets[slot] if secrets else b''
            results[slot] = call(place, {'hostname': f'h{slot}', **facts}, seconds, secret)
        except UserError as error:
            results[slot] = str(error)

    threads = [
        threading.Thread(target=join, args=(slot, *member)) for slot, member in enumerate(members)
    ]
    threads[0].start()
    if before:
        before(int(address.partition(':')[2]))
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(30)
    for result in results:
        if isinstance(result, Roll):
            for wire in result.wires.values():
                wire.close()
    return results


def test_a_roll_call_gives_all_the_names_of_all():
    found = rolls(*((process, 3, {}) for process in range(3)))
    assert [roll.names for roll in found] == [['h0', 'h1', 'h2']] * 3
    assert sorted(found[0].wires) == [1, 2] and sorted(found[2].wires) == [0]


def connected(port):
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            return socket.create_connection(('localhost', port), 1)
        time.sleep(0.05)
    raise AssertionError('nothing listens')


def closed(stranger):
    """Whether the other side closes this connection within five seconds."""
    stranger.settimeout(5)
    with contextlib.suppress(ConnectionError):
        while stranger.recv(1 << 16):
            pass
    return True


def hello(process, processes, *, proof='00', facts=None):
    facts = facts or {'hostname': 'old'}
    said = {'process': process, 'processes': processes, 'facts': facts}
    return json.dumps({**said, 'nonce': '11', 'proof': proof}).encode() + b'\n'


STRANGE = (
    b'GET / HTTP/1.1\r\n\r\n',
    b'[]\n',
    b'{"process": 1}\n',
    b'\xff\n',
    b'{"process": Infinity}\n',
    b'[' * 60_000 + b'\n',
    b'{"a":' * 20_000 + b'\n',
    b'x' * 70_000,
    b'1' * 65_000 + b'\n',
    b'null\n',
    hello(1, 3),
    hello(1, 99),
    hello(True, 3.0),
    hello(1e999, float('nan')),
    hello(10**300, 3),
    hello(1, 3, facts={'hostname': 5}),
    hello(1, 3, facts={'hostname': '\x1b[2J'}),
    hello(1, 3, proof=None),
    hello(1, 3, proof='\u2603'),
)


@pytest.mark.parametrize('secret', [b'', SECRET], ids=['open', 'secret'])
def test_strangers_at_the_port_are_closed_and_can_do_nothing_else(secret, capfd):
    def knock(port):
        connected(port).close()
        for data in STRANGE:
            with connected(port) as stranger:
                with contextlib.suppress(ConnectionError):
                    stranger.sendall(data)
                assert closed(stranger), data
        silent.extend(connected(port) for _ in range(300))

    silent = []
    members = ((process, 3, {}) for process in range(3))
    found = rolls(*members, before=knock, secrets=[secret] * 3)
    assert [roll.names for roll in found] == [['h0', 'h1', 'h2']] * 3
    assert len(silent) == 300 and all(closed(stranger) for stranger in silent)
    for stranger in silent:
        stranger.close()
    assert '\x1b' not in capfd.readouterr().out


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_bytes_of_a_stranger_end_the_run(data):
    parts = st.sampled_from(STRANGE) | st.binary(max_size=200)
    damaged = [data.draw(parts)[: data.draw(st.integers(0, 300))] for _ in range(5)]

    def knock(port):
        for piece in damaged:
            with connected(port) as stranger, contextlib.suppress(ConnectionError):
                stranger.sendall(piece)

    found = rolls((0, 2, {}), (1, 2, {}), before=knock)
    assert [roll.names for roll in found] == [['h0', 'h1']] * 2


def test_who_knows_another_secret_or_none_is_kept_out_and_told_so(capfd):
    def try_others(port):
        connected(port).close()
        for secret in (b'', b'another secret of a run'):
            place = Cluster('test', f'localhost:{port}', 2, 1)
            with pytest.raises(UserError, match=r'could not join .* its secret is another one'):
                answer_roll(place, {'hostname': 'h9'}, 1, secret)

    found = rolls((0, 2, {}), (1, 2, {}), before=try_others, secrets=[SECRET] * 2)
    assert [roll.names for roll in found] == [['h0', 'h1']] * 2
    assert 'does not know the secret of this run' in capfd.readouterr().out


@pytest.mark.slow
def test_a_secret_that_only_the_others_know_is_named():
    first, second = rolls((0, 2, {}), (1, 2, {}), seconds=2, secrets=[SECRET, b''])
    assert 'process(es) 1 of 2 have not reached process 0' in first
    assert 'its secret is another one (BIG_VIT_SECRET, BIG_VIT_SECRET_FILE)' in second


@pytest.mark.slow
def test_process_0_without_the_secret_is_not_believed():
    """It cannot end, rename or feed the others: they take no message before its proof."""
    first, second = rolls((0, 2, {}), (1, 2, {}), seconds=2, secrets=[b'', SECRET])
    assert isinstance(first, str) and 'could not join' in second


def test_a_hello_that_arrives_in_pieces_is_read(monkeypatch):
    whole = socket.socket.sendall

    def slowly(sock, data):
        for part in (data[:30], data[30:]):
            whole(sock, part)
            time.sleep(0.3)

    monkeypatch.setattr('socket.socket.sendall', slowly)
    found = rolls((0, 2, {}), (1, 2, {}), secrets=[SECRET] * 2)
    assert [roll.names for roll in found] == [['h0', 'h1']] * 2


def test_two_that_prove_to_be_the_same_process_are_an_error_for_all():
    found = rolls((0, 3, {}), (1, 3, {}), (1, 3, {}), secrets=[SECRET] * 3)
    assert all('says it is process 1 of 3' in x and 'is here already' in x for x in found)


def test_another_number_of_processes_with_proof_is_an_error_for_all():
    found = rolls((0, 2, {}), (1, 3, {}), secrets=[SECRET] * 2)
    assert all('says it is process 1 of 3, but here there are 2' in x for x in found)


def test_without_a_secret_a_wrong_number_ends_only_who_says_it(capfd):
    def miscount(port):
        connected(port).close()
        wrong = Cluster('test', f'localhost:{port}', 3, 1)
        with pytest.raises(UserError, match='process 1 of 3, but here there are 2'):
            answer_roll(wrong, {'hostname': 'h9'}, 10)

    found = rolls((0, 2, {}), (1, 2, {}), before=miscount)
    assert [roll.names for roll in found] == [['h0', 'h1']] * 2
    assert 'a process on h9 says it is process 1 of 3' in capfd.readouterr().out


def test_the_secret_is_in_a_variable_or_a_file_and_long(monkeypatch, tmp_path):
    assert run_secret() == b''
    file = tmp_path / 'secret'
    monkeypatch.setenv('BIG_VIT_SECRET_FILE', str(file))
    with pytest.raises(UserError, match=r'secret: No such file .*`openssl rand -hex 32`'):
        run_secret()
    file.write_text('\n')
    with pytest.raises(UserError, match='at least 16 characters'):
        run_secret()
    file.write_text('0123456789abcdef\n')
    assert run_secret() == SECRET
    monkeypatch.setenv('BIG_VIT_SECRET', 'short')
    with pytest.raises(UserError, match='BIG_VIT_SECRET: a secret has at least 16'):
        run_secret()
    monkeypatch.setenv('BIG_VIT_SECRET', '\udcff' * 16)  # Bytes that are no text.
    assert run_secret() == b'\xff' * 16


@pytest.mark.parametrize(
    ('address', 'bound'),
    [
        ('localhost:77', '127.0.0.1:77'),
        ('127.0.0.1:77', '127.0.0.1:77'),
        ('[::1]:77', '[::1]:77'),
        # Numbers that are translated on the way, and names, which may differ from host to host.
        ('203.0.113.7:77', '[::]:77'),
        ('host.example:77', '[::]:77'),
    ],
)
def test_process_0_listens_where_the_address_says(monkeypatch, address, bound):
    assert bind_address(address) == bound
    monkeypatch.setenv('JAX_COORDINATOR_BIND_ADDRESS', '0.0.0.0:5')
    assert bind_address(address) == '0.0.0.0:5'


def test_differences_name_the_few_and_not_the_many():
    facts = [{'hostname': f'h{i}', 'jax': '1', 'code': 'a'} for i in range(5)]
    assert difference(facts) is None
    facts[3]['jax'], facts[4]['code'] = '2', 'b'
    assert difference(facts) == (
        'the processes of this run are not alike: '
        'jax is 2 on process 3 (h3) and 1 on the others; '
        'code is b on process 4 (h4) and a on the others'
    )


def test_a_single_process_has_nobody_to_ask(tmp_path):
    assert hosts.gather(3) == [3]
    assert hosts.lead(lambda: 'done') == 'done'
    hosts.check_shared(tmp_path / 'nothing')
    assert not (tmp_path / 'nothing').exists()


def test_a_time_limit_that_is_no_number_is_an_error(monkeypatch):
    monkeypatch.setenv('BIG_VIT_PEER_TIMEOUT', 'soon')
    with pytest.raises(UserError, match='BIG_VIT_PEER_TIMEOUT=soon is not a number of seconds'):
        timeout_seconds('BIG_VIT_PEER_TIMEOUT')
