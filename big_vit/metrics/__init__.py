"""Metrics of a run: rows, the console, trackers and traces."""

from big_vit.metrics.best import Best, lower_is_better
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
    'Console',
    'Writer',
    'duration',
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
