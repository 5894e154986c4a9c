"""Memory that a call takes, without that of the process around it."""

import tracemalloc
from collections.abc import Callable
from typing import Any


def peak_of(call: Callable[[], Any]) -> tuple[Any, int]:
    """Return the result of a call, and the most bytes of Python and NumPy it held at once."""
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
