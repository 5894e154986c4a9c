"""A trace of some steps, for XProf, TensorBoard or https://ui.perfetto.dev: where the time goes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

# Until here caches fill: of programs, of the loader, of the file system.
WARMUP_STEPS = 10


@contextlib.contextmanager
def tracer(
    folder: epath.Path, start: int, count: int, say: Callable[[str], None]
) -> Iterator[Callable[[int, Any], None]]:
    """Traces `count` steps of a run from its tenth on; 0 traces none.

    Yields a function to be called before each step with its number and the results of the steps
    that may not be over yet, which the trace waits for.

    Args:
      folder: where the trace comes, one of each host; any place that TensorFlow-free JAX writes.
      start: the step at which this process began.
      say: told when the trace is there.
    """
    first, running = start + WARMUP_STEPS, False

    def end() -> None:
        nonlocal running
        running = False
        jax.profiler.stop_trace()
        say(f'trace   from step {first} on: {folder}')

    def before(step: int, pending: Any) -> None:
        nonlocal running
        if not count or step not in (first, first + count):
            return
        jax.block_until_ready(pending)
        if running:
            end()
        elif step == first:
            jax.profiler.start_trace(str(folder), create_perfetto_trace=True)
            running = True

    try:
        yield before
    finally:
        if running:
            end()


def step(number: int) -> contextlib.AbstractContextManager[Any]:
    """Marks a step in the trace that may be running."""
    return jax.profiler.StepTraceAnnotation('train', step_num=number)
