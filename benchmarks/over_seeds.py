"""What runs of several seeds say together: standard errors, cells of tables, and bars."""

import statistics
from collections.abc import Sequence
from typing import Any


def standard_error(values: list[float]) -> float | None:
    """Return the standard error of a mean over seeds; None for a single seed."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def cell(result: dict[str, Any], name: str) -> str:
    """Format a figure of a start in percent, with its standard error; '' if it has none."""
    mean, error = result['mean'].get(name), result['error'].get(name)
    text = '' if mean is None else f'{100 * mean:.1f}'
    return text + ('' if error is None else f' ± {100 * error:.1f}')


def bars(axis: Any, results: list[dict[str, Any]], name: str, starts: Sequence[str]) -> None:
    """Plot a bar per start, of its own colour in all plots of a study, and a dot per seed."""
    for position, result in enumerate(results):
        colour = f'C{starts.index(result["start"])}'
        axis.bar(position, 100 * result['mean'][name], 0.7, color=colour, alpha=0.75)
        # What no seed changes has none.
        dots = [100 * score for score in result.get('scores', {}).get(name, ())]
        axis.plot([position] * len(dots), dots, 'k.', ms=4)
    axis.grid(axis='y', alpha=0.25)
    axis.spines[['top', 'right']].set_visible(False)
