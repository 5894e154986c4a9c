"""Configure JAX for tests: eight fake devices, strict broadcasting, a persistent compile cache."""

import gc
import os
import signal
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

# Commands of tests are sent Ctrl-C, which they would ignore as we do when started by `make test &`.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tracing makes many objects and few cycles; looking for these less often saves a tenth of the time.
gc.set_threshold(200_000, 50, 50)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Where arrays are checked against the shapes of annotations. That doubles the time to trace, so
# `make test` does it for the tests of test_shapes.py alone.
TYPED = (
    *('big_vit.models', 'big_vit.data', 'big_vit.tasks', 'big_vit.optim', 'big_vit.evaluators'),
    'big_vit.inspection.plots',
)
hypothesis.settings.register_profile('gate', max_examples=6, deadline=None)
hypothesis.settings.register_profile('full', max_examples=100, deadline=None)

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')

# These come first, so that at the end no process waits for the other.
LONG = (
    *('test_train', 'test_readme', 'test_steps', 'test_contrastive', 'test_evaluate'),
    *('test_transfer', 'test_plan', 'test_sweep', 'test_hosts'),
)


def pytest_configure(config):
    gate = config.option.markexpr == 'not slow'
    hypothesis.settings.load_profile('gate' if gate else 'full')
    if not gate:
        jaxtyping.install_import_hook(TYPED, 'beartype.beartype')


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True, scope='module')
def forget_programs():
    """Free the programs of a file: a process with those of all would take gigabytes."""
    yield
    jax.clear_caches()
