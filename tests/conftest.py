"""Configure JAX for tests: eight fake devices, strict broadcasting, a persistent compile cache."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.cache' / 'xla'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

# Tests compile a lot and compute little: without LLVM's optimisations, with the older emitters and
# in one piece, programs compile in a third of the time.
FLAGS = (
    'xla_backend_optimization_level=0',
    'xla_cpu_use_fusion_emitters=false',
    'xla_cpu_parallel_codegen_split_count=1',
)
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *(f'--{f}' for f in FLAGS)])

import jax  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
