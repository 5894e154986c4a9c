"""Transfer: fine-tune a checkpoint on a small dataset, next to the same recipe from scratch.

    python -m big_vit.transfer --config configs/transfer_digits.py \\
        --config.init=runs/fdsl --workdir runs/digits

Only parameters come from the checkpoint; the head is new, and positions are resized to the new
grid. Training itself is `train.run`.
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the slow imports.
    command_line.answer_help(command_line.transfer())

import json
import math
import os
from typing import Any

import jax

from big_vit import config as config_lib
from big_vit import explain, interop, metrics, runtime, storage, train
from big_vit.config import Config
from big_vit.data import files
from big_vit.data.sources import folder, splits
from big_vit.distributed import hosts
from big_vit.errors import UserError
from big_vit.pretrained.load import model_keys_of
from big_vit.sweeps import study, sweep
from big_vit.workdir import owned


def load_config(spec: str, overrides: list[tuple[str, str]]) -> Config:
    """Load a config whose model is the checkpoint's, where file and overrides do not set it.

    Raises:
      UserError: config.init is not set, or there is no checkpoint.
    """
    # The config names the checkpoint, and the checkpoint gives the config's defaults of the model.
    first = config_lib.load(spec, overrides, base={'model.variant': 'mu/1'})
    if first.init is None:
        raise UserError('config: init must be set to a checkpoint, as in --config.init=runs/fdsl')
    base = model_keys_of(first.init, first.init_tower, first.init_architecture)
    config = config_lib.load(spec, overrides, base=base)
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
    """List the folders of splits, such as test, of a folder of images that no split here names."""
    data = config.data
    if data.peek('name') != 'folder' or not data.peek('path'):
        return []
    texts = [data.peek('split'), *(config.evals[name].peek('split') for name in config.evals)]
    parts = [part for text in texts for part in (text or 'test').split('+')]
    read = {splits.split_name(part).casefold() for part in parts}
    folders = folder.split_folders(files.place(data.peek('path'), 'data.path'))
    return [name for name in folders if name.casefold() not in read]


def run(
    config: Config, path: str | os.PathLike[str], *, force: bool = False
) -> dict[str, dict[str, float]] | None:
    """Fine-tune from the checkpoint and, as a control, from random parameters.

    Both runs are resumable, in WORKDIR/pretrained and WORKDIR/control.

    Returns:
      The last metrics by start ('pretrained', 'control'); None if a signal ended it early.
    """
    results = {}
    with owned(path) as workdir:
        for start, start_config in sweep.starts(config).items():
            result = train.run(
                start_config,
                workdir / start,
                force=force,
                params=sweep.make_params(start_config),
                label=start,
            )
            if result.stopped:
                return None
            results[start] = result.metrics
        text = json.dumps(results, indent=2) + '\n'
        hosts.lead(lambda: storage.write_text(workdir / 'transfer.json', text))
    return results


def _standard_error(scores: dict[str, float], name: str) -> float:
    share = scores[f'{name}/top1']
    return math.sqrt(share * (1 - share) / scores[f'{name}/count'])


# The columns of the table of classifications; other metrics follow in a table of their own.
_TABLED = ('top1', 'top5', 'loss', 'count')


def result_table(results: dict[str, dict[str, float]], evals: list[str]) -> str:
    """Tabulate results, a row for each start and evaluation; ± is the error of the test's size.

    Seeds add to this standard error: a difference of a few ± from one seed shows nothing. Metrics
    of evaluations of other types follow, a row each.

    Args:
      results: metrics by start, as `run` returns them.
      evals: names of the evaluations.
    """
    first = next(iter(results.values()))
    classified = [name for name in evals if {f'{name}/{m}' for m in _TABLED} <= set(first)]
    rows = [
        (
            study.STARTS[start],
            name,
            f'{scores[f"{name}/top1"]:.2%}',
            f'{_standard_error(scores, name):.2%}',
            f'{scores[f"{name}/top5"]:.2%}',
            f'{scores[f"{name}/loss"]:.4f}',
            f'{scores[f"{name}/count"]:.0f}',
        )
        for start, scores in results.items()
        for name in classified
    ]
    header = ('start', 'evaluation', 'top-1', '±', 'top-5', 'loss', 'examples')
    tabled = {f'{name}/{metric}' for name in classified for metric in _TABLED}
    more = [
        (
            *metric.split('/', 1),
            *(metrics.shown(metric, scores[metric]) for scores in results.values()),
        )
        for metric in first
        if metric.partition('/')[0] in evals and metric not in tabled
    ]
    texts = [metrics.table(header, rows)] if rows else []
    if more:
        starts = [study.STARTS[start] for start in results]
        texts.append(metrics.table(('evaluation', 'metric', *starts), more))
    return '\n\n'.join(texts)


def main(argv: list[str]) -> None:
    args, overrides = command_line.parse(command_line.transfer(), argv)
    interop.recall(args.workdir)
    config = load_config(args.config, overrides)
    runtime.start()
    if args.explain:
        print(explain.page(config))
        return
    if unread := unread_splits(config):
        print(
            f'note    {config.data.peek("path")} has folders {", ".join(unread)}, which no split '
            'of this run reads (configs/transfer.py:own has folders=true for that)'
        )
    workdir = args.workdir
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
        sweep.show(config, place, results)
        return
    print(f'\n{result_table(results, list(config.evals))}\n')
    if config.transfer.published:
        print(f'published   {config.transfer.published}')
    look = f'look inside: python -m big_vit.explore {workdir}/pretrained'
    print(f'done    {workdir}/transfer.json; {look}')


if __name__ == '__main__':
    runtime.command(main)
