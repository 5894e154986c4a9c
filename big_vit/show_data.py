"""Show transformed examples: `python -m big_vit.show_data --config configs/x.py --png FILE`.

Draws three rows of pictures: as stored in the dataset, after the transform on the host, and after
the device transform with mixup and cutmix, exactly as the train step sees them. Of several views of
an example each has a row, as the train step sees it. Boxes, masks and classes are drawn over them.
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the slow imports.
    command_line.answer_help(command_line.show_data())

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from big_vit import config as config_lib
from big_vit import runtime
from big_vit.build.data import Data, host_batches, train_data
from big_vit.build.steps import batch_seen
from big_vit.config import Config
from big_vit.data import dataset, pipeline, transforms, windows
from big_vit.errors import UserError
from big_vit.inspection import examples, objects, plots

# Inches of a picture with names of classes in it.
_LARGE = 3.6


def originals(data: Data, index: np.ndarray) -> list[np.ndarray]:
    """Return the pictures as stored in the dataset, uint8 [h, w, c] of any size."""
    # What the files themselves need to be pictures.
    first = data.transform.before(lambda name: name not in transforms.OF_FILES).host_text
    specs = tuple(replace(spec, transform=first, cache='none') for spec in data.specs)
    source, rest = dataset.open_examples(specs)

    def load_image(rows: np.ndarray) -> dict[str, Any]:
        return {name: column for name, column in source.load(rows).items() if name == 'image'}

    images = replace(source, load=load_image)
    rows = [
        pipeline.load(images, rest, index[i : i + 1], 0, 0, data.skip_bad)
        for i in range(len(index))
    ]
    return [row['image'][0] for row in rows if 'image' in row]


def titles(data: Data, batch: dict[str, np.ndarray], count: int) -> list[str]:
    """Describe the labels of the first examples; empty strings without labels."""
    if 'box_label' in batch:
        counts = (np.asarray(batch['box_label'][:count]) >= 0).sum(axis=1).tolist()
        return [f'{number} object{"" if number == 1 else "s"}' for number in counts]
    if 'label' not in batch or data.source.annotations is not None:
        return [''] * count
    return [examples.title(data, label) for label in batch['label'][:count]]


def with_objects(
    data: Data, pictures: list[np.ndarray], batch: dict[str, np.ndarray]
) -> list[np.ndarray]:
    """Draw what a batch says of objects, or of classes of pixels, over its first pictures."""
    names = data.source.class_names
    if 'box_label' in batch:
        shown = enumerate(plots.as_bytes(pictures))
        pictures = [objects.transformed(picture, batch, row, names) for row, picture in shown]
    elif 'segmentation' in batch:
        pairs = zip(plots.as_bytes(pictures), batch['segmentation'], strict=False)
        pictures = [objects.coloured(picture, np.asarray(classes)) for picture, classes in pairs]
    return pictures


def stored_objects(data: Data, pictures: list[np.ndarray], index: np.ndarray) -> list[np.ndarray]:
    """Draw what the dataset says of the objects in pictures as they are stored."""
    if data.source.annotations is None:
        return pictures
    pairs = zip(plots.as_bytes(pictures), data.source.annotations(index), strict=False)
    names = data.source.class_names
    return [objects.annotated(picture, own, names) for picture, own in pairs]


def draw(config: Config, path: Path, step: int, count: int) -> Data:
    """Write a PNG of the first examples of the batch of this step.

    Returns:
      The data that they are of.

    Raises:
      UserError: the examples have no images.
    """
    data = train_data(config)
    if 'image' not in data.shapes:
        raise UserError(
            f'config: data: {data.source.name} {data.source.split} has no pictures to draw, only '
            f'{", ".join(data.shapes)}'
        )
    assert data.order is not None
    index, _ = data.order.indices(step, data.source.length)
    count = min(count, config.batch_size)
    batches = host_batches(data, step, slice(None))
    batch = next(batches)
    batches.close()  # type: ignore[attr-defined]
    mixed = jax.device_get(batch_seen(config, data, batch, step))
    numbers = [str(number) for number in index[:count]]
    named = [
        ': '.join(filter(None, pair))
        for pair in zip(numbers, titles(data, batch, count), strict=False)
    ]
    stored = stored_objects(data, originals(data, index[:count]), index[:count])
    rows = [('in the dataset', stored, named)]
    if not data.transform.views:
        pictures = with_objects(data, list(batch['image'][:count]), batch)
        rows += [('after the host', pictures, titles(data, batch, count))]
    for name, pictures in examples.views(data, mixed).items():
        line, said = (
            (name, [''] * count) if name else ('what the model sees', titles(data, mixed, count))
        )
        rows.append((line, with_objects(data, pictures[:count], {} if name else mixed), said))
    is_drawn = data.source.annotations is not None or 'segmentation' in batch
    plots.picture_rows(rows, _LARGE if is_drawn else plots.WIDTH).save(path)
    return data


def main(argv: list[str]) -> None:
    args, overrides = command_line.parse(command_line.show_data(), argv)
    path = Path(args.png)
    config = config_lib.load(args.config, overrides)
    runtime.start()
    path.parent.mkdir(parents=True, exist_ok=True)
    data = draw(config, path, args.step, args.count)
    if data.order and data.order.shards:
        print(f'order   {windows.line(data.order.shards)}')
    print(f'drew    {path}')


if __name__ == '__main__':
    runtime.command(main)
