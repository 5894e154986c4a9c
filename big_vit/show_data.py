"""Show transformed examples: `python -m big_vit.show_data --config configs/x.py --png FILE`.

Draws three rows of pictures: as stored in the dataset, after the transform on the host, and after
the device transform with mixup and cutmix, exactly as the train step sees them. Of several views of
an example each has a row, as the train step sees it.
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
from big_vit.inspection import examples, plots


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
    if 'label' not in batch:
        return [''] * count
    return [examples.title(data, label) for label in batch['label'][:count]]


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
    rows = [('in the dataset', originals(data, index[:count]), named)]
    if not data.transform.views:
        rows += [('after the host', list(batch['image'][:count]), titles(data, batch, count))]
    for name, pictures in examples.views(data, mixed).items():
        line = name or 'what the model sees'
        rows.append(
            (line, pictures[:count], titles(data, mixed, count) if not name else [''] * count)
        )
    plots.picture_rows(rows).save(path)
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
