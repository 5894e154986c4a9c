"""What the task of a run makes of images: for a masked autoencoder, its reconstructions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from big_vit.inspection.loaded_model import LoadedModel

# Of each image, (title, uint8 picture) from left to right, the image itself first.
Rows = list[list[tuple[str, np.ndarray]]]


def from_files(loaded: LoadedModel, paths: Sequence[str | Path]) -> Rows:
    """Of image files; [] if the task makes nothing of images.

    Raises:
      UserError: a file is not an image, or the model does not take images.
    """
    return of_inputs(loaded, [loaded.normalised(loaded.picture(path)) for path in paths])


def of_inputs(loaded: LoadedModel, inputs: Sequence[np.ndarray]) -> Rows:
    """Of images as the model takes them; [] if the task makes nothing of them.

    Raises:
      UserError: the model does not take images.
    """
    images = np.stack(inputs)
    made = loaded.task_pictures(images)
    if not made:
        return []
    shown = {title: loaded.visible(x) for title, x in {'image': images, **made}.items()}
    return [[(title, pictures[i]) for title, pictures in shown.items()] for i in range(len(images))]
