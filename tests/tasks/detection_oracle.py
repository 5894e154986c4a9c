"""The tiny detector whose steps a reference implementation made too: parameters and batches."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from big_vit import trees
from big_vit.models.vit import make_vit
from big_vit.tasks.detection import detection
from big_vit.tasks.task import ExampleShape

ORACLE = Path(__file__).parent.parent / 'oracles' / 'detr.npz'
CANVAS, PATCH, CLASSES, BOXES, BATCH, STEPS = (32, 40), 8, 4, 5, 8, 20
SIZES = dict(width=16, depth=2, mlp_dim=24, num_heads=2, activation='relu', norm_eps=1e-5)
DECODER = dict(queries=6, decoder_depth=3)


def oracle():
    with np.load(ORACLE) as file:
        arrays = dict(file)
    return json.loads(str(arrays.pop('header'))), arrays


def task_and_model(scan=True):
    trunk = make_vit(
        0, (PATCH, PATCH), **SIZES, dtype=jnp.float32, posemb='sincos2d_detr', post_norm=True,
        posemb_per_block=True, scan=scan,
    )  # fmt: skip
    task = detection(**DECODER)
    example = ExampleShape({'image': (*CANVAS, 3), 'boxes': (BOXES, 4)}, CLASSES)
    return task, task.model(trunk, example)


def parameters(seed=0):
    """Parameters by our names, drawn in the order of these."""
    rng, params = np.random.default_rng(seed), {}
    for name, shape in sorted(shapes().items()):
        x = rng.standard_normal(shape)
        params[name] = np.float32(1 + 0.2 * x if name.endswith('scale') else 0.3 * x)
    return params


def shapes():
    """Of the parameters, one set for each block."""
    _, model = task_and_model(scan=False)
    inputs = jax.ShapeDtypeStruct((1, *CANVAS, 3), jnp.float32)
    tree = jax.eval_shape(lambda x: model.init(jax.random.key(0), x)['params'], inputs)
    return {name: leaf.shape for name, leaf in trees.flatten(tree).items()}


def batches(seed=1, count=STEPS):
    """Pictures of several sizes at the top left of a canvas, with none to all of the boxes."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        image = rng.standard_normal((BATCH, *CANVAS, 3)).astype(np.float32)
        size = np.stack([rng.integers(9, side + 1, BATCH) for side in CANVAS], 1)
        size[0] = CANVAS
        objects = rng.integers(0, BOXES + 1, BATCH)
        extent = rng.uniform(0.05, 0.5, (BATCH, BOXES, 2))
        boxes = np.concatenate([rng.uniform(extent / 2, 1 - extent / 2), extent], -1)
        label = rng.integers(0, CLASSES, (BATCH, BOXES))
        real = np.arange(BOXES)[None] < objects[:, None]
        made.append(
            {
                'image': image,
                'picture_size': size.astype(np.int32),
                'boxes': np.where(real[..., None], boxes, 0).astype(np.float32),
                'box_label': np.where(real, label, -1).astype(np.int32),
            }
        )
    return made
