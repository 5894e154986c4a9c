"""Learn from pictures without labels, and be judged on others: `python -m benchmarks.unlabelled`.

Small models learn from openclipart's drawings by each method of configs/unlabelled.py, or by their
folders (supervised), or classify formula images, or do not learn at all; each for the same number
of operations. Frozen features are then judged on pictures that none has seen: Tux Paint's stamps by
folder, emoji of two styles, and Fashion-MNIST, for which each method also learns from its training
pictures without labels. Raw pixels and histograms of colours are judged alike. Rates and how
features are read out are chosen on a tenth of openclipart that nothing learns from. Takes three
hours on two cores; a restart continues where it stopped.
"""

import argparse
import collections
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from benchmarks import emoji, frozen_features, machine, picture_sets
from benchmarks.emoji import categorised, recall, shrunk, whitening
from benchmarks.frozen_features import FOLDS, Features, Places, Readout, altered, rgb
from benchmarks.over_seeds import bars, cell, standard_error
from big_vit import config as config_lib
from big_vit import metrics, runtime, storage, trees
from big_vit.build.experiment import Experiment, build_experiment, fresh_state, train_batches
from big_vit.build.steps import build_train_step
from big_vit.config import Config
from big_vit.errors import UserError
from big_vit.evaluators import fewshot
from big_vit.inspection import plots
from big_vit.journal import MAX_SKIPPED_IN_A_ROW

RESULTS = Path(__file__).parent / 'results'
SELF_SUPERVISED = ('dino', 'mae', 'jepa', 'ijepa')
TRAINED = ('supervised', 'fdsl', *SELF_SUPERVISED)
STARTS = ('pixels', 'colours', 'random', *TRAINED)
SEEDS, FACTORS = 3, (0.3, 1.0)
# Operations of a final run, and the share of them in the search for a rate.
BUDGET, SEARCHED = 15e12, 0.2
PATCH, BATCH = 8, 64
# The network of every start, for two cores: 16 tokens of 128 numbers.
MODEL: dict[str, Any] = {
    'model.variant': f'mu/{PATCH}',
    'model.width': 128,
    'model.depth': 4,
    'model.num_heads': 4,
    'model.mlp_dim': 256,
    'model.scan': False,
    'model.dtype': 'float32',
    'model.posemb': 'sincos2d_mae',
    'model.activation': 'gelu',
    'model.norm_eps': 1e-6,
    'image_size': picture_sets.SIDE,
    'batch_size': BATCH,
    # On the tenth, after as many steps, better than AdamW with each start that was tried.
    'optim.name': 'muon',
    'lr': 0.01,
    'total_epochs': None,
    'total_steps': 1000,  # `config_of` counts them.
}
# Heads, decoders and predictors in proportion to the network.
TASKS: dict[str, dict[str, Any]] = {
    'dino': {'task.head_width': 256, 'task.bottleneck': 64},
    'mae': {'task.decoder_width': 64, 'task.decoder_depth': 2, 'task.decoder_heads': 4},
    'jepa': {
        'task.projector_width': 256,
        'task.projection_dim': 64,
        'task.sigreg_directions': 256,
    },
    'ijepa': {
        'task.predictor_width': 64,
        'task.predictor_depth': 2,
        'task.context_tokens': 8,  # Of 16.
    },
}
SUPERVISED = 'rrc(size, scale=(0.3, 1)) | flip_lr | color_jitter(0.4, 0.4, 0.2, 0.1, p=0.8)'
SHOTS, DRAWS = (10, 100), 5
TUNED_STEPS, TUNED_RATE = 600, 1e-3
BANK, POOL, LARGE_FAMILY = 3000, 5000, 60
POWERS = (0.0, 0.25, 0.5)
QUESTIONS = {
    'stamps_neighbours': 'stamps, 10-NN',
    'stamps_logistic': 'stamps, logistic',
    'retrieval': 'emoji found',
    'category': 'emoji, category',
    'probe_10': 'Fashion, probe of 10',
    'probe_100': '100',
    'tuned_10': 'fine-tuned on 10',
    'tuned_100': '100',
}


class Sets(NamedTuple):
    """All pictures of the study, 32 pixels wide."""

    learned: picture_sets.Pictures
    chosen: picture_sets.Pictures
    stamps: picture_sets.Pictures
    emoji: emoji.Emoji
    fashion: picture_sets.Pictures
    fashion_test: picture_sets.Pictures


def divide(families: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to learn from and a tenth to choose on; families stay together.

    Large families, such as 1,375 stars, are learned from: a tenth should not consist of stars.
    """
    counts = collections.Counter(families)
    names = sorted(name for name, count in counts.items() if count <= LARGE_FAMILY)
    held: set[str] = set()
    pictures = 0
    for number in np.random.default_rng(0).permutation(len(names)):
        if pictures >= len(families) / 10:
            break
        held.add(names[number])
        pictures += counts[names[number]]
    apart = np.array([family in held for family in families])
    return np.flatnonzero(~apart), np.flatnonzero(apart)


def rows_of(pictures: picture_sets.Pictures, rows: np.ndarray) -> picture_sets.Pictures:
    families = tuple(pictures.families[row] for row in rows)
    return picture_sets.Pictures(pictures.images[rows], pictures.labels[rows], families)


def unseen(chosen: picture_sets.Pictures, learned: picture_sets.Pictures) -> picture_sets.Pictures:
    """Leave out copies of what is learned: a third of the tenth has one in another folder."""
    seen = {image.tobytes() for image in learned.images}
    rows = [row for row, image in enumerate(chosen.images) if image.tobytes() not in seen]
    return rows_of(chosen, np.array(rows, int))


def read(data: Path, workdir: Path) -> Sets:
    """Read all sets; openclipart's take minutes, and are kept in the workdir."""
    pairs = emoji.read(data)
    fashion, test = map(picture_sets.fashion, ('train', 'test'))
    stamps = picture_sets.stamps(workdir / 'stamps.npz')
    drawings = picture_sets.clipart(workdir / 'clipart.npz')
    learned, chosen = (rows_of(drawings, rows) for rows in divide(drawings.families))
    for name, pictures in (('learned', learned), ('fashion', fashion)):
        arrays = {'train_images': pictures.images, 'train_labels': pictures.labels}
        np.savez(workdir / f'{name}.npz', **arrays)
    return Sets(learned, unseen(chosen, learned), stamps, pairs, fashion, test)


@dataclasses.dataclass(frozen=True)
class Run:
    """One start that learns from one set.

    Attributes:
      data: 'learned' (openclipart) or 'fashion'.
      seed: 0 in the search for a rate.
      factor: on the rate.
    """

    start: str
    data: str
    seed: int
    factor: float = 1.0


def base_config(run: Run, workdir: Path) -> Config:
    """Return the config of a start, without its length."""
    path = str(workdir / f'{run.data}.npz')
    arrays = {'data.name': 'arrays', 'data.path': path, 'data.split': 'train'}
    if run.start in SELF_SUPERVISED:
        count = 7000 if run.data == 'learned' else 60_000
        arguments = f'path={workdir},method={run.start},variant=mu/{PATCH},size=32'
        base = config_lib.load(
            f'configs/unlabelled.py:{arguments},pictures={count},batch={BATCH}', []
        )
        return base.replacing(
            {
                **MODEL,
                **TASKS[run.start],
                **arrays,
                'optim.b2': None,
                'data.transform': base.data.transform.replace('decode(3)', 'rgb'),
                'evals.features.transform': 'rgb | resize(size)',
                'evals.features.every_percent': 100,
            }
        )
    base = config_lib.load(f'configs/pretrain_fdsl.py:patch={PATCH}', [])
    base = base.replacing({**MODEL, 'model.pool': 'gap', 'evals.test.every_percent': 100})
    if run.start == 'fdsl':
        return base.replacing(
            {'data.transform': 'resize(size) | rgb', 'evals.test.transform': 'resize(size) | rgb'}
        )
    return base.replacing(
        {
            **arrays,
            'data.num_classes': None,
            'data.transform': f'rgb | {SUPERVISED}',
            'evals.test.split': 'train',
            'evals.test.transform': 'rgb | resize(size)',
        }
    )


def config_of(run: Run, workdir: Path, budget: float) -> Config:
    """Return the config of a run, with as many steps as the budget of operations allows."""
    base = base_config(run, workdir)
    base = base.replacing({'seed': run.seed, 'lr': base.lr * run.factor})
    cost = build_experiment(base).flops_per_example * BATCH
    return base.replacing({'total_steps': max(round(budget / cost), 4)})


def train(
    config: Config, start_params: Callable[[Any], Any] | None = None
) -> tuple[Experiment, Any, float]:
    """Train; return the experiment, the parameters to judge, and the seconds of a core.

    Args:
      start_params: gives the parameters to start from, for random ones.
    """
    parts = build_experiment(config)
    step = build_train_step(config, parts)
    began = time.process_time()
    with jax.set_mesh(parts.mesh):
        train_state = fresh_state(parts, config.seed)
        if start_params is not None:
            params = start_params(jax.device_get(train_state['params']))
            train_state = fresh_state(parts, config.seed, params)
        with train_batches(config, parts, 0) as batches:
            for _ in range(parts.total_steps):
                train_state, values = step(train_state, next(batches))
                jax.block_until_ready(values)
    if int(values['skipped_in_a_row']) >= MAX_SKIPPED_IN_A_ROW:
        raise UserError(f'{config.data.name}: the updates are no longer finite: lower the rate')
    kept = train_state.get('ema', train_state['params'])
    return parts, jax.device_get(kept), time.process_time() - began


def places(start: str) -> Places:
    """Return (block, grid) of all readouts; pixels and colours have no blocks."""
    if start == 'pixels':
        return (0, 4), (0, 8), (0, 16), (0, 32)
    if start == 'colours':
        return (0, 1), (0, 2)
    last = MODEL['model.depth'] - 1
    read = ((0, 2), (0, 4), (1, 1), (1, 2), (last, 1), (last, 2), (last, 4))
    return read if start in ('random', 'supervised', 'fdsl', 'ijepa') else (*read, (last, 0))


class Judge:
    """The features of one start, and what they are worth on each set."""

    def __init__(self, sets: Sets, features: Features):
        self._sets, self._features = sets, features

    def bank(self, pictures: picture_sets.Pictures) -> dict[tuple[int, int], np.ndarray]:
        """Return features of pictures, spread over a set, by which those of others are whitened."""
        spread = np.linspace(0, len(pictures.images) - 1, BANK).astype(int)
        return self._features(rgb(pictures.images[spread]))

    @functools.cached_property
    def _learned(self) -> dict[tuple[int, int], np.ndarray]:
        return self.bank(self._sets.learned)

    def values(
        self,
        how: Readout,
        images: Iterable[np.ndarray],
        bank: dict[tuple[int, int], np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        """Return features of sets of images, whitened by those of `bank`, else of openclipart."""
        place = how.block, how.grid
        bank = self._learned if bank is None else bank
        centre, matrix = whitening(bank[place], how.power)
        centred = (self._features(rgb(x))[place] - centre for x in images)
        return [x if matrix is None else x @ matrix for x in centred]

    def choose(self, start: str) -> dict[str, Any]:
        """Choose the best readout for each kind of question on openclipart's tenth."""
        held = self._sets.chosen
        common = np.flatnonzero(np.bincount(held.labels)[held.labels] >= FOLDS)
        labels = np.unique(held.labels[common], return_inverse=True)[1]
        features = [self._features(x) for x in (held.images, altered(held.images))]
        tried = []
        for place in places(start):
            for power in POWERS:
                centre, matrix = whitening(self._learned[place], power)
                plain, changed = (x[place] - centre for x in features)
                if matrix is not None:
                    plain, changed = plain @ matrix, changed @ matrix
                scores = {
                    'neighbours': frozen_features.neighbours(plain[common], labels),
                    'linear': frozen_features.ridge(plain[common], labels),
                    'retrieval': frozen_features.found_again(plain, changed),
                }
                tried.append({'how': Readout(*place, power), **scores})
        names = ('neighbours', 'linear', 'retrieval')
        best = {name: max(tried, key=lambda one: one[name]) for name in names}
        return {
            'readouts': {name: list(one['how']) for name, one in best.items()},
            'validation': {name: one[name] for name, one in best.items()},
        }

    def stamps(self, readouts: dict[str, Any]) -> dict[str, float]:
        stamps = self._sets.stamps
        near, line = (
            self.values(Readout(*readouts[name]), [stamps.images])[0]
            for name in ('neighbours', 'linear')
        )
        return {
            'stamps_neighbours': frozen_features.neighbours(near, stamps.labels),
            'stamps_logistic': frozen_features.logistic(line, stamps.labels),
        }

    def emoji(self, readouts: dict[str, Any]) -> dict[str, float]:
        """Score the emoji that `benchmarks.emoji` tests, of which this study has seen none."""
        one = self._sets.emoji
        held = emoji.divide(one.groups)['test']
        views = {name: one.images[name] for name in emoji.SETS}
        views['mirrored'] = one.images['twitter'][:, :, ::-1]
        small = [np.rint(shrunk(x, picture_sets.SIDE)).astype(np.uint8) for x in views.values()]

        def values(name: str) -> dict[str, np.ndarray]:
            return dict(zip(views, self.values(Readout(*readouts[name]), small), strict=True))

        return {
            'retrieval': recall(values('retrieval'), held, both=True),
            'category': categorised(values('linear'), one.categories, held, emoji.SHOTS),
        }

    def fashion(self, readouts: dict[str, Any]) -> dict[str, float]:
        """Score probes of few labels a class on all test pictures, over draws of the labels."""
        known, test = self._sets.fashion, self._sets.fashion_test
        how = Readout(*readouts['linear'])
        # All starts know these pictures without labels, whatever they have learned from.
        pool, scored = self.values(how, [known.images[:POOL], test.images], self.bank(known))
        figures = {}
        for shots in SHOTS:
            accuracies = []
            for draw in range(DRAWS):
                rows = fewshot.draw(known.labels[:POOL], shots, draw)
                answers = fewshot.scores_of(
                    pool[rows], known.labels[rows], scored, 10, l2=1024.0
                ).argmax(1)
                accuracies.append(float((answers == test.labels).mean()))
            figures[f'probe_{shots}'] = statistics.mean(accuracies)
        return figures


def fine_tuned(run: Run, params: Any, pool: str, sets: Sets, shots: int, workdir: Path) -> float:
    """Return the test accuracy on Fashion-MNIST after fine-tuning on few labels a class.

    Args:
      params: what was pretrained; what they lack, the head, starts at random.
      pool: of the pretrained model.
    """
    known = sets.fashion
    rows = fewshot.draw(known.labels, shots, run.seed)
    file = workdir / 'few.npz'
    np.savez(file, train_images=known.images[rows], train_labels=known.labels[rows])
    config = base_config(Run('supervised', 'few', run.seed), workdir).replacing(
        {
            'seed': run.seed,
            'model.pool': pool,
            'batch_size': 64,
            'total_steps': TUNED_STEPS,
            'lr': TUNED_RATE,
            'optim.name': 'adamw',
            'data.transform': 'rgb | random_crop(size, 4) | flip_lr',
        }
    )

    def start(fresh: Any) -> Any:
        kept = {name: leaf for name, leaf in params.items() if name != 'head'}
        return {name: kept.get(name, leaf) for name, leaf in fresh.items()}

    parts, tuned, _ = train(config, start)
    normalised, tuned = frozen_features.normaliser(parts), jax.tree.map(jnp.asarray, tuned)

    @jax.jit
    def answers(images: Any) -> Any:
        given = normalised(images)
        return parts.model.apply({'params': tuned}, given)[0].argmax(-1)

    test = sets.fashion_test
    given = [np.asarray(answers(rgb(test.images[i : i + 500]))) for i in range(0, 10_000, 500)]
    return float((np.concatenate(given) == test.labels).mean())


class Study:
    """All runs; finished ones are stored in WORKDIR/runs.jsonl."""

    def __init__(self, sets: Sets, workdir: Path, quick: bool = False):
        self._sets, self._workdir, self._quick = sets, workdir, quick
        self._budget = BUDGET / (200 if quick else 1)
        self._file = epath.Path(workdir) / 'runs.jsonl'
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._rows = [json.loads(text) for text in lines]

    @functools.cache  # noqa: B019
    def config(self, run: Run) -> Config | None:
        """Return the config of a run; None if nothing is trained."""
        if run.start not in TRAINED:
            return None
        return config_of(run, self._workdir, self._budget * (1 if run.seed else SEARCHED))

    def _identity(self, run: Run) -> dict[str, Any]:
        """Return what a stored row must have for it to be of this run."""
        config = self.config(run)
        return {
            **dataclasses.asdict(run),
            'config': config_lib.digest(config) if config else None,
            'chosen': len(self._sets.chosen.labels),
        }

    def done(self, run: Run) -> dict[str, Any] | None:
        """Return the stored row of a run, if it is finished and what it depends on is the same."""
        identity = self._identity(run)
        for row in self._rows:
            if all(row.get(name) == value for name, value in identity.items()):
                return row
        return None

    def search(self, start: str) -> list[Run]:
        factors = FACTORS if start in TRAINED and not self._quick else (1.0,)
        return [Run(start, 'learned', 0, factor) for factor in factors]

    def choice(self, start: str) -> dict[str, Any] | None:
        """Return the row of the best rate; None until all are tried."""
        rows = [self.done(run) for run in self.search(start)]
        tried = [row for row in rows if row is not None]
        if len(tried) < len(rows):
            return None
        return max(tried, key=lambda row: sum(row['validation'].values()))

    def finals(self, start: str, data: str) -> list[Run]:
        """Return the final runs; [] until the search is done."""
        choice = self.choice(start)
        if choice is None:
            return []
        # Pixels and colours do not depend on a seed.
        once = start in ('pixels', 'colours') or self._quick
        seeds = [1] if once else range(1, SEEDS + 1)
        return [Run(start, data, seed, choice['factor']) for seed in seeds]

    def all(self) -> None:
        """Run what is not done yet, with one line per run: the search, then seed by seed."""
        for start in STARTS:
            for run in self.search(start):
                self._run_if_missing(run)
        for seed in range(1, SEEDS + 1):
            for data in ('learned', 'fashion'):
                for start in STARTS if data == 'learned' else SELF_SUPERVISED:
                    for run in self.finals(start, data):
                        if run.seed == seed:
                            self._run_if_missing(run)

    def _run_if_missing(self, run: Run) -> None:
        if self.done(run):
            return
        began = time.perf_counter()
        row = self._run(run)
        jax.clear_caches()
        self._rows.append(row)
        storage.write_text(self._file, ''.join(json.dumps(one) + '\n' for one in self._rows))
        scores = row['test'] if run.seed else row['validation']
        told = '  '.join(f'{name} {100 * score:.1f}' for name, score in scores.items())
        spent = metrics.duration(time.perf_counter() - began)
        print(
            f'{run.start:<10} {run.data:<7} seed {run.seed} '
            f'rate x{run.factor:.2g}  {told}  {spent}',
            flush=True,
        )

    def _run(self, run: Run) -> dict[str, Any]:
        config, start = self.config(run), run.start
        row = self._identity(run)
        parts, params = None, None
        if start == 'random':
            config = base_config(Run('supervised', 'learned', run.seed), self._workdir)
            config = config.replacing({'seed': run.seed, 'total_steps': 1})
            parts = build_experiment(config)
            with jax.set_mesh(parts.mesh):
                params = jax.device_get(fresh_state(parts, run.seed)['params'])
        elif config is not None:
            parts, params, seconds = train(config)
            row |= {
                'examples': config.total_steps * config.batch_size,
                'params': trees.count(params),
                'seconds': seconds,
            }
        if parts is None:
            read_out = {'pixels': frozen_features.pixels, 'colours': frozen_features.colours}
            features = frozen_features.plain_features(read_out[start], places(start))
        else:
            features = frozen_features.network_features(config, parts, params, places(start))
        judge = Judge(self._sets, features)
        if not run.seed:
            return row | judge.choose(start)
        choice = self.choice(start)
        assert choice is not None
        readouts, figures = choice['readouts'], {}
        if run.data == 'learned':
            figures |= judge.stamps(readouts) | judge.emoji(readouts)
        if run.data == 'fashion' or start not in SELF_SUPERVISED:
            figures |= judge.fashion(readouts)
            if params is not None:
                for shots in SHOTS:
                    figures[f'tuned_{shots}'] = fine_tuned(
                        run, params, config.model.pool, self._sets, shots, self._workdir
                    )
        return row | {'test': figures}

    def results(self) -> list[dict[str, Any]]:
        """Summarise each start over the seeds that are done."""
        summaries = []
        for start in STARTS:
            rows = [
                row
                for data in ('learned', 'fashion')
                for run in self.finals(start, data)
                if (row := self.done(run))
            ]
            if not rows:
                continue
            choice = self.choice(start)
            assert choice is not None
            scores: dict[str, list[float]] = {}
            for row in rows:
                for name, score in row['test'].items():
                    scores.setdefault(name, []).append(score)
            trained = [row for row in rows if 'seconds' in row]
            summaries.append(
                {
                    'start': start,
                    'factor': choice['factor'],
                    'readouts': choice['readouts'],
                    'validation': choice['validation'],
                    'scores': scores,
                    'mean': {name: statistics.mean(x) for name, x in scores.items()},
                    'error': {name: standard_error(x) for name, x in scores.items()},
                    'params': trained[0]['params'] if trained else 0,
                    'examples': trained[0]['examples'] if trained else 0,
                    'seconds': statistics.mean(row['seconds'] for row in trained) if trained else 0,
                }
            )
        return summaries


def table(results: list[dict[str, Any]]) -> str:
    """Format the results as Markdown, one line per start."""
    header = ' | '.join(['start', *QUESTIONS.values(), 'pictures seen', 'core seconds'])
    lines = [f'| {header} |', '|' + '---|' * (header.count('|') + 1)]
    for result in results:
        cells = [result['start'], *(cell(result, name) for name in QUESTIONS)]
        cells += [f'{result["examples"]:,}', f'{result["seconds"]:.0f}']
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def margins(results: list[dict[str, Any]]) -> list[str]:
    """Compare the best self-supervised start with others, in standard errors of the difference."""
    by_name = {result['start']: result for result in results}
    lines = []
    for name in QUESTIONS:
        there = [x for x in SELF_SUPERVISED if name in by_name.get(x, {}).get('mean', {})]
        if not there:
            continue
        best = max(there, key=lambda start: by_name[start]['mean'][name])
        told = []
        for start in (x for x in by_name if x not in SELF_SUPERVISED):
            if name not in by_name[start]['mean']:
                continue
            gain = by_name[best]['mean'][name] - by_name[start]['mean'][name]
            errors = [by_name[x]['error'][name] or 0 for x in (best, start)]
            error = float(np.hypot(*errors))
            told.append(
                f'{100 * gain:+.1f} over {start}' + (f' ({gain / error:.1f} s.e.)' if error else '')
            )
        lines.append(f'{name}: {best}, {", ".join(told)}')
    return lines


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Plot a bar per start and a dot per seed, for each question."""
    figure, axes = plots.canvas(4, 2, 3.6, 2.9)
    for axis, (name, title) in zip(axes.flat, QUESTIONS.items(), strict=True):
        shown = [result for result in results if name in result['mean']]
        bars(axis, shown, name, STARTS)
        if shown:
            low = min(min(result['scores'][name]) for result in shown)
            axis.set_ylim(max(100 * low - 8, 0), None)
        names = [result['start'] for result in shown]
        axis.set_xticks(range(len(names)), names, fontsize=7, rotation=45, ha='right')
        axis.set_title(title.replace('100', 'Fashion, 100 labels a class'), fontsize=9)
    figure.supylabel('%', fontsize=9)
    figure.savefig(path)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.unlabelled',
        epilog='Debian: openclipart-png tuxpaint-stamps-default dataset-fashion-mnist. '
        f'Emoji: {emoji.INSTALL}',
        allow_abbrev=False,
    )
    parser.add_argument('--data', metavar='FOLDER', required=True, help="npm's prefix, see below")
    parser.add_argument('--workdir', default='runs/unlabelled', help='where runs are kept')
    parser.add_argument('--quick', action='store_true', help='a 200th of the steps, one seed')
    parser.add_argument('--report', action='store_true', help='only of what is done already')
    args = parser.parse_args(argv)
    runtime.start()
    workdir = Path(args.workdir) / ('quick' if args.quick else '')
    workdir.mkdir(parents=True, exist_ok=True)
    sets = read(Path(args.data), workdir)
    sizes = {
        'learned': len(sets.learned.labels),
        'chosen': len(sets.chosen.labels),
        'stamps': len(sets.stamps.labels),
        'emoji': len(emoji.divide(sets.emoji.groups)['test']),
    }
    print(f'pictures: {sizes}')
    study = Study(sets, workdir, args.quick)
    if not args.report:
        study.all()
    results = study.results()
    # A partial study must not replace the published results.
    folder = workdir if args.quick or args.report else RESULTS
    about = {
        **machine.about('jax', 'flax', 'optax', 'numpy', 'scikit-learn'),
        'pictures': sizes,
    }
    text = json.dumps({'about': about, 'results': results}, indent=1)
    (folder / 'unlabelled.json').write_text(text + '\n')
    (folder / 'unlabelled.md').write_text(table(results) + '\n')
    draw(results, folder / 'unlabelled.png')
    print(table(results), *margins(results), sep='\n')


if __name__ == '__main__':
    runtime.command(main)
