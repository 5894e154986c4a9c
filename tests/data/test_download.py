"""Downloads: what is published arrives whole, anything else leaves one line and no file."""

import gzip
import hashlib
import http.server
import threading

import numpy as np
import pytest

from big_vit import prepare
from big_vit.data import download
from big_vit.data.sources import idx
from big_vit.data.sources.base import Request
from big_vit.errors import UserError


def idx_bytes(array):
    header = bytes((0, 0, 8, array.ndim)) + b''.join(n.to_bytes(4, 'big') for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A stand-in for the authors' server: the folder that it serves, and the requested paths."""
    folder, asked = tmp_path / 'served', []
    folder.mkdir()
    rng = np.random.default_rng(0)
    known = {}
    for name in download.FASHION_MNIST:
        shape = (20, 28, 28) if 'images' in name else (20,)
        content = idx_bytes(rng.integers(10, size=shape))
        (folder / name).write_bytes(gzip.compress(content))
        known[name] = hashlib.sha256(content).hexdigest(), len(content)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *_):
            asked.append(self.path)

    server = http.server.HTTPServer(('localhost', 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(download, 'FASHION_MNIST', known)
    monkeypatch.setattr(download, 'FASHION_MNIST_URL', f'http://localhost:{server.server_port}')
    yield folder, asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_command_brings_files_that_can_be_read_and_brings_them_once(served, tmp_path, capsys):
    folder, asked = served
    argv = ['fashion_mnist', '--format', 'idx', '--data_dir', str(tmp_path / 'data')]
    prepare.main(argv)
    place = tmp_path / 'data' / 'fashion_mnist'
    said = capsys.readouterr().out
    assert f'wrote   {place}: 4 IDX files' in said
    assert f'use     --config configs/fashion_mnist.py:path={place}' in said
    source = idx.idx(Request('train', image_size=(28, 28)), path=str(place))
    content = gzip.decompress((folder / 'train-images-idx3-ubyte.gz').read_bytes())
    np.testing.assert_array_equal(
        source.load(np.arange(20))['image'].ravel(), np.frombuffer(content, np.uint8)[16:]
    )
    assert len(asked) == 4
    (place / 't10k-labels-idx1-ubyte.gz').unlink()
    prepare.main(argv)
    assert len(asked) == 5
    prepare.main(argv)
    assert len(asked) == 5 and 'there   ' in capsys.readouterr().out


@pytest.mark.parametrize(
    'spoil, words',
    [
        (lambda path: path.unlink(), 'cannot be downloaded'),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), 'is not the published file'),
        (lambda path: path.write_bytes(b'<html>Sign in</html>'), 'is not the published file'),
        (lambda path: path.write_bytes(gzip.compress(bytes(10**7))), 'is not the published file'),
    ],
    ids=['missing', 'cut off', 'a page', 'too large'],
)
def test_anything_else_is_one_line_and_no_file(served, tmp_path, spoil, words):
    folder, _ = served
    spoil(folder / 'train-images-idx3-ubyte.gz')
    with pytest.raises(UserError, match=words) as caught:
        download.fashion_mnist(tmp_path / 'data')
    assert 'train-images-idx3-ubyte.gz' in str(caught.value) and '\n' not in str(caught.value)
    assert not list(tmp_path.glob('data/*'))


def test_without_a_network_it_says_what_to_do_by_hand(tmp_path):
    with pytest.raises(UserError, match=r'put the file into .*data by hand'):
        download.fashion_mnist(tmp_path / 'data', 'http://localhost:9')


def test_a_file_of_another_dataset_is_not_overwritten(served, tmp_path):
    (tmp_path / 'train-labels-idx1-ubyte.gz').write_bytes(b'mine')
    with pytest.raises(UserError, match=r'train-labels.*is not the published file: remove it'):
        download.fashion_mnist(tmp_path)
    assert (tmp_path / 'train-labels-idx1-ubyte.gz').read_bytes() == b'mine'


def test_the_checksums_are_those_of_the_packaged_dataset():
    folder = idx.Path('/usr/share/datasets/fashion-mnist')
    if not folder.is_dir():
        pytest.skip('dataset-fashion-mnist is not installed')
    assert download.fashion_mnist(folder, 'http://localhost:9') == []
