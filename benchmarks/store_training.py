"""Training from stores: `python -m benchmarks.store_training FOLDER`.

FOLDER has Fashion-MNIST's IDX files. A small network learns the same pictures from 500 shards in
tar, in Parquet (by groups of rows) and in ArrayRecord, each from the local disk and from emulators
of S3 and of Google Cloud Storage that are late and fail, in a full shuffle and in windows, with
three seeds. Its batches come from the loader of training. The question is whether its test error is
the same; from a store even its parameters should be, to the last bit, those from the local disk.

What is done already is read from the file of results, so that it goes on where it was stopped.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import os
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import emulators, windows
from big_vit import runtime
from big_vit.errors import UserError

RESULTS = Path(__file__).parent / 'results' / 'store_training.json'
STORES, FORMATS, ORDERS = (
    ('local', 's3', 'gs'),
    ('tar', 'parquet', 'array_record'),
    (True, 'windows'),
)
SHARDS = 500


def png(image: np.ndarray) -> bytes:
    import cv2

    return cv2.imencode('.png', image)[1].tobytes()


def write_tar(folder: Path, files: list[bytes], labels: list[int], shards: int) -> None:
    from big_vit.data.sources import indexing

    for number, rows in enumerate(np.array_split(np.arange(len(files)), shards)):
        with tarfile.open(folder / f'train-{number:04d}.tar', 'w') as shard:
            for row in rows.tolist():
                for ending, data in (('png', files[row]), ('cls', str(labels[row]).encode())):
                    member = tarfile.TarInfo(f'{row:06d}.{ending}')
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))
    indexing.index(str(folder), say=lambda line: None)


def write_parquet(folder: Path, files: list[bytes], labels: list[int], shards: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number, rows in enumerate(np.array_split(np.arange(len(files)), shards)):
        chosen = rows.tolist()
        table = pa.table(
            {'image': [files[i] for i in chosen], 'label': [labels[i] for i in chosen]}
        )
        pq.write_table(table, folder / f'train-{number:05d}-of-{shards:05d}.parquet')


def write_array_record(folder: Path, files: list[bytes], labels: list[int], shards: int) -> None:
    import tensorflow_datasets as tfds

    features = {
        'image': tfds.features.Image(shape=(28, 28, 1)),
        'label': tfds.features.ClassLabel(num_classes=10),
    }

    class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = 'pictures'
        VERSION = tfds.core.Version('1.0.0')

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _: Any) -> Any:
            return {'train': self._generate_examples()}

        def _generate_examples(self) -> Any:
            for i, (file, label) in enumerate(zip(files, labels, strict=True)):
                yield i, {'image': io.BytesIO(file), 'label': label}

    builder = Pictures(data_dir=folder, file_format='array_record')
    settings = tfds.download.DownloadConfig(num_shards=shards)
    builder.download_and_prepare(download_config=settings)


WRITE = {'tar': write_tar, 'parquet': write_parquet, 'array_record': write_array_record}


def batches_of(path: str, kind: str, shuffle: bool | str, seed: int) -> Iterator[Any]:
    """Yield (images, float32 [batch, pixels], and labels) as training loads them."""
    from big_vit.data import dataset, pipeline
    from big_vit.data import windows as order_windows
    from big_vit.data.sources import arrow

    arrow.IN_MEMORY_BYTES = 0  # As if there were too much for the memory.
    more = (('tfds_name', 'pictures'),) if kind == 'array_record' else ()
    spec = dataset.Spec(
        key='data',
        name='tfds' if kind == 'array_record' else kind,
        split='train',
        transform='decode(1)',
        image_size=(28, 28),
        settings=(('path', path), *more),
        num_classes=10,
    )
    source, transform = dataset.open_examples((spec,))
    shards = (order_windows.opened(source.shard_lengths),) if shuffle == 'windows' else ()
    order = pipeline.Order(batch_size=windows.ROWS, seed=seed, shards=shards)
    with contextlib.closing(pipeline.train_batches(source, transform, order)) as batches:
        for batch in batches:
            images = batch['image'].reshape(len(batch['image']), -1)
            yield images.astype(np.float32) / 255, batch['label']


@contextlib.contextmanager
def served(store: str, folder: Path) -> Iterator[dict[str, str]]:
    """Serve sets from a store; yields the path of each format."""
    if store == 'local':
        yield {kind: str(folder / kind) for kind in FORMATS}
        return
    import fsspec

    link = emulators.Link(emulators.at_random(0.01, 0.001, 3.0), latency_s=0.01)
    with (
        emulators.emulator(store) as upstream,
        emulators.proxy(upstream, link, keeps=store == 's3') as handler,
    ):
        os.environ.update(emulators.environment(handler.port))
        fsspec.get_filesystem_class(store).clear_instance_cache()
        system = fsspec.filesystem(store)
        for file in sorted(folder.rglob('*')):
            if file.is_file():
                system.pipe_file(f'bucket/{file.relative_to(folder)}', file.read_bytes())
        system.invalidate_cache()
        yield {kind: f'{store}://bucket/{kind}' for kind in FORMATS}


def train(
    path: str, kind: str, shuffle: bool | str, seed: int, test: Any, steps: int
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        os.environ['BIG_VIT_CACHE'] = cache
        with contextlib.closing(batches_of(path, kind, shuffle, seed)) as batches:
            error, loss, params = windows.scores_of(batches, test, steps, seed)
    digest = hashlib.sha256(b''.join(param.tobytes() for param in params)).hexdigest()[:16]
    return {'error': error, 'loss': loss, 'parameters': digest}


def table(rows: list[dict[str, Any]]) -> str:
    """Format means and deviations of seeds as Markdown."""
    ours = {(r['format'], r['order'], r['seed']): r for r in rows if r['store'] == 'local'}
    lines = [('read from', 'format', 'order', 'test error', 'test loss', 'runs that equal local')]
    for (store, kind, order), group in itertools.groupby(
        sorted(rows, key=_case), key=lambda row: _case(row)[:3]
    ):
        runs = list(group)
        same = sum(
            row['parameters'] == ours.get((kind, order, row['seed']), {}).get('parameters')
            for row in runs
        )
        lines.append(
            (
                store,
                kind,
                'windows' if order == 'windows' else 'full shuffle',
                _spread([100 * row['error'] for row in runs], 2, ' %'),
                _spread([row['loss'] for row in runs], 4),
                '' if store == 'local' else f'{same} of {len(runs)}',
            )
        )
    return windows.markdown(lines)


def _case(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return row['store'], row['format'], row['order'], row['seed']


def _spread(values: list[float], digits: int, unit: str = '') -> str:
    text = f'{statistics.mean(values):.{digits}f}'
    if len(values) > 1:
        text += f' ± {statistics.stdev(values):.{digits}f}'
    return text + unit


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.store_training')
    parser.add_argument('folder', help="of Fashion-MNIST's IDX files")
    parser.add_argument('--stores', nargs='+', choices=STORES, default=STORES)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--epochs', type=int, default=windows.EPOCHS)
    parser.add_argument('--examples', type=int, help='of training, by default all 60,000')
    parser.add_argument('--shards', type=int, default=SHARDS)
    parser.add_argument('--json', type=Path, default=RESULTS, help='where the figures go')
    args = parser.parse_args(argv)
    for store in args.stores:
        if store != 'local' and emulators.lacking(store):
            need = ' '.join(emulators.lacking(store))
            raise UserError(f'--stores {store}: needs {need}: pip install them')
    images, labels = windows.images_and_labels(args.folder, 'train')
    test = windows.images_and_labels(args.folder, 'test')
    # All sets hold them in this order; those of the files are in no order of classes either.
    count = args.examples or len(labels)
    settings = {'examples': count, 'epochs': args.epochs, 'shards': args.shards}
    results = json.loads(args.json.read_text()) if args.json.exists() else {**settings, 'runs': []}
    if {name: results.get(name) for name in settings} != settings:
        raise UserError(
            f'--json: {args.json} is of other settings: name another file, or remove it'
        )
    done = {_case(row) for row in results['runs']}
    with tempfile.TemporaryDirectory() as name:
        bytes_of = (images[:count] * 255).round().astype(np.uint8).reshape(-1, 28, 28)
        files = [png(image) for image in bytes_of]
        for kind in FORMATS:
            (Path(name) / kind).mkdir()
            WRITE[kind](Path(name) / kind, files, labels[:count].tolist(), args.shards)
        for store in args.stores:
            cases = list(itertools.product((store,), FORMATS, ORDERS, range(args.seeds)))
            left = [case for case in cases if (*case[:2], str(case[2]), case[3]) not in done]
            if not left:
                continue
            with served(store, Path(name)) as paths:
                for _, kind, shuffle, seed in left:
                    steps = args.epochs * count // windows.ROWS
                    figures = train(paths[kind], kind, shuffle, seed, test, steps)
                    case = {'store': store, 'format': kind, 'order': str(shuffle), 'seed': seed}
                    results['runs'].append({**case, **figures})
                    args.json.write_text(json.dumps(results, indent=1) + '\n')
                    print(results['runs'][-1], file=sys.stderr, flush=True)
    print(table(results['runs']))


if __name__ == '__main__':
    runtime.command(main)
