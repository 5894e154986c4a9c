"""One process at a time writes into a folder; a dead one is in nobody's way."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from commands import ROOT, environment, script
from etils import epath
from test_storage import store  # noqa: F401

from big_vit import ownership, storage
from big_vit.errors import UserError

HOLD = """
import os, sys, time
from etils import epath
from big_vit import ownership
from big_vit.errors import UserError

try:
    with ownership.own(epath.Path(sys.argv[1])):
        ownership.began()
        if sys.argv[2:] == ['fork'] and not os.fork():
            time.sleep(20)  # A loader process that outlives its run.
            os._exit(0)
        if sys.argv[2:] == ['ending']:
            ownership.ending()
        print('mine', flush=True)
        sys.stdin.readline()
except UserError as error:
    print(error)
    sys.exit(2)
"""


@contextlib.contextmanager
def holder(folder, *more):
    with subprocess.Popen(
        [sys.executable, '-c', HOLD, str(folder), *more],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


def test_of_starts_at_the_same_time_one_wins_and_the_others_name_it(tmp_path):
    with contextlib.ExitStack() as stack:
        starts = [stack.enter_context(holder(tmp_path / 'w')) for _ in range(3)]
        first = {process.pid: process.stdout.readline() for process in starts}
        (winner,) = (process for process in starts if first[process.pid] == 'mine\n')
        record = record_of(tmp_path / 'w')
        assert record['pid'] == winner.pid
        for process in starts:
            if process is not winner:
                assert process.wait(timeout=60) == 2
                named = f'process {winner.pid} on {record["host"]} since {record["since"]}'
                assert named in first[process.pid]
        winner.communicate('\n', timeout=60)
        assert winner.returncode == 0 and not (tmp_path / 'w' / ownership.FILE).exists()


@pytest.mark.parametrize('more', [(), ('fork',)], ids=['', 'its child lives on'])
def test_after_kill_9_the_folder_is_free_at_once(tmp_path, more):
    with holder(tmp_path, *more) as process:
        assert process.stdout.readline() == 'mine\n'
        with (
            pytest.raises(UserError, match=f'process {process.pid} on'),
            ownership.own(path(tmp_path)),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / ownership.FILE).exists()
        began = time.monotonic()
        with ownership.own(path(tmp_path)):
            assert record_of(tmp_path)['pid'] == os.getpid()
        assert time.monotonic() - began < 3


def test_who_starts_while_the_owner_saves_and_ends_waits_for_it(tmp_path):
    with holder(tmp_path, 'ending') as process:
        assert process.stdout.readline() == 'mine\n'
        until = time.monotonic() + 20
        while not record_of(tmp_path)['ending'] and time.monotonic() < until:
            time.sleep(0.02)
        timer = threading.Timer(0.5, lambda: process.communicate('\n'))
        timer.start()
        with ownership.own(path(tmp_path)):
            timer.join()
            assert process.returncode == 0


@pytest.mark.parametrize('content', ['', 'x', '[]', '[' * 4000, '{"pid": "1", "id": 0, "beat": 0}'])
def test_what_no_owner_wrote_is_in_nobodys_way(content, tmp_path):
    (tmp_path / ownership.FILE).write_text(content)
    with ownership.own(path(tmp_path)):
        assert record_of(tmp_path)['pid'] == os.getpid()


def path(folder):
    return epath.Path(folder)


def record_of(folder):
    return json.loads((storage.place(folder) / ownership.FILE).read_text())


def elsewhere(folder, **more):
    """The record of an owner on another host, whose locks this one does not see."""
    record = {**ownership._me(), 'host': 'other', 'machine': 'other', 'pid': 7, **more}
    (storage.place(folder) / ownership.FILE).write_text(json.dumps(record))
    return record


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(ownership, 'BEAT_S', 0.05)
    monkeypatch.setattr(ownership, 'SILENCE_S', 0.5)


@pytest.fixture(params=['local', 'store'])
def folder(request, tmp_path):
    if request.param == 'local':
        return tmp_path
    request.getfixturevalue('store')
    return 'gs://bucket/run'


def test_an_owner_elsewhere_is_believed_to_live_while_its_number_grows(folder, fast):
    record, ended = elsewhere(folder), threading.Event()

    def beat():
        for number in range(1000):
            elsewhere(folder, id=record['id'], beat=number)
            if ended.wait(0.1):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with (
            pytest.raises(UserError, match=r'process 7 on other .*remove .*owner\.json'),
            ownership.own(storage.place(folder)),
        ):
            pass
    finally:
        ended.set()
        thread.join()
    with ownership.own(storage.place(folder)):  # By now it is silent.
        assert record_of(folder)['pid'] == os.getpid()
    assert not (storage.place(folder) / ownership.FILE).exists()


def test_an_owner_that_was_taken_over_ends_and_leaves_the_folder_alone(folder, fast):
    with (
        pytest.raises(UserError, match='belongs to process 7 on other by now'),
        ownership.own(storage.place(folder)),
    ):
        beat = record_of(folder)['beat']
        time.sleep(0.4)
        assert record_of(folder)['beat'] > beat
        elsewhere(folder)
        time.sleep(0.4)
        ownership.check()
    assert record_of(folder)['pid'] == 7


def test_a_store_has_one_owner_and_a_dead_one_of_this_host_is_no_obstacle(store):  # noqa: F811
    place = storage.place('gs://bucket/run')
    with ownership.own(place):
        mine = record_of(place)
        assert not ownership._StoredFile(place).take(ownership._me())[0]
        with pytest.raises(UserError, match=f'process {os.getpid()} on'), ownership.own(place):
            pass
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    text = json.dumps({**mine, 'pid': dead.pid, 'id': 'another'})
    (place / ownership.FILE).write_text(text)
    began = time.monotonic()
    with ownership.own(place):
        pass
    assert time.monotonic() - began < 5


@pytest.mark.parametrize('text', ['', '{"pid"', '[]', '{"pid": "x", "id": 1, "beat": 0}', '\0' * 9])
def test_a_file_that_tells_nothing_and_that_nobody_holds_is_no_obstacle(tmp_path, text):
    (tmp_path / ownership.FILE).write_text(text)
    with ownership.own(path(tmp_path)):
        assert record_of(tmp_path)['pid'] == os.getpid()


def test_nothing_of_a_start_that_a_second_ctrl_c_ends_stays(tmp_path):
    code = """
import sys
from big_vit import ownership, signals, storage

with ownership.own(storage.place(sys.argv[1])), ownership.own(storage.place(sys.argv[2])):
    for folder in sys.argv[1:3]:
        (storage.place(folder) / 'checkpoints').mkdir()
    if sys.argv[3] == 'began':
        ownership.began()
    signals.leave(2)
"""
    for when in ('starts', 'began'):
        outer, inner = tmp_path / 'sweep', tmp_path / 'sweep' / 'trial'
        ended = script(code, outer, inner, when)
        assert ended.returncode == 130 and ended.stderr == 'error: interrupted\n'
        assert outer.exists() == (when == 'began')
    assert sorted(p.name for p in outer.rglob('*')) == ['checkpoints', 'checkpoints', 'trial']


@pytest.mark.parametrize('before', ['absent', 'empty', 'full'])
def test_nothing_of_a_start_that_failed_stays(tmp_path, before):
    folder = tmp_path / 'a' / 'b'
    if before != 'absent':
        folder.mkdir(parents=True)
    if before == 'full':
        (folder / 'notes').write_text('mine')
    with pytest.raises(RuntimeError), ownership.own(path(folder)):
        (folder / 'made').mkdir(exist_ok=True)
        (folder / 'made' / 'file').write_text('x')
        raise RuntimeError
    if before == 'absent':
        assert not (tmp_path / 'a').exists()
    elif before == 'empty':
        assert list(folder.iterdir()) == []
    else:
        assert (folder / 'notes').read_text() == 'mine'
    with pytest.raises(RuntimeError), ownership.own(path(folder)):
        (folder / 'made').mkdir(exist_ok=True)
        ownership.began()
        raise RuntimeError
    assert (folder / 'made').exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / 'file').write_text('')
    with (
        pytest.raises(UserError, match=r'--out: cannot write to .*file/w: '),
        ownership.own(path(tmp_path / 'file' / 'w'), '--out'),
    ):
        pass
