"""Headers and labels of tar shards: against Python's tarfile, GNU tar, and damage."""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from big_vit.data import files
from big_vit.data.sources import tar
from big_vit.data.sources.base import Request
from big_vit.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('BIG_VIT_CACHE', str(tmp_path / 'cache'))


def write(path, members, kind=tarfile.USTAR_FORMAT):
    with tarfile.open(path, 'w', format=kind) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def walked(path):
    place = files.place(str(path), 'data.path')
    return list(tar._members(place, files.forward(place)))


def by_tarfile(path):
    with tarfile.open(path) as archive:
        return [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    # An old rule: tarfile cuts a slash off the end of a name.
    st.lists(
        st.tuples(
            st.text(st.characters(codec='utf-8', exclude_characters='\0'), min_size=1, max_size=150)
            .map(lambda name: name.strip('/'))
            .filter(bool),
            st.integers(0, 1500),
        ),
        max_size=5,
    ),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_that_tarfile_finds(tmp_path, members, kind):
    path = write(tmp_path / 'x.tar', [(name, bytes(size)) for name, size in members], kind)
    assert walked(path) == by_tarfile(path)


@pytest.mark.skipif(shutil.which('tar') is None, reason='needs GNU tar')
@pytest.mark.parametrize('kind', ['v7', 'ustar', 'oldgnu', 'gnu', 'posix'])
def test_members_are_those_that_gnu_tar_wrote(tmp_path, kind):
    home = tmp_path / 'in'
    deep = home / ('d' * 60) / ('e' * (100 if kind in ('gnu', 'posix', 'oldgnu') else 10))
    deep.mkdir(parents=True)
    (home / 'a.jpg').write_bytes(b'j' * 700)
    (deep / 'b.jpg').write_bytes(b'k' * 512)
    (deep / 'c.jpg').write_bytes(b'')
    (home / 'link.jpg').symlink_to('a.jpg')
    (home / 'hard.jpg').hardlink_to(home / 'a.jpg')
    path = tmp_path / 'x.tar'
    subprocess.run(['tar', f'--format={kind}', '-cf', path, '-C', home, '.'], check=True)
    assert walked(path) == by_tarfile(path)
    assert len(walked(path)) == 3


def test_sparse_files_are_refused(tmp_path):
    if shutil.which('tar') is None:
        pytest.skip('needs GNU tar')
    with (tmp_path / 'a.jpg').open('wb') as file:
        file.seek(1 << 20)
        file.write(b'end')
    for kind in ('gnu', 'posix'):
        path = tmp_path / f'{kind}.tar'
        command = ['tar', '--sparse', f'--format={kind}', '-cf', path, '-C', tmp_path, 'a.jpg']
        subprocess.run(command, check=True)
        with pytest.raises(
            UserError, match=r'\.tar: a sparse file at byte [\d,]+: write it without -S'
        ):
            walked(path)


@pytest.mark.parametrize('kind', ['gz', 'bz2', 'xz'])
def test_compressed_files_are_known_whatever_their_names(tmp_path, kind):
    with tarfile.open(tmp_path / 'x.tar', f'w:{kind}') as archive:
        archive.addfile(tarfile.TarInfo('a.jpg'))
    with pytest.raises(UserError, match=r'x\.tar: compressed, whatever its name says'):
        tar.tar(Request('train'), path=str(tmp_path / 'x.tar'))


def pairs(count):
    return [
        pair
        for i in range(count)
        for pair in ((f'{i}.jpg', b'x' * 700), (f'{i}.cls', str(i % 3).encode()))
    ]


def test_damage_between_samples_is_not_taken_for_the_end(tmp_path):
    """tarfile stops at a damaged header without a word: six of these ten would be lost."""
    path = tmp_path / 'x.tar'
    write(path, pairs(10))
    data = bytearray(path.read_bytes())
    at = data.index(b'4.jpg\0')
    data[at + 20] ^= 0x55
    path.write_bytes(data)
    assert len(by_tarfile(path)) == 8
    with pytest.raises(UserError, match=rf'x\.tar: damaged or truncated at byte {at:,} '):
        tar.tar(Request('train'), path=str(path))


def test_every_cut_is_noticed(tmp_path):
    path = tmp_path / 'x.tar'
    write(path, pairs(2))
    data = path.read_bytes()
    end = data.rindex(b'1.cls\0') + 1024
    assert not any(data[end:])
    for length in [*range(1, end, 97), end - 512, end, end + 511]:
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r'x\.tar: (damaged or )?truncated'):
            tar.tar(Request('train'), path=str(path))


def test_a_shard_may_be_empty(tmp_path):
    write(tmp_path / 'train-0.tar', pairs(3))
    write(tmp_path / 'train-1.tar', [])
    source = tar.tar(Request('train'), path=str(tmp_path))
    assert (source.length, source.num_classes) == (3, 3)


def test_hidden_files_and_masks_are_no_images(tmp_path):
    mask, image = ('./a.mask.png', b'mask'), ('./a.jpg', b'it')
    members = [('./._a.jpg', b'mac'), mask, image, ('./a.cls', b'1')]
    path = write(tmp_path / 'x.tar', members)
    place = files.place(path, 'data.path')
    index = tar.indexed([place], 'cls')
    assert [files.read_range(place, int(o), 2) for o in index['offset']] == [b'it']


@pytest.mark.parametrize(
    ('member', 'message'),
    [
        (('a.cls', b'99999999999'), r'a: .99999999999.\.\.\. is no label'),
        (('a.cls', b'3000000000'), r'a: .3000000000.\.\.\. is no label: numbers are below'),
        (('a.cls', b'7' * 5000), 'is no label'),
        (('a.json', b'[' * 40_000), r'a\.json is not JSON'),
        (('a.json', b'{"cls": 1.5}'), r'sample a has no \.cls and no .cls. in a \.json'),
        (('a.cls', bytes(2 << 20)), r'a\.cls of 2,097,152 bytes is no label'),
    ],
)
def test_what_is_no_label(tmp_path, member, message):
    path = write(tmp_path / 'x.tar', [('a.jpg', b''), member])
    with pytest.raises(UserError, match=message):
        tar.tar(Request('train'), path=path)


def test_a_member_of_five_gigabytes_is_refused(tmp_path):
    path = tmp_path / 'x.tar'
    video, label = tarfile.TarInfo('a.mp4'), tarfile.TarInfo('a.cls')
    video.size, label.size = 5 << 30, 1
    with path.open('wb') as file:  # A hole on the disk.
        file.write(video.tobuf(tarfile.GNU_FORMAT))
        file.seek(video.size, io.SEEK_CUR)
        file.write(label.tobuf(tarfile.GNU_FORMAT) + b'1'.ljust(512, b'\0') + bytes(1024))
    with pytest.raises(UserError, match=r'a at byte 512 has 5,368,709,120 bytes'):
        tar.tar(Request('train'), path=str(path))


def test_too_many_shards_are_refused_at_once():
    with pytest.raises(UserError, match=r'\{0\.\.9999999999\} are more than 1,000,000 shards'):
        tar.tar(Request('train'), path='x-{0..9999999999}.tar')


def test_a_remote_shard_is_read_in_few_requests(tmp_path, monkeypatch):
    """Labels come along with the headers: not a request for each."""
    import fsspec

    data = Path(write(tmp_path / 'x.tar', pairs(200))).read_bytes()
    fsspec.filesystem('memory').pipe_file('/shards/train-0.tar', data)
    asked = []
    real = files.read_range
    monkeypatch.setattr(files, 'read_range', lambda *what: asked.append(what) or real(*what))
    source = tar.tar(Request('train'), path='memory://shards')
    assert len(asked) == 1
    assert source.labels is not None
    np.testing.assert_array_equal(source.labels(), np.arange(200) % 3)
