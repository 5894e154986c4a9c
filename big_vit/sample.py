"""A few training examples of a config, without the rest of an experiment."""

import dataclasses

import numpy as np

from big_vit import build, plots
from big_vit.config import Config
from big_vit.data import pipeline


def batch(config: Config, count: int) -> tuple[build.Data, dict[str, np.ndarray]]:
    """The data of a config, and about `count` examples as they are trained on.

    Raises:
      UserError: the dataset is not here, or does not fit.
    """
    found = build.train_data(config)
    assert found.order is not None
    size = max(1, count // found.order.repeats) * found.order.repeats
    order = dataclasses.replace(found.order, batch_size=size)
    batches = pipeline.train_batches(found.source, found.transform, order)
    first = next(batches)
    batches.close()  # type: ignore[attr-defined]
    return found, first


def pictures(batch: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The images of a batch as bytes, [height, width, channels] each; [] where it has none."""
    return plots.as_bytes(list(batch['image'])) if 'image' in batch else []


def class_name(found: build.Data, label: np.ndarray) -> str:
    """The class of a label, or the likeliest one; by its number where classes have no names."""
    number = int(label) if np.ndim(label) == 0 else int(np.argmax(label))
    names = found.source.class_names
    return names[number] if names else str(number)
