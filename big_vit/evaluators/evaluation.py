"""An evaluation: everything that an evaluator may use to score parameters on a split."""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax.sharding import Mesh
from jaxtyping import Array

from big_vit.data.sources import Source
from big_vit.data.transforms import ExampleSpec, Transform
from big_vit.evaluators.features import Embedding, Features
from big_vit.tasks.batch import Batch
from big_vit.tasks.task import Detect, Segment

# Features that evaluations of the same parameters share, by the split and the embedding.
SharedFeatures = dict[Any, Features]

# A function of (params, features computed so far) that returns metrics by name. Training runs it
# where implicit transfers between host and device are errors: code that needs them says
# `with jax.transfer_guard('allow')`.
Evaluator = Callable[[Any, SharedFeatures], dict[str, float]]

# A function of (params, batch) that sums metrics over the real examples of the batch.
Sums = Callable[[Any, Batch], dict[str, Array]]
# A function of (params, batch) that returns what every host gets of all examples, and what each
# host gets only of those that it loads.
Rows = Callable[[Any, Batch], tuple[Any, Any]]


@dataclass(frozen=True)
class BatchMeans:
    """An evaluator whose metrics are all means over examples.

    Callers may vmap `sums` over parameters, add up batches, and divide by the sum 'count'.
    """

    sums: Sums
    evaluate: Evaluator

    def __call__(self, params: Any, shared: SharedFeatures) -> dict[str, float]:
        return self.evaluate(params, shared)


class Split(NamedTuple):
    """A split of a dataset as the model is evaluated on it.

    Attributes:
      source: class names, labels where they can be listed, and the length.
      transform: what the host does to examples.
      example_spec: shape and type of each part of an example.
      reads: the parts of a batch that the model takes.
      identity: equal for splits that hold the same examples, loaded alike.
      device: names and functions of the operations on devices; equal where `prepare` is.
      prepare: applies these operations to a batch, before the model takes it.
      batches: loads every example once, as global arrays; the last batch is padded, and 'mask' is
        0 there.
    """

    source: Source
    transform: Transform
    example_spec: ExampleSpec
    reads: tuple[str, ...]
    identity: Hashable
    device: Hashable
    prepare: Callable[[Batch], Batch]
    batches: Callable[[], Iterable[Batch]]


class Evaluation(NamedTuple):
    """One evaluation of a config, before anything is computed.

    Attributes:
      key: its config key, `evals.NAME`, for error messages.
      split: the split to score on.
      reference: the split to learn from or to search, if the evaluator requires one.
      training: the source of the training data, whose classes the logits are over.
      image_size: (height, width) of the images that the model was trained on.
      model: the model, whose parameters come with each call of the evaluator.
      detect, segment: functions of (params, batch), see `Task`; None if the task has none.
      loss: the kind of loss, 'softmax' or 'sigmoid'.
      seed: the seed of the run.
      mesh: the devices.
      compute_features: embeds a split, or takes the features from those shared:
        (split, embedding, params, shared) -> features. All hosts must call it.
      compile_sums: jits sums over a batch, once for all evaluations that give the same key:
        (key, sums) -> step of (params, batch).
      compile_rows: jits what is computed of each example, once for equal keys: (key, rows) -> step
        of (params, batch).
      as_split: sentences as a split, tokenized as the training data is; example i is sentence i.
      sample: the split with at most so many examples, spread evenly.
      views: random views of some examples as a split, from (most examples, views of each, transform
        or None for that of training). Those of one come in turn, and labels are numbers of rows.
        None if the transform is not random.
    """

    key: str
    split: Split
    reference: Split | None
    training: Source
    image_size: tuple[int, int]
    model: Any  # The task's trunk, a ViT or, where it provides 'pairs', `TwoTowers`.
    detect: Detect | None
    segment: Segment | None
    loss: str
    seed: int
    mesh: Mesh
    compute_features: Callable[[Split, Embedding, Any, SharedFeatures], Features]
    compile_sums: Callable[[Hashable, Sums], Sums]
    compile_rows: Callable[[Hashable, Rows], Rows]
    as_split: Callable[[list[str]], Split]
    sample: Callable[[int], Split]
    views: Callable[[int, int, str | None], Split | None]
