"""Inputs and results of the references' losses in float64; oracles/README.md says how made."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

BATCH, GLOBALS, LOCALS, PROTOTYPES, PATCHES = 6, 2, 3, 40, 9


def numbers():
    with np.load(Path(__file__).parent / 'oracles' / 'self_distillation.npz') as file:
        return dict(file)


def inputs():
    """Logits of two steps, by example and view; the references have views first."""
    rng = np.random.RandomState(0)

    def by_example(x, views):
        return x.reshape(2, views, BATCH, *x.shape[2:]).swapaxes(1, 2)

    views = GLOBALS + LOCALS
    cls = by_example(rng.standard_normal((2, GLOBALS * BATCH, PROTOTYPES)), GLOBALS)
    student = by_example(rng.standard_normal((2, views * BATCH, PROTOTYPES)), views)
    masks = rng.rand(GLOBALS, BATCH, 3, 3) < 0.4
    masks[0, 0] = False
    shape = (2, GLOBALS * BATCH, PATCHES, PROTOTYPES)
    patches = by_example(rng.standard_normal(shape), GLOBALS)
    student_patches = by_example(rng.standard_normal(shape), GLOBALS)
    return SimpleNamespace(
        cls=cls,
        student=student,
        masks=masks.reshape(GLOBALS, BATCH, PATCHES).swapaxes(0, 1),
        patches=patches,
        student_patches=student_patches,
        koleo=rng.standard_normal((12, 7)),
        gram=(rng.standard_normal((4, PATCHES, 7)), rng.standard_normal((4, PATCHES, 7))),
    )
