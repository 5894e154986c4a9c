"""Random-access sources of examples: one function a format, each giving a `Source`.

A source knows its length and loads any examples by index; order, augmentation and batching
are the business of `order`, `transforms` and `pipeline`.
"""

from big_vit.data.sources.arrays import digits, idx
from big_vit.data.sources.base import Columns, Source, cut, declared, parse_split
from big_vit.data.sources.prepared import tfds

__all__ = ['Columns', 'Source', 'cut', 'declared', 'digits', 'idx', 'parse_split', 'tfds']
