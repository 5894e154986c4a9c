"""Data in the emulators of two object stores, through a proxy that loses, delays and refuses."""

import http.client
import http.server
import importlib.util
import itertools
import socket
import subprocess
import sys
import threading
import time

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_index import opened, rows, shard

from big_vit.data import blocks, network, windows
from big_vit.data.sources import arrow, indexing, parquet
from big_vit.data.sources.base import Request
from big_vit.errors import UserError

pytestmark = [
    pytest.mark.slow,
    # What the clients of the stores leave open when a test ends.
    pytest.mark.filterwarnings('ignore::ResourceWarning'),
    pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning'),
]

PACKAGES = {'s3': ('moto', 's3fs'), 'gs': ('gcp_storage_emulator', 'gcsfs')}
SERVE = """
import sys, time
from gcp_storage_emulator.server import create_server
create_server('localhost', int(sys.argv[1]), in_memory=True, default_bucket='bucket').start()
time.sleep(3600)
"""


class Proxy(http.server.BaseHTTPRequestHandler):
    """Passes requests on, but for some GETs: every fifth fails in turn in one of three ways."""

    protocol_version = 'HTTP/1.1'
    upstream = 0
    faults = False
    numbers = itertools.count()
    done: list = []  # noqa: RUF012

    def log_message(self, *args):
        pass

    def answer(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        is_data = self.command == 'GET' and 'range' in {name.lower() for name in self.headers}
        number = next(self.numbers) if self.faults and is_data else -1
        fault = ('refused', 'lost', 'late')[number // 5 % 3] if number % 5 == 4 else None
        if fault is not None:
            self.done.append(fault)
        if fault == 'lost':
            self.close_connection = True
            return
        if fault == 'refused':
            self.send_response(503)
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        if fault == 'late':
            time.sleep(1)
        upstream = http.client.HTTPConnection('localhost', self.upstream)
        upstream.request(self.command, self.path, body, dict(self.headers))
        got = upstream.getresponse()
        data = got.read()
        upstream.close()
        self.send_response(got.status)
        for name, value in got.getheaders():
            if name.lower() not in ('content-length', 'transfer-encoding', 'connection', 'date'):
                self.send_header(name, value)
        size = got.getheader('Content-Length') if self.command == 'HEAD' else len(data)
        self.send_header('Content-Length', str(size or 0))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = answer


def free_port():
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return free.getsockname()[1]


def is_answering(port):
    with socket.socket() as client:
        return client.connect_ex(('localhost', port)) == 0


@pytest.fixture(params=['s3', 'gs'])
def bucket(request, monkeypatch, tmp_path):
    if not all(importlib.util.find_spec(name) for name in PACKAGES[request.param]):
        pytest.skip(f'needs {" and ".join(PACKAGES[request.param])}')
    port = free_port()
    command = {'s3': ['-m', 'moto.server', '-p'], 'gs': ['-c', SERVE]}[request.param]
    server = subprocess.Popen(
        [sys.executable, *command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not is_answering(port):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    monkeypatch.setattr(Proxy, 'upstream', port)
    monkeypatch.setattr(Proxy, 'faults', False)
    Proxy.done.clear()
    proxy = http.server.ThreadingHTTPServer(('localhost', 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    url = f'http://localhost:{proxy.server_port}'
    for name, value in {
        'AWS_ENDPOINT_URL': url,
        'AWS_ACCESS_KEY_ID': 'a',
        'AWS_SECRET_ACCESS_KEY': 'b',
        'AWS_DEFAULT_REGION': 'us-east-1',
        'STORAGE_EMULATOR_HOST': url,
        'GOOGLE_CLOUD_PROJECT': 'none',
        'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
        'BIG_VIT_CACHE': str(tmp_path / 'cache'),
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class(request.param).clear_instance_cache()
    monkeypatch.setattr(blocks, 'BLOCK_BYTES', 1 << 16)
    if request.param == 's3':
        fsspec.filesystem('s3').mkdir('bucket')
    with server:
        yield f'{request.param}://bucket'
        server.kill()
    proxy.shutdown()
    proxy.server_close()
    fsspec.get_filesystem_class(request.param).clear_instance_cache()


def put(url, name, data):
    system, path = fsspec.core.url_to_fs(f'{url}/{name}')
    system.pipe_file(path, data)
    system.invalidate_cache()


def images(source, steps):
    shards = windows.opened(source.shard_lengths, 2)
    found = []
    for step in range(steps):
        index, _ = windows.example_indices(step, parts=(shards,), batch_size=8, seed=1)
        if source.expect is not None:
            source.expect(index)
        found += source.load(index)['image']
    return found


def test_tar_shards(bucket, tmp_path):
    local = tmp_path / 'local'
    local.mkdir()
    for number in range(4):
        data = shard(rows(number, count=40, picture=6000))
        (local / f'train-{number:04d}.tar').write_bytes(data)
        put(bucket, f'set/train-{number:04d}.tar', data)
    Proxy.faults = True
    assert indexing.index(f'{bucket}/set', say=lambda line: None)
    before = network.TRAFFIC.counts()
    source = opened(f'{bucket}/set')
    assert source.length == 160
    assert images(source, 20) == images(opened(str(local)), 20)
    assert {'refused', 'lost', 'late'} <= set(Proxy.done)
    after = network.TRAFFIC.counts()
    total = sum(file.stat().st_size for file in local.iterdir())
    assert 0.9 * total < after['bytes'] - before['bytes'] < 1.2 * total + 50_000
    # All of it is on the local disk now.
    Proxy.faults = False
    again = network.TRAFFIC.counts()['bytes']
    source.load(np.arange(160))
    assert network.TRAFFIC.counts()['bytes'] == again
    # What is written beside the shards is found by others.
    put(bucket, 'set/train-0002.tar', shard(rows(9, count=3)))
    with pytest.raises(UserError, match=r'is older than 1 of 4 shards, such as train-0002\.tar'):
        opened(f'{bucket}/set')


def test_parquet(bucket, monkeypatch):
    random = np.random.default_rng(0)
    pictures = [random.bytes(20_000) for _ in range(40)]
    sink = pa.BufferOutputStream()
    table = pa.table({'image': pictures, 'label': [i % 3 for i in range(40)]})
    pq.write_table(table, sink, row_group_size=8, compression='none')
    put(bucket, 'q/train-00000-of-00001.parquet', sink.getvalue().to_pybytes())
    monkeypatch.setattr(arrow, 'IN_MEMORY_BYTES', 1000)
    Proxy.faults = True
    source = parquet.parquet(Request('train'), path=f'{bucket}/q')
    assert source.shard_lengths.tolist() == [8] * 5
    order = random.permutation(40)
    assert source.load(order)['image'] == [pictures[i] for i in order]
    assert Proxy.done


def test_buckets_that_are_not_there(bucket):
    for name in ('set', 'set/train-{0000..0003}.tar', 'set/*.tar'):
        path = f'{bucket}-of-nobody/{name}'
        with pytest.raises(UserError, match=r'data\.path: ') as caught:
            opened(path)
        assert '\n' not in str(caught.value)
        assert caught.value.status == 2


def test_what_is_not_allowed_is_told(bucket, monkeypatch):
    put(bucket, 'set/train-0000.tar', shard(rows(0)))
    monkeypatch.setattr(Proxy, 'answer', refuse)
    for verb in ('GET', 'HEAD', 'POST'):
        monkeypatch.setattr(Proxy, f'do_{verb}', refuse)
    fsspec.get_filesystem_class(bucket.partition(':')[0]).clear_instance_cache()
    with pytest.raises(UserError, match=r'data\.path: cannot read .*: give this machine access'):
        opened(f'{bucket}/set')


def refuse(self):
    self.rfile.read(int(self.headers.get('Content-Length') or 0))
    body = b'' if self.command == 'HEAD' else (
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>no</Message></Error>'
    )  # fmt: skip
    self.send_response(403)
    self.send_header('Content-Type', 'application/xml')
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)
