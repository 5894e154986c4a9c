"""The table of tasks: a new one is a file beside this one and a line here."""

from collections.abc import Callable

from big_vit.tasks import (
    classification,
    contrastive,
    detection,
    joint_embedding,
    masked,
    segmentation,
    self_distillation,
)
from big_vit.tasks.task import Task

TASKS: dict[str, Callable[..., Task]] = {
    'classification': classification.classification,
    'contrastive': contrastive.contrastive,
    'detection': detection.detection,
    'joint_embedding': joint_embedding.joint_embedding,
    'masked': masked.masked,
    'segmentation': segmentation.segmentation,
    'self_distillation': self_distillation.self_distillation,
}
