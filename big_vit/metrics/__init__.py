"""Metrics of a run: rows, the console, trackers and traces."""

from big_vit.metrics.best import Best, has_direction, lower_is_better
from big_vit.metrics.collapse import Collapse, collapses
from big_vit.metrics.console import Clock, Console, duration, table
from big_vit.metrics.writer import (
    FILE,
    LOSSES,
    RESUMED,
    REWRITE_EVERY_S,
    TIMING,
    Writer,
    headlines,
    host_memory_mb,
    is_share,
    latest,
    montage,
    read,
    shown,
)

__all__ = [
    'FILE',
    'LOSSES',
    'RESUMED',
    'REWRITE_EVERY_S',
    'TIMING',
    'Best',
    'Clock',
    'Collapse',
    'Console',
    'Writer',
    'collapses',
    'duration',
    'has_direction',
    'headlines',
    'host_memory_mb',
    'is_share',
    'latest',
    'lower_is_better',
    'montage',
    'read',
    'shown',
    'table',
]
