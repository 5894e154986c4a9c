"""Shards that vanish, change or come back between the parts of a run, and while it runs."""

import dataclasses
import io
import json
import tarfile

import numpy as np
import pytest

from big_vit import config as config_lib
from big_vit.build.data import train_data
from big_vit.data import (
    dataset,
    files,
    network,
    pipeline,
    shard_ledger,
    sources,
    transforms,
    windows,
)
from big_vit.data.sources.base import Shard, stand_ins
from big_vit.errors import Unavailable, UserError
from big_vit.journal import Damage

EXAMPLES, SHARDS = 12, 10
SOURCE = sources.Source('many', 'train', 12, 1, None, dict, False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('BIG_VIT_CACHE', str(tmp_path / 'cache'))


def write(folder, number, count=EXAMPLES, offset=0):
    """Write a shard of grey squares; example i of all has the value i."""
    import cv2

    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / f'{number:03d}.tar', 'w') as archive:
        for i in range(count):
            value = (number * EXAMPLES + i + offset) % 251
            png = cv2.imencode('.png', np.full((4, 4), value, np.uint8))[1].tobytes()
            for name, data in ((f'{i:04d}.png', png), (f'{i:04d}.cls', b'%d' % (value % 3))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path):
    for number in range(SHARDS):
        write(tmp_path / 'shards', number)
    return tmp_path / 'shards'


def opened(folder, ledger=None):
    spec = dataset.Spec(
        key='data',
        name='tar',
        split='train',
        transform='decode(1)',
        image_size=(4, 4),
        settings=(('path', str(folder)),),
        cache='none',
        ledger=ledger,
    )
    return dataset.open_spec(spec)[0]


def ledger_of(source, lanes=4):
    made = shard_ledger.of(source, windows.opened(source.shard_lengths, lanes))
    return shard_ledger.parse(json.loads(json.dumps(made.dump())))


def take(source, steps, rows=slice(None), start=0, meter=None, **settings):
    transform = transforms.parse('', size=(4, 4))
    shards = (windows.opened(source.shard_lengths, 4),)
    kept = pipeline.Order(24, 1, shards=shards)
    settings = {'skip_bad': True} | settings
    batches = pipeline.train_batches(
        source, transform, kept, rows=rows, start_step=start, num_threads=2, meter=meter, **settings
    )
    result = [next(batches) for _ in range(steps)]
    batches.close()
    return result


def test_a_ledger_is_of_the_files(folder):
    ledger = ledger_of(opened(folder))
    assert [shard.name for shard in ledger.shards] == [f'{n:03d}.tar' for n in range(SHARDS)]
    assert [shard.size for shard in ledger.shards] == [
        (folder / f'{n:03d}.tar').stat().st_size for n in range(SHARDS)
    ]
    assert (ledger.lengths, ledger.window, ledger.lost) == ((EXAMPLES,) * SHARDS, 4, ())
    assert shard_ledger.changes(ledger, ledger) == ([], True)


def test_a_lost_shard_keeps_its_place_and_comes_back(folder, capfd):
    before = opened(folder)
    ledger, clean = ledger_of(before), take(before, 6)
    (folder / '007.tar').rename(folder.parent / 'kept')
    source, stored = opened(folder, ledger), opened(folder)
    assert source.length == before.length
    meter = pipeline.Meter()
    batches = take(source, 6, meter=meter)
    lost = range(7 * EXAMPLES, 8 * EXAMPLES)
    seen = set()
    for batch, whole in zip(batches, clean, strict=True):
        values = whole['image'][:, 0, 0, 0]
        is_lost = np.isin(values, lost)
        seen |= set(values[is_lost].tolist())
        # The example at the same place of the next shard.
        np.testing.assert_array_equal(
            batch['image'][:, 0, 0, 0], np.where(is_lost, values + EXAMPLES, values)
        )
        np.testing.assert_array_equal(batch['replaced'], is_lost)
    assert seen == set(lost) and meter.damaged == set(lost) and meter.lost == {7}
    error = capfd.readouterr().err
    assert error.count('WARNING 007.tar: nothing near it can be read') == 1
    halves = [take(source, 6, rows) for rows in (np.arange(12), np.arange(12, 24))]
    for whole, *parts in zip(batches, *halves, strict=True):
        for name in whole:
            np.testing.assert_array_equal(whole[name], np.concatenate([p[name] for p in parts]))

    told = []
    small = dataclasses.replace(stored, expect=told.append)
    shard_ledger.with_lost(small, ledger).expect(np.array([0, 83, 84, 95, 96, 119]))
    np.testing.assert_array_equal(np.concatenate(told), [0, 83, 84, 107])

    then = ledger_of(source)
    assert then.lost == ('007.tar',)
    told, same = shard_ledger.changes(ledger, then)
    assert same
    assert told == ['of 10 shards 1 vanished (007.tar): until back, its examples count as damaged']
    (folder.parent / 'kept').rename(folder / '007.tar')
    back = opened(folder, then)
    assert shard_ledger.changes(then, ledger_of(back)) == (
        ['of 10 shards 1 came back (007.tar)'],
        True,
    )
    for batch, whole in zip(take(back, 6), clean, strict=True):
        np.testing.assert_array_equal(batch['image'], whole['image'])


def test_a_shard_that_vanishes_while_a_run_reads_is_replaced(folder, capfd):
    source = opened(folder)
    clean = take(source, 6)
    gone = folder / '003.tar'
    gone.unlink()
    gone.symlink_to(folder / 'nothing')

    files._descriptor.cache_clear()
    batches = take(source, 6)
    for batch, whole in zip(batches, clean, strict=True):
        values = whole['image'][:, 0, 0, 0]
        is_lost = values // EXAMPLES == 3
        np.testing.assert_array_equal(batch['replaced'], is_lost)
        assert not np.isin(batch['image'][:, 0, 0, 0] // EXAMPLES, 3).any()
    with pytest.raises(UserError, match=r'003\.tar.*No such file'):
        take(source, 6, skip_bad=False)


def test_changes_are_told(folder):
    before = ledger_of(opened(folder))
    write(folder, 4, count=EXAMPLES + 1)
    write(folder, 5, offset=1)
    write(folder, SHARDS)
    (folder / '001.tar').unlink()
    source = opened(folder, before)
    assert source.length == SHARDS * EXAMPLES + 1
    told, same = shard_ledger.changes(before, ledger_of(source))
    assert not same
    assert told == [
        'of 10 shards 1 vanished (001.tar)',
        'of 10 shards 1 came anew (010.tar)',
        'of 10 shards 1 changed in size or number of examples (004.tar)',
        'of 10 shards 1 changed without another size (005.tar)',
    ]


def test_another_window_is_another_order(folder):
    source = opened(folder)
    four, all_ = ledger_of(source), shard_ledger.of(source, None)
    assert shard_ledger.changes(four, four._replace(window=8)) == ([], False)
    assert shard_ledger.changes(all_, all_) == ([], True)


def test_a_run_that_may_not_skip_ends_where_a_shard_is_lost(folder):
    overrides = {
        'name': 'tar',
        'path': str(folder),
        'transform': 'decode(1)',
        'split': 'train',
        'shuffle': 'windows',
    }
    flags = [(f'data.{key}', value) for key, value in overrides.items()]
    flags += [('image_size', '4'), ('batch_size', '24'), ('model.variant', 'mu/2')]

    def data(*more, ledgers=None):
        config = config_lib.load('configs/fashion_mnist.py', [*flags, *more])
        return train_data(config, ledgers=ledgers)

    ledgers = data().ledgers
    assert ledgers['data'].window == 8
    (folder / '002.tar').unlink()
    with pytest.raises(UserError, match=r'^data: 1 of its shards vanished .*\(002\.tar\): put'):
        data(ledgers=ledgers)
    skipping = data(('data.on_error', 'skip'), ledgers=ledgers)
    assert skipping.source.length == SHARDS * EXAMPLES
    # What says nothing of the order keeps that of the run, and an older run had none.
    assert data(('data.shuffle', 'auto'), ('data.on_error', 'skip'), ledgers=ledgers).order.shards
    assert data(('data.shuffle', 'auto'), ledgers={}).order.shards == ()


def test_a_store_that_does_not_answer_is_no_damage(folder):
    source = opened(folder)

    def load(indices):
        raise TimeoutError('no answer')

    silent = dataclasses.replace(source, load=load, where=lambda i: f's3://bucket/{i}.tar')
    with pytest.raises(Unavailable, match='no answer'):
        take(silent, 1)

    def load_short(indices):
        if (indices // EXAMPLES == 2).any():
            raise network.ShortAnswerError('it ends at byte 7')
        return source.load(indices)

    short = dataclasses.replace(silent, load=load_short)
    batches = take(short, 5)
    assert sum(batch['replaced'].sum() for batch in batches) == EXAMPLES


def test_stand_ins_are_of_the_next_shards():
    source = dataclasses.replace(SOURCE, shard_lengths=np.array([5, 0, 3, 4]))
    assert stand_ins(source, 11, 4) == ([0, 1, 2], [3, 5])
    assert stand_ins(source, 6, 3) == ([7, 8], [9, 1])
    assert stand_ins(SOURCE, 11, 3) == ([0, 1], [])


def test_shards_of_one_name_do_not_end_a_run():
    twice = (Shard('a.tar', 1, 'x'), Shard('a.tar', 2, 'y'))
    ledger = shard_ledger.Ledger(twice, (3, 4), None)
    assert shard_ledger.changes(ledger, ledger) == ([], True)
    source = dataclasses.replace(
        SOURCE, length=7, shard_lengths=np.array([3, 4]), shards=lambda: twice
    )
    assert shard_ledger.with_lost(source, ledger) is source


def test_the_end_of_a_run_says_how_many_shards_were_lost():
    damage = Damage(1.0)
    damage.add(30, 100)
    line = damage.line({3, 4}, SOURCE, {1})
    assert line.startswith('data    30 of 100 examples were damaged')
    assert line.endswith('; shards that cannot be read: 1)')


def test_shards_without_names_have_a_ledger_of_lengths():
    source = dataclasses.replace(SOURCE, shard_lengths=np.array([5, 7]))
    before = ledger_of(source)
    assert shard_ledger.changes(before, before) == ([], True)
    now = ledger_of(dataclasses.replace(source, shard_lengths=np.array([6, 6])))
    told, same = shard_ledger.changes(before, now)
    assert told == ['of 2 shards 2 changed in size or number of examples (0, 1)'] and not same
