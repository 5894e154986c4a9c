"""XLA compiler options beyond the defaults, by kind of device.

docs/performance.md has the measured gain of each; options without one are not here.
"""

import os

from jax.sharding import Mesh

# Fast memory available to one fused operation. Larger tiles read large arrays less often, but
# leave less room for arrays that stay in fast memory between operations.
_VMEM = 'xla_tpu_scoped_vmem_limit_kib'
# All-reduce gradients in chunks of 8 MB during the backward pass instead of all at its end.
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
    """Options for `jax.jit(compiler_options=...)`, except those set by environment variables."""
    user_flags = os.environ.get('LIBTPU_INIT_ARGS', '') + os.environ.get('XLA_FLAGS', '')
    device_options = OPTIONS.get(mesh.devices.flat[0].device_kind, {})
    return {name: value for name, value in device_options.items() if f'--{name}=' not in user_flags}
