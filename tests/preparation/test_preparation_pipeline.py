"""The pipelines of `prepare filter`, run on Beam's own runner for one machine."""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import ROOT, environment

from big_vit.data.sources import parquet, tar
from big_vit.data.sources.base import Request
from big_vit.errors import UserError

pytest.importorskip('apache_beam')

from big_vit.preparation import filtering, stored

# Beam warns of its own future.
pytestmark = pytest.mark.filterwarnings('ignore')
HERE = ('--', '--direct_running_mode=in_memory')


def picture(number, size=(120, 160)):
    """A picture of blobs, large and small, that is like no other."""
    rng, image = np.random.default_rng(number), np.full((*size, 3), 120, np.float32)
    for cells, strength in ((4, 40), (9, 25), (20, 14)):
        grid = rng.standard_normal((cells, cells, 3), np.float32) * strength
        image += cv2.resize(grid, size[::-1], interpolation=cv2.INTER_CUBIC)
    return image.clip(0, 220).astype(np.uint8)


def jpeg(image, quality=92):
    return cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def samples():
    """Names, files and notes of 40 pictures, of which the last twenty are alterations."""
    made = [
        (f'{n:03d}', 'jpg', jpeg(picture(n)), {'lang': 'en' if n % 5 else 'fr'}) for n in range(20)
    ]
    made[10] = ('010', 'jpg', b'\xff\xd8\xff no picture', {'lang': 'en'})
    made[11] = ('011', 'jpg', jpeg(picture(11, (30, 160))), {'lang': 'en'})
    altered = {
        1: jpeg(picture(1)),
        2: jpeg(picture(2), 50),
        3: jpeg(picture(3)[3:-3, 4:-4]),
        4: jpeg(cv2.resize(picture(4), (80, 60), interpolation=cv2.INTER_AREA)),
        6: jpeg(np.clip(picture(6) * 1.15, 0, 255).astype(np.uint8)),
        7: jpeg(np.ascontiguousarray(picture(7)[..., [1, 2, 0]])),  # Other colours: another.
        8: jpeg(np.ascontiguousarray(picture(8)[:, ::-1])),  # Its mirror image: another.
    }
    for n in range(20):
        data = altered.get(n) or jpeg(picture(100 + n))
        made.append((f'{100 + n:03d}', 'jpg', data, {'lang': 'en'}))
    return made


def write_shards(folder, count=4):
    folder.mkdir(parents=True)
    made = samples()
    for shard in range(count):
        with tarfile.open(folder / f'{shard:05d}.tar', 'w') as file:
            for name, ending, data, notes in made[shard * 10 : shard * 10 + 10]:
                for kind, content in (
                    (ending, data),
                    ('txt', f'picture {name}'.encode()),
                    ('json', json.dumps(notes).encode()),
                    ('cls', str(int(name) % 3).encode()),
                ):
                    about = tarfile.TarInfo(f'{name}.{kind}')
                    about.size = len(content)
                    file.addfile(about, io.BytesIO(content))
    return folder


def write_evaluation(folder):
    (folder / 'test').mkdir(parents=True)
    for n in (12, 13, 113):
        changed = picture(n)[:, ::-1] if n == 13 else picture(n)[2:-4, 4:-4]
        (folder / 'test' / f'{n}.jpg').write_bytes(jpeg(np.ascontiguousarray(changed), 70))
    (folder / 'test' / 'other.jpg').write_bytes(jpeg(picture(999)))
    return folder


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('prepared')
    return write_shards(folder / 'set'), write_evaluation(folder / 'evaluation')


def command(inputs, out, *more):
    given, evaluation = map(str, inputs)
    rules = ('--where', 'lang=en', '--min_side', '40', '--shard_samples', '12')
    return [given, '--out', str(out), '--evaluation', evaluation, *rules, *more]


@pytest.fixture(scope='module')
def done(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp('done') / 'out'
    filtering.main([*command(inputs, out, '--resize', '90'), *HERE])
    return out


def gone(out):
    lines = (out / 'left_out' / 'part-00000.jsonl').read_text().splitlines()
    return {line['name']: line for line in map(json.loads, lines)}


def contents(out):
    """Hashes of all files, without what the manifest says of the command."""
    found = {}
    for file in sorted(path for path in out.rglob('*') if path.is_file()):
        data = file.read_bytes()
        if file.name == 'manifest.json':
            data = json.dumps(json.loads(data) | {'command': ''}).encode()
        found[str(file.relative_to(out))] = hashlib.sha256(data).hexdigest()
    return found


WANTED = {
    **dict.fromkeys(('000', '005', '015'), 'where lang=en'),
    '010': 'unreadable',
    '011': 'min_side',
    **dict.fromkeys(('012', '013', '113'), 'evaluation'),
    '101': 'exact',
    **dict.fromkeys(('102', '103', '104', '106'), 'near'),
}


def test_what_is_left_out_and_why(done):
    found = gone(done)
    reasons = {name: line['reason'] for name, line in found.items()}
    assert reasons.pop('006' if '006' in reasons else '106') == 'near'  # Of equal size.
    assert reasons == {n: r for n, r in WANTED.items() if n != '106'}
    assert found['101']['of'].endswith('00000.tar, row 1')
    assert found['012']['of'].endswith('evaluation/test/12.jpg')
    assert 'JPEG' in found['010']['why']


def test_the_manifest_adds_up_and_knows_its_shards(done, inputs):
    made = json.loads((done / 'manifest.json').read_text())
    assert made['examples'] == 40 == made['kept'] + sum(made['left_out'].values())
    assert made['kept'] == 27 and made['left_out']['near'] == 4
    assert [i['examples'] for i in made['inputs']] == [10] * 4
    assert [sum(i['counts'].values()) for i in made['inputs']] == [10] * 4
    assert sum(i['examples'] for i in made['evaluations'][0]['inputs']) == 4
    assert [shard['examples'] for shard in made['shards']] == [12, 12, 3]
    for shard in made['shards']:
        data = (done / shard['name']).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (shard['sha256'], shard['bytes'])
    assert made['command'].startswith('python -m big_vit.prepare filter ')
    assert '--direct' not in made['command'] and not (done / '.work').exists()
    names = {path.name for path in done.iterdir()}
    assert names == {'manifest.json', 'left_out', *(s['name'] for s in made['shards'])}


def test_the_shards_are_read_by_training_in_the_order_of_the_input(done):
    source = tar.tar(Request('train'), path=str(done), text_column='txt')
    expected = [n for n, *_ in samples() if n not in gone(done)]
    columns = source.load(np.arange(source.length))
    assert columns['text'] == [f'picture {name}' for name in expected]
    assert columns['label'].tolist() == [int(name) % 3 for name in expected]
    sizes = {cv2.imdecode(np.frombuffer(d, np.uint8), 1).shape for d in columns['image']}
    assert sizes == {(90, 120, 3)}


def test_the_inputs_are_not_touched_and_a_second_run_has_nothing_to_do(done, inputs, capsys):
    before = contents(done)
    filtering.main([*command(inputs, done, '--resize', '90'), *HERE])
    assert capsys.readouterr().out.startswith('there   ') and contents(done) == before
    with pytest.raises(UserError, match=r'--out: .* was begun with resize 90, now it is 80'):
        filtering.main([*command(inputs, done, '--resize', '80'), *HERE])
    with tarfile.open(inputs[0] / '00000.tar') as shard:
        assert len(shard.getnames()) == 40
    (other := done.parent / 'other').mkdir()
    (other / 'file').touch()
    with pytest.raises(UserError, match=r'other holds file and is none of ours'):
        filtering.main([*command(inputs, other), *HERE])


class Killed(BaseException):
    pass


# What Beam makes of it, where a worker of its own is cut off.
CUT_OFF = (Killed, RuntimeError)


@pytest.mark.parametrize('writes', [1, 4, 9, 12])
def test_a_run_that_was_cut_off_goes_on_and_ends_the_same(
    writes, done, inputs, tmp_path, monkeypatch
):
    left, write = [writes], stored.write

    def counted(file, data):
        if not left[0]:
            raise Killed
        left[0] -= 1
        write(file, data)

    out = tmp_path / 'out'
    monkeypatch.setattr(stored, 'write', counted)
    with contextlib.suppress(*CUT_OFF):
        filtering.main([*command(inputs, out, '--resize', '90'), *HERE])
    assert not (out / 'manifest.json').exists()
    (out / f'.train-00000.tar.{"0a" * 16}').write_text('what a kill leaves of a shard')
    monkeypatch.setattr(stored, 'write', write)
    filtering.main([*command(inputs, out, '--resize', '90'), *HERE])
    assert contents(out) == contents(done)


def test_an_input_that_changed_in_between_is_told(inputs, tmp_path, monkeypatch):
    given = write_shards(tmp_path / 'set')
    monkeypatch.setattr(stored, 'write_json', lambda file, value: (_ for _ in ()).throw(Killed))
    words = [*command((given, inputs[1]), tmp_path / 'out'), *HERE]
    with pytest.raises(CUT_OFF):
        filtering.main(words)
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(stored, 'packed', lambda arrays: (_ for _ in ()).throw(Killed))
        with pytest.raises(CUT_OFF):
            filtering.main(words)
    os.utime(given / '00002.tar', (0, 0))
    with pytest.raises(UserError, match=r'00002\.tar: has changed, come or gone'):
        filtering.main(words)


def test_damaged_shards_are_one_line_and_can_be_mended(inputs, tmp_path):
    given = write_shards(tmp_path / 'set')
    whole = (given / '00001.tar').read_bytes()
    (given / '00001.tar').write_bytes(whole[: len(whole) // 2])
    words = [*command((given, inputs[1]), tmp_path / 'out'), *HERE]
    with pytest.raises(UserError, match=r'00001\.tar: (damaged|truncated)') as error:
        filtering.main(words)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (('--where', 'langg=en'), r"--where: no 'langg' in .*00000\.tar \(there are cls, .*lang"),
        (('--caption_words', '2:', '--text_column', 'caption'), r'--caption_\*: no captions in'),
    ],
)
def test_rules_of_what_is_not_there(flags, message, inputs, tmp_path):
    with pytest.raises(UserError, match=message):
        filtering.main([*command(inputs, tmp_path / 'out', *flags), *HERE])


def test_parquet_keeps_its_columns(inputs, tmp_path):
    rows = [
        {'image': {'bytes': data, 'path': name}, 'label': int(name) % 2, 'text': name, **notes}
        for name, _, data, notes in samples()
    ]
    (tmp_path / 'set').mkdir()
    schema = pa.Table.from_pylist(rows).schema.with_metadata({'made': 'by hand'})
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, tmp_path / 'set' / 'train-00000.parquet')
    words = [str(tmp_path / 'set'), '--out', str(tmp_path / 'out'), '--caption_chars', ':3']
    filtering.main([*words, '--where', 'lang=en', '--min_side', '40', *HERE])
    (shard,) = (tmp_path / 'out').glob('*.parquet')
    assert shard.name == 'train-00000-of-00001.parquet'
    found = pq.read_table(shard)
    assert found.schema.equals(schema) and found.schema.metadata[b'made'] == b'by hand'
    left_out = {int(line['name'][-2:]) for line in gone(tmp_path / 'out').values()}
    kept = [row for i, row in enumerate(rows) if i not in left_out]
    assert [r['text'] for r in found.to_pylist()] == [r['text'] for r in kept]
    assert found['image'][0].as_py()['bytes'] == kept[0]['image']['bytes']  # To the byte.
    source = parquet.parquet(Request('train'), path=str(tmp_path / 'out'))
    assert source.length == len(kept) and source.num_classes == 2


@pytest.mark.parametrize(
    ('more', 'told'),
    [
        ({'n': 2, 'more': 7}, r"'more' is int64, and not in .*00000"),
        ({'n': 2.5}, r"'n' is double, and int64 in .*00000"),
    ],
)
def test_columns_that_the_first_file_has_not_are_not_lost_without_a_word(more, told, tmp_path):
    (tmp_path / 'set').mkdir()
    for number, columns in enumerate(({'n': 1, 'text': 'a'}, more)):
        table = pa.Table.from_pylist([{'image': jpeg(picture(number)), **columns}])
        pq.write_table(table, tmp_path / 'set' / f'train-{number:05d}.parquet')
    words = [str(tmp_path / 'set'), '--out', str(tmp_path / 'out')]
    with pytest.raises(UserError, match=rf'00001.parquet: column {told}.*write --format tar'):
        filtering.main([*words, *HERE])
    filtering.main([*words[:2], str(tmp_path / 'tar'), '--format', 'tar', *HERE])
    (shard,) = (tmp_path / 'tar').glob('*.tar')
    with tarfile.open(shard) as file:
        kept = [json.load(file.extractfile(m)) for m in file.getmembers() if 'json' in m.name]
    assert kept == [{'n': 1}, more]


def test_a_folder_becomes_shards_of_either_format(tmp_path):
    for number in range(6):
        (folder := tmp_path / 'set' / ('cat', 'dog')[number % 2]).mkdir(parents=True, exist_ok=True)
        (folder / f'{number % 5}.jpg').write_bytes(jpeg(picture(number)))
    for kind, read in (('tar', tar.tar), ('parquet', parquet.parquet)):
        out = tmp_path / kind
        filtering.main([str(tmp_path / 'set'), '--out', str(out), '--format', kind, *HERE])
        source = read(Request('train'), path=str(out))
        columns = source.load(np.arange(6))
        assert (
            source.class_names == ('cat', 'dog') and columns['label'].tolist() == [0] * 3 + [1] * 3
        )
        assert columns['image'][0] == jpeg(picture(0))


def test_embeddings_say_what_is_near_instead(inputs, tmp_path):
    rng = np.random.default_rng(0)
    names = [name for name, *_ in samples()]
    vectors = rng.standard_normal((40, 32)).astype(np.float32)
    vectors[20] = 3 * vectors[14] + 0.01 * rng.standard_normal(32)
    places = [f'{inputs[0]}/{i // 10:05d}.tar: {name}.jpg' for i, name in enumerate(names)]
    np.savez(tmp_path / 'a.npz', files=np.array(places[:30]), features=vectors[:30])
    table = {'file': places[30:39], 'embedding': vectors[30:39].tolist()}
    pq.write_table(pa.table(table), tmp_path / 'b.parquet')
    words = [str(inputs[0]), '--out', str(tmp_path / 'out'), '--keep', 'first']
    for name in ('a.npz', 'b.parquet'):
        words += ['--embeddings', str(tmp_path / name)]
    filtering.main([*words, *HERE])
    reasons = {name: line['reason'] for name, line in gone(tmp_path / 'out').items()}
    assert reasons == {'010': 'unreadable', '101': 'exact', '100': 'near'}
    made = json.loads((tmp_path / 'out' / 'manifest.json').read_text())
    assert made['without_embedding'] == 1  # The last one.


# As a user runs it, in processes.


def start(*words):
    return subprocess.Popen(
        [sys.executable, '-m', 'big_vit.prepare', 'filter', *words],
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_twice_and_with_two_workers_it_ends_the_same(done, inputs, tmp_path):
    out = tmp_path / 'out'
    words = command(inputs, out, '--resize', '90')
    for wanted in ('.work/examined/*.npz', '.work/written/*.json'):
        process = start(*words)
        while process.poll() is None and not list(out.glob(wanted)):
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    process = start(*words)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert stderr == '' and 'kept' in stdout
    assert contents(out) == contents(done)


@pytest.mark.slow
def test_a_mistake_is_one_line_in_a_terminal(inputs, tmp_path):
    process = start(*command(inputs, tmp_path / 'out', '--where', 'langg=en'))
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 2 and stdout == ''
    assert stderr.startswith("error: --where: no 'langg' in ") and stderr.count('\n') == 1
