"""Memory of training, to the byte: parameters, optimizer state, gradients.

    python -m big_vit.ledger --config configs/x.py --topology v5e:16x16

Everything is derived from abstract shapes: no data or devices are needed, and nothing is
allocated. Only a compiler knows the rest of what a step needs, above all activations: see
`big_vit.plan`.
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the slow imports.
    command_line.answer_help(command_line.ledger())

import itertools
import math
import re
from typing import Any, NamedTuple

import jax

from big_vit import config as config_lib
from big_vit import metrics, runtime, sharding, state, trees
from big_vit.build.experiment import build_experiment
from big_vit.config import Config, registries
from big_vit.errors import UserError
from big_vit.models import variants
from big_vit.planning import topology

GIB = 2**30
# Plain words for optimizer arrays whose names say little.
KINDS = {
    'mu': 'first moment',
    'nu': 'second moment',
    'trace': 'momentum',
    'v_row': 'second moment by rows',
    'v_col': 'second moment by columns',
    'v': 'second moment',
    'left': 'statistics of inputs',
    'right': 'statistics of outputs',
    'left_root': 'roots of inputs',
    'right_root': 'roots of outputs',
    'left_basis': 'basis of inputs',
    'right_basis': 'basis of outputs',
}
# Path components that say nothing about the purpose: chain links, block sizes, wrappers.
UNINFORMATIVE = r'\d+(x\d+)?|inner_states?|stacks'


class Usage(NamedTuple):
    """Memory of the arrays with one purpose; it is the same on every device.

    Attributes:
      arrays: number of arrays.
      scalars: number of scalars in them.
      nbytes: bytes with each array counted once, however it is split or copied.
      on_device: bytes on one device.
    """

    arrays: int
    scalars: int
    nbytes: int
    on_device: int


class Ledger(NamedTuple):
    """Memory of the state and gradients of a run.

    Attributes:
      params: parameters.
      average: averaged parameters; zeros if the run keeps none.
      optimizer: optimizer state by purpose, such as 'first moment'.
      task: the task's own state, such as a teacher's average, and a frozen teacher; zeros if it
        has none.
      counters: steps, and the loss history that detects spikes.
      gradients: held during a step, in float32, sharded like the parameters.
    """

    params: Usage
    average: Usage
    optimizer: dict[str, Usage]
    task: Usage
    counters: Usage
    gradients: Usage

    @property
    def optimizer_total(self) -> Usage:
        """The entire optimizer state."""
        return total(*self.optimizer.values())

    @property
    def state(self) -> Usage:
        """Everything that persists from step to step, and is in a checkpoint."""
        return total(self.params, self.average, self.optimizer_total, self.task, self.counters)

    @property
    def state_and_gradients(self) -> Usage:
        """State plus gradients."""
        return total(self.state, self.gradients)


def total(*parts: Usage) -> Usage:
    """Sums up several uses of memory."""
    return Usage(*map(sum, zip(*parts, strict=True))) if parts else Usage(0, 0, 0, 0)


def usage(tree: Any) -> Usage:
    """Measures a tree of arrays, or of ShapeDtypeStructs with shardings."""
    return Usage(
        len(jax.tree.leaves(tree)),
        trees.count(tree),
        trees.nbytes(tree),
        sharding.device_bytes(tree, state.shardings(tree)),
    )


def purpose(path: str, ndim: int, params: Any) -> str:
    """Purpose of an optimizer array, from its path: 'first moment', 'counters', ...

    Args:
      path: path in the optimizer state; it ends with the path of the parameter.
      ndim: number of dimensions of the array.
      params: top level of the parameters, whose names end the telling part of the path.
    """
    if not ndim:
        return 'counters'
    words = itertools.takewhile(lambda word: word not in params, path.split('/'))
    kept = [word for word in words if not re.fullmatch(UNINFORMATIVE, word)]
    return ' '.join([*kept[:-1], KINDS.get(kept[-1], kept[-1])]) if kept else 'other'


def measure(abstract_state: state.State) -> Ledger:
    """Measures a state, abstract or real."""
    parts: dict[str, list[Any]] = {}
    for path, leaf in trees.flatten(abstract_state['opt']).items():
        parts.setdefault(purpose(path, leaf.ndim, abstract_state['params']), []).append(leaf)
    measured = ('params', 'opt', 'ema', 'task', 'teacher')
    rest = [abstract_state[name] for name in abstract_state if name not in measured]
    params = usage(abstract_state['params'])
    by_device = sum(
        4 * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(abstract_state['params'])
    )
    return Ledger(
        params=params,
        average=usage(abstract_state.get('ema', {})),
        optimizer={name: usage(leaves) for name, leaves in parts.items()},
        task=usage([abstract_state.get(name, {}) for name in ('task', 'teacher')]),
        counters=usage(rest),
        gradients=params._replace(nbytes=4 * params.scalars, on_device=by_device),
    )


def amount(nbytes: int) -> str:
    """Formats bytes as MB or GB."""
    return f'{nbytes / 1e9:,.2f} GB' if nbytes >= 1e8 else f'{nbytes / 1e6:,.2f} MB'


def line(ledger: Ledger, optimizer: str, devices: int) -> str:
    """One-line summary for one device; × is relative to the bytes of the parameters there."""
    uses = {
        'params': ledger.params,
        'average': ledger.average,
        optimizer: ledger.optimizer_total,
        'task': ledger.task,
    }
    m = ledger.params.on_device
    sizes = ' + '.join(
        f'{name} {amount(use.on_device)}'
        + (f' ({use.on_device / m:.2f}×)' if name != 'params' else '')
        for name, use in uses.items()
        if use.arrays
    )
    where = f' on a device, {amount(ledger.state.nbytes)} in all' if devices > 1 else ''
    return f'{sizes}{where}; gradients {amount(ledger.gradients.on_device)}'


# Tables over optimizers and models.


class Row(NamedTuple):
    """One optimizer with one model; without `ledger`, `problem` says why it cannot be built."""

    variant: str
    optimizer: str
    ledger: Ledger | None
    problem: str = ''


def optimizers() -> list[str]:
    """Names of all optimizers."""
    return list(registries.OPTIMIZERS.entries())


def with_optimizer(config: Config, name: str) -> Config:
    """Returns the config with another optimizer.

    Keys of `optim` that this optimizer does not read are harmless: only a run calls `audit`.
    Schedules take no memory; constants are what every optimizer accepts.
    """
    changes = {'optim.name': name, 'optim.group_rules': None, 'schedule.name': 'constant'}
    return config.replacing({**changes, 'optim.weight_decay_end': None, 'mesh.max_replicated': 1.0})


def make_row(config: Config, devices: list[jax.Device], optimizer: str) -> Row:
    """Builds one row of a table; `problem` is set if training would reject the combination."""
    try:
        parts = build_experiment(with_optimizer(config, optimizer), devices)
    except UserError as error:
        return Row(config.model.variant, optimizer, None, str(error))
    problem, where, m = '', state.shardings(parts.abstract_state), config.mesh
    try:
        sharding.check_spread(
            parts.abstract_state, where, parts.mesh, m.min_shard_size, m.max_replicated
        )
    except UserError as error:
        problem = str(error)
    return Row(config.model.variant, optimizer, measure(parts.abstract_state), problem)


def with_variant(config: Config, variant: str) -> Config:
    """Returns the config with another model, in its published size.

    Raises:
      UserError: there is no such model.
    """
    variants.parse(variant)
    sizes = ('width', 'depth', 'mlp_dim', 'num_heads')
    return config.replacing({'model.variant': variant, **{f'model.{k}': None for k in sizes}})


def detail(ledger: Ledger) -> str:
    """Table with a line for every use of memory."""
    unit, count = ledger.params.nbytes, ledger.params.scalars
    uses = {
        'parameters': ledger.params,
        'averaged parameters': ledger.average,
        **{f'optimizer: {name}': use for name, use in ledger.optimizer.items()},
        'state of the task': ledger.task,
        'counters of the run': ledger.counters,
        'state': ledger.state,
        'gradients, while stepping': ledger.gradients,
        'state and gradients': ledger.state_and_gradients,
    }
    rows = [
        (
            name,
            use.arrays,
            f'{use.nbytes:,}',
            f'{use.nbytes / unit:.3f}',
            f'{use.scalars / count:.3f}',
            f'{use.on_device:,}',
        )
        for name, use in uses.items()
        if use.arrays
    ]
    header = ('held', 'arrays', 'bytes', '×', 'words a parameter', 'bytes on a device')
    return metrics.table(header, rows)


def fits(row: Row, capacity: float | None) -> bool | None:
    """Whether state and gradients fit on a device; None if that is not known."""
    if capacity is None or row.ledger is None:
        return None
    return row.ledger.state_and_gradients.on_device <= capacity


def comparison(rows: list[Row], capacity: float | None) -> str:
    """Table with a line for each optimizer of one model."""
    header = ['optimizer', 'bytes of its own', 'state, ×', 'words a parameter']
    header += ['state on a device', 'GiB with gradients', *(['fits'] if capacity else [])]
    lines = []
    for row in rows:
        f = row.ledger
        cells = ['-'] * len(header)
        if f is not None:
            cells[1:6] = [
                f'{f.optimizer_total.nbytes:,}',
                f'{f.state.nbytes / f.params.nbytes:.3f}',
                f'{f.optimizer_total.scalars / f.params.scalars:.3f}',
                f'{f.state.on_device:,}',
                f'{f.state_and_gradients.on_device / GIB:,.3f}',
            ]
            if capacity:
                cells[6] = 'yes' if fits(row, capacity) else 'NO'
        lines.append([row.optimizer, *cells[1:]])
    return metrics.table(header, lines)


def matrix(rows: list[Row], capacity: float | None) -> str:
    """Table with a line per optimizer and a column per model; `rows` come model by model."""
    cells: dict[str, list[str]] = {}
    for row in rows:
        cell = (
            '-' if row.ledger is None else f'{row.ledger.state_and_gradients.on_device / GIB:,.2f}'
        )
        if capacity is not None and row.ledger is not None:
            cell += ' fits' if fits(row, capacity) else '   NO'
        cells.setdefault(row.optimizer, []).append(cell)
    header = ('optimizer', *dict.fromkeys(f'ViT-{row.variant}' for row in rows))
    return metrics.table(header, [(name, *shown) for name, shown in cells.items()])


def notes(rows: list[Row]) -> list[str]:
    """Notes on combinations that training would reject: the first reason for each model."""
    problems: dict[str, list[Row]] = {}
    for row in rows:
        if row.problem:
            problems.setdefault(row.variant, []).append(row)
    return [
        f'note    {variant} with {", ".join(row.optimizer for row in refused)}: '
        f'{refused[0].problem}'
        for variant, refused in problems.items()
    ]


def to_json(row: Row, capacity: float | None) -> dict[str, Any]:
    """A row in bytes, words per parameter, and multiples of the bytes of the parameters."""
    about = {'variant': row.variant, 'optimizer': row.optimizer, 'problem': row.problem}
    f = row.ledger
    if f is None:
        return about
    uses = {
        'parameters': f.params,
        'averaged_parameters': f.average,
        'optimizer_state': f.optimizer_total,
        **({'task': f.task} if f.task.arrays else {}),
        'counters': f.counters,
        'state': f.state,
        'gradients': f.gradients,
        'state_and_gradients': f.state_and_gradients,
    }
    return {
        **about,
        **{name: use._asdict() for name, use in uses.items()},
        'optimizer_parts': {name: use._asdict() for name, use in f.optimizer.items()},
        'state_in_m': f.state.nbytes / f.params.nbytes,
        'words_per_parameter': f.optimizer_total.scalars / f.params.scalars,
        'fits': fits(row, capacity),
    }


def _names(text: str) -> list[str]:
    return [name for name in text.split(',') if name]


def main(argv: list[str]) -> None:
    args, overrides = command_line.parse(command_line.ledger(), argv)
    spec = args.config
    if args.topology and args.devices is not None:
        raise UserError('--topology and --devices are both given; give one')
    runtime.check_json(args.json)
    config = config_lib.load(spec, overrides)
    names = _names(args.optimizers) or optimizers()
    for name in names:
        with_optimizer(config, name)  # Raises for an unknown name, with the nearest known one.
    configs = [with_variant(config, variant) for variant in _names(args.variants)]
    topology.prepare_environment()
    # This machine's accelerators are not needed, and may be busy.
    jax.config.update('jax_platforms', 'cpu')
    place = topology.load(args.topology or f'cpu:{args.devices or 1}')
    capacity = place.chip.hbm / place.devices_per_chip if place.chip else None
    m = config.mesh
    mesh = sharding.make_mesh(m.replica, m.fsdp, m.tensor, place.devices).shape
    rows = [make_row(item, place.devices, name) for item in configs or [config] for name in names]
    if all(item.ledger is None for item in rows):
        raise UserError(rows[0].problem)
    axes = ', '.join(f'{name} {size}' for name, size in mesh.items())
    room = f', {capacity / GIB:,.2f} GiB each' if capacity else ''
    lines = [f'ledger  {place.name}: {len(place.devices):,} devices{room}, mesh {axes}']
    if configs:
        lines.append('table   GiB on a device of state and gradients, without activations')
        tables = [matrix(rows, capacity)]
    else:
        parts = build_experiment(config, place.devices)
        ledger = measure(parts.abstract_state)
        lines += [
            f'model   ViT-{config.model.variant}: {ledger.params.scalars / 1e6:,.2f} M parameters, '
            f'1× = {ledger.params.nbytes:,} bytes',
            f'state   {line(ledger, ", ".join(parts.settings), len(place.devices))}',
        ]
        tables = [detail(ledger), comparison(rows, capacity)]
    if args.json != '-':
        noted = ['\n'.join(notes(rows))] if notes(rows) else []
        print('\n\n'.join(['\n'.join(lines), *tables, *noted]))
    runtime.write_json(
        args.json,
        {
            'topology': place.name,
            'devices': len(place.devices),
            'mesh': dict(mesh),
            'hbm_of_a_device': capacity,
            'rows': [to_json(item, capacity) for item in rows],
        },
    )


if __name__ == '__main__':
    runtime.command(main)
