"""Time saving and restoring: `python -m benchmarks.checkpoint [--variants B/16,L/16]`.

Every round also times how long NumPy takes to write and read the same bytes on the same disk.
States are parameters and two moments of random bits, which do not compress. Files are evicted from
the page cache before they are read.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import machine
from big_vit import checkpoint, metrics, sharding, state, trees
from big_vit.checkpoint_hashes import hashes_of
from big_vit.models import variants
from big_vit.models.vit import make_vit

RESULTS = Path(__file__).parent / 'results' / 'checkpoint.json'


def random_state(variant: str, devices: int) -> Any:
    """Return parameters and AdamW moments of a ViT for ImageNet, as sharded float32 noise."""
    model = make_vit(num_classes=1000, **variants.parse(variant))
    params = state.abstract_params(model, (224, 224, 3))
    mesh = sharding.make_mesh(1, devices, 1, devices=jax.devices()[:devices])
    rng = np.random.default_rng(0)

    def noise(leaf: Any, shardings: Any) -> jax.Array:
        return jax.device_put(rng.standard_normal(leaf.shape, np.float32), shardings)

    shardings = sharding.shardings_for(params, mesh)
    trees = [jax.tree.map(noise, params, shardings) for _ in range(3)]
    step = jax.device_put(np.int32(1), sharding.replicated(mesh))
    return {'params': trees[0], 'opt': {'mu': trees[1], 'nu': trees[2]}, 'step': step}


def evict(folder: Path) -> None:
    """Evict the files of a folder from the page cache."""
    for path in folder.rglob('*'):
        if path.is_file():
            with path.open('rb') as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def one_round(full: Any, arrays: list[np.ndarray], folder: Path, number: int) -> dict[str, float]:
    """Measure each kind of writing and reading once, in seconds."""
    raw, results = folder / 'raw', {}

    def write() -> None:
        with raw.open('wb') as file:
            for array in arrays:
                array.tofile(file)
            file.flush()
            os.fsync(file.fileno())

    def read() -> None:
        with raw.open('rb') as file:
            for array in arrays:
                np.fromfile(file, array.dtype, array.size)

    def restore() -> None:
        abstract_state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), full
        )
        jax.block_until_ready(checkpoint.restore(folder, 1, abstract_state))

    results['NumPy write and fsync'] = timed(write)
    evict(folder)
    with checkpoint.Manager(folder, keep_last=1) as manager:
        manager.save(full, {}, {})
        manager.wait()
        seconds = manager.timings()
    results['save, training held up'] = seconds['time/save_blocked_s']
    results['save, until it is complete'] = seconds['time/save_s']
    evict(folder)
    results['NumPy read'] = timed(read)
    # Alternate which goes first: the second may find the file in a cache of the host that we cannot
    # empty.
    for checked in (True, False) if number % 2 else (False, True):
        evict(folder)
        name = 'restore' if checked else 'restore, hashes not checked'
        hashes, compare = checkpoint.hashes_of, checkpoint._check_hashes
        if not checked:
            checkpoint.hashes_of, checkpoint._check_hashes = lambda _: {}, lambda *_: None
        results[name] = timed(restore)
        checkpoint.hashes_of, checkpoint._check_hashes = hashes, compare
    results['hashes alone'] = timed(lambda: hashes_of(full))
    files = [path for path in (folder / 'checkpoints').rglob('*') if path.is_file()]
    results['bytes on disk'] = sum(path.stat().st_size for path in files)
    shutil.rmtree(folder / 'checkpoints')
    return results


def measure(variant: str, devices: int, rounds: int, folder: Path) -> dict[str, Any]:
    full = random_state(variant, devices)
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(full)]
    hashes_of(full)  # Compile it now, so that no round has to.
    results = [one_round(full, arrays, folder, number) for number in range(rounds)]
    medians = {name: statistics.median(row[name] for row in results) for name in results[0]}
    return {'variant': variant, 'bytes': trees.nbytes(full), 'median': medians, 'rounds': results}


def table(results: list[dict[str, Any]]) -> str:
    """Format the medians as Markdown, with their ratios to NumPy."""
    lines = ['| state | what | seconds | × NumPy |', '|---|---|---|---|']
    for result in results:
        medians = dict(result['median'])
        medians.pop('bytes on disk')
        label = f'ViT-{result["variant"]}, {result["bytes"] / 1e9:.2f} GB'
        for name, seconds in medians.items():
            reads = 'restore' in name or 'read' in name
            raw = medians['NumPy read' if reads else 'NumPy write and fsync']
            lines.append(f'| {label} | {name} | {seconds:.2f} | {seconds / raw:.2f} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.checkpoint', allow_abbrev=False)
    parser.add_argument('--variants', default='B/16,L/16', help='sizes of ViT, with commas between')
    parser.add_argument('--devices', type=int, default=1, help='that the state is sharded over')
    parser.add_argument('--rounds', type=int, default=3, help='of which the median is taken')
    parser.add_argument('--folder', help='on the disk to measure; by default the temporary one')
    args = parser.parse_args()
    results = []
    for variant in args.variants.split(','):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            results.append(measure(variant, args.devices, args.rounds, Path(folder)))
    about = {
        **machine.about('jax', 'orbax-checkpoint', 'tensorstore', 'numpy'),
        'devices': f'{args.devices} x {jax.devices()[0].device_kind}',
        'host memory at the end, MB': round(metrics.host_memory_mb() or 0),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({'about': about, 'results': results}, indent=2) + '\n')
    print(table(results))


if __name__ == '__main__':
    main()
