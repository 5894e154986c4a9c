"""A few training examples of a run, without building the rest of an experiment."""

import dataclasses

import numpy as np

from big_vit.build.data import Data, single_view, train_data
from big_vit.build.steps import batch_seen
from big_vit.config import Config
from big_vit.data import pipeline
from big_vit.errors import UserError, printable
from big_vit.inspection import plots
from big_vit.inspection.loaded_model import LoadedModel


def batch(config: Config, count: int) -> tuple[Data, dict[str, np.ndarray]]:
    """Load the data of a config, and about `count` of its first training examples.

    Where training sees several views of an example, it is the first of them.

    Raises:
      UserError: the dataset is not available here or does not match the config.
    """
    if config.data.cache in ('auto', 'decoded'):  # Filling a cache would decode the whole dataset.
        config = config.replacing({'data.cache': 'none'})
    data = single_view(train_data(config))
    return data, first_examples(data, count)


def first_examples(data: Data, count: int) -> dict[str, np.ndarray]:
    """Return the first training examples of opened data, about `count`: whole groups of repeats.

    Of several views it is the first.
    """
    data = single_view(data)
    assert data.order is not None
    size = max(1, count // data.order.repeats) * data.order.repeats
    order = dataclasses.replace(data.order, batch_size=size)
    batches = pipeline.train_batches(data.source, data.transform, order, skip_bad=data.skip_bad)
    examples = next(batches)
    examples.pop('replaced', None)
    batches.close()  # type: ignore[attr-defined]
    return examples


def training_inputs(
    loaded: LoadedModel, count: int
) -> tuple[LoadedModel, list[np.ndarray], list[np.ndarray]]:
    """Return the first training images of a run, and what its model is given of them.

    They are transformed as in training, the first view of each where there are several, but not
    mixed, so that each shows one example.

    Returns:
      (the model, for images of their size, the images as uint8, the images as floats).

    Raises:
      UserError: the data is not available here, or the model does not take images alone.
    """
    assert loaded.config is not None
    data, columns = batch(loaded.config, count)
    if data.reads != ('image',):
        raise UserError(f'{loaded.path}: its model reads {", ".join(data.reads)}, no images alone')
    first = {name: value[:count] for name, value in columns.items()}
    config = loaded.config.replacing({'mixup': 0.0, 'cutmix': 0.0})
    loaded = dataclasses.replace(loaded, image_shape=data.shapes['image'])
    seen = batch_seen(config, data, first, 0)['image']
    return loaded, pictures(first), [np.asarray(image, np.float32) for image in seen]


def pictures(batch: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return the images of a batch as uint8 [height, width, channels]; [] if it has none."""
    return plots.as_bytes(list(batch['image'])) if 'image' in batch else []


def views(data: Data, batch: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Return the pictures of each view of a batch by a name such as 'local 3', or of the images."""
    if not data.transform.views:
        return {'': list(batch['image'])}
    return {
        f'{group} {number + 1}': list(batch[group][:, number])
        for group, count in data.transform.groups.items()
        for number in range(count)
    }


def title(data: Data, label: np.ndarray) -> str:
    """Describe a label: its class, or the two largest classes of a mixed label with shares."""
    label = np.asarray(label)
    if label.ndim == 0:
        return _name(data, int(label))
    largest = [int(c) for c in np.argsort(-label, kind='stable')[:2] if label[c] > 0]
    if len(largest) == 1 and label[largest[0]] == 1:
        return _name(data, largest[0])
    return '\n'.join(f'{label[c]:.2f} {_name(data, c)}' for c in largest)


def _name(data: Data, number: int) -> str:
    names = data.source.class_names
    return printable(names[number]) if names else str(number)
