"""Top-1, top-5 and loss over a whole split, each example counted once."""

from collections.abc import Callable, Iterable
from typing import Any

import jax


def run(
    eval_step: Callable[[Any, Any], dict[str, jax.Array]], params: Any, batches: Iterable[Any]
) -> dict[str, float]:
    """{'loss', 'top1', 'top5', 'count'}: means over the real examples, and how many they are."""
    parts: list[dict[str, jax.Array]] = []
    for batch in batches:
        parts.append(eval_step(params, batch))
        if len(parts) > 2:  # Waiting two behind bounds the batches that wait on the devices.
            jax.block_until_ready(parts[-3])
    fetched = jax.device_get(parts)
    sums = {name: sum(float(part[name]) for part in fetched) for name in fetched[0]}
    count = sums.pop('count')
    return {**{name: value / count for name, value in sums.items()}, 'count': count}
