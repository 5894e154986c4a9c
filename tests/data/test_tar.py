"""Headers and labels of tar shards: against Python's tarfile, GNU tar, and damage."""

import io
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from big_vit.data import files
from big_vit.data.sources import tar, tar_format, tar_index
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
    return list(tar_format.members(place, files.forward(place)))


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
    index = tar_index.indexed(files.stored([place]), 'cls')
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


# --- Samples ---------------------------------------------------------------------------


def opened(tmp_path, members, labelled=True, **more):
    path = write(tmp_path / 'x.tar', members)
    return tar.tar(Request('train', labelled=labelled), path=path, **more)


def refused(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('again', ['a.jpg', 'a.cls', 'a.JPG'])
def test_a_name_that_comes_twice_is_refused(tmp_path, again):
    """As webdataset does; the later member would hide the earlier one."""
    members = [('a.jpg', b'1'), ('a.cls', b'0'), (again, b'2')]
    refused(
        lambda: opened(tmp_path, members),
        rf'x\.tar: {again.lower()} is there twice, at byte [\d,]+ and at [\d,]+: give each sample',
    )
    # Apart from each other they are two samples, to webdataset too.
    apart = [('a.jpg', b'1'), ('a.cls', b'0'), ('b.jpg', b''), ('b.cls', b'0'), *members[:2]]
    assert opened(tmp_path, apart).length == 3


def test_dots_in_names_are_told_of(tmp_path):
    members = [('22.5.jpg', b''), ('22.5.cls', b'0')]
    refused(
        lambda: opened(tmp_path, members),
        r'sample 22 has no \.cls .*\(it has \.5\.cls, \.5\.jpg\): a sample.s name ends at',
    )
    members = [('clip.0001.jpg', b'1'), ('clip.0002.jpg', b'2')]
    refused(
        lambda: opened(tmp_path, members, labelled=False),
        r'clip\.0001\.jpg and clip\.0002\.jpg would be one sample, clip: ',
    )
    # Dots in folders do not count.
    members = [('v1.0/a.jpg', b''), ('v1.0/a.cls', b'2'), ('v1.0/b.jpg', b''), ('v1.0/b.cls', b'3')]
    assert opened(tmp_path, members).labels().tolist() == [2, 3]


@pytest.mark.parametrize(
    ('text', 'column', 'label'),
    [
        ('{"label": 3.0}', 'label', 3),
        ('{"label": {"id": 3}}', 'label.id', 3),
        ('{"a": {"b": {"c": 2}}, "a.b": 1}', 'a.b.c', 2),
        ('{"a.b": 1, "a": {"b": 5}}', 'a.b', 1),
        ('{"label": [1, 2]}', 'label', r'.label. there is \[1, 2\]: labels are whole numbers'),
        ('{"label": 1.5}', 'label', r'.label. there is 1\.5: labels'),
        ('{"label": true}', 'label', 'there is true'),
        ('{"label": {"id": 3}}', 'label', r'there is \{"id": 3\}'),
        ('{"label": null}', 'label', r'\(it has \.jpg, \.json\): set label_column'),
        ('[3]', 'label', r'\(it has \.jpg, \.json\): set label_column'),
    ],
)
def test_labels_in_json(tmp_path, text, column, label):
    members = [('a.jpg', b''), ('a.json', text.encode())]
    if isinstance(label, int):
        assert opened(tmp_path, members, label_column=column).labels().tolist() == [label]
    else:
        refused(lambda: opened(tmp_path, members, label_column=column), label)
        # Where no labels are needed, those that are none do no harm.
        assert opened(tmp_path, members, False, label_column=column).length == 1


def test_members_that_are_left_out_are_counted(tmp_path, capfd):
    members = [(f'{i}.{"heic" if i == 2 else "jpg"}', bytes([i])) for i in range(6)]
    pairs = [pair for i, m in enumerate(members) for pair in (m, (f'{i}.cls', b'1'))]
    clutter = ['./__MACOSX/9.jpg', '@eaDir/8.jpg', 'x/.ipynb_checkpoints/7.jpg', 'README.md']
    extra = [('notes.txt', b'of all'), *((name, b'') for name in clutter)]
    source = opened(tmp_path, pairs + extra)
    loaded = source.load(np.arange(source.length))['image']
    assert loaded == [bytes([i]) for i in (0, 1, 3, 4, 5)]
    told = capfd.readouterr().err
    assert told == 'data    tar:x.tar, train: 1 file left out (1 .heic), such as 2.heic\n'
    # The index remembers.
    tar.tar(Request('train[:2]'), path=str(tmp_path / 'x.tar'))
    refused(
        lambda: opened(tmp_path, [(name.replace('jpg', 'heic'), data) for name, data in pairs]),
        r'no sample with an image, .*\(6 files left out \(6 \.heic\), such as 0\.heic\)',
    )


@pytest.mark.slow
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(['a', 'b', 'x/a', './c', '.d', '@eaDir/e']),
            st.sampled_from(
                ['jpg', 'JPG', 'png', 'seg.png', 'cls', 'json', 'txt', 'heic', '1.jpg']
            ),
        ),
        max_size=8,
    )
)
def test_samples_are_grouped_as_webdataset_groups_them(tmp_path, names):
    members = [(f'{stem}.{ending}', f'{i}'.encode()) for i, (stem, ending) in enumerate(names)]
    groups: list[tuple[str, dict[str, bytes]]] = []
    twice = False
    for name, data in members:
        match = re.match(r'^((?:.*/|)[^.]+)[.]([^/]*)$', name)
        if match is None or match[1].startswith('@eaDir'):
            continue
        key, ending = match[1], match[2].lower()
        if not groups or groups[-1][0] != key:
            groups.append((key, {}))
        twice |= ending in groups[-1][1]
        groups[-1][1][ending] = data
    try:
        source = opened(tmp_path, members, labelled=False)
    except UserError as error:
        pictures = [g for _, g in groups if any(e.endswith(('jpg', 'png', 'txt')) for e in g)]
        told = 'twice' in str(error) or 'would be one sample' in str(error)
        assert twice or not pictures or told or 'left out' in str(error)
        return
    assert not twice
    column = source.load(np.arange(source.length))
    found = column.get('image') or [text.encode() for text in column['text']]
    wanted = [group for _, group in groups if any(e.endswith(('jpg', 'png')) for e in group)]
    if 'image' in column:
        assert len(found) == len(wanted)
        assert all(data in group.values() for data, group in zip(found, wanted, strict=True))


def test_labels_and_texts_of_windows(tmp_path):
    members = [
        ('a.png', b'x'),
        ('a.cls', b'\xef\xbb\xbf1\r\n'),
        ('a.txt', b'\xef\xbb\xbfhi'),
        ('b.png', b'x'),
        ('b.json', b'\xef\xbb\xbf{"cls": 0}'),
        ('b.txt', b'ho'),
    ]
    source = opened(tmp_path, members, text_column='txt')
    assert source.class_names is None
    assert source.labels().tolist() == [1, 0]
    assert source.load(np.arange(2))['text'] == ['hi', 'ho']


@pytest.mark.parametrize('label', [b'', b' \n', b'caf\xe9', b'\x93NUMPY\x01\0'])
def test_an_empty_label_and_one_of_other_bytes_are_no_names(tmp_path, label):
    members = [('a.png', b'x'), ('a.cls', b'y'), ('b.png', b'x'), ('b.cls', label)]
    refused(lambda: opened(tmp_path, members), 'sample b has no|is not text in UTF-8')


@pytest.mark.parametrize('kind', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_member_is_named_as_tarfile_names_it_or_not_at_all(tmp_path, kind):
    names = ['a.png', 'b/' * 40 + 'c.png', 'b/' * 60 + 'd.png', 'ünïcödé/e.png', f'{"x" * 96}.png']
    with tarfile.open(tmp_path / 'a.tar', 'w', format=kind) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b'\x89PNG'))
    with tarfile.open(tmp_path / 'a.tar') as archive:
        offsets = {member.offset_data: member.name for member in archive}
    shard, named = files.place(str(tmp_path / 'a.tar'), 'a'), 0
    for offset, name in offsets.items():
        place = tar_format.place_of(shard, offset, 4)
        named += place == f'{shard}: {name}'
        assert place in (f'{shard}: {name}', f'{shard} at byte {offset:,} (4 bytes)')
    assert named >= 2
