"""Read weights of other codebases with `read`, write ours for them with `write`.

The format is recognised from the file. Arrays are only renamed and laid out differently, so a round
trip is bit-exact, and a missing or unexpected array is an error. Whatever arrays do not reveal
(epsilon, activation, pooling, image normalisation, licence, source) travels as settings and
metadata.
"""

from big_vit.interop.formats import READ, WRITE
from big_vit.interop.locations import locate, name_meant, recall, record
from big_vit.interop.reader import load_init, read
from big_vit.interop.weights import META, Weights, describe
from big_vit.interop.writer import write

__all__ = [
    'META',
    'READ',
    'WRITE',
    'Weights',
    'describe',
    'load_init',
    'locate',
    'name_meant',
    'read',
    'recall',
    'record',
    'write',
]
