"""Labels that are made of what a dataset says of an example: the tasks of VTAB.

Constants are those of the benchmark's own code (google-research/task_adaptation), so that numbers
can be compared with published ones. A config names one as `label_column`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Example = Mapping[str, Any]
# What is given where nothing can be told, as in CLEVR's test split, which has no annotations.
NONE = -1


class Derived(NamedTuple):
    """A label that is computed.

    Attributes:
      needs: features of the dataset, 'objects/location' being a part of each object.
      classes: how many there are.
      of: from an example as TFDS gives it to its label.
    """

    needs: tuple[str, ...]
    classes: int
    of: Callable[[Example], int]


def clevr_count(example: Example) -> int:
    """Objects in the scene, of which there are 3 to 10: classes 0 to 7."""
    count = len(example['objects']['size'])
    return count - 3 if count else NONE


def clevr_distance(example: Example) -> int:
    """Distance of the closest object from the camera, in 6 bins."""
    distances = np.asarray(example['objects']['pixel_coords'])[:, 2]
    return _bin(float(distances.min()), (8.0, 8.5, 9.0, 9.5, 10.0)) if len(distances) else NONE


def kitti_distance(example: Example) -> int:
    """Metres to the closest car, van or truck: up to 8, up to 20, more, or 3 where none is."""
    objects = example['objects']
    ahead = np.asarray(objects['location'])[:, 2]
    vehicles = ahead[np.asarray(objects['type']) < 3]
    return _bin(float(vehicles.min()), (8.0, 20.0)) if len(vehicles) else 3


def dsprites_location(example: Example) -> int:
    """The horizontal position, 32 places in 16 classes."""
    return int(example['label_x_position']) * 16 // 32


def dsprites_orientation(example: Example) -> int:
    """The orientation, 40 angles in 16 classes (of two or three angles)."""
    return int(example['label_orientation']) * 16 // 40


def _bin(value: float, edges: tuple[float, ...]) -> int:
    """How many of the edges lie below; an edge itself belongs to the bin that it ends."""
    return int(np.searchsorted(edges, value, side='left'))


DERIVED = {
    'clevr_count': Derived(('objects/size',), 8, clevr_count),
    'clevr_distance': Derived(('objects/pixel_coords',), 6, clevr_distance),
    'kitti_distance': Derived(('objects/location', 'objects/type'), 4, kitti_distance),
    'dsprites_location': Derived(('label_x_position',), 16, dsprites_location),
    'dsprites_orientation': Derived(('label_orientation',), 16, dsprites_orientation),
}
