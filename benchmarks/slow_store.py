"""Pictures a second from a slow store: `python -m benchmarks.slow_store --peers PYTHON ...`.

The same tar shards of JPEG files are read from the local disk and from an emulator of S3 on this
machine, whose answers come after a latency, by way of a bandwidth, and not always: some requests
fail and some are very late. Contenders decode a window of each picture, scale it to 224x224, flip
half of them, and yield batches of bytes. Each runs on one core, in a process of its own, with empty
caches, in turns with the others; the store has the other cores. Medians are printed, as pictures a
second and as shares of what the contender itself reaches from the local disk: from the start, the
first batch among them, and after --warm seconds.

PYTHON are interpreters with the peers: webdataset (with torch, for worker processes), tensorflow.
Those that are in none are left out. webdataset reads by curl, as its documentation has it. tf.data
has no reader of tar files: `interleave` runs Python's `tarfile` over streams of HTTP.
"""

import argparse
import io
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import emulators, machine
from benchmarks.loader import BATCH, Batches, pil_picture, tf_picture, write_images

RESULTS = Path(__file__).parent / 'results' / 'slow_store.json'
# Of peers: examples among which they draw, and streams or processes that read at once.
BUFFER, STREAMS = 1000, 8
_TRIES = 10


class Shards(NamedTuple):
    """Where a contender finds the shards: a folder or URL, and a URL of each that curl can read."""

    path: str
    urls: list[str]

    @property
    def is_local(self) -> bool:
        return '://' not in self.path


# --- Contenders: each yields uint8 batches [BATCH, 224, 224, 3] forever ---------------------


def _ours(shards: Shards, shuffle: str | bool) -> Batches:
    from big_vit.data import dataset, pipeline, windows

    spec = dataset.Spec(
        key='data',
        name='tar',
        split='train',
        transform='decode | inception_crop(size) | flip_lr',
        image_size=(224, 224),
        settings=(('path', shards.path),),
    )
    source, transform = dataset.open_examples((spec,))
    parts = (windows.opened(source.shard_lengths),) if shuffle == 'windows' else ()
    order = pipeline.Order(batch_size=BATCH, seed=0, shards=parts)
    for batch in pipeline.train_batches(source, transform, order, num_threads=1):
        yield batch['image']


def ours_windows(shards: Shards) -> Batches:
    return _ours(shards, 'windows')


def ours_shuffled(shards: Shards) -> Batches:
    return _ours(shards, True)


class _Picture:
    """Decodes the bytes of a picture; a class, because worker processes get it pickled."""

    def __call__(self, sample: dict[str, Any]) -> np.ndarray:
        return pil_picture(io.BytesIO(sample['jpg']), np.random.default_rng())


def webdataset(shards: Shards) -> Batches:
    import torch
    import webdataset

    torch.set_num_threads(1)
    curl = f'pipe:curl -s -f --retry {_TRIES} --retry-all-errors --retry-delay 1 '
    urls = shards.urls if shards.is_local else [curl + url for url in shards.urls]
    data = webdataset.WebDataset(
        urls, resampled=True, shardshuffle=False, nodesplitter=None, empty_check=False
    )
    data = data.shuffle(BUFFER).map(_Picture()).batched(BATCH, collation_fn=np.stack)
    # Of processes on one core few decode at a time; the others wait for the store.
    yield from torch.utils.data.DataLoader(data, batch_size=None, num_workers=STREAMS)


def _members(url: str) -> Iterator[bytes]:
    """Yield the pictures of a shard, which is read as a stream; goes on after what fails."""
    yielded = 0
    for _ in range(_TRIES):
        try:
            with (
                urllib.request.urlopen(url) as stream,
                tarfile.open(fileobj=stream, mode='r|') as shard,
            ):
                pictures = (member for member in shard if member.name.endswith('.jpg'))
                for member in itertools.islice(pictures, yielded, None):
                    data = shard.extractfile(member)
                    assert data is not None
                    yielded += 1
                    yield data.read()
            return
        except (OSError, tarfile.ReadError):
            time.sleep(1)
    raise OSError(f'{url}: cannot be read')


def tf_data(shards: Shards) -> Batches:
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(STREAMS + 2)

    def stream(number: Any) -> Any:
        return tf.data.Dataset.from_generator(
            lambda number: _members(shards.urls[number]),
            output_signature=tf.TensorSpec((), tf.string),
            args=(number,),
        ).prefetch(16)

    data = tf.data.Dataset.range(len(shards.urls)).shuffle(len(shards.urls)).repeat()
    data = data.interleave(
        stream, cycle_length=STREAMS, num_parallel_calls=STREAMS, deterministic=False
    )
    data = data.shuffle(BUFFER).map(tf_picture, num_parallel_calls=1).batch(BATCH).prefetch(2)
    yield from data.as_numpy_iterator()


OURS: dict[str, Callable[[Shards], Batches]] = {
    'big_vit, windows': ours_windows,
    'big_vit, full shuffle': ours_shuffled,
}
PEERS: dict[str, Callable[[Shards], Batches]] = {'webdataset': webdataset, 'tf.data': tf_data}
CONTENDERS = {**OURS, **PEERS}
PLACES = ('local', 'store')


# --- Measurement -----------------------------------------------------------------------


def measure(name: str, shards: Shards, warm: float, seconds: float, core: int) -> dict[str, Any]:
    """Measure a contender in this process: when batches come, processor time, and requests."""
    os.sched_setaffinity(0, {core})
    began, came, used = time.perf_counter(), [], []
    for batch in CONTENDERS[name](shards):
        assert batch.shape == (BATCH, 224, 224, 3) and batch.dtype == np.uint8
        came.append(time.perf_counter() - began)
        used.append(processor_seconds())
        if came[-1] > warm + seconds and len(came) > 2 and came[-3] > warm:
            break
    times = np.array(came)
    after = np.array(used)[np.searchsorted(times, warm) :]
    figures = {
        **rates(times, warm),
        'cpu_ms_per_image': 1e3 * (after[-1] - after[0]) / (BATCH * (len(after) - 1)),
        'peak_memory_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }
    if name in OURS:
        from big_vit.data import network

        figures['traffic'] = network.TRAFFIC.counts()
    return figures


def processor_seconds() -> float:
    """Return the processor time of this process and of its workers, with what they have waited for.

    The system adds that of workers to their parent's only when they end, and these do not.
    """
    ticks = 0
    for worker in multiprocessing.active_children():
        # Its name, in brackets, may have spaces: fields are counted from there (proc_pid_stat(5)).
        fields = Path(f'/proc/{worker.pid}/stat').read_text().rpartition(')')[2].split()
        ticks += sum(map(int, fields[11:15]))
    return time.process_time() + ticks / os.sysconf('SC_CLK_TCK')


def rates(times: np.ndarray, warm: float) -> dict[str, float]:
    """Return what the seconds say at which batches came, of which those up to `warm` warm up.

    Returns:
      Seconds until the first; pictures a second from the start to the end, and after `warm`; and
      the longest time without a batch after `warm`.
    """
    after = times[np.searchsorted(times, warm) :]
    return {
        'first_s': float(times[0]),
        'images_per_s_from_start': BATCH * len(times) / float(times[-1]),
        'images_per_s': BATCH * (len(after) - 1) / float(after[-1] - after[0]),
        'longest_pause_s': float(np.diff(after).max()),
    }


def run(
    name: str, python: str, shards: Shards, args: argparse.Namespace, environment: dict[str, str]
) -> dict[str, Any] | None:
    """Measure a contender in a process of its own; None if it cannot run there."""
    task = json.dumps([name, shards, args.warm, args.seconds, args.core])
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [python, '-m', 'benchmarks.slow_store', '--contender', task],
            env={**os.environ, **environment, 'BIG_VIT_CACHE': cache},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=600 + 10 * (args.warm + args.seconds),
        )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ['no message'])[-1][:160]
        print(f'not run: {name} by {python}: {why}', file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def write_shards(folder: Path, count: int, pictures: int) -> dict[str, float]:
    """Write tar shards of so many pictures each; all are cut from a few photographs."""
    with tempfile.TemporaryDirectory() as name:
        about = write_images(Path(name), min(512, pictures), 375, 500)
        files = [file.read_bytes() for file in sorted((Path(name) / 'train').rglob('*.jpg'))]
    for number in range(count):
        with tarfile.open(folder / f'train-{number:04d}.tar', 'w') as shard:
            for row in range(pictures):
                example = number * pictures + row
                for ending, data in (
                    ('cls', str(example % 10).encode()),
                    ('jpg', files[example % len(files)]),
                ):
                    member = tarfile.TarInfo(f'{example:08d}.{ending}')
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))
    megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    return {**about, 'shards': count, 'pictures': count * pictures, 'megabytes': megabytes}


def table(medians: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Format medians as Markdown, beside what each contender reaches from the local disk."""
    head = (
        *('loader', 'local, images/s', 'store', 'of local', 'store, from the start', 'of local'),
        *('first batch, s', 'longest pause, s', 'CPU ms an image, local', 'store'),
    )
    rows = [head, tuple('---' for _ in head)]
    for name, by_place in medians.items():
        local, store = (by_place[place] for place in PLACES)
        shares = {
            key: store[key] / local[key] for key in ('images_per_s', 'images_per_s_from_start')
        }
        rows.append(
            (
                name,
                f'{local["images_per_s"]:,.0f}',
                f'{store["images_per_s"]:,.0f}',
                f'{shares["images_per_s"]:.2f}',
                f'{store["images_per_s_from_start"]:,.0f}',
                f'{shares["images_per_s_from_start"]:.2f}',
                f'{store["first_s"]:.1f}',
                f'{store["longest_pause_s"]:.2f}',
                f'{local["cpu_ms_per_image"]:.2f}',
                f'{store["cpu_ms_per_image"]:.2f}',
            )
        )
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def medians_of(rounds: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Return the median of each figure, where there are figures of all places."""

    def median(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: median([value[key] for value in values]) for key in values[0]}
        return statistics.median(values)

    return {
        name: {place: median(by_place[place]) for place in PLACES}
        for name, by_place in rounds.items()
        if all(by_place.get(place) for place in PLACES)
    }


def upload(folder: Path, environment: dict[str, str]) -> None:
    """Copy shards and their indices into the emulator."""
    os.environ.update(environment)
    import fsspec

    system = fsspec.filesystem('s3')
    for file in sorted(folder.iterdir()):
        system.pipe_file(f'bucket/set/{file.name}', file.read_bytes())


def all_rounds(args: argparse.Namespace, folder: Path, port: int) -> dict[str, Any]:
    """Measure all contenders in turns: {contender: {place: figures of each round}}."""
    names = [file.name for file in sorted(folder.glob('*.tar'))]
    base = f'http://localhost:{port}/bucket/set'
    shards = {
        'local': Shards(str(folder), [(folder / name).as_uri() for name in names]),
        'store': Shards('s3://bucket/set', [f'{base}/{name}' for name in names]),
    }
    environment = emulators.environment(port)
    pythons = {name: [sys.executable] if name in OURS else [*args.peers] for name in CONTENDERS}
    rounds: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for number in range(args.rounds):
        for name in CONTENDERS:
            for place in PLACES:
                for python in list(pythons[name]):
                    figures = run(name, python, shards[place], args, environment)
                    if figures is not None:
                        rounds.setdefault(name, {}).setdefault(place, []).append(figures)
                        break
                    pythons[name].remove(python)
        print(f'round {number + 1} of {args.rounds} done', file=sys.stderr)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.slow_store', allow_abbrev=False)
    parser.add_argument('--peers', metavar='PYTHON', nargs='*', default=[sys.executable])
    parser.add_argument('--shards', type=int, default=32)
    parser.add_argument('--pictures', type=int, default=500, help='of each shard')
    parser.add_argument('--warm', type=float, default=10.0, help='seconds that each warms up')
    parser.add_argument('--seconds', type=float, default=20.0, help='of each measurement')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--latency_ms', type=float, default=50.0)
    parser.add_argument('--megabytes_per_s', type=float, default=200.0)
    parser.add_argument('--errors', type=float, default=0.01, help='share of requests that fail')
    parser.add_argument('--slow', type=float, default=0.01, help='share that is late by 3 s')
    parser.add_argument('--json', type=Path, default=RESULTS, help='where the figures go')
    parser.add_argument('--contender', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        name, shards, *rest = json.loads(args.contender)
        print(json.dumps(measure(name, Shards(*shards), *rest)), flush=True)
        # Neither worker processes nor what is on its way are waited for.
        os._exit(0)
    if emulators.lacking('s3'):
        raise SystemExit(f'needs {" and ".join(emulators.lacking("s3"))}: pip install them')
    from big_vit.data.sources import indexing

    args.core, *others = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, set(others) or {args.core})
    link = emulators.Link(
        fault=emulators.at_random(args.errors, args.slow, 3.0),
        latency_s=args.latency_ms / 1e3,
        bytes_per_s=args.megabytes_per_s * 1e6,
    )
    with tempfile.TemporaryDirectory() as name, emulators.emulator('s3') as upstream:
        folder = Path(name)
        about = write_shards(folder, args.shards, args.pictures)
        indexing.index(str(folder), say=lambda line: None)
        upload(folder, emulators.environment(upstream))
        with emulators.proxy(upstream, link, keeps=True) as served:
            rounds = all_rounds(args, folder, served.port)
    settings = vars(args) | {'json': str(args.json), 'peers': len(args.peers)}
    del settings['contender'], settings['core']
    results = {
        'about': {**machine.about('numpy', 's3fs', 'moto'), **about, **settings},
        'median': medians_of(rounds),
        'rounds': rounds,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(results, indent=1) + '\n')
    print(table(results['median']))


if __name__ == '__main__':
    main()
