"""Write a model as a file that answers without big_vit: ONNX, or StableHLO for JAX alone.

What such a file takes and gives, how pictures become its input and the names of its classes are in
a JSON file beside it.
"""

from big_vit.deployment.writer import FORMATS, write

__all__ = ['FORMATS', 'write']
