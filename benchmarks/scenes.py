"""Find and outline drawings that were never seen, on photographs: `python -m benchmarks.scenes`.

Small detectors learn from composed scenes: a ViT of plain patches, one with a convolutional stem,
a hybrid with stages of a ResNet, and a ViT that first learned without labels from openclipart; each
for the same number of operations. What the last spent before is its own: `longer` is the plain ViT
that spends as much. Then a linear layer tells classes of pixels on each of these trunks, frozen. No
thing, and no part of a photograph, of the test scenes is in those of training. Controls are a
random trunk, and what can be said without looking. Rates are chosen on scenes of other things.
Finished runs stay, and those that were interrupted go on.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from benchmarks import machine, picture_sets, scene_pictures
from benchmarks.over_seeds import bars, cell, standard_error
from benchmarks.scene_pictures import CLASSES
from big_vit import config as config_lib
from big_vit import metrics, runtime, storage, train
from big_vit.build.experiment import build_experiment
from big_vit.config import Config
from big_vit.data.decode import DecodeError
from big_vit.data.sources import coco
from big_vit.data.sources.base import Request
from big_vit.evaluators import detection
from big_vit.inspection import plots, sightings

RESULTS = Path(__file__).parent / 'results'
SIZE, DRAWING, PATCH, BATCH, QUERIES = 128, 64, 16, 16, 12
SEEDS, FACTORS = 3, (0.3, 1.0)
# Operations of a final detector, and the shares of a search for a rate and of classes of pixels.
BUDGET, SEARCHED, PIXELS = 2e13, 0.2, 0.15
SCENES = {'train': 5000, 'val': 400, 'test': 1000}
QUICK = {'train': 48, 'val': 16, 'test': 16}
# Of each class, the things of the scenes to test on and to choose rates on.
HELD_OUT = (0.2, 0.1)
TRUNK: dict[str, Any] = {
    'model.variant': f'mu/{PATCH}',
    'model.width': 128,
    'model.depth': 4,
    'model.num_heads': 4,
    'model.mlp_dim': 256,
    'model.scan': False,
    'model.dtype': 'float32',
    'model.tokenizer': 'patches',
    'model.posemb': 'sincos2d_mae',
    'model.activation': 'gelu',
    'model.norm_eps': 1e-6,
    'model.pool': 'cls',
}
STEMS: dict[str, dict[str, Any]] = {
    'convolutions': {'model.tokenizer': 'conv'},
    'hybrid': {'model.tokenizer': 'resnet', 'model.variant': f'R8+mu/{PATCH}'},
}
STARTS = ('random trunk', 'plain', 'longer', 'convolutions', 'hybrid', 'self-supervised')
LONGER = 2.0
METHOD = 'jepa'
FROZEN = (('(decoder|class_head|box_head|decode_head)/.*', 1.0), ('.*', 0.0))
# Heights of bars, in the order of the columns of the table.
FIGURES = {'AP50': 'AP50', 'AP': 'AP', 'miou': 'mIoU'}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
      kind: 'pictures' (without labels), 'boxes' or 'pixels'.
      seed: 0 in the search for a rate.
      factor: on the rate.
    """

    kind: str
    start: str
    seed: int
    factor: float = 1.0

    @property
    def name(self) -> str:
        return f'{self.kind}-{self.start.replace(" ", "_")}-{self.seed}-{self.factor:g}'


def drawings(known: scene_pictures.Things, held: np.ndarray, cache: Path) -> int:
    """Write openclipart as squares to learn from without labels; return how many there are.

    Args:
      held: rows of things that must not be learned from; nor are others of their families.
    """
    if not cache.exists():
        families = {known.families[row] for row in held}
        images = []
        for path in sorted(picture_sets.CLIPART.rglob('*.png')):
            if picture_sets.family(path) in families:
                continue
            try:
                images.append(picture_sets.square(path, DRAWING))
            except DecodeError:
                continue
        partial = cache.with_suffix('.partial.npz')
        labels = np.zeros(len(images), np.int32)
        np.savez(partial, train_images=np.stack(images), train_labels=labels)
        partial.replace(cache)
    with np.load(cache, allow_pickle=False) as kept:
        return len(kept['train_labels'])


def compose(workdir: Path, counts: dict[str, int]) -> dict[str, Any]:
    """Write the scenes of all splits, as COCO and as label maps; return what they are made of."""
    about = workdir / 'scenes.json'
    known = scene_pictures.things(workdir / 'things.npz')
    parts = dict(
        zip(('train', 'test', 'val'), scene_pictures.divided(known, HELD_OUT), strict=True)
    )
    made = {
        'classes': list(CLASSES),
        'scenes': counts,
        'things': {name: len(rows) for name, rows in parts.items()},
    }
    if not (about.exists() and json.loads(about.read_text()) == made):
        photos = scene_pictures.photographs()
        for seed, (split, rows) in enumerate(parts.items()):
            pages = scene_pictures.halves(photos, 'right' if split == 'test' else 'left')
            composed = scene_pictures.scenes(known, rows, pages, counts[split], seed, size=SIZE)
            scene_pictures.write_coco(workdir / 'coco', split, composed, list(CLASSES))
            scene_pictures.write_label_maps(workdir / 'maps', split, composed)
        names = ''.join(f'{name}\n' for name in ('nothing', *CLASSES))
        (workdir / 'maps' / 'classes.txt').write_text(names)
        about.write_text(json.dumps(made))
    held = np.concatenate([parts['test'], parts['val']])
    return {**made, 'drawings': drawings(known, held, workdir / 'drawings.npz')}


# --- Configs ---------------------------------------------------------------------------


def base_config(run: Run, workdir: Path) -> Config:
    """Return the config of a run, without its length and what it starts from."""
    return {'pictures': of_pictures, 'boxes': of_boxes, 'pixels': of_pixels}[run.kind](run, workdir)


def of_pictures(run: Run, workdir: Path) -> Config:
    arguments = f'path={workdir},method={METHOD},variant=mu/{PATCH},size={DRAWING},batch=64'
    base = config_lib.load(f'configs/unlabelled.py:{arguments}', [])
    return base.replacing(
        {
            **TRUNK,
            'optim.name': 'muon',
            'optim.b2': None,
            'lr': 0.01,
            'task.projector_width': 256,
            'task.projection_dim': 64,
            'task.sigreg_directions': 256,
            'data.name': 'arrays',
            'data.path': str(workdir / 'drawings.npz'),
            'data.transform': base.data.transform.replace('decode(3)', 'rgb'),
            'evals.features.transform': 'rgb | resize(size)',
            'evals.features.every_percent': 100,
        }
    )


def of_boxes(run: Run, workdir: Path) -> Config:
    arguments = f'path={workdir / "coco"},format=coco,size={SIZE},queries={QUERIES},batch={BATCH}'
    base = config_lib.load(f'configs/own_boxes.py:{arguments}', [])
    frozen = {'optim.lr_rules': FROZEN} if run.start == 'random trunk' else {}
    return base.replacing(
        {
            **TRUNK,
            **STEMS.get(run.start, {}),
            **frozen,
            'data.transform': (
                'flip_lr | large_scale_jitter(size, scale=(0.7, 1.3))'
                f' | boxes({QUERIES}) | normalize'
            ),
            'evals.val.split': 'test' if run.seed else 'val',
            'evals.val.every_percent': 100,
        }
    )


def of_pixels(run: Run, workdir: Path) -> Config:
    base = config_lib.load(f'configs/vit_seg_ade20k.py:path={workdir / "maps"}', [])
    return base.replacing(
        {
            **TRUNK,
            'model.class_token': False,
            'model.posemb_prefix': 0,
            'model.layer_scale': 0.0,
            **STEMS.get(run.start, {}),
            'image_size': SIZE,
            'batch_size': BATCH,
            'lr': 3e-3,
            'task.last_blocks': 4,
            'optim.lr_rules': FROZEN,
            'schedule.warmup_steps': None,
            'schedule.warmup_percent': 5,
            'transfer.published': None,
            'data.split': 'train',
            'data.num_examples': None,
            'data.num_classes': None,
            'data.transform': 'decode | flip_lr | normalize',
            'evals.val.split': 'test' if run.seed else 'val',
            'evals.val.num_examples': None,
            'evals.val.stride': None,
            'evals.val.transform': 'decode | normalize',
            'evals.val.every_percent': 100,
        }
    )


# --- Runs ------------------------------------------------------------------------------


class Study:
    """All runs; finished ones are stored in WORKDIR/runs.jsonl."""

    def __init__(self, workdir: Path, about: dict[str, Any], quick: bool = False):
        self._workdir, self._about, self._quick = workdir, about, quick
        self._file = epath.Path(workdir) / 'runs.jsonl'
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._rows = [json.loads(text) for text in lines]

    @functools.cache  # noqa: B019
    def config(self, run: Run) -> Config:
        """Return the config of a run, with as many steps as its operations allow."""
        base = base_config(run, self._workdir)
        budget = BUDGET / (200 if self._quick else 1)
        budget *= LONGER if run.start == 'longer' and run.kind == 'boxes' else 1
        budget *= PIXELS if run.kind == 'pixels' else 1 if run.seed else SEARCHED
        base = base.replacing(
            {
                'seed': run.seed,
                'lr': base.lr * run.factor,
                'total_epochs': None,
                'total_steps': 1000,
            }
        )
        # Without a start: it costs nothing, and may not be there yet.
        cost = build_experiment(base).flops_per_example * base.batch_size
        base = base.replacing({'total_steps': max(round(budget / cost), 4)})
        before = self.before(run)
        return base if before is None else base.replacing({'init': str(self.place(before))})

    def before(self, run: Run) -> Run | None:
        """Return the run whose weights a run starts from."""
        if run.kind == 'pixels':
            return self.finals('boxes', run.start)[max(run.seed, 1) - 1]
        if run.kind == 'boxes' and run.start == 'self-supervised':
            return Run('pictures', run.start, max(run.seed, 1))
        return None

    def place(self, run: Run) -> Path:
        """Return the folder of a run, which other settings of it, or of its start, change."""
        digest = config_lib.digest(self.config(run))
        return self._workdir / 'trained' / f'{run.name}-{digest[:8]}'

    def _identity(self, run: Run) -> dict[str, Any]:
        """Return what a stored row must have for it to be of this run."""
        config, about = config_lib.digest(self.config(run)), json.dumps(self._about)
        return {**dataclasses.asdict(run), 'config': config, 'about': about}

    def done(self, run: Run) -> dict[str, Any] | None:
        identity = self._identity(run)
        for row in self._rows:
            if all(row.get(name) == value for name, value in identity.items()):
                return row
        return None

    def factor(self, start: str) -> float | None:
        """Return the factor of the best rate of a detector; None until all are tried."""
        # The longer one has that of the plain one.
        start = 'plain' if start == 'longer' else start
        if self._quick:
            return 1.0
        rows = [self.done(run) for run in self.search(start)]
        tried = [row for row in rows if row is not None]
        return max(tried, key=lambda r: r['AP50'])['factor'] if len(tried) == len(rows) else None

    def search(self, start: str) -> list[Run]:
        is_tried = start != 'longer' and not self._quick
        return [Run('boxes', start, 0, factor) for factor in FACTORS] if is_tried else []

    def finals(self, kind: str, start: str) -> list[Run]:
        """Return the final runs; [] until the search is done."""
        factor = self.factor(start)
        if factor is None:
            return []
        seeds = [1] if self._quick else range(1, SEEDS + 1)
        return [Run(kind, start, seed, factor if kind == 'boxes' else 1.0) for seed in seeds]

    def all(self) -> None:
        """Run what is not done yet: the search, then seed by seed."""
        for start in STARTS:
            for run in self.search(start):
                self._with_start(run)
        for seed in range(SEEDS):
            for start in STARTS:
                for kind in ('boxes', 'pixels'):
                    for run in self.finals(kind, start)[seed : seed + 1]:
                        self._with_start(run)

    def _with_start(self, run: Run) -> None:
        before = self.before(run)
        if before is not None:
            self._with_start(before)
        if self.done(run):
            return
        began, config = time.perf_counter(), self.config(run)
        train.run(config, self.place(run), label=run.name)
        (*_, last) = metrics.read(self.place(run))
        scores = {name: last[f'val/{name}'] for name in FIGURES if f'val/{name}' in last}
        row = {
            **self._identity(run),
            'examples': config.total_steps * config.batch_size,
            'seconds': time.perf_counter() - began,
            **scores,
        }
        self._rows.append(row)
        storage.write_text(self._file, ''.join(json.dumps(one) + '\n' for one in self._rows))
        told = '  '.join(f'{name} {100 * score:.1f}' for name, score in scores.items())
        print(f'{run.name}  {told}  {metrics.duration(row["seconds"])}', flush=True)

    def results(self) -> list[dict[str, Any]]:
        """Summarise each start over the seeds that are done, below what is said without looking."""
        blind = without_looking(self._workdir)
        summaries = [{'start': 'without looking', 'mean': blind, 'error': {}, 'examples': 0}]
        for start in STARTS:
            rows = [
                row
                for kind in ('boxes', 'pixels')
                for run in self.finals(kind, start)
                if (row := self.done(run))
            ]
            scores = {
                name: values for name in FIGURES if (values := [r[name] for r in rows if name in r])
            }
            if rows:
                summaries.append(
                    {
                        'start': start,
                        'factor': self.factor(start),
                        'scores': scores,
                        'mean': {name: statistics.mean(x) for name, x in scores.items()},
                        'error': {name: standard_error(x) for name, x in scores.items()},
                        'examples': rows[0]['examples'],
                        'seconds': sum(row['seconds'] for row in rows),
                    }
                )
        return summaries


def without_looking(workdir: Path, candidates: int = 500) -> dict[str, float]:
    """Score the same likely boxes in every test scene, and no object in any pixel.

    Boxes are some of the training scenes, less those that overlap a likelier one; the score of each
    is the share of the objects of its class that it overlaps by half or more.
    """
    source = coco.coco(Request('train', labelled=False), path=str(workdir / 'coco'))
    known = detection.annotations_of(source)(np.arange(source.length))
    boxes = np.concatenate([one.boxes for one in known])
    labels = np.concatenate([one.labels for one in known])
    drawn = np.random.default_rng(0).permutation(len(boxes))[:candidates]
    hits = (sightings.overlap(boxes[drawn], boxes) >= 0.5) & (
        labels[drawn][:, None] == labels[None]
    )
    shares = hits.sum(1) / len(known)
    kept: list[int] = []
    for row in np.argsort(-shares):
        same = [one for one in kept if labels[drawn[one]] == labels[drawn[row]]]
        if not same or sightings.overlap(boxes[drawn[[row]]], boxes[drawn[same]]).max() < 0.5:
            kept.append(int(row))
    kept = kept[:100]
    test = coco.coco(Request('test', labelled=False), path=str(workdir / 'coco'))
    truth = detection.ground_truth(test, list(range(test.length)), list(CLASSES))
    x0, y0, x1, y1 = boxes[drawn[kept]].T / SIZE
    shown = np.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], axis=1)
    tested = detection.annotations_of(test)(np.arange(test.length))
    entries = [
        entry
        for image in detection.image_ids(tested)
        for entry in detection.results(shares[kept], labels[drawn[kept]], shown, (SIZE,) * 2, image)
    ]
    figures = detection.score(truth, entries, 'bbox')
    # What is seen of things has no pixel in common.
    nothing = 1 - float(np.mean([one.area.sum() for one in tested])) / SIZE**2
    return {'AP50': figures['AP50'], 'AP': figures['AP'], 'miou': nothing / (len(CLASSES) + 1)}


# --- Results ---------------------------------------------------------------------------


def table(results: list[dict[str, Any]]) -> str:
    """Format the results as Markdown, one line per start."""
    header = ' | '.join(['start', *(f'{name}, %' for name in FIGURES.values()), 'scenes seen'])
    lines = [f'| {header} |', '|' + '---|' * (header.count('|') + 1)]
    for result in results:
        cells = [result['start'], *(cell(result, name) for name in FIGURES)]
        lines.append(f'| {" | ".join([*cells, format(result["examples"], ",")])} |')
    return '\n'.join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Plot a bar per start and a dot per seed, for each figure."""
    figure, axes = plots.canvas(len(FIGURES), 1, 3.6, 3.2)
    for axis, (name, title) in zip(axes.flat, FIGURES.items(), strict=True):
        shown = [result for result in results if name in result['mean']]
        bars(axis, shown, name, ('without looking', *STARTS))
        names = [result['start'] for result in shown]
        axis.set_xticks(range(len(names)), names, fontsize=7, rotation=45, ha='right')
        axis.set_title(f'{title}, things never seen', fontsize=9)
    figure.supylabel('%', fontsize=9)
    figure.savefig(path)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.scenes',
        epilog='Debian: openclipart-png tuxpaint-stamps-default. PyPI: scikit-image.',
        allow_abbrev=False,
    )
    parser.add_argument('--workdir', default='runs/scenes', help='where runs are kept')
    parser.add_argument('--quick', action='store_true', help='few scenes and steps, one seed')
    parser.add_argument('--report', action='store_true', help='only of what is done already')
    args = parser.parse_args(argv)
    runtime.start()
    workdir = Path(args.workdir) / ('quick' if args.quick else '')
    workdir.mkdir(parents=True, exist_ok=True)
    about = compose(workdir, QUICK if args.quick else SCENES)
    print(f'scenes: {about}', flush=True)
    study = Study(workdir, about, args.quick)
    if not args.report:
        study.all()
    results = study.results()
    # A partial study must not replace the published results.
    folder = workdir if args.quick or args.report else RESULTS
    made = {'about': {**machine.about('jax', 'flax', 'optax', 'numpy'), **about}}
    text = json.dumps({**made, 'results': results}, indent=1)
    (folder / 'scenes.json').write_text(text + '\n')
    (folder / 'scenes.md').write_text(table(results) + '\n')
    draw(results, folder / 'scenes.png')
    print(table(results))


if __name__ == '__main__':
    runtime.command(main)
