"""Transfer from one style of emoji to another: `python -m benchmarks.emoji --data FOLDER`.

A small model is pretrained to match views of the same Google emoji, and pictures of the same
category and subcategory; or to classify formula images; or not at all. Its frozen features are then
tested on emoji that it has never seen: which of Twitter's pictures is the same emoji as one of
Google's, and which category does a picture of Twitter's have, given 20 pictures of each? A restart
continues where it stopped.
"""

import argparse
import dataclasses
import json
import math
import re
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from benchmarks import machine
from benchmarks.over_seeds import bars, cell, standard_error
from big_vit import config as config_lib
from big_vit import metrics, runtime, sharding, state, steps, storage
from big_vit.build.data import device_operations
from big_vit.build.experiment import Experiment, build_experiment, train_batches
from big_vit.build.steps import build_train_step
from big_vit.config import Config
from big_vit.data.decode import DecodeError, Encoded
from big_vit.errors import UserError
from big_vit.evaluators import fewshot, retrieval
from big_vit.evaluators.features import Features
from big_vit.inspection import plots
from big_vit.journal import MAX_SKIPPED_IN_A_ROW
from big_vit.tasks.batch import model_inputs
from big_vit.tasks.task import Aux, Loss

RESULTS = Path(__file__).parent / 'results'
SETS = ('google', 'twitter')
INSTALL = (
    'npm install --prefix FOLDER --ignore-scripts emoji-datasource-google emoji-datasource-twitter'
)
SIDE, BACKGROUND = 64, 255
HELD_OUT, VALIDATION = 0.4, 0.12  # Shares of all emoji.

# People are drawn as a man, a woman and neither; the joined sequences of the first two are left
# out. A gender sign on its own is kept as a symbol.
_JOINER, _GENDERS = '200D', {'2640', '2642', '1F468', '1F469'}
# Words that distinguish variants of one thing, which have to stay on one side of the split.
_VARIANT = re.compile(
    r'\b(MAN|WOMAN|MEN|WOMEN|MALE|FEMALE|BOY|GIRL|PERSON|ADULT|CHILD|OLDER|LEFT|RIGHT|LEFTWARDS|'
    r'RIGHTWARDS|UPWARDS|DOWNWARDS|UP|DOWN|NORTH|SOUTH|EAST|WEST|LIGHT|HEAVY|LARGE|MEDIUM|SMALL|'
    r'BLACK|WHITE|RED|ORANGE|YELLOW|GREEN|BLUE|PURPLE|BROWN|PINK|GREY)\b'
)


class Emoji(NamedTuple):
    """The selected emoji in the order of the file; the split keeps each group together."""

    names: tuple[str, ...]
    categories: np.ndarray
    subcategories: np.ndarray
    category_names: tuple[str, ...]
    groups: tuple[str, ...]
    images: dict[str, np.ndarray]


def is_variant(unified: str) -> bool:
    """Return whether a sequence of code points is a gendered variant."""
    points = unified.split('-')
    return _JOINER in points and not _GENDERS.isdisjoint(points)


def group_of(name: str) -> str:
    """Return what the variants of one thing have in common."""
    name = name.upper()
    for family in ('CLOCK FACE', 'FAMILY', 'KEYCAP'):
        if name.startswith(family):
            return family
    # A name that consists of such words only, such as WOMAN, is a person.
    return ' '.join(re.findall(r"[\w']+", _VARIANT.sub('', name))) or 'PERSON'


def _folder(data: Path, name: str) -> Path:
    """Return the folder of a set; `data` may be npm's prefix or its node_modules."""
    package = f'emoji-datasource-{name}'
    for folder in (data / 'node_modules' / package, data / package):
        if (folder / 'img' / name / '64').is_dir():
            return folder
    raise UserError(f'--data: {data} has no {package}/img/{name}/64: fill a folder with {INSTALL}')


def _picture(path: Path) -> np.ndarray:
    """Read a picture as RGB bytes [64, 64, 3] over white."""
    try:
        encoded = Encoded(path.read_bytes(), channels=4)
        if encoded.shape[:2] != (SIDE, SIDE):
            raise DecodeError(f'it has {encoded.shape[0]}x{encoded.shape[1]} pixels, not 64x64')
        pixels = encoded.pixels()
    except (OSError, DecodeError) as error:
        raise UserError(f'--data: {path}: {error}; install it again: {INSTALL}') from error
    alpha = pixels[..., 3:].astype(np.float32) / 255
    return np.rint(pixels[..., :3] * alpha + BACKGROUND * (1 - alpha)).astype(np.uint8)


def read(data: Path) -> Emoji:
    """Read the emoji that both sets have, without skin tones, genders and duplicate pictures.

    Raises:
      UserError: a folder or a picture is missing, damaged, or not what npm installs.
    """
    folders = {name: _folder(data, name) for name in SETS}
    table = folders['google'] / 'emoji.json'
    try:
        entries = json.loads(table.read_text())
        kept = [
            (
                entry['name'] or entry['short_name'],
                entry['category'],
                entry['subcategory'],
                entry['image'],
            )
            for entry in entries
            if all(entry[f'has_img_{name}'] for name in SETS)
            and entry['category'] != 'Component'  # Skin tone patches.
            and not is_variant(entry['unified'])
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'--data: {table} is not the list of emoji ({error!r}); install it again: {INSTALL}'
        ) from error
    rows, seen_pictures = [], set()
    for name, category, subcategory, image in kept:
        if Path(image).name != image:
            raise UserError(f'--data: {table}: {image!r} is no name of a file')
        pictures_of_sets = [
            _picture(folders[entry] / 'img' / entry / '64' / image) for entry in SETS
        ]
        keys = {
            (entry, picture.tobytes())
            for entry, picture in zip(SETS, pictures_of_sets, strict=True)
        }
        # Some flags look the same. Retrieval could only find one, and a copy might cross the split.
        if seen_pictures.isdisjoint(keys):
            rows.append((name, category, subcategory, pictures_of_sets))
        seen_pictures |= keys
    names, categories, subcategories, pictures = zip(*rows, strict=True)
    known = tuple(sorted(set(categories)))
    pairs = list(zip(categories, subcategories, strict=True))
    known_pairs = sorted(set(pairs))
    return Emoji(
        names,
        np.array([known.index(entry) for entry in categories], np.int32),
        np.array([known_pairs.index(pair) for pair in pairs], np.int32),
        known,
        tuple(map(group_of, names)),
        {
            name: np.stack([pictures_of_sets[i] for pictures_of_sets in pictures])
            for i, name in enumerate(SETS)
        },
    )


def divide(groups: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Split the emoji into {'fit', 'val', 'test'}: indices; deterministic, and groups stay whole.

    `fit` and `val` are the 60 % used for training and choices; `test` is the rest.
    """
    names = sorted(set(groups))
    rank_of_group = dict(zip(names, np.random.default_rng(0).permutation(len(names)), strict=True))
    order = np.argsort([rank_of_group[group] for group in groups], kind='stable')
    ranks = np.array([rank_of_group[groups[i]] for i in order])
    total = len(order)
    # A group across a border goes to the side before it.
    borders = [
        int(np.searchsorted(ranks, ranks[round(total * share) - 1], side='right'))
        for share in (1 - HELD_OUT - VALIDATION, 1 - HELD_OUT)
    ]
    return dict(zip(('fit', 'val', 'test'), np.split(order, borders), strict=True))


# The network of every start. Like everything below, it was chosen by trials on `val` alone.
SHARED: dict[str, Any] = {
    'image_size': 32,
    'model.variant': 'mu/8',
    'model.tokenizer': 'conv',
    'model.width': 128,
    'model.depth': 2,
    'model.num_heads': 4,
    'model.mlp_dim': 256,
    'lr': 3e-3,
    'ema': 0.99,
    'data.transform': 'resize(size) | rgb',
    'evals.test.transform': 'resize(size) | rgb',
    'optim.weight_decay': 0.05,
}
# Mild augmentation that keeps what both sets share: the layout and roughly the colours.
TRANSFORM = (
    'pad(6, 255) | rrc(size, (0.5, 1), (0.75, 1.333)) | color_jitter(0.3, 0.3, 0.3, 0.05) | '
    'random_grayscale(0.05)'
)
BATCH, TEMPERATURE, GRID, BY_KIND = 256, 0.1, 2, 0.5
EXAMPLES = {'fdsl': 30_000, 'google': 400_000}
STARTS = ('pixels', 'random', 'google', 'fdsl')
SEEDS, DRAWS, SHOTS = 3, 10, 20
# A category needs this many times as many pictures as are learnt from.
ENOUGH = 1.5
VAL_SHOTS = 8
FLAGS = 'Flags'
# How features are read out: the block and the grid to which its tokens are averaged (or the side to
# which pixels are averaged), and the power of whitening, where 0 only centres.
POWERS = (0.0, 0.25, 0.5)
RIDGE = 0.1


class Readout(NamedTuple):
    block: int
    grid: int
    power: float


def readouts(start: str) -> list[Readout]:
    last = SHARED['model.depth'] - 1
    places = [(0, 4), (0, 8), (0, 16)]
    if start != 'pixels':
        places = [(0, 2), (0, 4), (last, 1), (last, 4)]
    return [Readout(*place, power) for place in places for power in POWERS]


def grid_means(tokens: Any, grid: int) -> Any:
    """Average tokens [N, side * side, width] to [N, grid * grid * width]."""
    count, length, width = tokens.shape
    side = math.isqrt(length)
    cell = side // grid
    cells = tokens.reshape(count, grid, cell, grid, cell, width)
    return cells.mean((2, 4)).reshape(count, -1)


def contrast(features: Any, label: Any) -> Any:
    """Return the supervised contrastive loss of a batch (arXiv 2004.11362)."""
    unit = features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-6)
    diagonal = jnp.eye(len(label), dtype=bool)
    same = (label[:, None] == label[None]) & ~diagonal
    similarity = jnp.where(diagonal, -jnp.inf, unit @ unit.T / TEMPERATURE)
    logs = jnp.where(same, jax.nn.log_softmax(similarity, axis=1), 0)
    count = same.sum(1)
    per_example = -logs.sum(1) / jnp.maximum(count, 1)
    return per_example.sum() / jnp.maximum((count > 0).sum(), 1)


def objective(apply: Any, kinds: np.ndarray) -> Loss:
    """Return the pretraining loss.

    Views of one emoji are matched by tokens averaged to a grid, as emoji also differ in where
    things are in the picture; pictures of one kind are matched by the mean of all tokens.

    Args:
      kinds: labels of the emoji, [emoji, ways to sort them].
    """

    def loss(params: Any, task_state: Any, batch: Any, rng: Any, step: Any) -> tuple[Any, Aux]:
        rngs = {} if rng is None else {'dropout': rng}
        given, train = model_inputs(batch), rng is not None
        _, extra = apply({'params': params}, given, train=train, rngs=rngs, capture=('blocks',))
        tokens, label = extra['blocks'][-1], batch['label']
        total = contrast(grid_means(tokens, GRID), label)
        for way in jnp.asarray(kinds)[label].T:
            total += BY_KIND * contrast(tokens.mean(1), way)
        return total, Aux({})

    return loss


def config_of(start: str, seed: int, arrays: Path, fit: int, quick: bool) -> Config:
    """Return the config of a start that is trained; seed 0 sees no validation emoji."""
    base = config_lib.load('configs/pretrain_fdsl.py', []).replacing(SHARED)
    size = BATCH if start != 'fdsl' else 64
    count = EXAMPLES[start] // size // (100 if quick else 1)
    changes: dict[str, Any] = {'seed': seed, 'batch_size': size, 'total_steps': max(count, 2)}
    if start != 'fdsl':
        changes |= {
            'data.name': 'arrays',
            'data.num_classes': None,
            'data.path': str(arrays),
            'data.split': 'train' if seed else f'train[:{fit}]',
            'data.transform': TRANSFORM,
            'evals.test.transform': 'resize(size)',
            'evals.test.split': 'train',  # Arrays have no test split; neither is scored.
            'optim.name': 'muon',
            'lr': 0.01,
            'data.repeats': 2,  # Two views of each emoji, to be matched.
        }
    return base.replacing(changes)


def train(config: Config, kinds: np.ndarray) -> tuple[Experiment, Any, float]:
    """Train a start; return the experiment, the averaged parameters and the seconds of all steps.

    Args:
      kinds: labels of the training emoji, see `objective`.
    """
    parts = build_experiment(config)
    if config.data.name == 'fdsl':
        step = build_train_step(config, parts)
    else:
        update = steps.update(
            objective(parts.model.apply, kinds),
            parts.optimizer,
            parts.schedule,
            parts.mesh,
            prepare=device_operations(parts.data),
            seed=config.seed,
            ema=config.ema,
        )
        step = steps.make_train_step(update, parts.abstract_state, parts.mesh)
    with jax.set_mesh(parts.mesh):
        shape = parts.data.inputs
        train_state = state.create(
            parts.model, shape, parts.optimizer, config.seed, parts.abstract_state
        )
        start = time.perf_counter()
        with train_batches(config, parts, 0) as batches:
            for _ in range(parts.total_steps):
                train_state, values = step(train_state, next(batches))
                jax.block_until_ready(values)
    # As in any run, a few non-finite updates are skipped, but many in a row end it.
    if int(values['skipped_in_a_row']) >= MAX_SKIPPED_IN_A_ROW:
        raise UserError(f'{config.data.name}: the updates are no longer finite: lower the rate')
    return parts, train_state['ema'], time.perf_counter() - start


def random_network(seed: int) -> tuple[Experiment, Any]:
    """Return the network with its initial parameters."""
    base = config_lib.load('configs/pretrain_fdsl.py', []).replacing({**SHARED, 'seed': seed})
    parts = build_experiment(base)
    with jax.set_mesh(parts.mesh):
        initial = state.create(
            parts.model, parts.data.inputs, parts.optimizer, seed, parts.abstract_state
        )
    return parts, initial['params']


def shrunk(images: np.ndarray, side: int) -> np.ndarray:
    count, size, _, channels = images.shape
    cell = size // side
    cells = images.reshape(count, side, cell, side, cell, channels).astype(np.float32)
    return cells.mean((2, 4))


class StartFeatures:
    """Features of all pictures from one start, by readout; `parts` is None for raw pixels."""

    def __init__(self, parts: Experiment | None, params: Any, emoji: Emoji):
        self._emoji, self._tokens = emoji, {}
        views = {name: emoji.images[name] for name in SETS}
        views['mirrored'] = emoji.images['twitter'][:, :, ::-1]
        small = {name: shrunk(images, SHARED['image_size']) for name, images in views.items()}
        if parts is None:
            flat = {name: x.reshape(len(x), -1, x.shape[-1]) for name, x in small.items()}
            self._tokens = {name: [x / 255] for name, x in flat.items()}
            return

        @jax.jit
        def blocks(params: Any, images: Any) -> Any:
            given = images * (2 / 255) - 1
            _, extra = parts.model.apply({'params': params}, given, capture=('blocks',))
            return list(extra['blocks'])

        # A fixed batch size, so that one compiled program serves every set.
        size = 64
        for name, images in small.items():
            padded = np.pad(images, ((0, -len(images) % size), (0, 0), (0, 0), (0, 0)))
            batches = [
                jax.device_get(blocks(params, padded[i : i + size]))
                for i in range(0, len(padded), size)
            ]
            self._tokens[name] = [
                np.concatenate(block_tokens)[: len(images)]
                for block_tokens in zip(*batches, strict=True)
            ]

    def values(self, how: Readout, bank: np.ndarray) -> dict[str, np.ndarray]:
        """Return features by set, centred and whitened with statistics of Google's `bank` alone."""
        plain = {name: grid_means(x[how.block], how.grid) for name, x in self._tokens.items()}
        centre, matrix = whitening(plain['google'][bank], how.power)
        if matrix is None:
            return {name: x - centre for name, x in plain.items()}
        return {name: (x - centre) @ matrix for name, x in plain.items()}


def whitening(
    known: np.ndarray, power: float, ridge: float = RIDGE
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the mean and the matrix that divides principal axes by variance^power (None if 0)."""
    centre = known.mean(0)
    if not power:
        return centre, None
    rows = (known - centre).astype(np.float64)
    more_features = rows.shape[1] > len(rows)
    # The smaller of the two Gram matrices has all non-zero variances.
    variances, axes = np.linalg.eigh(
        (rows @ rows.T if more_features else rows.T @ rows) / len(rows)
    )
    nonzero = variances > 1e-9 * variances.max()
    variances, axes = variances[nonzero], axes[:, nonzero]
    if more_features:
        axes = rows.T @ (axes / np.sqrt(variances * len(rows)))
    scale = (variances + ridge * variances.sum() / rows.shape[1]) ** -power
    return centre, (axes * scale).astype(known.dtype)


def recall(values: dict[str, np.ndarray], chosen: np.ndarray, both: bool = False) -> float:
    """Return how often the nearest of Twitter's pictures is the same emoji.

    Args:
      chosen: the emoji to compare.
      both: average both directions.
    """
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    sides = [Features(x[chosen].astype(np.float32), chosen) for x in map(values.get, SETS)]
    ways = [retrieval.one_way(*sides, mesh, (1,))['recall@1']]
    if both:
        ways.append(retrieval.one_way(*sides[::-1], mesh, (1,))['recall@1'])
    return statistics.mean(ways)


def categorised(
    values: dict[str, np.ndarray],
    categories: np.ndarray,
    chosen: np.ndarray,
    shots: int,
    draws: int = DRAWS,
) -> float:
    """Return the mean accuracy over draws on the chosen pictures that are not among the shots.

    Categories with too few pictures are left out. Shots and test pictures are also used mirrored.
    """
    kinds, counts = np.unique(categories[chosen], return_counts=True)
    kinds = kinds[counts >= ENOUGH * shots]
    chosen = chosen[np.isin(categories[chosen], kinds)]
    labels = np.searchsorted(kinds, categories[chosen])
    plain, other = values['twitter'][chosen], values['mirrored'][chosen]
    accuracies = []
    for seed in range(draws):
        rows = fewshot.draw(labels, shots, seed)
        rest = np.setdiff1d(np.arange(len(labels)), rows)
        learnt, known = np.concatenate([plain[rows], other[rows]]), np.tile(labels[rows], 2)
        scored = np.concatenate([plain[rest], other[rest]])
        answers = fewshot.scores_of(learnt, known, scored, len(kinds), l2=1024.0)
        answers = answers.reshape(2, len(rest), -1).sum(0).argmax(1)
        accuracies.append(float((answers == labels[rest]).mean()))
    return statistics.mean(accuracies)


@dataclasses.dataclass(frozen=True)
class Run:
    """One start with one seed; seed 0 is the run by which readouts are chosen."""

    start: str
    seed: int


class Study:
    """All runs of the study; finished ones are stored in WORKDIR/runs.jsonl."""

    def __init__(self, emoji: Emoji, workdir: Path, quick: bool = False):
        self._emoji, self._quick = emoji, quick
        self._sides = divide(emoji.groups)
        self._learnt = np.concatenate([self._sides['fit'], self._sides['val']])
        workdir.mkdir(parents=True, exist_ok=True)
        self._arrays = workdir / 'google.npz'
        np.savez(
            self._arrays,
            train_images=emoji.images['google'][self._learnt],
            train_labels=np.arange(len(self._learnt)),
        )
        self._file = epath.Path(workdir) / 'runs.jsonl'
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._rows = [json.loads(text) for text in lines]

    def config(self, run: Run) -> Config | None:
        """Return the config of a run; None if nothing is trained."""
        if run.start not in EXAMPLES:
            return None
        fit = len(self._sides['fit'])
        return config_of(run.start, run.seed, self._arrays, fit, self._quick)

    def done(self, run: Run) -> dict[str, Any] | None:
        """Return the stored row of a run, if it is finished and its config has not changed."""
        config = self.config(run)
        digest = config_lib.digest(config) if config else None
        for row in self._rows:
            if (row['start'], row['seed'], row['config']) == (run.start, run.seed, digest):
                return row
        return None

    def seeds(self, start: str) -> list[int]:
        """Return the seeds after 0; pixels do not depend on one."""
        return [1] if start == 'pixels' or self._quick else list(range(1, SEEDS + 1))

    def all(self) -> None:
        """Run what is not done yet, with one line per run; seed 0 of each start comes first."""
        for run in (Run(start, seed) for start in STARTS for seed in (0, *self.seeds(start))):
            if self.done(run):
                continue
            began = time.perf_counter()
            row = self._run(run)
            jax.clear_caches()
            self._rows.append(row)
            storage.write_text(self._file, ''.join(json.dumps(one) + '\n' for one in self._rows))
            if run.seed:
                figures = row['test']
                told = f'retrieval {figures["retrieval"]:.3f}  category {figures["category"]:.3f}'
            else:
                told = f'chosen: {row["retrieval"]} and {row["category"]}'
            spent = metrics.duration(time.perf_counter() - began)
            print(f'{run.start:<18} seed {run.seed}  {told}  {spent}', flush=True)

    def _features(self, run: Run) -> tuple[StartFeatures, dict[str, Any]]:
        config = self.config(run)
        if run.start == 'pixels':
            return StartFeatures(None, None, self._emoji), {'params': 0, 'seconds': 0.0}
        if config is None:
            (parts, params), seconds = random_network(run.seed), 0.0
        else:
            emoji, learnt = self._emoji, self._learnt
            kinds = np.stack([emoji.categories, emoji.subcategories], 1)[learnt]
            parts, params, seconds = train(config, kinds)
        body = {name: leaf for name, leaf in params.items() if name != 'head'}
        about = {'params': sum(x.size for x in jax.tree.leaves(body)), 'seconds': seconds}
        return StartFeatures(parts, params, self._emoji), about

    def _run(self, run: Run) -> dict[str, Any]:
        config = self.config(run)
        row = {**dataclasses.asdict(run), 'config': config_lib.digest(config) if config else None}
        features, about = self._features(run)
        row |= about
        if run.seed == 0:
            return row | self._choose(run.start, features)
        choice = self.done(Run(run.start, 0))
        assert choice is not None
        return row | {'test': self._test(features, choice)}

    def _choose(self, start: str, features: StartFeatures) -> dict[str, Any]:
        """Choose the best readout for either question on the validation emoji, both ways."""
        bank, val, kinds = self._sides['fit'], self._sides['val'], self._emoji.categories
        tried = []
        for how in readouts(start):
            values = features.values(how, bank)
            recall_at_1 = recall(values, val, both=True)
            category = categorised(values, kinds, val, VAL_SHOTS)
            tried.append({'how': how, 'retrieval': recall_at_1, 'category': category})
        best = {
            name: list(max(tried, key=lambda one: one[name])['how'])
            for name in ('retrieval', 'category')
        }
        return {**best, 'tried': tried}

    def _test(self, features: StartFeatures, choice: dict[str, Any]) -> dict[str, float]:
        """Score the held-out emoji, with and without flags."""
        bank, held, kinds = self._learnt, self._sides['test'], self._emoji.categories
        plain = held[kinds[held] != self._emoji.category_names.index(FLAGS)]
        values = features.values(Readout(*choice['retrieval']), bank)
        figures = {
            'retrieval': recall(values, held),
            'retrieval_no_flags': recall(values, plain),
        }
        values = features.values(Readout(*choice['category']), bank)
        for name, chosen in (('category', held), ('category_no_flags', plain)):
            figures[name] = categorised(values, kinds, chosen, SHOTS)
        return figures

    def results(self) -> list[dict[str, Any]]:
        """Summarise each start over the seeds that are done."""
        figures = []
        for start in STARTS:
            choice = self.done(Run(start, 0))
            rows = [row for seed in self.seeds(start) if (row := self.done(Run(start, seed)))]
            if choice is None or not rows:
                continue
            scores = {name: [row['test'][name] for row in rows] for name in rows[0]['test']}
            figures.append(
                {
                    'start': start,
                    'seeds': len(rows),
                    'readouts': {name: choice[name] for name in ('retrieval', 'category')},
                    'validation': choice['tried'],
                    'scores': scores,
                    'mean': {name: statistics.mean(values) for name, values in scores.items()},
                    'error': {name: standard_error(values) for name, values in scores.items()},
                    'params': rows[0]['params'],
                    'seconds': statistics.mean(row['seconds'] for row in rows),
                }
            )
        return figures

    def sizes(self) -> dict[str, int]:
        held, kinds = self._sides['test'], self._emoji.categories
        flags = kinds[held] == self._emoji.category_names.index(FLAGS)
        counts = {name: len(rows) for name, rows in self._sides.items()}
        return {**counts, 'test_no_flags': int((~flags).sum())}


def table(results: list[dict[str, Any]]) -> str:
    """Format the results as Markdown, one line per start."""
    header = (
        'start | retrieval, % | the same without flags | category, % | the same without flags | '
        'seeds | parameters | seconds'
    )
    lines = [f'| {header} |', '|' + '---|' * (header.count('|') + 1)]
    for result in results:
        cells = [result['start'], *(cell(result, name) for name in result['mean'])]
        cells += [str(result['seeds']), f'{result["params"]:,}', f'{result["seconds"]:.0f}']
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Plot a bar per start and a dot per seed."""
    figure, axes = plots.canvas(2, 1, 4.8, 3.8)
    titles = {
        'retrieval': "Google's emoji among Twitter's, top-1",
        'category': f"category of Twitter's, {SHOTS} shots",
    }
    for axis, (name, title) in zip(axes[0], titles.items(), strict=True):
        labels = [result['start'] for result in results]
        bars(axis, results, name, labels)
        axis.set_xticks(range(len(results)), labels, fontsize=8)
        axis.set_ylabel('%')
        axis.set_title(title, fontsize=10)
    figure.savefig(path)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.emoji',
        epilog=f'The pictures: {INSTALL}',
        allow_abbrev=False,
    )
    parser.add_argument('--data', metavar='FOLDER', required=True, help="npm's prefix, see below")
    parser.add_argument('--workdir', default='runs/emoji', help='where runs are kept')
    parser.add_argument('--quick', action='store_true', help='a 100th of the steps, one seed')
    parser.add_argument('--report', action='store_true', help='only of what is done already')
    args = parser.parse_args(argv)
    runtime.start()
    workdir = Path(args.workdir) / ('quick' if args.quick else '')
    study = Study(read(Path(args.data)), workdir, args.quick)
    print(f'emoji: {study.sizes()}')
    if not args.report:
        study.all()
    results = study.results()
    # A partial study must not replace the published results.
    folder = workdir if args.quick or args.report else RESULTS
    about = {**machine.about('jax', 'flax', 'optax', 'numpy'), 'emoji': study.sizes()}
    text = json.dumps({'about': about, 'results': results}, indent=1)
    (folder / 'emoji.json').write_text(text + '\n')
    (folder / 'emoji.md').write_text(table(results) + '\n')
    draw(results, folder / 'emoji.png')
    print(table(results))


if __name__ == '__main__':
    runtime.command(main)
