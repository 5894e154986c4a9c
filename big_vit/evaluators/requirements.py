"""Requirements that an evaluator states about the task and the data, checked by build/data.py."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

Output = Literal['logits', 'features', 'pairs', 'boxes', 'pixels']
Labels = Literal['numbers', 'any', 'none']
Factory = TypeVar('Factory', bound=Callable[..., Any])


class Requirements(NamedTuple):
    """Requirements of one type of evaluation.

    Attributes:
      output: what the task must provide: 'logits' over the classes it is trained on, 'features'
        of one example, 'pairs' of features from two streams that stay apart, 'boxes' of objects,
        or classes of 'pixels'. Only logits tie the labels of the evaluated data to those of the
        training data; evaluators of boxes and pixels compare the classes themselves.
      labels: 'numbers' (one class per example), 'any' (a number, or a vector over the classes),
        or 'none'.
      reference: the config key that names a second split of the same dataset, to learn from or to
        search; None if there is none.
      all_streams: whether examples must hold the input of every stream. If not, streams of words
        may be missing.
      head_top1: whether its 'top1' is the accuracy of the model's head on the split, unchanged.
      scores: the metrics that checkpoints and settings can be chosen by, from the values of the
        evaluator's keys; those that only its data can tell (a class, the way back) are left out.
      of_data: whether its split is by default that of the training data.
    """

    output: Output
    labels: Labels = 'numbers'
    reference: str | None = None
    all_streams: bool = False
    head_top1: bool = False
    scores: Callable[..., tuple[str, ...]] = lambda **_: ()
    of_data: bool = False


_BY_FACTORY: dict[Callable[..., Any], Requirements] = {}


def requires(
    output: Output,
    *,
    labels: Labels = 'numbers',
    reference: str | None = None,
    all_streams: bool = False,
    head_top1: bool = False,
    scores: Callable[..., tuple[str, ...]] = Requirements._field_defaults['scores'],
    of_data: bool = False,
) -> Callable[[Factory], Factory]:
    """Decorate a factory of evaluators with its `Requirements`, whose fields the arguments are."""

    def record(factory: Factory) -> Factory:
        _BY_FACTORY[factory] = Requirements(
            output, labels, reference, all_streams, head_top1, scores, of_data
        )
        return factory

    return record


def requirements_of(factory: Callable[..., Any]) -> Requirements:
    """Return what `requires` recorded for a factory."""
    return _BY_FACTORY[factory]
