"""The handwritten digits that come with scikit-learn."""

from typing import Any

import numpy as np

from big_vit.data.sources.base import Request, Source, from_arrays
from big_vit.data.sources.splits import cut
from big_vit.errors import UserError


def digits(request: Request) -> Source:
    """Open the 1,797 handwritten digits of 8x8 pixels that come with scikit-learn.

    Gray values 0..16 become 0..255. `train` is the first 80 % of the file and `test` the
    rest; the file is ordered by writer, so the writers in `test` are mostly new.

    Raises:
      UserError: scikit-learn is missing, or no such split.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            f'{request.key}.name: digits come with scikit-learn: pip install scikit-learn'
        ) from error
    bunch: Any = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    boundary = round(len(images) * 0.8)
    parts = {'train': slice(0, boundary), 'test': slice(boundary, None)}

    def open_split(name: str) -> Source:
        return from_arrays('digits', name, images[parts[name]], labels[parts[name]], 10)

    return cut('digits', parts, open_split, request)
