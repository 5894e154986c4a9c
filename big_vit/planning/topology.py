"""TPU topologies for ahead-of-time compilation, and the capabilities of their chips."""

import contextlib
import importlib.metadata
import os
import re
from typing import Any, NamedTuple

import jax

from big_vit.errors import UserError


class Chip(NamedTuple):
    """One kind of TPU chip, from Google's data sheets.

    Attributes:
      peak_flops: bfloat16 operations per second and chip.
      clock: Hz, derived from the peak rate and the number of matrix units; converts the
        compiler's cycles into seconds, as an estimate.
      hbm: bytes that a program can use, as reported by the compiler.
      links: bytes per second out of a chip, over all links to its neighbours.
      network: bytes per second of the data-centre network, a chip's share of its host's.
      dimensions: of the torus.
      options: arguments by which libtpu selects the chip.
    """

    peak_flops: float
    clock: float
    hbm: float
    links: float
    network: float
    dimensions: int
    options: dict[str, str]


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
    """Devices to compile for; `chip` is None for this machine's own CPU or GPU devices."""

    name: str
    devices: list[jax.Device]
    chips: int
    hosts: int
    slices: int
    chip: Chip | None

    @property
    def devices_per_chip(self) -> int:
        """Number of JAX devices per chip; two on chips with separate cores."""
        return len(self.devices) // self.chips


def prepare_environment() -> None:
    """Keeps libtpu from searching for TPUs and from its lock file; call before it is loaded."""
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
    """Version of libtpu that this jax requires, such as '0.0.42.*'; '' if it names none."""
    for line in importlib.metadata.requires('jax') or []:
        match = re.match(r'libtpu\s*==\s*([\d.*]+)', line.replace('(', ''))
        if match:
            return match[1]
    return ''


def check_libtpu() -> None:
    """Raises UserError, with the pip command, if libtpu is missing or the wrong version."""
    wanted = wanted_libtpu()
    fix = f"pip install 'libtpu=={wanted}'"
    try:
        version = importlib.metadata.version('libtpu')
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f'the TPU compiler is not installed: {fix} (or pip install "big_vit[plan]")'
        ) from None
    if wanted and not re.match(re.escape(wanted).replace(r'\*', '.*') + '$', version):
        raise UserError(
            f'libtpu {version} does not go with jax {jax.__version__}, which wants {wanted}: {fix}'
        )


def load(name: str, slices: int = 1) -> Topology:
    """Loads a topology by name: 'v5e:16x16' etc., or 'cpu:8' and 'gpu:8' for local devices.

    Args:
      name: kind of chip and shape of a slice.
      slices: number of TPU slices of this shape, joined by the data-centre network.

    Raises:
      UserError: no such topology, or libtpu is missing or the wrong version.
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
        description = topologies.get_topology_desc(platform='tpu', topology_name=name, **options)
    except Exception as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(
            f'--topology: the compiler does not accept {name!r} ({reason}); examples are {valid}'
        ) from None
    chips = slices
    for n in sizes:
        chips *= int(n)
    devices: list[Any] = list(description.devices)
    hosts = len({device.process_index for device in devices})
    return Topology(name, devices, chips, hosts, slices, chip)


def _local(kind: str, count: int, slices: int) -> Topology:
    name = f'{kind}:{count}'
    if slices > 1:
        raise UserError(f'--slices: {name} has no slices')
    if kind == 'cpu':
        with contextlib.suppress(RuntimeError):  # JAX has already started: too late to change.
            jax.config.update('jax_num_cpu_devices', count)
    try:
        devices = jax.devices(kind)
    except RuntimeError:
        raise UserError(
            f'--topology: {name}: this machine has no GPU that JAX can use; GPU programs can only '
            "be compiled where one is, with pip install 'big_vit[cuda]'"
        ) from None
    if len(devices) < count:
        raise UserError(f'--topology: {name}: this machine has {len(devices)} {kind} device(s)')
    return Topology(name, devices[:count], count, 1, 1, None)
