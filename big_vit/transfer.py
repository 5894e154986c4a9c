"""Transfer: fine-tune a checkpoint on a small dataset, beside the same recipe from scratch.

    python -m big_vit.transfer --config configs/transfer_digits.py \\
        --config.init=runs/fdsl --workdir runs/digits

Only parameters come from the checkpoint; the head is new, positions are
resized to the new grid. Training itself is `train.run`, the same path.
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the imports that take their time.
    command_line.answer_help(command_line.transfer())

import json
import math
import os
from typing import Any

import jax

from big_vit import config as config_lib
from big_vit import explain, metrics, runtime, storage, train
from big_vit.config import Config
from big_vit.data import files
from big_vit.data.sources import folder, splits
from big_vit.distributed import hosts
from big_vit.errors import UserError
from big_vit.pretrained.load import initial_params, model_keys_of
from big_vit.sweeps import study, sweep


def load_config(spec: str, overrides: list[tuple[str, str]]) -> Config:
    """The config, whose model is the checkpoint's where file and overrides do not say.

    Raises:
      UserError: config.init is not set, or there is no checkpoint.
    """
    # Where the checkpoint is stands in the config, and the model's default in the checkpoint.
    first = config_lib.load(spec, overrides, base={'model.variant': 'mu/1'})
    if first.init is None:
        raise UserError('config: init must be set to a checkpoint, as in --config.init=runs/fdsl')
    config = config_lib.load(spec, overrides, base=model_keys_of(first.init, first.init_tower))
    trained = config.transfer.train
    if trained == 'all':
        return config
    if config.sets('optim.lr_rules'):
        raise UserError(
            f'config: transfer.train={trained!r} and optim.lr_rules both say what is trained: '
            'set one'
        )
    more: dict[str, Any] = {'optim.lr_rules': sweep.rules(trained)}
    if trained == 'lora' and not config.model.peek('lora'):
        more['model.lora'] = 8
    return config.replacing(more)


def unread_splits(config: Config) -> list[str]:
    """Folders of splits, such as test, that a folder of images has and no split here names."""
    data = config.data
    if data.peek('name') != 'folder' or not data.peek('path'):
        return []
    texts = [data.peek('split'), *(config.evals[name].peek('split') for name in config.evals)]
    read = {splits.split_name(part) for text in texts for part in (text or 'test').split('+')}
    there = folder.split_folders(files.place(data.peek('path'), 'data.path'))
    return [name for name in there if name not in read]


def run(
    config: Config, path: str | os.PathLike[str], *, force: bool = False
) -> dict[str, dict[str, float]] | None:
    """Fine-tunes from the checkpoint and, as a control, from random parameters.

    Both runs are resumable, in WORKDIR/pretrained and WORKDIR/control.

    Returns:
      The last metrics by start ('pretrained', 'control'); None if a signal
      ended it early.
    """
    workdir = storage.place(path)
    results = {}
    for label, own in sweep.starts(config).items():
        start = initial_params(own, keep_head=False) if own.init else None
        ended = train.run(own, workdir / label, force=force, params=start, label=label)
        if ended.stopped:
            return None
        results[label] = ended.metrics

    text = json.dumps(results, indent=2) + '\n'
    hosts.lead(lambda: storage.write_text(workdir / 'transfer.json', text))
    return results


def _standard_error(found: dict[str, float], name: str) -> float:
    share = found[f'{name}/top1']
    return math.sqrt(share * (1 - share) / found[f'{name}/count'])


# What the table of classification has; other metrics follow in one of their own.
_TABLED = ('top1', 'top5', 'loss', 'count')


def result_table(results: dict[str, dict[str, float]], evals: list[str]) -> str:
    """One row for each start and evaluation; ± is the standard error from the size of the test.

    Seeds add to it: a difference of a few ± from one seed shows nothing. What evaluations of
    other types measure follows, a row for each metric.
    """
    first = next(iter(results.values()))
    classified = [name for name in evals if {f'{name}/{m}' for m in _TABLED} <= set(first)]
    rows = [
        (
            study.STARTS[label],
            name,
            f'{found[f"{name}/top1"]:.2%}',
            f'{_standard_error(found, name):.2%}',
            f'{found[f"{name}/top5"]:.2%}',
            f'{found[f"{name}/loss"]:.4f}',
            f'{found[f"{name}/count"]:.0f}',
        )
        for label, found in results.items()
        for name in classified
    ]
    header = ('start', 'evaluation', 'top-1', '±', 'top-5', 'loss', 'examples')
    tabled = {f'{name}/{metric}' for name in classified for metric in _TABLED}
    more = [
        (
            *metric.split('/', 1),
            *(metrics.shown(metric, found[metric]) for found in results.values()),
        )
        for metric in first
        if metric.partition('/')[0] in evals and metric not in tabled
    ]
    texts = [metrics.table(header, rows)] if rows else []
    if more:
        starts = [study.STARTS[label] for label in results]
        texts.append(metrics.table(('evaluation', 'metric', *starts), more))
    return '\n\n'.join(texts)


def main(argv: list[str]) -> None:
    args, overrides = command_line.parse(command_line.transfer(), argv)
    for flag, value in (('--seeds', args.seeds), ('--at-once', args.at_once)):
        if value is not None and value < 1:
            raise UserError(f'{flag} must be at least 1, got {value}')
    spec = command_line.require_flag(args.config, '--config', 'configs/transfer_digits.py')
    config = load_config(spec, overrides)
    runtime.start()
    if args.explain:
        print(explain.page(config))
        return
    if unread := unread_splits(config):
        print(
            f'note    {config.data.peek("path")} has folders {", ".join(unread)}, which no split '
            'of this run reads (configs/transfer.py:own has folders=true for that)'
        )
    workdir = command_line.require_flag(args.workdir, '--workdir', 'runs/digits')
    same = {'config': config_lib.digest(config), 'workdir': workdir}
    same |= {'sweep': f'{args.sweep} x {args.seeds}'}
    study_asked = bool(args.sweep or args.seeds)
    with hosts.session(args.distributed, same):
        results: Any
        if study_asked:
            place = storage.place(workdir)
            results = sweep.run(
                config, place, args.sweep, args.seeds or 1, args.at_once, args.force
            )
        else:
            results = run(config, workdir, force=args.force)
        first = jax.process_index() == 0
    if results is None or not first:
        return
    if study_asked:
        print(f'\n{sweep.report(study.read(place), results, config)}\n')
        picture = sweep.draw(config, place, results)
        done, look = (
            f'{workdir}/{study.TEST}',
            f'{workdir}/{next(iter(results.values()))["trials"][0]}',
        )
    else:
        print(f'\n{result_table(results, list(config.evals))}\n')
        picture = None
        done, look = f'{workdir}/transfer.json', f'{workdir}/pretrained'
    if config.transfer.published:
        print(f'published   {config.transfer.published}')
    if picture:
        print(f'drew    {picture}')
    print(f'done    {done}; look inside: python -m big_vit.explore {look}')


if __name__ == '__main__':
    runtime.command(main)
