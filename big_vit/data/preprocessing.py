"""What a transform does to a picture, where other codebases have words for it.

Their configs know one resize, a crop around the middle and a normalisation. An operation says by
its `step` which of these it is; one without a step is something that they do not have.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from big_vit.errors import UserError


class Resize(NamedTuple):
    """A resize to (height, width), or of the shorter side where the size is one number."""

    size: int | tuple[int, int]
    method: str


class CentralCrop(NamedTuple):
    """A window (height, width) from the middle."""

    size: tuple[int, int]


# 'keeps' leaves the picture as it is; 'grey' makes one channel of it; 'upright' turns a file as its
# orientation tag says.
Step = Resize | CentralCrop | Literal['keeps', 'grey', 'upright']


class Preprocessing(NamedTuple):
    """A resize, a crop of the middle, and (pixel - mean) / std of pixels in 0..1.

    Attributes:
      resize: to (height, width), or of the shorter side; by which method of `geometry.METHODS`.
      size: (height, width) of the crop, which is what the model takes.
      mean: of each channel.
      std: of each channel.
      is_turned: whether files are turned as their orientation tags say.
    """

    resize: Resize
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    is_turned: bool = False

    def __str__(self) -> str:
        """'shorter side to 261 (area), middle 224x224, mean 0.5, std 0.5'."""
        target = self.resize.size
        side = f'shorter side to {target}' if isinstance(target, int) else f'to {_by(target)}'
        crop = '' if target == self.size else f', middle {_by(self.size)}'
        numbers = (', '.join(f'{x:.4g}' for x in _merged(part)) for part in (self.mean, self.std))
        mean, std = numbers
        return f'{side} ({self.resize.method}){crop}, mean {mean}, std {std}'


def _by(size: tuple[int, int]) -> str:
    return f'{size[0]}x{size[1]}'


def _merged(values: tuple[float, ...]) -> tuple[float, ...]:
    return values[:1] if len({*values}) == 1 else values


def of_steps(
    steps: Iterable[tuple[str, Step | None]],
    size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    key: str,
) -> Preprocessing:
    """Read the steps of a transform, by the names of their operations.

    Pictures that no step resizes had the model's size already, and any other is resized to it.

    Args:
      size: (height, width) that the model takes.
      mean: one number for each channel that the model takes.
      key: of the config, for messages.

    Raises:
      UserError: names what is neither a resize, a crop of the middle nor a normalisation.
    """
    resize: Resize | None = None
    crop: CentralCrop | None = None
    kinds: dict[Step, str] = {}
    for name, step in steps:
        late = isinstance(step, Resize) and (resize or crop)
        if step is None or late or (isinstance(step, CentralCrop) and crop):
            raise UserError(f'{key} has {name}{" after another" if step else ""}, {_ONLY}')
        kinds.setdefault(step, name)
        resize = step if isinstance(step, Resize) else resize
        crop = step if isinstance(step, CentralCrop) else crop
    if len(mean) not in (1, 3):
        raise UserError(f'{key} makes pictures of {len(mean)} channels, {_ONLY}')
    if 'grey' in kinds and len(mean) > 1:
        raise UserError(f'{key} has {kinds["grey"]}, for a model of 3 channels, {_ONLY}')
    if crop and resize is None:
        raise UserError(f'{key} has {kinds[crop]} without a resize, {_ONLY}')
    resize = resize or Resize(size, 'area')
    return Preprocessing(resize, size, mean, std, is_turned='upright' in kinds)


_ONLY = 'and other codebases have one resize, a crop of the middle and a normalisation'
