"""big_vit: pretrain Vision Transformers at scale, transfer them to small datasets.

Importing the package is free: it imports nothing, not even jax.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from big_vit.predictor import Predictor

__version__ = '0.1.0'


def load(path: str, **options: Any) -> 'Predictor':
    """Load a model to ask it about pictures; see `big_vit.predictor.load`."""
    from big_vit import predictor

    return predictor.load(path, **options)
