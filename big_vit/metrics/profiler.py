"""A trace of some steps, for XProf, TensorBoard or https://ui.perfetto.dev: where the time goes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from big_vit import storage

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
      folder: where the trace comes, one of each host; in an object store without Perfetto's file.
      start: the step at which this process began.
      say: told when the trace is there, or that the run was too short for one.
    """
    first, running, started = start + WARMUP_STEPS, False, False

    def end() -> None:
        nonlocal running
        running = False
        jax.profiler.stop_trace()
        say(f'trace   from step {first} on: {folder}')

    def before(step: int, pending: Any) -> None:
        nonlocal running, started
        if not count or step not in (first, first + count):
            return
        jax.block_until_ready(pending)
        if step == first:
            local = storage.is_local(folder)  # JAX makes Perfetto's file of one that it can open.
            jax.profiler.start_trace(str(folder), create_perfetto_trace=local)
            running = started = True
        else:
            end()

    try:
        yield before
    finally:
        if running:
            end()
        elif count and not started:
            say(f'trace   none: this start ended before step {first + 1}, which would be its first')


def step(number: int) -> contextlib.AbstractContextManager[Any]:
    """Marks a step in the trace that may be running."""
    return jax.profiler.StepTraceAnnotation('train', step_num=number)
