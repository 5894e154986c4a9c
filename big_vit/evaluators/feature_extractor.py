"""Feature extraction shared by the evaluations of a run."""

from typing import Any

from jax.sharding import Mesh

from big_vit.evaluators import features
from big_vit.evaluators.evaluation import SharedFeatures, Split
from big_vit.evaluators.features import Embedding, Features
from big_vit.state import State


class FeatureExtractor:
    """Compiles one step for all evaluations with the same embedding and device operations."""

    def __init__(self, abstract_state: State, mesh: Mesh):
        self._abstract_state = abstract_state
        self._mesh = mesh
        self._steps: dict[Any, Any] = {}

    def compute(
        self, key: str, split: Split, embedding: Embedding, params: Any, shared: SharedFeatures
    ) -> Features:
        """Embed a split, unless `shared` has its features already.

        Args:
          key: of the evaluation in the config, for messages.
        """
        alike = split.device, embedding.name
        if alike not in self._steps:
            self._steps[alike] = features.make_step(
                embedding.embed, split.prepare, self._abstract_state, self._mesh, embedding.label
            )
        name = split.identity, alike
        if name not in shared:
            shared[name] = features.gather(self._steps[alike], params, split.batches(), key)
        return shared[name]
