"""The table of evaluators, by the value of `evals.NAME.type`.

An entry is a factory: a function of an `Evaluation` that returns an `Evaluator`. Its keyword-only
arguments are the config keys that the type reads, with their defaults, and `@requires` states what
it needs of the task and the data. `config/registries.py` reads both names and keys from here.
"""

from collections.abc import Callable

from big_vit.evaluators.classification import classification
from big_vit.evaluators.detection import detection
from big_vit.evaluators.evaluation import Evaluator
from big_vit.evaluators.fewshot import fewshot
from big_vit.evaluators.knn import knn
from big_vit.evaluators.linear_grid import linear_grid
from big_vit.evaluators.linear_probe import linear_probe
from big_vit.evaluators.matching import matching
from big_vit.evaluators.representation import representation
from big_vit.evaluators.requirements import Requirements, requirements_of
from big_vit.evaluators.retrieval import retrieval
from big_vit.evaluators.robustness import robustness
from big_vit.evaluators.segmentation import segmentation
from big_vit.evaluators.zero_shot import zero_shot

EVALUATORS: dict[str, Callable[..., Evaluator]] = {
    'classification': classification,
    'fewshot': fewshot,
    'knn': knn,
    'linear_probe': linear_probe,
    'linear_grid': linear_grid,
    'representation': representation,
    'retrieval': retrieval,
    'robustness': robustness,
    'zero_shot': zero_shot,
    'matching': matching,
    'detection': detection,
    'segmentation': segmentation,
}
# The type of an evaluation that names none.
DEFAULT = 'classification'


def requirements(name: str) -> Requirements:
    """Return what an evaluator needs of the task and the data."""
    return requirements_of(EVALUATORS[name])
