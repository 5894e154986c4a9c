"""TPUs that are not there: their devices, for the compiler, and what their chips can do."""

import contextlib
import importlib.metadata
import os
import re
from typing import Any, NamedTuple

import jax

from big_vit.errors import UserError


class Chip(NamedTuple):
    """One kind of TPU chip, from Google's data sheets.

    `clock` follows from the peak rate and the number of matrix units; it turns the
    compiler's cycles into seconds, as an estimate. The data-centre figure is a chip's
    share of its host's network.
    """

    peak_flops: float  # bfloat16, per second and chip.
    clock: float  # Hz.
    hbm: float  # Bytes that a program can use, as the compiler says.
    links: float  # Bytes per second out of a chip, over all of its links to neighbours.
    network: float  # Bytes per second out of a chip's share of the data-centre network.
    dimensions: int  # Of the torus.
    options: dict[str, str]  # How libtpu is asked for it.


GIB = 2**30
CHIPS = {
    'v4': Chip(275e12, 1.05e9, 30.75 * GIB, 300e9, 6.25e9, 3, {'chip_config_name': 'megacore'}),
    'v5e': Chip(197e12, 1.5e9, 15.75 * GIB, 200e9, 3.125e9, 2, {}),
    'v5p': Chip(459e12, 1.75e9, 95.74 * GIB, 600e9, 6.25e9, 3, {}),
    'v6e': Chip(918e12, 1.75e9, 31.25 * GIB, 448e9, 12.5e9, 2, {}),
    'tpu7x': Chip(2307e12, 2.2e9, 189.5 * GIB, 1200e9, 12.5e9, 3, {}),
}
EXAMPLES = {2: '4x4, 8x8 or 16x16', 3: '4x4x4, 4x4x8 or 8x8x8'}


class Topology(NamedTuple):
    name: str
    devices: list[jax.Device]
    chips: int
    hosts: int
    slices: int
    chip: Chip | None  # None for a machine's own CPU or GPU devices.

    @property
    def devices_per_chip(self) -> int:
        return len(self.devices) // self.chips


def prepare_environment() -> None:
    """Must run before libtpu is loaded: keeps it from looking for TPUs, and from its lock file."""
    defaults = {
        'TPU_SKIP_MDS_QUERY': '1',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
        'TPU_WORKER_HOSTNAMES': 'localhost',
        'TPU_STDERR_LOG_LEVEL': '3',
        'TPU_MIN_LOG_LEVEL': '3',
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def wanted_libtpu() -> str:
    """The version of libtpu that goes with this jax, such as '0.0.42.*'."""
    for line in importlib.metadata.requires('jax') or []:
        found = re.match(r'libtpu\s*==\s*([\d.*]+)', line.replace('(', ''))
        if found:
            return found[1]
    return ''


def check_libtpu() -> None:
    """Raises UserError, with the pip line, where libtpu is missing or of another version."""
    wanted = wanted_libtpu()
    how = f"pip install 'libtpu=={wanted}'"
    try:
        have = importlib.metadata.version('libtpu')
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f'the TPU compiler is not installed: {how} (or pip install -e ".[plan]")'
        ) from None
    if wanted and not re.match(re.escape(wanted).replace(r'\*', '.*') + '$', have):
        raise UserError(
            f'libtpu {have} does not go with jax {jax.__version__}, which wants {wanted}: {how}'
        )


def load(name: str, slices: int = 1) -> Topology:
    """'v5e:16x16' and such as a `Topology`; 'cpu:8' and 'gpu:8' are this machine's own devices.

    Args:
      slices: TPU slices of this shape, joined by the data-centre network.

    Raises:
      UserError: no such topology, or libtpu does not fit.
    """
    kind, _, shape = name.partition(':')
    valid = '; '.join(f'{k}:{EXAMPLES[c.dimensions]}' for k, c in CHIPS.items()) + '; cpu:8; gpu:8'
    if kind in ('cpu', 'gpu') and shape.isdigit() and int(shape):
        return _local(kind, int(shape), slices)
    sizes = shape.split('x')
    if kind not in CHIPS or not all(n.isdigit() and int(n) for n in sizes):
        raise UserError(f'--topology: there is no {name!r}; examples are {valid}')
    chip = CHIPS[kind]
    if len(sizes) != chip.dimensions:
        raise UserError(
            f'--topology: {name!r}: {kind} slices have {chip.dimensions} dimensions, '
            f'such as {kind}:{EXAMPLES[chip.dimensions]}'
        )
    check_libtpu()
    prepare_environment()
    from jax.experimental import topologies

    options: dict = dict(chip.options)
    if shape == '1x1':
        options['chips_per_host_bounds'] = [1, 1, 1]
    if slices > 1:
        options['num_slices'] = slices
    try:
        found = topologies.get_topology_desc(platform='tpu', topology_name=name, **options)
    except Exception as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(
            f'--topology: the compiler does not accept {name!r} ({reason}); examples are {valid}'
        ) from None
    chips = slices
    for n in sizes:
        chips *= int(n)
    devices: list[Any] = list(found.devices)
    hosts = len({device.process_index for device in devices})
    return Topology(name, devices, chips, hosts, slices, chip)


def _local(kind: str, count: int, slices: int) -> Topology:
    name = f'{kind}:{count}'
    if slices > 1:
        raise UserError(f'--slices: {name} has no slices')
    if kind == 'cpu':
        with contextlib.suppress(RuntimeError):  # JAX has started already: they are what they are.
            jax.config.update('jax_num_cpu_devices', count)
    try:
        devices = jax.devices(kind)
    except RuntimeError:
        raise UserError(
            f'--topology: {name}: this machine has no GPU that JAX can use; GPU programs can only '
            "be compiled where one is, with pip install -e '.[cuda]'"
        ) from None
    if len(devices) < count:
        raise UserError(f'--topology: {name}: this machine has {len(devices)} {kind} device(s)')
    return Topology(name, devices[:count], count, 1, 1, None)
