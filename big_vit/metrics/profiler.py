"""Traces of a few steps, for XProf, TensorBoard or https://ui.perfetto.dev."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from big_vit import storage

# Steps in which caches still fill: of programs, of the loader, of the file system.
WARMUP_STEPS = 10


@contextlib.contextmanager
def tracer(
    folder: epath.Path, start: int, count: int, say: Callable[[str], None]
) -> Iterator[Callable[[int, Any], None]]:
    """Trace a few steps of a run, after its first ten.

    Args:
      folder: where each host writes its trace; in an object store without Perfetto's file.
      start: the step at which this process began.
      count: number of steps to trace; 0 traces none.
      say: prints a line when the trace is written, or if the run was too short for one.

    Yields:
      A function to call before each step with its number and the results of the steps that may
      still be computed, which the trace waits for.
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
            local = storage.is_local(folder)  # JAX converts for Perfetto only what it can open.
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
    """Mark a step in the trace that may be running."""
    return jax.profiler.StepTraceAnnotation('train', step_num=number)
