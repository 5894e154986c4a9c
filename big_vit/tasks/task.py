"""A task: all that the rest of the code may know of what is learned.

A task is one file here: a function whose keyword arguments are its config keys (`task.*`) and
that returns a `Task`, and one line in `registry.py`. Nothing outside this folder asks for a task
by its name.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
from jaxtyping import Array, Float, Int

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


class Run(NamedTuple):
    """What schedules and laws of a whole batch depend on.

    Attributes:
      total_steps: length of the run, in updates.
      batch_size: examples of a global batch.
      teacher: module of the frozen model that is learned from (`Task.teacher`), which the
        teacher's parameters are of; None where the teacher is an average of the model itself.
    """

    total_steps: int
    batch_size: int
    teacher: Any = None


# (params, task state, batch, key, step) -> (loss, Aux). Without a key nothing is random: dropout
# is off. The step is a traced scalar, for schedules of temperatures and the like. Of a task with
# a teacher the state has its parameters as 'teacher', of one with targets their shared part as
# 'targets'; neither has a gradient.
Loss = Callable[
    [Tree, Tree, Batch, Array | None, Array | int],
    tuple[Float[Array, ''], Aux],
]

# (parameters, task state, carried, step) -> task state. What it is given has the new teacher, where
# there is one, as 'teacher', which is not of what it gives.
AfterUpdate = Callable[[Tree, Tree, Tree, Array], Tree]

# (step, total steps) -> what share of the new parameters a teacher takes in: 1 less its momentum,
# which in float32 is lost near 1.
TeacherRate = Callable[[Array, int], Float[Array, '']]


class Targets(NamedTuple):
    """What losses aim at and what depends on all examples of a batch, computed before the losses.

    So laws of the whole batch (Sinkhorn's, a batch's mean) are the same with any accumulation and
    mesh, and the second gradient of SAM aims at the same.

    Attributes:
      rows: (task state, microbatch, key, step) -> arrays with a row for each example; the key is
        that which the loss of the microbatch gets. The loss finds them as batch['targets'].
      shared: (task state, the rows of the whole batch, step) -> tree, in the task state of the
        losses as 'targets'.
    """

    rows: Callable[[Tree, Batch, Array, Array], dict[str, Array]]
    shared: Callable[[Tree, dict[str, Array], Array], Tree]


# (parameters, images as the model sees them, key) -> pictures of each of them by title, in the
# range of the images; NaN where there is nothing to see.
Pictures = Callable[
    [Tree, Float[Array, 'batch height width channels'], Array],
    dict[str, Float[Array, 'batch height width channels']],
]


class Detections(NamedTuple):
    """Objects that a model finds in each picture, in no order.

    Attributes:
      scores: probability of the class, from 0 to 1.
      labels: the class.
      boxes: (centre x, centre y, width, height) in shares of the picture without its padding.
      masks: logits of the pixels of each over the whole canvas, at any resolution; None without.
    """

    scores: Float[Array, '*batch objects']
    labels: Int[Array, '*batch objects']
    boxes: Float[Array, '*batch objects 4']
    masks: Float[Array, '*batch objects rows columns'] | None = None


# (parameters, batch) -> what a model finds in its pictures.
Detect = Callable[[Tree, Batch], Detections]
# (parameters, batch) -> logits of classes over the canvas, at any resolution.
Segment = Callable[[Tree, Batch], Float[Array, 'batch rows columns classes']]


class ExampleShape(NamedTuple):
    """The examples that a task learns from.

    Attributes:
      inputs: shape of each part of the model's input, and of `Task.reads` where a model is made to
        be trained, without the batch; of views, which have one axis more, also 'image', one of the
        first group.
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
      loss: (model, run) -> `Loss`.
      headline: the training metric that console and explore show beside the loss.
      provides: what evaluations may ask for: 'logits' of classes, 'features' of examples, 'pairs'
        of embeddings of two streams, 'boxes' of objects, 'pixels' with classes.
      additions: first names of parameter paths that the task adds to the trunk; a transfer or an
        export leaves them.
      trunk: model -> the module that gives features; it is applied to the same parameters.
      needs_labels: whether each example must have a label.
      least_classes: how many classes the data must have.
      reads: parts of a batch that the loss needs beside the model's inputs.
      mixes_labels: whether mixup and cutmix make sense.
      logits_loss: whether logits compete ('softmax') or stand alone ('sigmoid').
      views: names of groups of views that the loss can read. Views of the first group, which must
        be there, are of the configured size. () where it sees examples once, as they are.
      state: parameters -> the task's own state, such as a batch's running mean; None without one.
      after_update: moves that state after each accepted update.
      teacher_rate: of the teacher, an average of all parameters that the loss learns from and that
        is evaluated and transferred (`ema` of a state); None without a teacher.
      teacher: workdir or checkpoint of a run of the same task whose model is the teacher, frozen;
        then the average is only what is kept. None where the average is the teacher.
      continues: parts of the task's own state that go on where a run starts from another one.
      targets: (model, run) -> `Targets`; None without.
      draw: model -> a function (batch, key) of the whole batch that gives random numbers, a row for
        each example. The loss finds those of its microbatch as batch['drawn'], so that nothing
        depends on accumulation; a loss that is called by itself draws its own. None without.
      detect: model -> `Detect`; None where it finds no objects.
      segment: model -> `Segment`; None where it tells no classes of pixels.
      pictures: model -> `Pictures` of what it makes of images, for reports; None without.
      whole_batch: whether the loss is of all examples of a batch together, with gradients between
        them, so that a batch cannot be learned from in parts.
    """

    name: str
    model: Callable[[ViT, ExampleShape], nn.Module]
    loss: Callable[[Any, Run], Loss]
    headline: str
    provides: frozenset[str]
    additions: tuple[str, ...] = ()
    trunk: Callable[[Any], Any] = lambda model: model
    needs_labels: bool = False
    least_classes: int = 0
    reads: tuple[str, ...] = ()
    mixes_labels: bool = False
    logits_loss: str = 'softmax'
    views: tuple[str, ...] = ()
    state: Callable[[Tree], Tree] | None = None
    after_update: AfterUpdate | None = None
    teacher_rate: TeacherRate | None = None
    teacher: str | None = None
    continues: tuple[str, ...] = ()
    targets: Callable[[Any, Run], Targets] | None = None
    draw: Callable[[Any], Callable[[Batch, Array], dict[str, Array]]] | None = None
    detect: Callable[[Any], Detect] | None = None
    segment: Callable[[Any], Segment] | None = None
    pictures: Callable[[Any], Pictures] | None = None
    whole_batch: bool = False

    def is_addition(self, path: str) -> bool:
        """Whether a parameter belongs to the task and not to its trunk."""
        return path.partition('/')[0] in self.additions
