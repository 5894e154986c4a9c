"""What compilers are asked for beyond their defaults, by kind of device.

Each option has its measured gain in docs/performance.md; there are none without.
"""

import os

from jax.sharding import Mesh

# The fast memory that one fused operation may use: larger tiles read large arrays less often,
# and leave less of it for whole arrays that stay there between operations.
_VMEM = 'xla_tpu_scoped_vmem_limit_kib'
# Gradients are summed over the chips in parts of so many bytes, beside what makes the next ones.
_OVERLAPPED = {
    'xla_enable_async_all_reduce': 'true',
    'xla_tpu_enable_async_collective_fusion_fuse_all_reduce': 'true',
    'xla_jf_crs_combiner_threshold_in_bytes': '8000000',
}
OPTIONS: dict[str, dict[str, str]] = {
    'TPU v5 lite': {_VMEM: '28672', **_OVERLAPPED},
    'TPU v5': {_VMEM: '28672'},
    'TPU v6 lite': {_VMEM: '40960'},
}


def options(mesh: Mesh) -> dict[str, str]:
    """For `jax.jit(compiler_options=...)`, but what LIBTPU_INIT_ARGS or XLA_FLAGS say already."""
    said = os.environ.get('LIBTPU_INIT_ARGS', '') + os.environ.get('XLA_FLAGS', '')
    found = OPTIONS.get(mesh.devices.flat[0].device_kind, {})
    return {name: value for name, value in found.items() if f'--{name}=' not in said}
