"""Labels derived from other annotations of an example: the tasks of VTAB.

Constants are those of the benchmark's code (google-research/task_adaptation), so that numbers
are comparable with published ones. A config selects one as `label_column`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Example = Mapping[str, Any]
# The label of an example without annotations, as in CLEVR's test split.
NONE = -1


class Derived(NamedTuple):
    """A label computed from other features.

    Attributes:
      needs: features of the dataset; 'objects/location' is a field of each object.
      classes: number of classes.
      of: maps an example, as TFDS yields it, to its label.
    """

    needs: tuple[str, ...]
    classes: int
    of: Callable[[Example], int]


def clevr_count(example: Example) -> int:
    """Count the objects in the scene: 3 to 10 are classes 0 to 7."""
    count = len(example['objects']['size'])
    return count - 3 if count else NONE


def clevr_distance(example: Example) -> int:
    """Bin the distance of the closest object from the camera into 6 classes."""
    distances = np.asarray(example['objects']['pixel_coords'])[:, 2]
    return _bin(float(distances.min()), (8.0, 8.5, 9.0, 9.5, 10.0)) if len(distances) else NONE


def kitti_distance(example: Example) -> int:
    """Bin the meters to the closest car, van or truck: up to 8, up to 20, more; 3 if none is."""
    objects = example['objects']
    ahead = np.asarray(objects['location'])[:, 2]
    vehicles = ahead[np.asarray(objects['type']) < 3]
    return _bin(float(vehicles.min()), (8.0, 20.0)) if len(vehicles) else 3


def dsprites_location(example: Example) -> int:
    """Bin the horizontal position, 32 places into 16 classes."""
    return int(example['label_x_position']) * 16 // 32


def dsprites_orientation(example: Example) -> int:
    """Bin the orientation, 40 angles into 16 classes (of two or three angles)."""
    return int(example['label_orientation']) * 16 // 40


def _bin(value: float, edges: tuple[float, ...]) -> int:
    """Return the number of edges below; an edge belongs to the bin that it ends."""
    return int(np.searchsorted(edges, value, side='left'))


DERIVED = {
    'clevr_count': Derived(('objects/size',), 8, clevr_count),
    'clevr_distance': Derived(('objects/pixel_coords',), 6, clevr_distance),
    'kitti_distance': Derived(('objects/location', 'objects/type'), 4, kitti_distance),
    'dsprites_location': Derived(('label_x_position',), 16, dsprites_location),
    'dsprites_orientation': Derived(('label_orientation',), 16, dsprites_orientation),
}
