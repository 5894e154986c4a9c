"""Zero-shot accuracy: examples against the embeddings of sentences that name the classes.

As in CLIP (arXiv 2103.00020): the embedding of a class is the mean of the normalised embeddings of
its prompts, normalised again; the answer is the class with the largest cosine.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Float64, Int

from big_vit.errors import UserError
from big_vit.evaluators.evaluation import Evaluation, Evaluator, SharedFeatures
from big_vit.evaluators.features import stream_vectors
from big_vit.evaluators.requirements import requires

Embeddings = Float[np.ndarray, '*items width']


@requires('pairs', scores=lambda **_: ('top1', 'top5'))
def zero_shot(evaluation: Evaluation, *, prompts: tuple[str, ...] = ('{}',)) -> Evaluator:
    """Score top-1 and top-5 among sentences for the classes.

    Args:
      prompts: sentences in which `{}` stands for the name of a class.

    Raises:
      UserError: the streams are not words and something else, the classes have no names, or a
        prompt has no place for them.
    """
    key, split, model = evaluation.key, evaluation.split, evaluation.model
    is_words = [stream.tokenizer == 'words' for stream in model.streams]
    if sorted(is_words) != [False, True]:
        raise UserError(
            f'config: {key}.type=zero_shot needs one stream of words and one of something else'
        )
    words, other = (model.streams[is_words.index(wanted)].name for wanted in (True, False))
    names = split.source.class_names
    # Classes without a name have no examples.
    named = np.array([bool(name) for name in names or ()])
    if named.sum() < 2:
        raise UserError(
            f'config: {key}: {named.sum()} of the classes of {split.source.name} have names, so '
            'there are no sentences to choose from: give the data two classes with names or more'
        )
    names, places = tuple(filter(None, names or ())), named.cumsum() - 1
    texts = evaluation.as_split(sentences(names, prompts, key))
    embed_words, embed_other = (stream_vectors(model, (name,)) for name in (words, other))

    def evaluate(params: Any, shared: SharedFeatures) -> dict[str, float]:
        with jax.transfer_guard('allow'):
            written = evaluation.compute_features(texts, embed_words, params, shared)
            seen = evaluation.compute_features(split, embed_other, params, shared)
        by_class = written.values.reshape(len(names), len(prompts), -1)
        return scores(seen.values, places[seen.labels], ensemble(by_class))

    return evaluate


def normalised(vectors: Embeddings) -> Float64[np.ndarray, '*items width']:
    """Scale vectors to length 1; zeros stay zeros."""
    wide = vectors.astype(np.float64)
    length = np.linalg.norm(wide, axis=-1, keepdims=True)
    return wide / np.where(length > 0, length, 1)


def sentences(names: tuple[str, ...], prompts: tuple[str, ...], key: str) -> list[str]:
    """Fill the name of every class into every prompt; sentences of one class are adjacent.

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
    """Compute the embedding of each class from those of its prompts."""
    return normalised(normalised(prompts).mean(axis=1))


def scores(
    images: Float[np.ndarray, 'examples width'],
    labels: Int[np.ndarray, ' examples'],
    classes: Float[np.ndarray, 'classes width'],
) -> dict[str, float]:
    """Compute {'top1', 'top5', 'count'}; ties and values that are not finite are misses.

    Args:
      classes: embeddings, from `ensemble`.
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
