"""Evaluate: `python -m big_vit.evaluate RUN` scores a checkpoint on its config's splits.

Every example of a split counts exactly once, on any number of devices.
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the slow imports.
    command_line.answer_help(command_line.evaluate())

import contextlib
import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from big_vit import checkpoint, interop, metrics, runtime, sharding, state, storage
from big_vit import config as config_lib
from big_vit.build.data import Data, completed_section
from big_vit.build.evaluations import SharedFeatures, build_evaluators, build_judges
from big_vit.build.experiment import Experiment, build_experiment
from big_vit.config import Config
from big_vit.data.sources.known import Known
from big_vit.distributed import hosts
from big_vit.errors import UserError, printable
from big_vit.evaluators import confusion
from big_vit.evaluators.confusion import Judged
from big_vit.evaluators.registry import requirements
from big_vit.pretrained.load import initial_params, read_pretrained

HEADERS = {'top1': 'top-1', 'top5': 'top-5', 'count': 'examples'}
# Evaluations with more metrics get a line for each metric.
MAX_COLUMNS = 10


# What was answered in evaluations of the head, by their names, with the data that it is of.
Answered = dict[str, tuple[Judged, Data]]


def run(
    workdir: Path,
    step: int,
    overrides: Sequence[tuple[str, str]] = (),
    answered: Answered | None = None,
) -> dict[str, dict[str, float]]:
    """Score a checkpoint's parameters, the averaged ones where it has them.

    Args:
      overrides: changes to the checkpoint's own config, as (dotted key, text).
      answered: gets what is answered for each example of the evaluations of the head.

    Returns:
      {evaluation: {metric: value}}.
    """
    config, load, known = _of_run(workdir, step, overrides)
    return _scores(config, load, known, answered)


def judge(workdir: Path, step: int, seconds: float) -> Answered:
    """Say what a checkpoint answers in the evaluations of its head, as far as time allows.

    Args:
      seconds: for each evaluation, whose examples come in a random order.

    Raises:
      UserError: the run has no such evaluation, or its data is not here.
    """
    config, load, known = _of_run(workdir, step, ())
    kinds = {name: completed_section(config, 'evals', name).type for name in config.evals}
    others = [name for name, kind in kinds.items() if not requirements(kind).head_top1]
    if len(others) == len(kinds):
        return {}
    config = config.without(*(f'evals.{name}.' for name in others))
    if config.data.cache in ('auto', 'decoded'):  # To fill a cache would take longer.
        config = config.replacing({'data.cache': 'none'})
    with _opened(config, load, known) as (parts, params):
        judges = build_judges(config, parts, seconds)
        return {name: judge(params) for name, judge in judges.items()}


def _of_run(
    workdir: Path, step: int, overrides: Sequence[tuple[str, str]]
) -> tuple[Config, Callable[[Experiment], Any], Known | None]:
    """Return the config of a checkpoint here, what loads its parameters, and their classes."""
    sidecar = checkpoint.read_sidecar(workdir, step)
    config = _here(config_lib.from_json(sidecar['config']), overrides)

    def load(parts: Experiment) -> Any:
        params, _ = checkpoint.load_params(workdir, step, checkpoint.scored_part(sidecar))
        checkpoint.check_params(
            params, parts.abstract_state['params'], f'{workdir}/checkpoints/{step}'
        )
        return params

    names = checkpoint.class_names(sidecar)
    return config, load, None if names is None else Known(len(names), names, 'the model')


def run_weights(
    path: str,
    overrides: Sequence[tuple[str, str]] = (),
    answered: Answered | None = None,
) -> dict[str, dict[str, float]]:
    """Score weights of another codebase.

    Args:
      path: file or folder of the weights.
      overrides: data and evaluations, as (dotted key, text). Evaluations without a transform get
        that of the weights.

    Returns:
      {evaluation: {metric: value}}.
    """
    architecture = dict(overrides).get('init_architecture')
    pretrained = read_pretrained(path, architecture=architecture)
    config = _here(pretrained.config, [*overrides, ('init', path)])
    plain = [name for name in config.evals if config.evals[name].transform is None]
    text = config.data.transform
    config = config.replacing({f'evals.{name}.transform': text for name in plain})
    head = pretrained.params.get('head')
    names = pretrained.class_names
    load = initial_params(config, keep_head=True, by_name=names is None)

    def checked(parts: Experiment) -> Any:
        head_classes = 0 if head is None else head['kernel'].shape[-1]
        of_head = [
            name
            for name in parts.evals
            if requirements(completed_section(config, 'evals', name).type).output == 'logits'
        ]
        if of_head and head_classes != parts.data.source.num_classes:
            raise UserError(
                f'config: evals.{of_head[0]} is of the head, which in {path} has {head_classes} '
                f'classes, but data has {parts.data.source.num_classes}: give data with the same '
                'classes, or evaluations of features, such as type=knn'
            )
        return load(parts)

    known = None if names is None else Known(len(names), names, path, or_numbers=True)
    return _scores(config, checked, known, answered)


def _here(saved: Config, overrides: Sequence[tuple[str, str]]) -> Config:
    """Adapt a config to this machine and apply overrides.

    Raises:
      UserError: it has no evaluation.
    """
    devices = len(jax.devices())
    # In an evaluation a batch is only how many examples are computed at a time.
    here = {
        'mesh.replica': 1,
        'mesh.fsdp': -1,
        'mesh.tensor': 1,
        'accumulation': 1,
        'batch_size': math.ceil(saved.batch_size / devices) * devices,
    }
    config = config_lib.override(saved.replacing(here), overrides)
    if not list(config.evals):
        raise UserError(
            "the checkpoint's config has no evals; add one: --config.evals.test.split=test"
        )
    return config


@contextlib.contextmanager
def _opened(
    config: Config, load: Callable[[Experiment], Any], known: Known | None
) -> Iterator[tuple[Experiment, Any]]:
    """Context of an evaluation: the experiment, and the parameters on the devices."""
    parts = build_experiment(config, known=known, to_train=False)
    params = jax.tree.map(
        sharding.place, load(parts), state.shardings(parts.abstract_state)['params']
    )
    with jax.set_mesh(parts.mesh):
        hosts.connect(parts.mesh)
        yield parts, params


def _scores(
    config: Config,
    load: Callable[[Experiment], Any],
    known: Known | None = None,
    answered: Answered | None = None,
) -> dict[str, dict[str, float]]:
    with _opened(config, load, known) as (parts, params):
        evaluators = build_evaluators(config, parts)
        judges = {} if answered is None else build_judges(config, parts)
        shared: SharedFeatures = {}
        scores = {name: evaluate(params, shared) for name, evaluate in evaluators.items()}
        if answered is not None:
            answered |= {name: judge(params) for name, judge in judges.items()}
        return scores


def write_per_class(answered: Answered, out: Path) -> None:
    """Write figures of each class, the worst first, and in JSON also all that is confused.

    Raises:
      UserError: no evaluation is of the head, or the file cannot be written.
    """
    if not answered:
        raise UserError(
            f'--per-class {out}: no evaluation is of the accuracy of the head: add one, as in '
            '--config.evals.test.type=classification'
        )
    rows = {name: confusion.figures(judged) for name, (judged, _) in answered.items()}
    if out.suffix == '.json':
        tree = {
            name: {
                'accuracy': judged.accuracy,
                'examples': len(judged.labels),
                'classes': [figures._asdict() for figures in rows[name]],
                'confused': [pair._asdict() for pair in confusion.confused(judged)],
            }
            for name, (judged, _) in answered.items()
        }
        storage.write_text(storage.place(out), json.dumps(tree, indent=1) + '\n')
        return
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(('evaluation', 'class', *confusion.ClassFigures._fields[1:]))
    for name, figures in rows.items():
        writer.writerows((name, *one) for one in figures)
    storage.write_text(storage.place(out), text.getvalue())


def tables(scores: dict[str, dict[str, float]]) -> str:
    """Tabulate scores: evaluations with the same metrics share a table, unless those are many."""
    by_metrics: dict[tuple[str, ...], list[str]] = {}
    for name, values in scores.items():
        by_metrics.setdefault(tuple(values), []).append(name)
    texts = []
    for measured, evaluations in by_metrics.items():
        if len(measured) > MAX_COLUMNS:
            for name in evaluations:
                rows = [(metric, metrics.shown(metric, x)) for metric, x in scores[name].items()]
                texts.append(metrics.table((name, ''), rows))
            continue
        # The count comes last.
        columns = sorted(measured, key=lambda metric: metric == 'count')
        body = [
            (name, *(metrics.shown(metric, scores[name][metric]) for metric in columns))
            for name in evaluations
        ]
        header = ('evaluation', *(HEADERS.get(metric, metric) for metric in columns))
        texts.append(metrics.table(header, body))
    return '\n\n'.join(texts)


def main(argv: list[str]) -> None:
    args, overrides = command_line.parse(command_line.evaluate(), argv)
    if args.path and args.checkpoint:
        raise UserError(f'{args.path} and --checkpoint {args.checkpoint}: name one of them')
    path = command_line.require_flag(args.path or args.checkpoint, 'PATH', 'runs/first')
    weights = interop.load_init(path, dict(overrides).get('init_architecture'))
    foreign = weights is not None
    key = '--checkpoint' if args.checkpoint else 'PATH'
    workdir, step = (Path(path), 0) if foreign else checkpoint.locate(path, key)
    where = path if foreign else f'{workdir}/checkpoints/{step}'
    out = None if args.per_class is None else Path(args.per_class).expanduser()
    if out is not None and (out.suffix not in ('.csv', '.json') or not out.parent.is_dir()):
        raise UserError(f'--per-class {out}: name a .csv or .json file in a folder that is there')
    answered: Answered | None = None if out is None else {}
    runtime.start()
    with hosts.session(args.distributed, {'checkpoint': where, 'overrides': str(overrides)}):
        scores = (
            run_weights(path, overrides, answered)
            if foreign
            else run(workdir, step, overrides, answered)
        )
        first = jax.process_index() == 0
    if not first:
        return
    if out is not None and answered is not None:
        write_per_class(answered, out)
    if args.json:
        print(json.dumps({'checkpoint': where, **scores}))
        return
    part = weights.meta.get('part') if weights is not None else None
    print(where + (printable(f' ({part})') if part else ''))
    print(tables(scores))
    if out is not None:
        print(f'wrote   {out}')


if __name__ == '__main__':
    runtime.command(main)
