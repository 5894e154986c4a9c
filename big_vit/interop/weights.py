"""A model in our layout, with the settings and metadata that its arrays do not reveal."""

from typing import Any, NamedTuple

import numpy as np

from big_vit import trees
from big_vit.data.sources.classes import shown
from big_vit.errors import printable
from big_vit.interop import pictures

# Metadata of foreign weights, kept beside the checkpoints of the workdir made from them.
ORIGIN = 'origin.json'
# How pictures are prepared where nothing says it: as evaluations do by default.
PREPARED = 'resize(size)'
META = (
    'format', 'architecture', 'image_size', 'channels', 'mean', 'std', 'crop_pct', 'crop_mode',
    'interpolation', 'class_names', 'class_descriptions', 'multi_label', 'licence', 'source',
    'dropped', 'part',
)  # fmt: skip


class Learnt(NamedTuple):
    """What a model learnt with, beside its encoder: keys of `task`, and flat parameters of ours."""

    task: dict[str, Any]
    params: dict[str, np.ndarray]


class Weights(NamedTuple):
    """A model in our layout, read from another codebase or about to be written for one.

    Attributes:
      params: nested parameters under our names, one subtree per block; float32 or bfloat16.
      settings: fields of `ViT`, which are the keys of `config.model`.
      meta: format, architecture, image_size (height, width), channels, mean, std, crop_pct,
        crop_mode and interpolation (as `pictures` has them), class_names (of the head, in order, ''
        for one without), class_descriptions (longer names), multi_label (whether classes do not
        exclude each other), licence, source, dropped (names that were left out), part (the place
        of the encoder in the file); None where unknown.
      learnt: what it was pretrained with, where the file has that too.
    """

    params: dict[str, Any]
    settings: dict[str, Any]
    meta: dict[str, Any]
    learnt: Learnt | None = None


def describe(weights: Weights) -> str:
    """Summarise a model in a few lines of text."""
    settings, meta = weights.settings, weights.meta
    count = trees.count(weights.params)
    kinds = (
        f'width {settings["width"]}, {settings["depth"]} blocks, {settings["num_heads"]} heads, '
        f'patch {"x".join(map(str, settings["patch_size"]))}'
    )
    rest = ', '.join(
        f'{name}={settings[name]}'
        for name in ('posemb', 'pool', 'activation', 'norm_eps', 'registers', 'num_classes')
    )
    height, width = meta['image_size']
    images = f'{height}x{width}, mean {meta.get("mean")}, std {meta.get("std")}'
    crop_mode, crop_pct = pictures.crop_mode(meta), meta.get('crop_pct') or 1.0
    images += f', {crop_mode} {crop_pct:.4g}, {meta.get("interpolation") or "any"} interpolation'
    names = meta.get('class_descriptions') or meta.get('class_names')
    classes = [printable(f'classes  {shown(names)}')] if names else []
    beside = []
    if weights.learnt is not None:
        keys = ', '.join(f'{key}={value!r}' for key, value in weights.learnt.task.items())
        beside = [f'task     {keys}: {trees.count(weights.learnt.params):,} parameters beside it']
    return '\n'.join(
        [
            f'model    {count:,} parameters: {kinds}',
            f'         {rest}',
            *beside,
            f'images   {images}',
            *classes,
            printable(
                f'from     {meta.get("source") or "unknown source"}, '
                f'licence {meta.get("licence") or "unknown"}'
                + (f', part {meta["part"]}' if meta.get('part') else '')
            ),
        ]
    )
