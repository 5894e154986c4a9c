"""What training keeps in memory, to the byte: parameters, optimizer state, gradients.

    python -m big_vit.ledger --config configs/x.py --topology v5e:16x16

All is told from abstract shapes: neither data nor devices need be there, and nothing is
allocated. What a step takes besides, activations above all, only a compiler knows: that is
`big_vit.plan`.
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the imports that take their time.
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
# What optimizers call their arrays, where the name says little.
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
# Words of paths that say nothing of the use: links of a chain, sizes of blocks, wrappings.
PASSED_OVER = r'\d+(x\d+)?|inner_states?|stacks'


class Held(NamedTuple):
    """Arrays of one use; every device holds as much as any other."""

    arrays: int
    scalars: int
    nbytes: int  # Each array once, however it is split or copied.
    on_device: int  # Bytes on one device.


class Ledger(NamedTuple):
    """What the state and the gradients of a run come to."""

    params: Held
    average: Held  # Of parameters; nothing where the run keeps none.
    optimizer: dict[str, Held]  # By use, such as 'first moment'.
    counters: Held  # Steps, and the losses that spikes are told by.
    gradients: Held  # While stepping: float32, split as the parameters are.

    @property
    def own(self) -> Held:
        """All of the optimizer."""
        return total(*self.optimizer.values())

    @property
    def state(self) -> Held:
        """All that stays from step to step, and that a checkpoint holds."""
        return total(self.params, self.average, self.own, self.counters)

    @property
    def at_most(self) -> Held:
        """State and gradients together."""
        return total(self.state, self.gradients)


def total(*parts: Held) -> Held:
    return Held(*map(sum, zip(*parts, strict=True))) if parts else Held(0, 0, 0, 0)


def held(tree: Any) -> Held:
    """Counts a tree of ShapeDtypeStructs with shardings, or of arrays."""
    return Held(
        len(jax.tree.leaves(tree)),
        trees.count(tree),
        trees.nbytes(tree),
        sharding.device_bytes(tree, state.shardings(tree)),
    )


def use_of(path: str, ndim: int, params: Any) -> str:
    """What an array of the optimizer is for, from its path: 'first moment', 'counters', ...

    The path of a parameter in it says nothing of that.
    """
    if not ndim:
        return 'counters'
    words = itertools.takewhile(lambda word: word not in params, path.split('/'))
    kept = [word for word in words if not re.fullmatch(PASSED_OVER, word)]
    return ' '.join([*kept[:-1], KINDS.get(kept[-1], kept[-1])]) if kept else 'other'


def measure(abstract_state: state.State) -> Ledger:
    """Counts an abstract or a real state."""
    parts: dict[str, list[Any]] = {}
    for path, leaf in trees.flatten(abstract_state['opt']).items():
        parts.setdefault(use_of(path, leaf.ndim, abstract_state['params']), []).append(leaf)
    rest = [abstract_state[name] for name in abstract_state if name not in ('params', 'opt', 'ema')]
    params = held(abstract_state['params'])
    by_device = sum(
        4 * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(abstract_state['params'])
    )
    return Ledger(
        params=params,
        average=held(abstract_state.get('ema', {})),
        optimizer={name: held(leaves) for name, leaves in parts.items()},
        counters=held(rest),
        gradients=params._replace(nbytes=4 * params.scalars, on_device=by_device),
    )


def amount(nbytes: int) -> str:
    return f'{nbytes / 1e9:,.2f} GB' if nbytes >= 1e8 else f'{nbytes / 1e6:,.2f} MB'


def line(found: Ledger, optimizer: str, devices: int) -> str:
    """The ledger in one line, of a device; M is the bytes of the parameters there."""
    uses = {'params': found.params, 'average': found.average, optimizer: found.own}
    m = found.params.on_device
    sizes = ' + '.join(
        f'{name} {amount(use.on_device)} ({use.on_device / m:.2f} M)'
        for name, use in uses.items()
        if use.arrays
    )
    where = f' on a device, {amount(found.state.nbytes)} in all' if devices > 1 else ''
    return f'{sizes}{where}; gradients {amount(found.gradients.on_device)} while stepping'


# Tables.


class Row(NamedTuple):
    """One optimizer for one model; without `found`, `problem` says why it cannot be built."""

    variant: str
    optimizer: str
    found: Ledger | None
    problem: str = ''


def optimizers() -> list[str]:
    """All that the schema offers."""
    return list(registries.OPTIMIZERS.entries())


def of_optimizer(config: Config, name: str) -> Config:
    """The config with another optimizer.

    What `optim` sets that this one does not read is passed over: only a run calls `audit`.
    The schedule has no memory, and 'constant' is what every optimizer takes.
    """
    changes = {'optim.name': name, 'optim.group_rules': None, 'schedule.name': 'constant'}
    return config.replacing({**changes, 'mesh.max_replicated': 1.0})


def row(config: Config, devices: list[jax.Device], optimizer: str) -> Row:
    """The ledger of a config with another optimizer; training may still refuse it: `problem`."""
    try:
        parts = build_experiment(of_optimizer(config, optimizer), devices)
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


def of_variant(config: Config, variant: str) -> Config:
    """The config with another model, in its published size.

    Raises:
      UserError: there is no such model.
    """
    variants.parse(variant)
    sizes = ('width', 'depth', 'mlp_dim', 'num_heads')
    return config.replacing({'model.variant': variant, **{f'model.{k}': None for k in sizes}})


def detail(found: Ledger) -> str:
    """Every use of memory, a line each."""
    unit, count = found.params.nbytes, found.params.scalars
    uses = {
        'parameters': found.params,
        'averaged parameters': found.average,
        **{f'optimizer: {name}': use for name, use in found.optimizer.items()},
        'counters of the run': found.counters,
        'state': found.state,
        'gradients, while stepping': found.gradients,
        'state and gradients': found.at_most,
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
    header = ('held', 'arrays', 'bytes', 'M', 'words a parameter', 'bytes on a device')
    return metrics.table(header, rows)


def fits(one: Row, capacity: float | None) -> bool | None:
    """Whether state and gradients leave any room on a device; None where that is not known."""
    if capacity is None or one.found is None:
        return None
    return one.found.at_most.on_device <= capacity


def comparison(rows: list[Row], capacity: float | None) -> str:
    """A line for each optimizer of one model."""
    header = ['optimizer', 'bytes of its own', 'state, M', 'words a parameter']
    header += ['state on a device', 'GiB with gradients', *(['fits'] if capacity else [])]
    lines = []
    for one in rows:
        f = one.found
        cells = ['-'] * len(header)
        if f is not None:
            cells[1:6] = [
                f'{f.own.nbytes:,}',
                f'{f.state.nbytes / f.params.nbytes:.3f}',
                f'{f.own.scalars / f.params.scalars:.3f}',
                f'{f.state.on_device:,}',
                f'{f.at_most.on_device / GIB:,.3f}',
            ]
            if capacity:
                cells[6] = 'yes' if fits(one, capacity) else 'NO'
        lines.append([one.optimizer, *cells[1:]])
    return metrics.table(header, lines)


def matrix(rows: list[Row], capacity: float | None) -> str:
    """A line for each optimizer, a column for each model; rows come model by model."""
    cells: dict[str, list[str]] = {}
    for one in rows:
        cell = '-' if one.found is None else f'{one.found.at_most.on_device / GIB:,.2f}'
        if capacity is not None and one.found is not None:
            cell += ' fits' if fits(one, capacity) else '   NO'
        cells.setdefault(one.optimizer, []).append(cell)
    header = ('optimizer', *dict.fromkeys(f'ViT-{one.variant}' for one in rows))
    return metrics.table(header, [(name, *shown) for name, shown in cells.items()])


def notes(rows: list[Row]) -> list[str]:
    """What training would refuse: for each model the first of the reasons."""
    found: dict[str, list[Row]] = {}
    for one in rows:
        if one.problem:
            found.setdefault(one.variant, []).append(one)
    return [
        f'note    {variant} with {", ".join(one.optimizer for one in refused)}: '
        f'{refused[0].problem}'
        for variant, refused in found.items()
    ]


def to_json(one: Row, capacity: float | None) -> dict[str, Any]:
    """A row in bytes, words a parameter and units of M."""
    about = {'variant': one.variant, 'optimizer': one.optimizer, 'problem': one.problem}
    f = one.found
    if f is None:
        return about
    uses = {
        'parameters': f.params,
        'averaged_parameters': f.average,
        'optimizer_state': f.own,
        'counters': f.counters,
        'state': f.state,
        'gradients': f.gradients,
        'state_and_gradients': f.at_most,
    }
    return {
        **about,
        **{name: use._asdict() for name, use in uses.items()},
        'optimizer_parts': {name: use._asdict() for name, use in f.optimizer.items()},
        'state_in_m': f.state.nbytes / f.params.nbytes,
        'words_per_parameter': f.own.scalars / f.params.scalars,
        'fits': fits(one, capacity),
    }


def _names(text: str) -> list[str]:
    return [name for name in text.split(',') if name]


def main(argv: list[str]) -> None:
    args, overrides = command_line.parse(command_line.ledger(), argv)
    spec = command_line.require_flag(args.config, '--config', 'configs/vit_b16_i1k.py')
    if args.topology and args.devices is not None:
        raise UserError('--topology and --devices are both given; give one')
    if args.devices is not None and args.devices < 1:
        raise UserError(f'--devices must be at least 1, not {args.devices}')
    runtime.check_json(args.json)
    config = config_lib.load(spec, overrides)
    names = _names(args.optimizers) or optimizers()
    for name in names:
        of_optimizer(config, name)  # Raises, with the nearest that there is.
    configs = [of_variant(config, variant) for variant in _names(args.variants)]
    topology.prepare_environment()
    # The accelerators of this machine are not needed, and may be busy.
    jax.config.update('jax_platforms', 'cpu')
    place = topology.load(args.topology or f'cpu:{args.devices or 1}')
    capacity = place.chip.hbm / place.devices_per_chip if place.chip else None
    m = config.mesh
    mesh = sharding.make_mesh(m.replica, m.fsdp, m.tensor, place.devices).shape
    rows = [row(one, place.devices, name) for one in configs or [config] for name in names]
    if all(one.found is None for one in rows):
        raise UserError(rows[0].problem)
    axes = ', '.join(f'{name} {size}' for name, size in mesh.items())
    room = f', {capacity / GIB:,.2f} GiB each' if capacity else ''
    lines = [f'ledger  {place.name}: {len(place.devices):,} devices{room}, mesh {axes}']
    if configs:
        lines.append('table   GiB on a device of state and gradients, without activations')
        tables = [matrix(rows, capacity)]
    else:
        parts = build_experiment(config, place.devices)
        found = measure(parts.abstract_state)
        lines += [
            f'model   ViT-{config.model.variant}: {found.params.scalars / 1e6:,.2f} M parameters, '
            f'M = {found.params.nbytes:,} bytes',
            f'state   {line(found, ", ".join(parts.settings), len(place.devices))}',
        ]
        tables = [detail(found), comparison(rows, capacity)]
    if args.json != '-':
        noted = ['\n'.join(notes(rows))] if notes(rows) else []
        print('\n\n'.join(['\n'.join(lines), *tables, *noted]))
    runtime.put_json(
        args.json,
        {
            'topology': place.name,
            'devices': len(place.devices),
            'mesh': dict(mesh),
            'hbm_of_a_device': capacity,
            'rows': [to_json(one, capacity) for one in rows],
        },
    )


if __name__ == '__main__':
    runtime.command(main)
