"""What a model attends to in a picture: raw attention, its distances, and the rollout."""

import dataclasses
from pathlib import Path

import numpy as np

from big_vit.build.steps import batch_seen
from big_vit.errors import UserError
from big_vit.inspection import examples, plots, weight_statistics
from big_vit.inspection.loaded_model import LoadedModel


@dataclasses.dataclass(frozen=True)
class Look:
    """One image and the attention [depth, heads, tokens, tokens] of a model to it."""

    image: np.ndarray
    weights: np.ndarray
    grid: tuple[int, int]
    prefix: int

    @property
    def rollout(self) -> np.ndarray:
        """[rows, columns]: the share that each patch has in the end."""
        return weight_statistics.looked_at(
            weight_statistics.rollout(self.weights), self.prefix, self.grid
        )

    @property
    def distances(self) -> np.ndarray:
        """[depth, heads], in pixels."""
        rows, columns = self.grid
        apart = self.image.shape[0] / rows, self.image.shape[1] / columns
        return weight_statistics.distances(self.weights, self.prefix, self.grid, apart)

    def titled(self) -> list[tuple[str, np.ndarray]]:
        """Itself, what some blocks look at, and the rollout, as pictures with their titles."""
        return plots.looks(self.image, self.weights, self.grid, self.prefix)


def of_file(found: LoadedModel, path: str | Path) -> Look:
    """What a model looks at in an image file.

    Raises:
      UserError: no image, or a model that takes none.
    """
    image = found.picture(path)
    weights = found.attention(found.normalised(image))
    return Look(image, weights, found.grid, found.model.prefix_tokens)


def of_training(found: LoadedModel, count: int = 6) -> list[Look]:
    """The first training images of a run of ours, and what it looks at in them.

    Raises:
      UserError: the data is not here, or the model takes no images.
    """
    assert found.config is not None
    data, batch = examples.batch(found.config, count)
    if data.reads != ('image',):
        raise UserError(f'{found.where}: its model reads {", ".join(data.reads)}, no images alone')
    few = {name: value[:count] for name, value in batch.items()}
    config = found.config.replacing({'mixup': 0.0, 'cutmix': 0.0})
    found = dataclasses.replace(found, shape=data.shapes['image'])
    seen = batch_seen(config, data, few, 0)['image']
    return [
        Look(
            image,
            found.attention(np.asarray(one, np.float32)),
            found.grid,
            found.model.prefix_tokens,
        )
        for image, one in zip(examples.pictures(few), seen, strict=True)
    ]
