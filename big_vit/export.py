"""Convert weights between checkpoints of ours and other codebases: `python -m big_vit.export`.

--checkpoint RUN --to timm --out PATH     write a folder (or .npz) that another codebase reads
--checkpoint RUN --to onnx --out PATH     write a model that answers without big_vit
--from PATH --out RUN                     write a checkpoint of ours from foreign weights
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the slow imports.
    command_line.answer_help(command_line.export())

import argparse
import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from big_vit import checkpoint, deployment, interop, runtime, sharding, storage, trees
from big_vit import config as config_lib
from big_vit.build.data import DEVICE_OPERATIONS, evaluation_transform
from big_vit.build.model import build_scored_model
from big_vit.build.task import build_task
from big_vit.config import Config, registries
from big_vit.data import transforms
from big_vit.data.transforms import Transform
from big_vit.errors import UserError
from big_vit.inspection import loaded_model
from big_vit.interop import Weights, class_names, detectors, fit, google, pictures
from big_vit.interop.weights import ORIGIN, PREPARED, Learnt
from big_vit.models.encoder import merge_lora, stack_blocks, unstack_blocks
from big_vit.models.vit import settings_of
from big_vit.pretrained.load import (
    config_of_weights,
    image_normalisation,
    task_parameters,
    with_learnt,
)


def settings_from_text(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse `name=value` texts into settings; sizes may be written as 224,224.

    Raises:
      UserError: a value is missing, or the name is not a setting.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition('=')
        if not equals:
            raise UserError(f'--set {pair}: write --set NAME=VALUE')
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = {'true': True, 'false': False, 'none': None}.get(text.lower(), text)
        if name in ('image_size', 'patch_size', 'stride') and isinstance(value, int):
            value = (value, value)
        settings[name] = value
    fit.complete({name: value for name, value in settings.items() if name != 'image_size'})
    size = settings.get('image_size', (1, 1))
    if not (isinstance(size, tuple) and len(size) == 2 and all(type(n) is int for n in size)):
        raise UserError('--set image_size: write --set image_size=HEIGHT,WIDTH in pixels')
    return settings


def from_checkpoint(
    path: str, which: str | None = None, *, to: str | None = None, transform: str | None = None
) -> Weights:
    """Load the parameters of a checkpoint with the settings and metadata from its config.

    Args:
      which: 'params' or 'ema'; by default 'ema' if it was saved.
      to: the format that this is for, whose config must be able to say how pictures are prepared.
      transform: how they are, instead of what the evaluation of the run says.

    Raises:
      UserError: there is no checkpoint, its model reads something else than one image, or
        pictures are prepared in a way that other codebases have no words for.
    """
    workdir, step = checkpoint.locate(path, '--checkpoint')
    sidecar = checkpoint.read_sidecar(workdir, step)
    params, _ = checkpoint.load_params(workdir, step, which or checkpoint.scored_part(sidecar))
    params = merge_lora(params)
    config = config_lib.from_json(sidecar['config']).without('model.lora')
    if list(config.streams):
        raise UserError(f'{path}: a model of several inputs has no place in other formats')
    flat = trees.flatten(params)
    stems = ('stem/conv_root/kernel', 'stem/conv_root/conv/kernel')
    first = next((name for name in stems if name in flat), 'embedding/kernel')
    if first not in flat or flat[first].ndim != 4:
        raise UserError(f'{path}: only models of patches of images have a place in other formats')
    channels = int(flat[first].shape[2])
    classes = flat['head/kernel'].shape[1] if 'head/kernel' in flat else 0
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    task = build_task(config.task)
    shape = {'image': (*config.image_size, channels)}
    model = build_scored_model(config, classes, shape, mesh)
    settings = {name: x for name, x in settings_of(model).items() if name in fit.FIELDS}
    settings['num_classes'] = classes
    params, left = task_parameters(params, task)
    known = storage.place(workdir) / ORIGIN
    meta = json.loads(known.read_text()) if known.exists() else {}
    mean, std = image_normalisation(config, channels)
    meta |= {'image_size': tuple(config.image_size), 'channels': channels}
    meta |= {'mean': mean, 'std': std, 'multi_label': task.logits_loss == 'sigmoid' or None}
    names, learnt = checkpoint.class_names(sidecar), None
    if task.detect is not None:
        keys = {name: config.task.peek(name) for name in registries.TASKS.keys(task.name)}
        keys = {name: value for name, value in keys.items() if value is not None}
        beside = trees.flatten(unstack_blocks(trees.unflatten({n: flat[n] for n in left})))
        learnt = Learnt({'name': task.name, **keys}, beside)
    named = classes or detectors.classes_of(learnt)
    meta |= {'class_names': names if names and len(names) == named else None}
    default = None if known.exists() or to in (None, *google.FORMATS) else PREPARED
    prepared = evaluation_transform(config, path, transform, default=default)
    # Detectors are given pictures of any shape, on a canvas.
    if prepared is not None and to not in detectors.FORMATS:
        meta |= _preparation(prepared, config.image_size, channels, to)
    meta = {**dict.fromkeys(interop.META), **meta}
    return Weights(unstack_blocks(params), settings, meta, learnt)


def _preparation(
    prepared: Transform, size: tuple[int, int], channels: int, to: str | None
) -> dict[str, Any]:
    """Return a transform in words of other codebases, and print what these cannot say.

    Args:
      to: the format that must have words for it; None for none.
    """
    try:
        preprocessing = prepared.preprocessing(size, channels)
        words = pictures.words(preprocessing, prepared.key)
    except UserError as error:
        if to in (None, *google.FORMATS):  # These say nothing of pictures.
            return {}
        raise UserError(
            f'--to {to}: {error}; --transform TEXT says what is written instead, as in '
            "'resize(size)'"
        ) from None
    if to not in (None, *google.FORMATS):
        print(f'pictures {preprocessing}')
        for line in pictures.remarks(preprocessing):
            print(f'         {line}')
    return words


def to_checkpoint(
    weights: Weights, out: str, overrides: Sequence[tuple[str, str]] = ()
) -> tuple[Path, Config]:
    """Save the parameters as step 0 of a workdir, with a matching config.

    Raises:
      UserError: the folder already has a run, or cannot be written.
    """
    config = config_of_weights(weights, overrides)
    params = with_learnt(weights)
    params = stack_blocks(params) if config.model.scan else params
    names = weights.meta.get('class_names')
    workdir = Path(checkpoint.save_params(out, params, 0, config.to_dict(), names))
    storage.write_text(storage.place(workdir) / ORIGIN, json.dumps(weights.meta, indent=2) + '\n')
    return workdir, config


def _add_labels(weights: Weights, labels: str | None) -> None:
    if labels:
        count, known = weights.settings['num_classes'], weights.meta.get('class_names')
        names = class_names.of_file(Path(labels).expanduser(), count, known)
        weights.meta.update({'class_names': names, 'class_descriptions': None})


def _deploy(args: argparse.Namespace, given: dict[str, Any], out: str) -> None:
    """Write a model of ours, or of another codebase, that answers without big_vit."""
    if args.source:
        weights = interop.read(args.source, args.format, args.drop, given, args.architecture)
        loaded = loaded_model.LoadedModel(args.source, weights.params, foreign_weights=weights)
    else:
        if given or args.drop:
            flag = '--set' if given else '--drop'
            raise UserError(f'{flag} only goes with --from, or a format of another codebase')
        loaded = loaded_model.load(args.checkpoint, args.which, '--checkpoint')
    names = None
    if args.labels:
        head = trees.flatten(loaded.params).get('head/kernel')
        count = 0 if head is None else head.shape[-1]
        names = class_names.of_file(Path(args.labels).expanduser(), count, loaded.class_names)
    how = {'transform': args.transform, 'class_names': names, 'licence': args.licence}
    for line in deployment.write(out, args.to, loaded, **how):
        print(line)


def main(argv: list[str]) -> None:
    args, overrides = command_line.parse(command_line.export(), argv)
    given = settings_from_text(args.set)
    out = args.out
    if not args.source and not args.checkpoint:
        raise UserError('give --checkpoint RUN to write one, or --from PATH to make one')
    if args.source and args.which:
        raise UserError(f'--which is of --checkpoint; of a file: --from {args.source}:KEY')
    formats = (*interop.WRITE, *deployment.FORMATS)
    if args.checkpoint and not args.to:
        raise UserError(f'--to is missing: one of {", ".join(formats)}')
    if args.to and args.to not in formats:
        raise UserError(
            f'--to {args.to}: not a format that is written; these are: {", ".join(formats)}'
        )
    if args.to and overrides:
        raise UserError(f'--config.{overrides[0][0]} only goes with --from PATH --out RUN')
    if args.to in deployment.FORMATS:
        _deploy(args, given, out)
        return
    if args.source:
        weights = interop.read(args.source, args.format, args.drop, given, args.architecture)
        print(f'read     {args.source} ({weights.meta["format"]})')
        if weights.meta['dropped']:
            print(f'dropped  {len(weights.meta["dropped"])} arrays')
        if args.transform and args.to:
            prepared = transforms.parse(
                args.transform,
                size=weights.meta['image_size'],
                key='--transform',
                device=DEVICE_OPERATIONS,
            )
            size, channels = weights.meta['image_size'], weights.meta['channels']
            weights.meta.update(_preparation(prepared, size, channels, args.to))
        _add_labels(weights, args.labels)
    if args.source and not args.to:
        if args.licence:
            weights.meta['licence'] = args.licence
        print(interop.describe(weights))
        workdir, config = to_checkpoint(weights, out, overrides)
        print(f'wrote    {workdir}/checkpoints/0')
        print(f'use      --config.init={workdir}   (model.variant {config.model.variant})')
        return
    if args.source:  # From one foreign format to another.
        args.drop = []
    else:
        weights = from_checkpoint(args.checkpoint, args.which, to=args.to, transform=args.transform)
        size = given.pop('image_size', weights.meta['image_size'])
        weights.meta['image_size'] = size
        weights = weights._replace(settings={**weights.settings, **given})
        _add_labels(weights, args.labels)
    if args.licence:
        weights.meta['licence'] = args.licence
    path = interop.write(out, args.to, weights, args.drop, args.architecture)
    print(interop.describe(weights))
    print(f'wrote    {path} ({args.to})')


if __name__ == '__main__':
    runtime.command(main)
