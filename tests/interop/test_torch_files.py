"""Files of PyTorch: read without torch, without running anything in them, and damaged ones."""

import argparse
import collections
import contextlib
import io
import os
import pathlib
import pickle
import random
import struct
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest
from torch_writer import View, pickled, save, save_legacy

from big_vit.errors import UserError
from big_vit.interop import files, pickles

SLOW = pytest.mark.slow


def arrays_of(path):
    sections, _ = files.read(path)
    return {
        place: {name: get() for name, get in table.items()} for place, table in sections.items()
    }


def some(seed=0):
    rng = np.random.default_rng(seed)
    return collections.OrderedDict(
        {
            'a.weight': rng.normal(size=(3, 4)).astype(np.float32),
            'a.bias': rng.normal(size=3),
            'half': rng.normal(size=(2, 2)).astype(np.float16),
            'brain': rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
            'scalar': np.array(3.5, np.float32),
            'empty': np.zeros((0, 4), np.float32),
            'count': np.arange(5),
        }
    )


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(
            found[name].astype(np.float64), np.asarray(array).astype(np.float64)
        )


class Harmful:
    """What would leave a mark if anything in a file were run."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


class Stateful:
    """An object like those of trainers, and one whose state is set by a method."""

    def __init__(self, **state):
        self.__dict__.update(state)

    def __setstate__(self, state):
        raise AssertionError('the state of an object was set')


def training(mark):
    """What DeiT, MAE and DINO save beside their parameters."""
    return {
        'args': argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath('x'), nested=Stateful(a=1)),
        'scores': [np.float64(3.5), np.arange(3.0).tolist(), {1, 2}, frozenset('ab'), 3 + 4j],
        'optimizer': {'state': {0: {'exp_avg': np.ones(3, np.float32)}}, 'param_groups': [{}]},
        'history': collections.defaultdict(list, {'loss': [1.0]}),
        'epoch': 300,
        'harmful': Harmful(mark),
        Stateful(b=2): 'a key',
    }


@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_tensors_are_read_and_nothing_else_is_run(protocol, tmp_path):
    tree = {'model': some(), 'model_ema': some(1), **training(tmp_path / 'mark')}
    wanted = {'model.': some(), 'model_ema.': some(1)}
    found = arrays_of(save(tree, tmp_path / 'a.pth', protocol))
    assert found.keys() == wanted.keys()
    for place in wanted:
        same(found[place], wanted[place])
    assert not (tmp_path / 'mark').exists()
    # The file does what it says where it is unpickled.
    with pytest.raises((AttributeError, ImportError, pickle.UnpicklingError)):
        pickle.loads(pickled(tree, protocol)[0])
    pickle.loads(pickle.dumps(Harmful(tmp_path / 'mark')))
    assert (tmp_path / 'mark').exists()


def test_files_of_before_zip_are_read(tmp_path):
    tree = {'state_dict': some(), **training(tmp_path / 'mark')}
    found = arrays_of(save_legacy(tree, tmp_path / 'model_best.pth.tar'))
    assert list(found) == ['state_dict.']
    same(found['state_dict.'], some())
    assert not (tmp_path / 'mark').exists()


def test_a_bare_dictionary_and_views_of_one_storage(tmp_path):
    storage = np.arange(24, dtype=np.float32)
    tree = {
        'first': View(storage, 0, (2, 3), (3, 1)),
        'transposed': View(storage, 6, (3, 2), (1, 3)),
        'one': View(storage, 5, (1, 4), (10**30, 1)),
    }
    for write in (save, save_legacy):
        found = arrays_of(write(tree, tmp_path / 'a.pt'))['']
        np.testing.assert_array_equal(found['first'], storage[:6].reshape(2, 3))
        np.testing.assert_array_equal(found['transposed'], storage[6:12].reshape(2, 3).T)
        np.testing.assert_array_equal(found['one'], storage[None, 5:9])


def test_views_that_negate_or_conjugate_are_no_plain_numbers(tmp_path):
    storage = np.arange(3, dtype=np.float32)
    for more, is_plain in ((({},), True), (({'neg': True},), False), (({'conj': True},), False)):
        path = save({'x': View(storage, 0, (3,), (1,), more=more)}, tmp_path / 'a.pth')
        if is_plain:
            np.testing.assert_array_equal(arrays_of(path)['']['x'], storage)
        else:
            with pytest.raises(UserError, match=r'x is made by .* not a dense tensor'):
                arrays_of(path)


class Named(collections.OrderedDict):
    """A dictionary of a trainer's own kind."""


def test_dictionaries_of_other_kinds_are_dictionaries(tmp_path):
    for tree in (Named(some()), {'state_dict': Named(some())}):
        (found,) = arrays_of(save(tree, tmp_path / 'a.pth')).values()
        same(found, some())


def test_of_two_files_of_one_name_in_an_archive_none_is_chosen(tmp_path):
    path = save(some(), tmp_path / 'a.pth')
    np.savez(tmp_path / 'a.npz', a=np.ones(3, np.float32))
    for name, entry in (('a.pth', 'archive/data/0'), ('a.npz', 'a.npy'), ('a.npz', 'a')):
        content = (tmp_path / name).read_bytes()
        with zipfile.ZipFile(tmp_path / name, 'a') as archive, warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Of zipfile, about just that.
            archive.writestr(entry, bytes(12))
        with pytest.raises(UserError, match='twice'):
            files.read(tmp_path / name)
        (tmp_path / name).write_bytes(content)
    same(arrays_of(path)[''], some())


def test_what_else_lies_in_a_numpy_archive_is_no_array(tmp_path):
    array = np.arange(3, dtype=np.float32)
    np.savez(tmp_path / 'a.npz', little=array, big=array.astype('>f4'), half=array.astype('>f2'))
    with zipfile.ZipFile(tmp_path / 'a.npz', 'a') as archive:
        archive.writestr('notes/', b'')
        archive.writestr('notes/readme.txt', b'text')
        archive.comment = b'[' * 60_000
    found = arrays_of(tmp_path / 'a.npz')['']
    assert found.keys() == {'little', 'big', 'half'}
    for stored in found.values():
        np.testing.assert_array_equal(files.as_float(stored, 'x'), array)
        assert files.as_float(stored, 'x').dtype == np.float32


def test_a_pickled_module_has_the_names_of_its_state(tmp_path):
    def module(modules, **parameters):
        state = {'_parameters': parameters, '_buffers': {}, '_modules': modules, 'training': True}
        return Stateful(**state)

    inner = module({}, weight=np.ones(3, np.float32), bias=None)
    inner._buffers = {'mean': np.zeros(3, np.float32), 'passing': np.ones(1, np.float32)}
    inner._non_persistent_buffers_set = {'passing'}
    path = save(module({'0': inner}, cls=np.full(2, 5, np.float32)), tmp_path / 'whole.pth')
    found = arrays_of(path)['']
    assert found.keys() == {'cls', '0.weight', '0.mean'}


LIES = {
    'beyond': dict(offset=20, shape=(2, 3), strides=(3, 1)),
    'strides': dict(offset=0, shape=(4, 6), strides=(6, 2)),
    'expanded': dict(offset=0, shape=(10**9, 10**9), strides=(0, 0)),
    'negative': dict(offset=-4, shape=(2,), strides=(1,)),
    'count': dict(offset=0, shape=(10**12,), strides=(1,), count=10**12),
    'few': dict(offset=0, shape=(4,), strides=(1,), count=4),
    'axes': dict(offset=0, shape=(1,) * 60, strides=(1,) * 60),
    'huge': dict(offset=0, shape=(0, 10**40), strides=(1, 1)),
    'uneven': dict(offset=0, shape=(2, 3), strides=(1,)),
    'sparse': dict(offset=0, shape=(2,), strides=(1,), rebuild='_rebuild_sparse_tensor'),
}


@pytest.mark.parametrize('lie', LIES)
@pytest.mark.parametrize('write', [save, save_legacy])
def test_tensors_that_lie_about_their_storage(lie, write, tmp_path):
    path = write({'x': View(np.arange(24, dtype=np.float32), **LIES[lie])}, tmp_path / 'a.pth')
    with pytest.raises(UserError, match=r'cannot be read|not a dense|no tensors|repeat') as error:
        arrays_of(path)
    assert '\n' not in str(error.value)


def test_many_names_of_one_storage_do_not_fill_the_memory(tmp_path):
    storage = np.zeros(2**18, np.float16)
    tree = {f'x{i}': View(storage, 0, (2**18,), (1,)) for i in range(40)}
    with pytest.raises(UserError, match='repeat the same numbers'):
        arrays_of(save(tree, tmp_path / 'a.pth'))


def test_archives_that_would_fill_the_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / 'a.npz', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('x.npy', b'')
    content = (tmp_path / 'a.npz').read_bytes()
    for size in (2**31, 2**32 - 2):
        # The size that the directory gives, of 4 bytes, 24 behind its mark.
        at = content.index(b'PK\x01\x02') + 24
        (tmp_path / 'a.npz').write_bytes(content[:at] + struct.pack('<I', size) + content[at + 4 :])
        with pytest.raises(UserError, match='would become'):
            files.read(tmp_path / 'a.npz')


HOSTILE = {
    'eval': b'cbuiltins\neval\n(S\'open("mark", "w")\'\ntR.',
    'inst': b"(S'touch mark'\nios\nsystem\n.",
    'obj': b"(cos\nsystem\nS'touch mark'\no.",
    'newobj': b"\x80\x02cos\nsystem\nS'touch mark'\n\x85\x81.",
    'build': b'\x80\x02cbuiltins\nexec\n}X\x04\x00\x00\x00testK\x01sb.',
    'stack global': b'\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\ntouch mark\x85R.',
    'dotted': b'\x80\x04\x8c\x08builtins\x8c\x0b__import__.\x93\x8c\x02os\x85R.',
    'extension': b'\x80\x02\x82\x01.',
    'persistent': b'Pos.system\n.',
    'memo': b'\x80\x02}r\xff\xff\xff\x7f.',
    'long': b'\x80\x02\x8b\xff\xff\xff\x7f\x01.',
    'bytes': b'\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.',
    'empty': b'.',
    'pops': b'000000.',
    'marks': b'(((((((((.',
    'endless': b'\x80\x02',
    'nested': b'\x80\x02' + b']' * 20_000 + b'a' * 19_999 + b'.',
    # Each tuple has the last twice: its hash takes 2**200 steps.
    'hash': b'\x80\x02}K\x01' + b'2\x86' * 200 + b'K\x01s.',
    'itself': b'\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.',
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_pickles_end_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.pth').write_bytes(HOSTILE[name])
    with zipfile.ZipFile(tmp_path / 'b.pth', 'w') as archive:
        archive.writestr('b/data.pkl', HOSTILE[name])
    for path in (tmp_path / 'a.pth', tmp_path / 'b.pth'):
        with pytest.raises(UserError) as error:
            arrays_of(path)
        assert '\n' not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.pth', 'b.pth']


def damaged(content, rng):
    """A file with bytes changed, taken out, or missing at its end."""
    content = bytearray(content)
    kind = rng.random()
    if kind < 0.3:
        return bytes(content[: rng.randrange(len(content))])
    for _ in range(rng.choice((1, 3, 30))):
        at = rng.randrange(len(content))
        if kind < 0.8:
            content[at] = rng.randrange(256)
        else:
            del content[at : at + rng.randrange(1, 5)]
    return bytes(content)


@pytest.mark.parametrize('write', [save, save_legacy])
@pytest.mark.parametrize('examples', [30, pytest.param(3000, marks=SLOW)])
def test_damaged_files_read_or_end_in_one_line(examples, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = {'model': some(), **training(tmp_path / 'mark')}
    content = write(tree, tmp_path / 'a.pth').read_bytes()
    rng = random.Random(0)
    for _ in range(examples):
        (tmp_path / 'a.pth').write_bytes(damaged(content, rng))
        try:
            arrays_of(tmp_path / 'a.pth')
        except UserError as error:
            assert '\n' not in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ['a.pth']


@SLOW
def test_damaged_pickles_make_containers_or_an_error():
    program, _ = pickled({'model': some(), **training('mark')})
    rng = random.Random(1)
    known = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError)
    for _ in range(20_000):
        with contextlib.suppress(*known):
            pickles.sections(pickles.load(io.BytesIO(damaged(program, rng))))
    assert not pathlib.Path('mark').exists()


def test_pointers_and_other_kinds_of_files_are_named(tmp_path):
    for name in ('a.pth', 'a.safetensors', 'a.npz'):
        (tmp_path / name).write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\n')
        with pytest.raises(UserError, match='pointer of Git LFS'):
            files.read(tmp_path / name)
    (tmp_path / 'a.pth').write_bytes(b'<!DOCTYPE html><html></html>')
    with pytest.raises(UserError, match='cannot be read as a file of PyTorch'):
        files.read(tmp_path / 'a.pth')
    (tmp_path / 'a.pth').write_bytes(bytes(257) + b'ustar' + bytes(300))
    with pytest.raises(UserError, match='where you trust it'):
        files.read(tmp_path / 'a.pth')
