"""Overrides that shrink any config, and small datasets in the formats of MNIST and TFDS."""

import gzip
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

MODEL = {
    'model.width': '32',
    'model.depth': '1',
    'model.mlp_dim': '64',
    'model.num_heads': '2',
}
RUN = {
    'total_steps': '3',
    'batch_size': '16',
    'checkpoint.every_steps': '2',
    'log.every_steps': '1',
}
# A run of self-distillation on digits; `task.prototypes` and `data.transform` are each test's own.
SELF_DISTILLATION = {
    'task.name': 'self_distillation',
    'task.bottleneck': 8,
    'task.head_width': 16,
    'task.mask_group': 4,
    'task.koleo_group': 4,
    'model.variant': 'mu/2',
    'model.dtype': 'float32',
    'model.pool': 'cls',
    'model.posemb': 'learned',
    'model.posemb_prefix': 1,
    'image_size': 8,
    'batch_size': 16,
    'total_steps': 6,
    'log.every_steps': 1,
    'lr': 1e-3,
    'data.name': 'digits',
    'data.split': 'train[:64]',
    'schedule.name': 'constant',
}


def overrides(*parts: dict[str, str], evals: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    short = {f'evals.{name}.split': 'test[:20]' for name in evals}
    return [pair for part in (*parts, short) for pair in part.items()]


def flags(*parts: dict[str, str]) -> list[str]:
    return [f'--config.{key}={value}' for part in parts for key, value in part.items()]


def audited(settings):
    """Build an experiment and read all that a run would read; raises if keys remain unread."""
    from big_vit.build.evaluations import build_evaluators
    from big_vit.build.experiment import build_experiment, tracker_options
    from big_vit.build.steps import build_train_step

    parts = build_experiment(settings)
    build_train_step(settings, parts)
    build_evaluators(settings, parts)
    tracker_options(settings)
    _ = settings.init, settings.init_standardise, settings.switch, settings.data.max_error_rate
    settings.audit()
    return parts


def write_idx(folder: Path, examples: int = 64, size: int = 28) -> Path:
    """Write MNIST's four gzipped files; class c has a bright column at 2c + 2."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for prefix in ('train', 't10k'):
        labels = (np.arange(examples) % 10).astype(np.uint8)
        images = rng.integers(0, 60, (examples, size, size), dtype=np.uint8)
        images[np.arange(examples), :, 2 * labels + 2] = 255
        for name, array in (('images-idx3', images), ('labels-idx1', labels)):
            header = struct.pack(f'>I{array.ndim}I', 0x800 + array.ndim, *array.shape)
            path = folder / f'{prefix}-{name}-ubyte.gz'
            path.write_bytes(gzip.compress(header + array.tobytes()))
    return folder


def write_folder(folder: Path, examples: int = 60, classes: int = 3, splits=None) -> Path:
    """Write JPEG photographs of several sizes, one folder per class, within `splits` if given."""
    import cv2

    rng = np.random.default_rng(0)
    for split in splits or ('',):
        for i in range(examples):
            coarse = rng.integers(0, 128, (5, 4 + i % 3, 3), dtype=np.uint8)
            coarse[..., i % classes % 3] += 100
            image = cv2.resize(coarse, (60 + 20 * (i % 3), 75))
            path = folder / split / f'class{i % classes}' / f'{i:04d}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cv2.imencode('.jpg', image)[1].tobytes())
    return folder


def write_captioned(folder: Path, examples: int = 32) -> Path:
    """Write a webdataset shard of the first examples of `captions`: NAME.png and NAME.txt."""
    import cv2

    from big_vit.data.sources import captions
    from big_vit.data.sources.base import Request

    folder.mkdir(parents=True, exist_ok=True)
    columns = captions.captions(Request('train', image_size=(32, 32))).load(np.arange(examples))
    with tarfile.open(folder / 'train-000.tar', 'w') as archive:
        for i, (image, text) in enumerate(zip(columns['image'], columns['text'], strict=True)):
            encoded = cv2.imencode('.png', image[..., ::-1])[1].tobytes()
            for ending, data in (('png', encoded), ('txt', text.encode())):
                info = tarfile.TarInfo(f'{i:05d}.{ending}')
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return folder


def write_tfds(folder: Path, name: str, classes: int, sizes: dict[str, int]) -> Path:
    """Write a TFDS dataset of JPEG photographs of several sizes; `sizes` by split."""
    import tensorflow_datasets as tfds
    from PIL import Image

    features = {
        'image': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
        'label': tfds.features.ClassLabel(num_classes=classes),
    }

    def example(i: int, rng: np.random.Generator) -> dict:
        coarse = rng.integers(0, 256, (5, 4 + i % 3, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((60 + 20 * (i % 3), 75)).save(file, 'JPEG')
        file.seek(0)
        return {'image': file, 'label': i % classes}

    return write_features(folder, name, features, sizes, example)


def png(image: np.ndarray) -> io.BytesIO:
    """Encode an image [H, W, 1 or 3] as a file, since TFDS needs TensorFlow to encode arrays."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, 'PNG')
    file.seek(0)
    return file


def write_features(
    folder: Path,
    name: str,
    features: dict,
    sizes: dict[str, int],
    example: Callable,
    num_shards: int | None = None,
) -> Path:
    """Write a TFDS dataset with any features; `example(i, rng)` makes an example.

    'name/config' is written where TFDS expects a dataset with several configs.
    """
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {split: self._generate_examples(split) for split in sizes}

        def _generate_examples(self, split):
            rng = np.random.default_rng(len(split))
            for i in range(sizes[split]):
                yield i, example(i, rng)

    *parents, Tiny.name = name.split('/')
    builder = Tiny(data_dir=folder.joinpath(*parents), file_format='array_record')
    settings = tfds.download.DownloadConfig(num_shards=num_shards)
    builder.download_and_prepare(download_config=settings)
    return folder
