"""The `--explain` page: what a config means, in words and tables, before anything runs."""

import re

import jax
import numpy as np

from big_vit import config, ledger, metrics, state, trees
from big_vit.build.experiment import Experiment, build_experiment
from big_vit.data import windows
from big_vit.optim import per_layer


def summary(settings: config.Config, parts: Experiment) -> list[str]:
    """Summarizes a run in a few lines: mesh, memory, model, data and length."""
    data, encoder = parts.data, parts.task.trunk(parts.model).encoder
    params = trees.count(parts.abstract_state['params'])
    tokens = parts.model.sequence_length(data.input_shapes)
    operations = parts.forward_flops
    shown = ' + '.join('x'.join(map(str, data.shapes[part])) for part in data.reads)
    unit = 'an image' if data.reads == ('image',) else 'an example'
    mesh = ', '.join(f'{name} {size}' for name, size in parts.mesh.shape.items())
    memory = ledger.line(
        ledger.measure(parts.abstract_state), ', '.join(parts.settings), parts.mesh.size
    )
    assert data.order is not None
    positions = data.order.shift + parts.total_steps * data.order.positions
    epochs = positions * data.order.repeats / data.source.length
    known = parts.task.needs_labels or parts.task.reads
    labels = f'{data.source.num_classes} classes' if known else 'without labels'
    return [
        f'mesh    {mesh}',
        f'state   {memory}',
        *(layout(parts.abstract_state) if parts.mesh.size > 1 else []),
        f'model   ViT-{settings.model.variant}: {encoder.depth} blocks of width {encoder.width}, '
        f'{params / 1e6:,.2f} M parameters, {tokens} tokens, {operations / 1e9:,.3g} GFLOP {unit}',
        *_teacher_lines(parts),
        f'data    {data.source.name} {data.source.split}: {data.source.length:,} examples, '
        f'{labels}, {shown}',
        *([f'order   {windows.line(data.order.shards)}'] if data.order.shards else []),
        f'train   {parts.total_steps:,} steps of {settings.batch_size} examples = '
        f'{epochs:,.2f} epochs, {", ".join(parts.settings)}',
    ]


def _teacher_lines(parts: Experiment) -> list[str]:
    teacher = parts.teacher
    if teacher is None:
        return []
    return [
        f'teacher ViT-{teacher.config.model.variant} of {teacher.where}, frozen: '
        f'{trees.count(teacher.params) / 1e6:,.2f} M parameters with its heads'
    ]


def spec_text(leaf: jax.ShapeDtypeStruct) -> str:
    """Formats how an array is sharded, as in '-, fsdp, tensor'."""
    assert isinstance(leaf.sharding, jax.NamedSharding)
    axes = leaf.sharding.spec
    shown = ('+'.join(axis) if isinstance(axis, tuple) else str(axis or '-') for axis in axes)
    return ', '.join(shown) if any(axes) else 'replicated'


def layout(abstract_state: state.State) -> list[str]:
    """Describes how much of an abstract state is replicated, and how its largest arrays lie."""
    flat = trees.flatten(abstract_state)
    copied = [leaf for leaf in flat.values() if spec_text(leaf) == 'replicated']
    size = sum(trees.nbytes(leaf) for leaf in copied)
    lines = [
        f'whole   {len(copied)} of {len(flat)} arrays are on every device, {size / 1e6:,.1f} MB '
        f'({size / trees.nbytes(abstract_state):.0%} of the state)'
    ]
    params = sorted(
        trees.flatten(abstract_state['params']).items(), key=lambda item: -trees.nbytes(item[1])
    )
    for name, leaf in params[:3]:
        shape = 'x'.join(map(str, leaf.shape))
        lines.append(f'split   {name} {shape}: {spec_text(leaf)}')
    return lines


def _peak(lr: float, factors: list[per_layer.Factor]) -> str:
    """Formats the peak learning rate, as a range if it differs between layers."""
    layer_factors = np.concatenate([np.atleast_1d(factor) for factor in factors])
    ends = sorted({layer_factors.min(), layer_factors.max()})
    return ' to '.join(f'{lr * end:.2e}' if end else 'frozen' for end in ends)


def _decay(factor: float, ends: list[float]) -> str:
    """Formats a weight decay, with both ends if it is on a schedule."""
    return ' to '.join(f'{factor * end:.6g}' for end in ends) if factor else '0'


def optimizers(parts: Experiment) -> list[str]:
    """Lists each optimizer with all of its settings, given or default."""
    return [
        f'{name}: ' + ', '.join(f'{key}={value!r}' for key, value in keys.items())
        for name, keys in parts.settings.items()
    ]


def page(settings: config.Config) -> str:
    """Formats the `--explain` page: summary, intervals, schedule, and every parameter group."""
    parts = build_experiment(settings)
    intervals, total = parts.intervals, parts.total_steps
    points = sorted({0, *(round(total * share / 10) for share in range(11))})
    # Evaluated on this machine's own device: these are a few scalars.
    rates: list[tuple] = [(step, f'{float(parts.schedule(step)):.3e}') for step in points]
    columns: tuple[str, ...] = ('step', 'learning rate')
    if parts.decay_schedule is not None:
        decays = [f'{float(parts.decay_schedule(step)):.4g}' for step in points]
        rates = [(*row, decay) for row, decay in zip(rates, decays, strict=True)]
        columns = (*columns, 'weight decay')

    def frequency(every: int) -> str:
        times = total // every + bool(total % every) if every else 0
        return f'every {every:,} steps ({times:,} times)' if every else 'never'

    rows = [
        ('log', frequency(intervals.log)),
        ('save', frequency(intervals.save)),
        ('keep for ever', frequency(intervals.keep)),
        *((f'evaluate {name}', frequency(every)) for name, every in intervals.evals.items()),
    ]
    groups: dict[tuple, list[str]] = {}
    by_step = parts.decay_schedule
    ends = [1.0] if by_step is None else [float(by_step(step)) for step in (0, total)]
    flat = trees.flatten(parts.abstract_state['params'])
    for name, leaf in flat.items():
        collapsed = re.sub(r'encoderblock_\d+', 'encoderblock_*', name)
        key = (
            collapsed,
            'x'.join(map(str, leaf.shape)),
            _decay(parts.decay_factors[name], ends),
            parts.groups[name],
            spec_text(leaf),
        )
        groups.setdefault((key, parts.first_steps.get(name)), []).append(name)
    header = ('parameter', 'shape', 'weight decay', 'optimizer', 'sharding', 'peak lr', 'arrays')
    shown = []
    for (key, first), names in groups.items():
        peak = _peak(settings.lr, [parts.lr_factors[name] for name in names])
        peak += '' if first is None else f' from step {round(first):,}'
        shown.append((*key, peak, len(names)))
    table = metrics.table(header, shown)
    values = sorted(config.flatten(settings.to_dict()).items())
    lines = [
        f'{key} = {value!r}' + ('' if settings.sets(key) else '  # default')
        for key, value in values
        if value is not None
    ]
    return '\n\n'.join(
        [
            '\n'.join(summary(settings, parts)),
            metrics.table(('duty', 'when'), rows),
            metrics.table(columns, rates),
            '\n'.join(optimizers(parts)),
            table,
            '\n'.join(lines),
        ]
    )
