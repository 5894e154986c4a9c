"""What frozen features are worth: how they are read from a network, and figures for them."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import picture_sets
from benchmarks.emoji import grid_means, shrunk
from big_vit.build.experiment import Experiment
from big_vit.build.model import build_scored_model
from big_vit.config import Config
from big_vit.data import transforms
from big_vit.evaluators import fewshot
from big_vit.models import layers
from big_vit.models.placement import unplaced

NEIGHBOURS, FOLDS = 10, 5
# What is made of a picture that is to be found again.
ALTERED = 'rrc(size, scale=(0.5, 1)) | color_jitter(0.3, 0.3, 0.3, 0.05)'

# Blocks and grids, as in `Readout`.
Places = tuple[tuple[int, int], ...]
Features = Callable[[np.ndarray], dict[tuple[int, int], np.ndarray]]


class Readout(NamedTuple):
    """How features are read: the block, the grid to which tokens are averaged, and whitening.

    Attributes:
      grid: rows and columns; 0 is the class token.
      power: of whitening, as in `whitening`; 0 only centres.
    """

    block: int
    grid: int
    power: float


def colours(images: np.ndarray, grid: int, bins: int = 4) -> np.ndarray:
    """Return roots of the shares of colours in each cell of a grid, [N, grid * grid * bins^3]."""
    count, side = images.shape[:2]
    levels = images.astype(int) * bins // 256
    number = (levels[..., 0] * bins + levels[..., 1]) * bins + levels[..., 2]
    cells = number.reshape(count, grid, side // grid, grid, side // grid).swapaxes(2, 3)
    cells = cells.reshape(count, grid * grid, -1)
    shares = np.stack([(cells == one).mean(-1) for one in range(bins**3)], axis=-1)
    return np.sqrt(shares).reshape(count, -1).astype(np.float32)


def pixels(images: np.ndarray, side: int) -> np.ndarray:
    """Return the means of the pixels in each cell of a grid, [N, side * side * 3]."""
    return shrunk(images, side).reshape(len(images), -1) / 255


def plain_features(read: Callable[[np.ndarray, int], np.ndarray], places: Places) -> Features:
    """Return a function of images to `pixels` or `colours`, by place; blocks are ignored."""
    return lambda images: {place: read(images, place[1]) for place in places}


def normaliser(parts: Experiment) -> Callable[[Any], Any]:
    """Return a function of bytes to the numbers that the model was trained with."""
    mean, std = (jnp.asarray(x).reshape(1, 1, 1, 3) for x in parts.data.transform.normalisation(3))
    return lambda images: (images / 255 - mean) / std


def network_features(config: Config, parts: Experiment, params: Any, places: Places) -> Features:
    """Return a function of images to the features of a network, by place."""
    shapes = {'image': (picture_sets.SIDE, picture_sets.SIDE, 3)}
    classes = parts.data.source.num_classes
    model = unplaced(build_scored_model(config, classes, shapes, parts.mesh))
    last = layers.norm(model.encoder.style, 'encoder_norm')
    normalised, params = normaliser(parts), jax.tree.map(jnp.asarray, params)

    @jax.jit
    def read_out(images: Any) -> list[Any]:
        given = normalised(images)
        _, extra = model.apply({'params': params}, given, capture=('blocks',))
        vectors = []
        for block, grid in places:
            norm = params['Transformer']['encoder_norm']
            tokens = last.apply({'params': norm}, extra['blocks'][block])
            pooled = (
                tokens[:, 0] if not grid else grid_means(tokens[:, model.prefix_tokens :], grid)
            )
            vectors.append(pooled.astype(jnp.float32))
        return vectors

    def features(images: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
        # A fixed batch size, so that one compiled program serves every set.
        size = 128
        padded = np.pad(images, ((0, -len(images) % size), (0, 0), (0, 0), (0, 0)))
        batches = [
            jax.device_get(read_out(padded[i : i + size])) for i in range(0, len(padded), size)
        ]
        return {
            place: np.concatenate(vectors)[: len(images)]
            for place, vectors in zip(places, zip(*batches, strict=True), strict=True)
        }

    return features


def neighbours(values: np.ndarray, labels: np.ndarray) -> float:
    """Return the accuracy of the vote of the 10 nearest by cosine, over folds."""
    from sklearn.neighbors import KNeighborsClassifier

    return over_folds(KNeighborsClassifier(NEIGHBOURS, metric='cosine'), values, labels)


def logistic(values: np.ndarray, labels: np.ndarray) -> float:
    """Return the accuracy of logistic regression on standardised features, over folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    return over_folds(model, values, labels)


def over_folds(model: Any, values: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean accuracy over stratified folds, always the same."""
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    return float(cross_val_score(model, values, labels, cv=folds).mean())


def ridge(values: np.ndarray, labels: np.ndarray) -> float:
    """Return the accuracy of ridge regression over folds: a quick stand-in for `logistic`."""
    from sklearn.model_selection import StratifiedKFold

    accuracies = []
    for train_rows, rows in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(
        values, labels
    ):
        answers = fewshot.scores_of(
            values[train_rows], labels[train_rows], values[rows], int(labels.max()) + 1, l2=1024.0
        )
        accuracies.append(float((answers.argmax(1) == labels[rows]).mean()))
    return statistics.mean(accuracies)


def found_again(values: np.ndarray, altered: np.ndarray) -> float:
    """Return how often the picture nearest to an altered one, by cosine, is that one."""
    sides = [
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) for x in (values, altered)
    ]
    return float((np.argmax(sides[1] @ sides[0].T, axis=1) == np.arange(len(values))).mean())


def altered(images: np.ndarray) -> np.ndarray:
    """Return a random view of each picture, always the same."""
    size = images.shape[1:3]
    change = transforms.parse(ALTERED, size=size)
    keys = np.arange(len(images), dtype=np.uint64)
    return np.asarray(change({'image': images}, keys)['image'])


def rgb(images: np.ndarray) -> np.ndarray:
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
