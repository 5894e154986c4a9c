"""Attention of a model to images: raw weights, mean distances and the rollout."""

import dataclasses
from pathlib import Path

import numpy as np

from big_vit.inspection import examples, plots, weight_statistics
from big_vit.inspection.loaded_model import LoadedModel


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """One image and a model's attention to it.

    Attributes:
      image: uint8 [height, width, channels].
      weights: attention probabilities [depth, heads, tokens, tokens].
      grid: (rows, columns) of patches.
      prefix: tokens before those of the patches.
    """

    image: np.ndarray
    weights: np.ndarray
    grid: tuple[int, int]
    prefix: int

    @property
    def rollout(self) -> np.ndarray:
        """Share of attention per patch [rows, columns] after all blocks; sums to 1."""
        return weight_statistics.patch_attention(
            weight_statistics.rollout(self.weights), self.prefix, self.grid
        )

    @property
    def distances(self) -> np.ndarray:
        """Mean attention distance [depth, heads], in pixels."""
        rows, columns = self.grid
        patch_size = self.image.shape[0] / rows, self.image.shape[1] / columns
        return weight_statistics.distances(self.weights, self.prefix, self.grid, patch_size)

    def panels(self) -> list[tuple[str, np.ndarray]]:
        """Return (title, picture) of the image, of the maps of some blocks and of the rollout."""
        return plots.attention_panels(self.image, self.weights, self.grid, self.prefix)


def from_file(loaded: LoadedModel, path: str | Path) -> AttentionMaps:
    """Compute the attention to an image file.

    Raises:
      UserError: the file is not an image, or the model does not take images.
    """
    image = loaded.picture(path)
    weights = loaded.attention(loaded.normalised(image))
    return AttentionMaps(image, weights, loaded.grid, loaded.model.prefix_tokens)


def from_training_images(loaded: LoadedModel, count: int = 6) -> list[AttentionMaps]:
    """Compute the attention to the first training images of one of our runs.

    Raises:
      UserError: the data is not available here, or the model does not take images alone.
    """
    return of_inputs(*examples.training_inputs(loaded, count))


def of_inputs(
    loaded: LoadedModel, pictures: list[np.ndarray], inputs: list[np.ndarray]
) -> list[AttentionMaps]:
    """Compute the attention to pictures that are given as the model takes them.

    Raises:
      UserError: the model's tokens form no grid of one picture.
    """
    return [
        AttentionMaps(image, loaded.attention(model_input), loaded.grid, loaded.model.prefix_tokens)
        for image, model_input in zip(pictures, inputs, strict=True)
    ]
