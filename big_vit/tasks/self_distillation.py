"""Self-distillation: DINO (arXiv 2104.14294), iBOT (2111.07832), DINOv2 (2304.07193) and v3.

A student sees several views of an image, some of them small, some with patches hidden; a teacher,
the average of the student, sees the large ones whole. The student learns to assign each view to
prototypes as the teacher does another view of the same image, and hidden patches as the teacher
does those patches. What keeps all images from one prototype is a running centre, or Sinkhorn's
iterations over the whole batch. A large frozen model may be the teacher of a smaller one instead.
"""

import inspect
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from big_vit.errors import UserError
from big_vit.models.prototype_head import PrototypeHead, similarity
from big_vit.models.vit import ViT
from big_vit.tasks import block_masks, prototypes
from big_vit.tasks.batch import Batch
from big_vit.tasks.gram import gram_loss
from big_vit.tasks.koleo import koleo_loss
from big_vit.tasks.self_distillation_model import SelfDistillation, check_trunk, check_views
from big_vit.tasks.task import Aux, ExampleShape, Loss, Run, Targets, Task, Tree

Pair = tuple[float, float]
_CENTRE_MOMENTUM = 0.9
# Number of the step's key for masks; those of dropout have small ones.
_MASKS = 2**31 + 2
# Of fewer rows for a prototype Sinkhorn makes nearly uniform targets, from which nothing is learnt.
_PROTOTYPES_PER_ROW = 64


class Settings(NamedTuple):
    """Settings of self-distillation: keys of the config, with their defaults.

    Attributes:
      prototypes: number of prototypes.
      bottleneck, head_width: width of the rows that are compared with prototypes, and of the
        hidden layers before.
      patch_head: hidden patches have the head of views ('shared'), another one ('separate'), or
        there are none ('none', DINO).
      prototype_norm: length of the prototypes: 'fixed' to 1, 'learned', or 'none' (DINOv3).
      centering: 'centre' subtracts a running mean of the teacher's logits, 'sinkhorn' gives each
        prototype an equal part of the batch.
      teacher: run whose model is the teacher, frozen, in place of the average. Then no patch is
        hidden from the student, which still learns of those that would be.
      teacher_temperature: at the start and, from `temperature_warmup` on, a share of the run.
      student_temperature: temperature of the student's logits.
      momentum: of the average at the start and at the end, on a cosine.
      dino_weight, ibot_weight, koleo_weight: factors of the losses of views, hidden patches, and
        of the distance of features.
      koleo_group: examples among which the nearest is sought; of a smaller batch all.
      gram_weight: factor of the loss that keeps likenesses of patches as a former teacher has them
        (Gram anchoring, DINOv3); 0 has none.
      gram_start, gram_every: when that copy of the teacher is made, and after what shares of the
        run again (0: never).
      mask_ratios: least and greatest share of the patches that are hidden in a view.
      mask_probability: share of the views that have hidden patches.
      mask_group: examples over whose views the ratios are spread evenly.
      mask_law: 'exact' numbers of hidden patches, as in DINOv3, or those that blocks come to in
        each view by itself ('ibot'), for which heads keep room for the greatest ratio.
      patch_centre: the centre of patches is the mean of 'hidden' ones, as in DINOv2, or of 'all'
        patches of the teacher, as in iBOT.
      position_offset: of the interpolation of learned positions for small views.
    """

    prototypes: int = 65_536
    bottleneck: int = 256
    head_width: int = 2048
    patch_head: str = 'shared'
    prototype_norm: str = 'learned'
    centering: str = 'centre'
    teacher: str | None = None
    teacher_temperature: Pair = (0.04, 0.07)
    temperature_warmup: float = 0.3
    student_temperature: float = 0.1
    momentum: Pair = (0.992, 1.0)
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_group: int = 64
    gram_weight: float = 0.0
    gram_start: float = 0.0
    gram_every: float = 0.0
    mask_ratios: Pair = (0.1, 0.5)
    mask_probability: float = 0.5
    mask_group: int = 8
    mask_law: str = 'exact'
    patch_centre: str = 'hidden'
    position_offset: float = 0.1


def self_distillation(**keys: Any) -> Task:
    """Learn from an average of itself, or from a frozen teacher; `Settings` has the arguments."""
    settings = Settings(**keys)
    if settings.teacher is not None and settings.gram_weight:
        raise UserError(
            'config: task.gram_weight keeps patches as the average had them, and task.teacher is '
            'another model: remove one of them'
        )
    centred = settings.centering == 'centre'
    stateful = centred or settings.gram_weight > 0

    def model(trunk: ViT, example: ExampleShape) -> SelfDistillation:
        return _model(trunk, example, settings)

    return Task(
        name='self_distillation',
        model=model,
        loss=partial(_loss, settings=settings),
        headline='kl',
        provides=frozenset({'features'}),
        additions=('dino_head', 'ibot_head', 'mask_token'),
        trunk=lambda model: model.trunk,
        views=('global', 'local', 'gram'),
        draw=partial(_draw, settings=settings) if settings.patch_head != 'none' else None,
        state=partial(_state, settings=settings) if stateful else None,
        after_update=_after_update if stateful else None,
        teacher_rate=partial(teacher_rate, momentum=settings.momentum),
        teacher=settings.teacher,
        continues=('centre',) if centred else (),
        targets=partial(_targets, settings=settings),
    )


# The keys of the config, with their defaults, are read from the signature of a task.
self_distillation.__signature__ = inspect.signature(Settings)  # type: ignore[attr-defined]


def teacher_rate(step: Array | int, total_steps: int, momentum: Pair) -> Float[Array, '']:
    """One less the teacher's momentum, which goes from one value to the other on a cosine."""
    start, end = momentum
    wave = 1 + jnp.cos(jnp.pi * jnp.asarray(step, jnp.float32) / total_steps)
    return (1 - end) + (end - start) / 2 * wave


def teacher_temperature(
    step: Array | int, total_steps: int, temperature: Pair, warmup: float
) -> Float[Array, '']:
    """On a line from one value to the other, which the last step of the warm-up has."""
    start, end = temperature
    steps = max(round(warmup * total_steps) - 1, 0)
    if not steps:
        return jnp.float32(end)
    share = jnp.minimum(jnp.asarray(step, jnp.float32) / steps, 1)
    return start + (end - start) * share


def _model(trunk: ViT, example: ExampleShape, settings: Settings) -> SelfDistillation:
    check_trunk(trunk)
    grid = check_views(trunk, example)
    if 'gram' in example.inputs and not settings.gram_weight:
        raise UserError(
            'config: data.transform gives views of gram, which are compared with '
            'task.gram_weight above 0 alone: set it, or leave them out'
        )
    head = PrototypeHead(
        settings.prototypes,
        settings.bottleneck,
        settings.head_width,
        settings.prototype_norm,
        trunk.encoder.style,
    )
    patches, views = settings.patch_head != 'none', example.inputs['global'][0]
    if patches:
        counts = _counts(settings, views, grid)
        if not counts.any():
            raise UserError(
                f'config: task.mask_probability={settings.mask_probability:g} and task.mask_ratios='
                f'{settings.mask_ratios} hide none of {grid[0] * grid[1]} patches: set greater '
                "ones, or task.patch_head='none'"
            )
    separate = head.clone() if settings.patch_head == 'separate' else None
    hides, offset = patches and settings.teacher is None, settings.position_offset
    return SelfDistillation(trunk, head, separate, patches, hides, views, grid, offset)


def _counts(settings: Settings, views: int, grid: tuple[int, int]) -> Int[np.ndarray, ' views']:
    """Numbers of hidden patches in the views of a group; the most there may be by iBOT's law."""
    if settings.mask_law == 'ibot':
        most = int(settings.mask_ratios[1] * grid[0] * grid[1] * (settings.mask_probability > 0))
        return np.full(settings.mask_group * views, most)
    return block_masks.masked_counts(
        settings.mask_group * views,
        grid[0] * grid[1],
        settings.mask_probability,
        settings.mask_ratios,
    )


def _check_group(batch_size: int, key: str, group: int) -> None:
    if batch_size % group:
        near = max(n for n in range(1, group) if batch_size % n == 0)
        raise UserError(
            f'config: batch_size={batch_size} is not divisible by task.{key}={group}: set '
            f'task.{key}={near}'
        )


def _check_teacher(model: Any, teacher: Any, settings: Settings) -> None:
    """Refuses a teacher whose assignments the student cannot learn."""
    count = teacher.dino_head.count
    if count != settings.prototypes:
        raise UserError(
            f'config: task.prototypes={settings.prototypes}, but task.teacher has {count}: set '
            f'task.prototypes={count}'
        )
    if model.patches and not teacher.patches:
        raise UserError(
            "config: task.teacher has learnt nothing of patches: set task.patch_head='none'"
        )
    ours, theirs = (m.trunk.single.patch_size for m in (model, teacher))
    if model.patches and ours != theirs:
        shown = ['x'.join(map(str, size)) for size in (ours, theirs)]
        raise UserError(
            f'config: model.variant has patches of {shown[0]} pixels, but task.teacher of '
            f"{shown[1]}: take the same, or task.patch_head='none'"
        )


def _check_sinkhorn(settings: Settings, run: Run, views: int) -> None:
    """Refuses batches in which Sinkhorn finds too little."""
    rows = views * run.batch_size
    if settings.centering == 'sinkhorn' and rows * _PROTOTYPES_PER_ROW < settings.prototypes:
        least = -(-settings.prototypes // (_PROTOTYPES_PER_ROW * views))
        raise UserError(
            f"config: task.centering='sinkhorn' spreads the {rows} large views of a batch over "
            f'task.prototypes={settings.prototypes}, which makes nearly uniform targets: set '
            f"task.centering='centre', task.prototypes={rows * _PROTOTYPES_PER_ROW} or fewer, or "
            f'batch_size={least} or more'
        )


class _Patches(NamedTuple):
    """The hidden patches of a microbatch: the masks, where they are, and their weights."""

    masks: Array | None = None
    place: Array | None = None
    weight: Array | None = None


def _draw(model: SelfDistillation, *, settings: Settings) -> Any:
    """The masks of a whole batch, so that they are the same in microbatches and on any mesh."""

    def draw(batch: Batch, rng: Array) -> dict[str, Array]:
        examples, group = batch['global'].shape[0], settings.mask_group
        counts, masks = jax.random.split(jax.random.fold_in(rng, _MASKS))
        exact = settings.mask_law == 'exact'
        if exact:
            _check_group(examples, 'mask_group', group)
            drawn = block_masks.shuffled_counts(
                counts, _counts(settings, model.views, model.grid), examples // group
            ).reshape(-1)
        else:
            drawn = block_masks.independent_targets(
                counts,
                examples * model.views,
                model.grid[0] * model.grid[1],
                settings.mask_probability,
                settings.mask_ratios,
            )
        found = block_masks.block_masks(masks, drawn, model.grid, exact)
        return {'masks': found.reshape(examples, model.views, -1)}

    return draw


def _patches(model: SelfDistillation, batch: Batch, run: Run, settings: Settings) -> _Patches:
    if not model.patches:
        return _Patches()
    masks = batch['drawn']['masks']
    examples, views = masks.shape[:2]
    # Of a group of consecutive examples a microbatch has each n-th.
    accumulation = run.batch_size // examples
    group = settings.mask_group if settings.mask_law == 'exact' else 1
    rows = 1 if group % accumulation else group // accumulation
    room = block_masks.slots(_counts(settings, views, model.grid), rows, views)
    index, weight = block_masks.select(masks, rows, min(room, masks[0].size))
    return _Patches(masks, index, weight)


def _targets(model: SelfDistillation, run: Run, *, settings: Settings) -> Targets:
    """The teacher's rows, and what of the whole batch its assignments depend on."""
    teacher: Any = model if run.teacher is None else run.teacher
    _check_teacher(model, teacher, settings)
    # Sinkhorn has no centre: there, heads of all patches would be work for nothing.
    centred = model.patches and settings.centering == 'centre'
    of_all = centred and settings.patch_centre == 'all'

    def rows(task_state: Tree, batch: Batch, rng: Array, step: Array) -> dict[str, Array]:
        patches = _patches(model, batch, run, settings)
        params = {'params': task_state['teacher']}
        given = batch['global'], patches.place, of_all
        found = teacher.apply(params, *given, method='teacher')
        if patches.weight is not None:
            found['weight'] = patches.weight
        return found

    def shared(task_state: Tree, rows: dict[str, Array], step: Array) -> Tree:
        temperature = _temperature(settings, run, step)
        weights = {'dino': jnp.ones(rows['dino'].shape[:2])}
        if 'weight' in rows:
            weights['ibot'] = (rows['weight'] > 0).astype(jnp.float32)
        logits = {
            kind: partial(similarity, vectors=_vectors(teacher, task_state, kind))
            for kind in weights
        }
        found: dict[str, Any] = {'offset': {}, 'mean': {}}
        for kind, weight in weights.items():
            if settings.centering == 'sinkhorn':
                found['offset'][kind] = prototypes.sinkhorn(
                    logits[kind], rows[kind], weight, settings.prototypes, temperature
                )
            else:
                found['offset'][kind] = -task_state['centre'][kind] / temperature
                # Logits are linear in rows, so the mean of rows has their mean.
                counted = rows[kind] * weight[..., None], jnp.maximum(weight.sum(), 1)
                total = counted[0].sum((0, 1)) / counted[1]
                if kind == 'ibot' and 'all' in rows:
                    total = rows['all'].mean((0, 1))
                found['mean'][kind] = logits[kind](total[None, None])[0, 0]
        found['statistics'] = prototypes.statistics(
            logits['dino'],
            rows['dino'],
            settings.prototypes,
            temperature,
            found['offset']['dino'],
        )
        return found

    return Targets(rows, shared)


def _vectors(teacher: Any, task_state: Tree, kind: str) -> Array:
    return teacher.apply({'params': task_state['teacher']}, kind, method='vectors')


def _temperature(settings: Settings, run: Run, step: Array | int) -> Float[Array, '']:
    return teacher_temperature(
        step, run.total_steps, settings.teacher_temperature, settings.temperature_warmup
    )


def _state(params: Tree, *, settings: Settings) -> Tree:
    """Running means of the teacher's logits, at 0, and the teacher of Gram anchoring."""
    found: dict[str, Any] = {}
    if settings.centering == 'centre':
        kinds = ('dino',) if settings.patch_head == 'none' else ('dino', 'ibot')
        found['centre'] = {kind: jnp.zeros(settings.prototypes) for kind in kinds}
    if settings.gram_weight:
        found['gram'] = jax.tree.map(jnp.copy, params)
    return found


def _after_update(params: Tree, task_state: Tree, carried: Tree, step: Array) -> Tree:
    found = {}
    if 'centre' in task_state:
        # After use: the targets of a step depend on the batches before.
        share = 1 - _CENTRE_MOMENTUM
        found['centre'] = jax.tree.map(
            lambda centre, mean: centre + share * (mean - centre),
            task_state['centre'],
            carried['mean'],
        )
    if 'gram' in task_state:
        found['gram'] = jax.tree.map(
            lambda old, new: jnp.where(carried['gram_due'] > 0.5, new, old),
            task_state['gram'],
            task_state['teacher'],
        )
    return found


def _gram_due(settings: Settings, run: Run, step: Array | int) -> Float[Array, '']:
    """Whether the teacher after this step is what patches are compared with from then on."""
    start = round(settings.gram_start * run.total_steps)
    every = round(settings.gram_every * run.total_steps)
    since = jnp.asarray(step) + 1 - start
    due = (since >= 0) & (since % every == 0) if every else since == 0
    return due.astype(jnp.float32)


def _loss(model: SelfDistillation, run: Run, *, settings: Settings) -> Loss:
    """Cross-entropy to the teacher's assignments, of views and hidden patches, and KoLeo.

    Its metrics are the parts, what they are above the least possible ('kl', of views), and what
    tells a collapse: see `prototypes.Statistics`.
    """
    apply: Any = model.apply
    teacher: Any = model if run.teacher is None else run.teacher
    views = model.views
    _check_sinkhorn(settings, run, views)
    if settings.koleo_weight:
        _check_group(run.batch_size, 'koleo_group', min(settings.koleo_group, run.batch_size))
    gram_from = round(settings.gram_start * run.total_steps)

    def targets_of(task_state: Tree, rows: Array, kind: str, temperature: Array) -> Array:
        logits = similarity(rows, _vectors(teacher, task_state, kind)) / temperature
        offset = task_state['targets']['offset'][kind]
        return jax.lax.stop_gradient(jax.nn.softmax(logits + offset[None, None], axis=-1))

    def gram(task_state: Tree, patches: Array, batch: Batch) -> Array:
        views = batch.get('gram', batch['global'])
        wanted = apply({'params': task_state['gram']}, views, method='anchors')
        by_image = (-1, *patches.shape[2:])
        return gram_loss(patches.reshape(by_image), wanted.reshape(by_image))

    def loss(
        params: Tree, task_state: Tree, batch: Batch, rng: Array | None, step: Array | int
    ) -> tuple[Array, Aux]:
        patches = _patches(model, batch, run, settings)
        inputs = {name: batch[name] for name in ('global', 'local') if name in batch}
        given = inputs, patches.masks, patches.place, rng is not None
        rngs = {} if rng is None else {'dropout': rng}
        student = apply({'params': params}, *given, method='student', rngs=rngs)
        temperature = _temperature(settings, run, step)
        parts, weights = {}, {'dino': settings.dino_weight, 'ibot': settings.ibot_weight}
        wanted = partial(targets_of, task_state, temperature=temperature)
        scaled = {k: x / settings.student_temperature for k, x in student.items() if k in weights}
        parts['dino'] = prototypes.views_loss(
            wanted(batch['targets']['dino'], 'dino'), scaled['dino']
        )
        if patches.weight is not None:
            parts['ibot'] = prototypes.patches_loss(
                wanted(batch['targets']['ibot'], 'ibot'), scaled['ibot'], patches.weight, views
            )
        if settings.koleo_weight:
            weights['koleo'] = settings.koleo_weight
            group = _koleo_group(settings, run, len(batch['global']))
            parts['koleo'] = sum(
                (koleo_loss(student['pooled'][:, view], group) for view in range(views)),
                jnp.zeros(()),
            )
        if settings.gram_weight:
            weights['gram'] = settings.gram_weight
            parts['gram'] = jax.lax.cond(
                jnp.asarray(step) >= gram_from,
                lambda: gram(task_state, student['patches'], batch),
                lambda: jnp.zeros(()),
            )
        total = sum((weights[name] * part for name, part in parts.items()), jnp.zeros(()))
        statistics = task_state['targets']['statistics']
        metrics = {
            **parts,
            'kl': parts['dino'] - statistics.entropy,
            'teacher_entropy': statistics.entropy,
            'teacher_entropy_of_mean': statistics.entropy_of_mean,
            'used_prototypes': statistics.used,
            'teacher_temperature': temperature,
        }
        carried = {
            'mean': task_state['targets']['mean'],
            'gram_due': _gram_due(settings, run, step),
        }
        return total, Aux(metrics, carried)

    return loss


def _koleo_group(settings: Settings, run: Run, examples: int) -> int:
    group = min(settings.koleo_group, run.batch_size)
    if examples % group:
        near = max(n for n in range(1, group) if examples % n == 0 and run.batch_size % n == 0)
        raise UserError(
            f'config: task.koleo_group={group} does not divide the {examples} examples of a '
            f'microbatch (batch_size / accumulation): set task.koleo_group={near}'
        )
    return group
