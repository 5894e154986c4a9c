"""big_vit: pretrain Vision Transformers at scale, transfer them to small datasets.

Importing the package is free: it imports nothing, not even jax.
"""

__version__ = '0.1.0'
