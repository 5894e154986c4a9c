"""What TensorBoard and Weights & Biases get is read back from their files."""

import importlib.util
import json
import struct

import numpy as np
import pytest
from commands import script
from tiny import MODEL, RUN, overrides

from big_vit import config, metrics, train
from big_vit.metrics import trackers

PICTURES = [np.full((8, 6, 1), 20 * i, np.uint8) for i in range(10)]


def write_run(workdir, start=0, **targets):
    """A short run, or its second start."""
    settings = {'lr': 0.5, 'model': {'variant': 'S/16', 'width': None}, 'sizes': [1, 2]}
    with metrics.Writer(workdir, start, config=settings, **targets) as writer:
        assert writer.tracked
        writer.pictures(start, 'train/images', PICTURES)
        writer.write(start + 1, {'train/loss': 1.5, 'time/mfu': 0.5})
        writer.write(start + 2, {'test/top1': 0.25, 'test/count': 8.0})
        writer.checkpoint(workdir / 'checkpoints' / str(start + 2), start + 2)


def events(folder):
    """Of all event files, oldest first: length, its checksum, an event, its checksum; again."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.glob('events.*'), key=lambda path: path.stat().st_mtime_ns):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from('<Q', data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
    return found


def values_of(found):
    return {v.tag: (e.step, v) for e in found for v in e.summary.value}


def test_tensorboard_has_scalars_pictures_and_hyperparameters(tmp_path):
    write_run(tmp_path, tensorboard=True)
    found = values_of(events(tmp_path / 'tensorboard'))
    step, loss = found['train/loss']
    assert (step, loss.simple_value) == (1, 1.5)
    assert found['test/top1'][0] == 2 and found['time/mfu'][1].simple_value == 0.5
    image = found['train/images'][1].image
    assert (image.width, image.height, image.colorspace) == (8 * 6, 2 * 8, 3)
    assert b'"S/16"' in found['config/text_summary'][1].tensor.string_val[0]
    assert found['checkpoint/text_summary'][0] == 2
    start = found['_hparams_/session_start_info'][1].metadata.plugin_data.content
    assert b'model.variant' in start and b'model.width' not in start
    scores = found['_hparams_/experiment'][1].metadata.plugin_data.content
    assert b'test/top1' in scores and b'train/loss' not in scores


def test_a_resumed_run_goes_on_in_tensorboard(tmp_path):
    write_run(tmp_path, tensorboard=True)
    write_run(tmp_path, start=2, tensorboard=True)
    found = events(tmp_path / 'tensorboard')
    losses = [e.step for e in found for v in e.summary.value if v.tag == 'train/loss']
    assert losses == [1, 3]
    assert [row.get(metrics.RESUMED) for row in metrics.read(tmp_path)] == [None, None, 2.0, None]


READ = """
import json, sys, warnings
warnings.simplefilter('ignore')
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[1])
found.Reload()
image = found.Images('train/images')[0]
names = found.Tags()['scalars']
scalars = {name: [[e.step, e.value] for e in found.Scalars(name)] for name in names}
print(json.dumps([scalars, image.width, image.height]))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('tensorboard') is None, reason='no tensorboard')
def test_tensorboard_itself_reads_them(tmp_path):
    write_run(tmp_path, tensorboard=True)
    result = script(READ, tmp_path / 'tensorboard')
    assert result.returncode == 0, result.stderr
    scalars, width, height = json.loads(result.stdout.splitlines()[-1])
    assert scalars['train/loss'] == [[1, 1.5]] and scalars['test/count'] == [[2, 8.0]]
    assert (width, height) == (48, 16)


def test_pictures_side_by_side():
    grid = metrics.montage(PICTURES)
    assert grid.shape == (16, 48, 3)
    np.testing.assert_array_equal(grid[8:, 6:12], np.full((8, 6, 3), 180))
    assert (grid[8:, 12:] == 0).all()
    assert metrics.montage(PICTURES[:3]).shape == (8, 18, 3)


def test_a_config_by_dotted_keys():
    assert trackers.flat({'a': {'b': 1, 'c': None}, 'd': [1, 2], 'e': True}) == {
        'a.b': 1,
        'd': '[1, 2]',
        'e': True,
    }


def test_another_process_tracks_nothing(tmp_path):
    with metrics.Writer(tmp_path, 0, active=False, tensorboard=True, wandb='vits') as writer:
        assert not writer.tracked
        writer.pictures(0, 'train/images', PICTURES)
        writer.checkpoint(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_shows_its_images_and_checkpoint(tmp_path):
    settings = config.load(
        'configs/pretrain_fdsl.py',
        overrides(MODEL, RUN, {'log.tensorboard': 'true'}, evals=('test',)),
    )
    train.run(settings, tmp_path / 'w')
    found = values_of(events(tmp_path / 'w' / 'tensorboard'))
    assert found['train/images'][0] == 0 and found['train/images'][1].image.width == 8 * 32
    assert found['checkpoint/text_summary'][0] == 3
    assert {'train/loss', 'test/top1', 'train/lr'} <= found.keys()


# A run's file is a log of records in blocks of 32 KiB, as LevelDB has them, behind 7 bytes.
WANDB = """
import json, os, pathlib, struct, sys, warnings
warnings.simplefilter('ignore')
sys.path.insert(0, 'tests')
os.environ |= {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'}
import test_tracking
from wandb.proto import wandb_internal_pb2
workdir = pathlib.Path(sys.argv[1])
for start in (0, 2):
    (workdir / 'checkpoints' / str(start + 2)).mkdir(parents=True)
    test_tracking.write_run(workdir, start, wandb='vits')
found = []
for file in sorted(workdir.glob('wandb/offline-run-*/run-*.wandb')):
    data, at, whole = file.read_bytes(), 7, b''
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from('<IHB', data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b''
def text(record):
    return str(getattr(record, record.WhichOneof('record_type')))
print(json.dumps([[r.WhichOneof('record_type'), text(r)] for r in found]))
"""


@pytest.mark.skipif(importlib.util.find_spec('wandb') is None, reason='no wandb')
def test_wandb_offline_has_config_rows_tables_and_the_checkpoint(tmp_path):
    result = script(WANDB, tmp_path)
    assert result.returncode == 0, result.stderr
    records = json.loads(result.stdout.splitlines()[-1])
    kinds = {}
    for kind, text in records:
        kinds.setdefault(kind, []).append(text)
    own = (tmp_path / 'wandb_id').read_text().strip()
    assert len(kinds['run']) >= 2
    assert all(own in text for text in kinds['run'])  # The second start is the same run.
    assert any('S/16' in text and 'vits' in text for text in kinds['run'])
    rows = ' '.join(kinds['history'])
    for name in ('train/loss', 'test/top1', 'train/images', 'evaluations'):
        assert name in rows, name
    artifacts = ' '.join(text for kind, text in records if 'artifact' in kind or kind == 'request')
    assert f'checkpoint-{own}' in artifacts
    assert not list((tmp_path / 'checkpoints').rglob('*.wandb'))
