"""A few training examples of a config, without the rest of an experiment."""

import dataclasses

import numpy as np

from big_vit.build.data import Data, train_data
from big_vit.config import Config
from big_vit.data import pipeline
from big_vit.inspection import plots


def batch(config: Config, count: int) -> tuple[Data, dict[str, np.ndarray]]:
    """The data of a config, and about `count` examples as they are trained on.

    Raises:
      UserError: the dataset is not here, or does not fit.
    """
    if config.data.cache in ('auto', 'decoded'):  # A few examples are decoded when they are read.
        config = config.replacing({'data.cache': 'none'})
    found = train_data(config)
    return found, first(found, count)


def first(found: Data, count: int) -> dict[str, np.ndarray]:
    """About `count` examples of data that is open, the first that are trained on."""
    assert found.order is not None
    size = max(1, count // found.order.repeats) * found.order.repeats
    order = dataclasses.replace(found.order, batch_size=size)
    batches = pipeline.train_batches(found.source, found.transform, order, skip_bad=found.skip_bad)
    examples = next(batches)
    examples.pop('replaced', None)
    batches.close()  # type: ignore[attr-defined]
    return examples


def pictures(batch: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The images of a batch as bytes, [height, width, channels] each; [] where it has none."""
    return plots.as_bytes(list(batch['image'])) if 'image' in batch else []


def title(found: Data, label: np.ndarray) -> str:
    """A label in words: its class, or the classes of a mixture with their shares."""
    label = np.asarray(label)
    if label.ndim == 0:
        return _name(found, int(label))
    largest = [int(c) for c in np.argsort(-label, kind='stable')[:2] if label[c] > 0]
    if len(largest) == 1 and label[largest[0]] == 1:
        return _name(found, largest[0])
    return '\n'.join(f'{label[c]:.2f} {_name(found, c)}' for c in largest)


def _name(found: Data, number: int) -> str:
    names = found.source.class_names
    return names[number] if names else str(number)
