"""A task: all that the rest of the code may know of what is learned.

A task is one file here: a function whose keyword arguments are its config keys (`task.*`) and
that returns a `Task`, and one line in `registry.py`. Nothing outside this folder asks for a task
by its name.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
from jaxtyping import Array, Float

from big_vit.models.vit import ViT
from big_vit.tasks.batch import Batch

# Parameters and task states are trees of arrays.
Tree = Any


class Aux(NamedTuple):
    """Results of a loss beside its value.

    Attributes:
      metrics: scalars to log.
      carried: tree of arrays for `Task.after_update`, such as a batch's mean; with gradient
        accumulation the mean over microbatches.
    """

    metrics: dict[str, Array]
    carried: Tree = ()


# (params, task state, batch, key, step) -> (loss, Aux). Without a key nothing is random: dropout
# is off. The step is a traced scalar, for schedules of temperatures and the like.
Loss = Callable[
    [Tree, Tree, Batch, Array | None, Array | int],
    tuple[Float[Array, ''], Aux],
]

# (parameters, task state, carried, step) -> task state.
AfterUpdate = Callable[[Tree, Tree, Tree, Array], Tree]


class ExampleShape(NamedTuple):
    """The examples that a task learns from.

    Attributes:
      inputs: shape of each part of the model's input, without the batch.
      num_classes: number of classes, 0 without labels.
    """

    inputs: dict[str, tuple[int, ...]]
    num_classes: int


class Task(NamedTuple):
    """What is learned, as plain functions.

    Attributes:
      name: as `task.name` in the config.
      model: (trunk, example) -> the Flax module that is trained: the trunk and what the task adds.
        The trunk's parameters keep their paths at the root. UserError where they do not fit.
      loss: model -> `Loss`.
      headline: the training metric that console and explore show beside the loss.
      provides: what evaluations may ask for: 'logits' of classes, 'features' of examples, 'pairs'
        of embeddings of two streams.
      additions: first names of parameter paths that the task adds to the trunk; a transfer or an
        export leaves them.
      trunk: model -> the module that gives features; it is applied to the same parameters.
      needs_labels: whether each example must have a label.
      least_classes: how many classes the data must have.
      mixes_labels: whether mixup and cutmix make sense.
      logits_loss: whether logits compete ('softmax') or stand alone ('sigmoid').
      state: parameters -> the task's own state, such as a teacher's average; None without one.
      after_update: moves that state after each accepted update.
    """

    name: str
    model: Callable[[ViT, ExampleShape], nn.Module]
    loss: Callable[[Any], Loss]
    headline: str
    provides: frozenset[str]
    additions: tuple[str, ...] = ()
    trunk: Callable[[Any], Any] = lambda model: model
    needs_labels: bool = False
    least_classes: int = 0
    mixes_labels: bool = False
    logits_loss: str = 'softmax'
    state: Callable[[Tree], Tree] | None = None
    after_update: AfterUpdate | None = None

    def is_addition(self, path: str) -> bool:
        """Whether a parameter belongs to the task and not to its trunk."""
        return path.partition('/')[0] in self.additions
