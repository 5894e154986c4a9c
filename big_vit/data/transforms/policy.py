"""Entries of an augmentation policy: a pixel operation and how strong it is at a given level."""

from collections.abc import Callable
from typing import Any, NamedTuple

from big_vit.data.transforms.pixels import Image


class PolicyOperation(NamedTuple):
    """A pixel operation with the law of its magnitude, called as (image, level, sign, ...).

    Attributes:
      operation: of (image), of (image, magnitude), or of either and one thing more.
      law: gives the magnitude, of (level, sign, image); None for an operation without one. Each
        policy has its own range of levels; a sign is 1 or -1.
      takes_drawn: whether the operation takes one thing more that the policy draws, such as the
        interpolation method (timm) or a position (cutout).
    """

    operation: Callable[..., Image]
    law: Callable[[float, int, Image], Any] | None = None
    takes_drawn: bool = False

    def __call__(self, image: Image, level: float, sign: int, drawn: Any = None) -> Image:
        arguments = [] if self.law is None else [self.law(level, sign, image)]
        return self.operation(image, *arguments, *([drawn] if self.takes_drawn else []))
