"""Random-access sources of examples, one function per format; `registry` lists them.

A source knows its length and loads any examples by index; order, augmentation and batching
are left to `order`, `transforms` and `pipeline`.
"""

from big_vit.data.sources.base import Columns, Request, Source, declared
from big_vit.data.sources.splits import cut, parse_split

__all__ = ['Columns', 'Request', 'Source', 'cut', 'declared', 'parse_split']
