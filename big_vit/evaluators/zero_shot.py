"""Accuracy of images against embeddings of classes, such as those of a text encoder.

The law of CLIP (arXiv 2103.00020): a class is the mean of the normalised embeddings of its
prompts, normalised again; an image is of the class with the largest cosine.
"""

import numpy as np
from jaxtyping import Float, Float64, Int

from big_vit.errors import UserError

Embeddings = Float[np.ndarray, '*items width']


def normalised(vectors: Embeddings) -> Float64[np.ndarray, '*items width']:
    """Vectors of length 1; a zero stays one."""
    wide = vectors.astype(np.float64)
    length = np.linalg.norm(wide, axis=-1, keepdims=True)
    return wide / np.where(length > 0, length, 1)


def sentences(names: tuple[str, ...], prompts: tuple[str, ...], key: str) -> list[str]:
    """Every prompt with the name of every class, all of a class together.

    Raises:
      UserError: a prompt has no place for the name.
    """
    for prompt in prompts:
        if '{}' not in prompt:
            raise UserError(
                f"config: {key}.prompts: {prompt!r} has no {{}} for the name of a class, as in 'a "
                "photo of a {}'"
            )
    return [prompt.replace('{}', name.replace('_', ' ')) for name in names for prompt in prompts]


def ensemble(
    prompts: Float[np.ndarray, 'classes prompts width'],
) -> Float64[np.ndarray, 'classes width']:
    """One embedding for each class, of those of its prompts."""
    return normalised(normalised(prompts).mean(axis=1))


def scores(
    images: Float[np.ndarray, 'examples width'],
    labels: Int[np.ndarray, ' examples'],
    classes: Float[np.ndarray, 'classes width'],
) -> dict[str, float]:
    """{'top1', 'top5', 'count'}; ties count against an image, and what is not finite never counts.

    Args:
      classes: embeddings, as of `ensemble`.
    """
    near = normalised(images) @ normalised(classes).T
    own = near[np.arange(len(labels)), labels][:, None]
    # "Not below" and "not its own" rather than "above": collapsed embeddings must not score.
    others = ~(near < own)
    others[np.arange(len(labels)), labels] = False
    rank = np.where(np.isfinite(own[:, 0]), others.sum(axis=1), len(classes))
    return {
        'top1': float((rank < 1).mean()),
        'top5': float((rank < 5).mean()),
        'count': float(len(labels)),
    }
