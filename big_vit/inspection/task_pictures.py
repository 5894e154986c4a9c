"""What the task of a run makes of images: for a masked autoencoder, its reconstructions."""

import dataclasses
from pathlib import Path

import numpy as np

from big_vit.build.steps import batch_seen
from big_vit.errors import UserError
from big_vit.inspection import examples
from big_vit.inspection.loaded_model import LoadedModel

# Of each image, (title, uint8 picture) from left to right, the image itself first.
Rows = list[list[tuple[str, np.ndarray]]]


def from_file(loaded: LoadedModel, path: str | Path) -> Rows:
    """Of an image file; [] if the task makes nothing of images.

    Raises:
      UserError: the file is not an image, or the model does not take images.
    """
    return _rows(loaded, loaded.normalised(loaded.picture(path))[None])


def from_training_images(loaded: LoadedModel, count: int = 6) -> Rows:
    """Of the first training images of one of our runs, as it saw them but not mixed.

    Raises:
      UserError: the data is not available here, or the model does not take images alone.
    """
    assert loaded.config is not None
    data, batch = examples.batch(loaded.config, count)
    if data.reads != ('image',):
        raise UserError(f'{loaded.path}: its model reads {", ".join(data.reads)}, no images alone')
    config = loaded.config.replacing({'mixup': 0.0, 'cutmix': 0.0})
    seen = batch_seen(config, data, {name: x[:count] for name, x in batch.items()}, 0)['image']
    loaded = dataclasses.replace(loaded, image_shape=data.shapes['image'])
    return _rows(loaded, np.asarray(seen, np.float32))


def _rows(loaded: LoadedModel, images: np.ndarray) -> Rows:
    made = loaded.task_pictures(images)
    titled = {'image': images, **made} if made else {}
    shown = {title: loaded.visible(pictures) for title, pictures in titled.items()}
    count = len(images) if made else 0
    return [[(title, pictures[i]) for title, pictures in shown.items()] for i in range(count)]
