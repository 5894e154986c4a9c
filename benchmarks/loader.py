"""Benchmark JPEG loading in images per second: `python -m benchmarks.loader --peers PYTHON`.

Every contender reads the same folder of JPEG files of 500x375 pixels, crops at random, resizes to
224x224, flips half of them, and yields batches of bytes. Each runs in a process of its own, on one
and on two cores, taking turns with the others in every round; medians are printed. PYTHON is an
interpreter with the peers (tensorflow, torch, torchvision, timm, grain, pillow); peers that it
lacks are left out. Photographs come with packages: scikit-learn, and scikit-image if installed.

With --views each file is seen ten times instead, as DINOv2 does: two crops of 224x224 and eight of
96x96, flipped, jittered, grey, blurred, solarised.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / 'results' / 'loader.json'
SIZE, BATCH = 224, 64
# Crops cover 5 to 100 % of the area, sampled as TensorFlow or torchvision do: peers use their own.
Batches = Iterator[np.ndarray]


def photographs() -> list[np.ndarray]:
    """Return RGB photographs that come with packages."""
    photos = []
    from sklearn.datasets import load_sample_images

    photos += list(load_sample_images().images)
    try:
        from skimage import data

        names = ('astronaut', 'chelsea', 'coffee', 'rocket', 'cat')
        photos += [getattr(data, name)()[..., :3] for name in names]
    except ImportError:
        pass
    return photos


def write_images(folder: Path, count: int, height: int, width: int) -> dict[str, float]:
    """Write JPEG files of quality 95 into two class folders; return statistics of the files."""
    import cv2

    rng, photos, total = np.random.default_rng(0), photographs(), 0
    for i in range(count):
        photo = photos[i % len(photos)]
        tall, wide = photo.shape[:2]
        share = rng.uniform(0.7, 1.0)
        crop_width = int(min(wide, tall * width / height) * share)
        crop_height = int(crop_width * height / width)
        top, left = rng.integers(tall - crop_height + 1), rng.integers(wide - crop_width + 1)
        window = np.ascontiguousarray(
            photo[top : top + crop_height, left : left + crop_width, ::-1]
        )
        interpolation = cv2.INTER_AREA if crop_width > width else cv2.INTER_CUBIC
        image = cv2.resize(window, (width, height), interpolation=interpolation)
        path = folder / 'train' / f'class{i % 2}' / f'{i:06d}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        data = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
        path.write_bytes(data)
        total += len(data)
    return {'photographs': len(photos), 'files': count, 'mean_kilobytes': total / count / 1e3}


def files_of(folder: Path) -> list[str]:
    return sorted(map(str, (folder / 'train').rglob('*.jpg')))


# --- Contenders: each yields uint8 batches [BATCH, 224, 224, 3] forever ---------------------


# DINOv2's views as its released models saw them, averaged where they shrink; colours come after.
_COLOURS = 'color_jitter(0.4, 0.4, 0.2, 0.1, p=0.8) | random_grayscale(0.2)'
_VIEWS = (
    ('global: rrc(size, scale=(0.32, 1)) | flip_lr', _COLOURS),
    (
        'global: rrc(size, scale=(0.32, 1)) | flip_lr',
        f'{_COLOURS} | gaussian_blur(kernel=9, p=0.9) | solarize(p=0.2)',
    ),
    (
        'local: 8 * rrc(96, scale=(0.05, 0.32)) | flip_lr',
        f'{_COLOURS} | gaussian_blur(kernel=9, p=0.5)',
    ),
)


def _ours(folder: Path, cores: int, transform: str, cache: str) -> Batches:
    from big_vit.data import dataset, pipeline

    spec = dataset.Spec(
        key='data',
        name='folder',
        split='train',
        transform=transform,
        image_size=(SIZE, SIZE),
        settings=(('path', str(folder)),),
        cache=cache,
    )
    source, rest = dataset.open_examples((spec,))
    order = pipeline.Order(batch_size=BATCH, seed=0)
    for batch in pipeline.train_batches(source, rest, order, num_threads=cores):
        yield next(batch[name] for name in ('image', 'global') if name in batch)


def ours_views(folder: Path, cores: int) -> Batches:
    views = [f'{crop} | {colours}' for crop, colours in _VIEWS]
    return _ours(folder, cores, ' ; '.join(['decode(3)', *views]), 'none')


def ours_crops(folder: Path, cores: int) -> Batches:
    """Cut views alone: what is left for the host where devices do the colours."""
    views = [crop for crop, _ in _VIEWS]
    return _ours(folder, cores, ' ; '.join(['decode(3)', *views]), 'none')


def ours(folder: Path, cores: int) -> Batches:
    return _ours(folder, cores, 'decode | inception_crop(size) | flip_lr', 'none')


def ours_rrc(folder: Path, cores: int) -> Batches:
    return _ours(folder, cores, 'decode | rrc(size) | flip_lr', 'none')


def ours_cached(folder: Path, cores: int) -> Batches:
    return _ours(folder, cores, 'decode | resize(256) | inception_crop(size) | flip_lr', 'decoded')


def raw_cached(folder: Path, cores: int) -> Batches:
    """Loop over decoded 256x256 images in memory: the lower bound without any loader."""
    import cv2

    cv2.setNumThreads(1)
    images = np.stack(
        [
            cv2.resize(cv2.imread(file), (256, 256), interpolation=cv2.INTER_AREA)
            for file in files_of(folder)
        ]
    )
    rng = np.random.default_rng(0)
    while True:
        out = np.empty((BATCH, SIZE, SIZE, 3), np.uint8)
        for row in range(BATCH):
            image = images[rng.integers(len(images))]
            top, left, height, width = _box(rng, 256, 256)
            window = image[top : top + height, left : left + width]
            cv2.resize(window, (SIZE, SIZE), dst=out[row])
            if rng.random() < 0.5:
                out[row] = out[row, :, ::-1].copy()
        yield out


def _box(rng: Any, height: int, width: int) -> tuple[int, int, int, int]:
    while True:
        area = rng.uniform(0.05, 1) * height * width
        aspect = rng.uniform(3 / 4, 4 / 3)
        h, w = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w


def _threads(files: list[str], load: Callable[[str, Any], np.ndarray], cores: int) -> Batches:
    """Load single images with a plain thread pool."""
    from concurrent.futures import ThreadPoolExecutor

    rng = np.random.default_rng(0)
    with ThreadPoolExecutor(cores) as pool:
        while True:
            chosen = rng.integers(len(files), size=BATCH)
            seeds = rng.integers(1 << 40, size=BATCH)
            work = [
                (files[i], np.random.default_rng(s)) for i, s in zip(chosen, seeds, strict=True)
            ]
            yield np.stack(list(pool.map(lambda job: load(*job), work)))


def opencv(folder: Path, cores: int) -> Batches:
    import cv2

    cv2.setNumThreads(1)

    def load(file: str, rng: Any) -> np.ndarray:
        image = cv2.imread(file, cv2.IMREAD_COLOR)
        top, left, height, width = _box(rng, *image.shape[:2])
        window = image[top : top + height, left : left + width]
        image = cv2.cvtColor(cv2.resize(window, (SIZE, SIZE)), cv2.COLOR_BGR2RGB)
        return image[:, ::-1] if rng.random() < 0.5 else image

    return _threads(files_of(folder), load, cores)


def pil_picture(file: Any, rng: Any) -> np.ndarray:
    from PIL import Image

    with Image.open(file) as image:
        top, left, height, width = _box(rng, image.height, image.width)
        box = (left, top, left + width, top + height)
        image = image.convert('RGB').resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    array = np.asarray(image)
    return array[:, ::-1] if rng.random() < 0.5 else array


def pillow(folder: Path, cores: int) -> Batches:
    return _threads(files_of(folder), pil_picture, cores)


def grain_pillow(folder: Path, cores: int) -> Batches:
    import grain

    files = files_of(folder)
    data = grain.MapDataset.source(files).seed(0).shuffle().repeat().random_map(pil_picture)
    read = grain.ReadOptions(num_threads=cores, prefetch_buffer_size=BATCH)
    yield from data.to_iter_dataset(read).batch(BATCH)


def tf_picture(data: Any) -> Any:
    """Decode a window of an encoded picture, as an operation of TensorFlow."""
    import tensorflow as tf

    begin, size, _ = tf.image.sample_distorted_bounding_box(
        tf.image.extract_jpeg_shape(data),
        tf.zeros([0, 0, 4], tf.float32),
        area_range=(0.05, 1),
        min_object_covered=0,
        use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([begin[:2], size[:2]], 0)
    image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
    image = tf.image.resize(image, (SIZE, SIZE))
    return tf.cast(tf.image.random_flip_left_right(image), tf.uint8)


def tf_data(folder: Path, cores: int) -> Batches:
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(cores)
    files = files_of(folder)

    def load(file):
        return tf_picture(tf.io.read_file(file))

    data = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    data = data.map(load, num_parallel_calls=cores).batch(BATCH).prefetch(1)
    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    options.threading.max_intra_op_parallelism = 1
    yield from data.with_options(options).as_numpy_iterator()


def _torch() -> Any:
    import torch

    try:
        import torchvision
    except RuntimeError:  # A torchvision built for GPUs fails with a CPU-only torch.
        library = torch.library.Library('torchvision', 'DEF')
        library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        library.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        globals()['_kept'] = library
        import torchvision
    del torchvision
    torch.set_num_threads(1)
    return torch


class _Folder:
    """A map-style dataset for torch's DataLoader."""

    def __init__(self, folder: Path, transform: Any):
        self._files, self._transform = files_of(folder), transform

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> np.ndarray:
        from PIL import Image

        with Image.open(self._files[hash(index * 7919) % len(self._files)]) as image:
            seen = self._transform(image.convert('RGB'))
        return np.asarray(seen) if not isinstance(seen, list) else [np.asarray(x) for x in seen]


def _data_loader(folder: Path, cores: int, transform: Any) -> Batches:
    torch = _torch()
    # With one worker process, this process would be idle beside it and use a second core.
    loader = torch.utils.data.DataLoader(
        _Folder(folder, transform),
        BATCH,
        sampler=range(1 << 40),
        num_workers=0 if cores == 1 else cores,
        collate_fn=_stacked,
    )
    yield from loader


def _stacked(examples: list[Any]) -> np.ndarray:
    """The images of a batch; of views all are stacked, and the first returned."""
    if isinstance(examples[0], np.ndarray):
        return np.stack(examples)
    views = [np.stack(view) for view in zip(*examples, strict=True)]
    return views[0]


def torchvision_views(folder: Path, cores: int) -> Batches:
    """The ten views of DINOv2 by torchvision, in its order of operations."""
    _torch()
    from torchvision import transforms as t

    flip_and_colour = [
        t.RandomHorizontalFlip(),
        t.RandomApply([t.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        t.RandomGrayscale(0.2),
    ]

    def view(size: int, scale: tuple[float, float], *more: Any) -> Any:
        crop = t.RandomResizedCrop(size, scale, interpolation=t.InterpolationMode.BICUBIC)
        return t.Compose([crop, *flip_and_colour, *more])

    def blur(p: float) -> Any:
        return t.RandomApply([t.GaussianBlur(9, (0.1, 2.0))], p=p)

    wide, small = (0.32, 1.0), (0.05, 0.32)
    views = [view(SIZE, wide), view(SIZE, wide, blur(0.9), t.RandomSolarize(128, 0.2))]
    views += [view(96, small, blur(0.5))] * 8
    return _data_loader(folder, cores, lambda image: [make(image) for make in views])


def torchvision_pillow(folder: Path, cores: int) -> Batches:
    _torch()
    from torchvision import transforms as t

    transform = t.Compose([t.RandomResizedCrop(SIZE), t.RandomHorizontalFlip()])
    return _data_loader(folder, cores, transform)


def timm_pillow(folder: Path, cores: int) -> Batches:
    _torch()
    from timm.data import create_transform

    transform = create_transform(
        SIZE, is_training=True, color_jitter=None, interpolation='bilinear', use_prefetcher=True
    )
    return _data_loader(folder, cores, transform)


PEERS = {
    'tf.data, decode_and_crop_jpeg': tf_data,
    'OpenCV, threads': opencv,
    'Pillow, threads': pillow,
    'Grain with Pillow': grain_pillow,
    'torchvision with Pillow, DataLoader': torchvision_pillow,
    'timm with Pillow, DataLoader': timm_pillow,
}
OURS = {'big_vit, inception_crop': ours, 'big_vit, rrc (antialiased)': ours_rrc}
CACHED = {
    'big_vit, from cache=decoded at 256': ours_cached,
    'a bare loop over decoded images at 256': raw_cached,
}
OURS_VIEWS = {'big_vit, views': ours_views, 'big_vit, views without colours': ours_crops}
PEERS_VIEWS = {'torchvision with Pillow, views': torchvision_views}
VIEWS = {**OURS_VIEWS, **PEERS_VIEWS}
CONTENDERS = {**OURS, **PEERS, **CACHED, **VIEWS}


def measure(name: str, folder: Path, cores: int, seconds: float) -> dict[str, float]:
    """Measure this process's images per second, and processor time per image."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
    batches = iter(CONTENDERS[name](folder, cores))
    warm = 40 if name in CACHED else 5  # The cache has to fill first.
    for _ in range(warm):
        next(batches)

    def cpu() -> float:
        return sum(
            usage.ru_utime + usage.ru_stime
            for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )

    start, cpu_start, images = time.perf_counter(), cpu(), 0
    while time.perf_counter() - start < seconds:
        images += len(next(batches))
    elapsed = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {
        'images_per_s': images / elapsed,
        # The time of child processes is only known when they end, so a DataLoader's workers are
        # missing.
        'cpu_ms_per_image': (cpu() - cpu_start) / images * 1e3,
        'peak_memory_mb': memory,
    }


def run(
    name: str, python: str, folder: Path, cores: int, seconds: float
) -> dict[str, float] | None:
    command = [python, str(Path(__file__)), '--contender', name, '--folder', str(folder)]
    command += ['--cores', str(cores), '--seconds', str(seconds)]
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        print(f'left out: {name}: {done.stderr.strip().splitlines()[-1][:160]}', file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(medians: dict[str, dict[str, Any]]) -> str:
    """Format median images per second as Markdown, relative to tf.data, or to torchvision."""
    first, named = 'tf.data, decode_and_crop_jpeg', 'tf.data'
    if first not in medians:
        first, named = next(iter(PEERS_VIEWS)), 'torchvision'
    base = medians.get(first)
    lines = [
        f'| loader | images/s, 1 core | × {named} | 2 cores | scaling | CPU ms an image '
        '| peak MB |',
        '|---|---|---|---|---|---|---|',
    ]
    for name, row in medians.items():
        one, two = row['1']['images_per_s'], row['2']['images_per_s'] if '2' in row else None
        ratio = f'{one / base["1"]["images_per_s"]:.2f}' if base and name not in CACHED else ''
        lines.append(
            f'| {name} | {one:,.0f} | {ratio} | {f"{two:,.0f}" if two else ""} | '
            f'{f"{two / one:.2f}" if two else ""} | {row["1"]["cpu_ms_per_image"]:.3f} | '
            f'{row["1"]["peak_memory_mb"]:,.0f} |'
        )
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.loader', allow_abbrev=False)
    parser.add_argument('--peers', metavar='PYTHON', default=sys.executable)
    parser.add_argument('--images', type=int, default=512, help='how many JPEG files')
    parser.add_argument('--height', type=int, default=375)
    parser.add_argument('--width', type=int, default=500)
    parser.add_argument('--seconds', type=float, default=3.0, help='of each measurement')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--json', help='where the figures go; by default into benchmarks/results')
    parser.add_argument('--contender', choices=CONTENDERS, help='measure one here, and print JSON')
    parser.add_argument('--views', action='store_true', help="load DINOv2's ten views of each file")
    parser.add_argument('--folder', type=Path)
    parser.add_argument('--cores', type=int, default=1)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(measure(args.contender, args.folder, args.cores, args.seconds)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        about = write_images(folder, args.images, args.height, args.width)
        cores = [n for n in (1, 2) if n <= (os.cpu_count() or 1)]
        rounds: dict[str, dict[str, list[dict[str, float]]]] = {}
        missing: set[str] = set()
        for number in range(args.rounds):
            for contender in VIEWS if args.views else {**OURS, **PEERS, **CACHED}:
                is_peer = contender in {**PEERS, **PEERS_VIEWS}
                python = args.peers if is_peer else sys.executable
                for count in cores:
                    if contender in missing:
                        continue
                    figures = run(contender, python, folder, count, args.seconds)
                    if figures is None:
                        missing.add(contender)
                        continue
                    rounds.setdefault(contender, {}).setdefault(str(count), []).append(figures)
            print(f'round {number + 1} of {args.rounds} done', file=sys.stderr)
    medians = {
        contender: {
            count: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            for count, rows in by_cores.items()
        }
        for contender, by_cores in rounds.items()
        if contender not in missing
    }
    result = {
        'about': {
            **about,
            'height': args.height,
            'width': args.width,
            'python': platform.python_version(),
            'seconds': args.seconds,
            'rounds': args.rounds,
        },
        'median': medians,
        'rounds': rounds,
    }
    path = Path(
        args.json or RESULTS.with_name('loader_views.json' if args.views else 'loader.json')
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + '\n')
    print(table(medians))


if __name__ == '__main__':
    main()
