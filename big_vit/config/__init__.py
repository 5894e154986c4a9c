"""Configs: a Python file of choices, checked against one schema before anything runs."""

from big_vit.config.config import (
    RESUMABLE,
    STARRED,
    Config,
    check_names,
    difference,
    differing,
    digest,
    flatten,
    from_json,
    load,
    override,
    resolve,
    steps,
    with_values,
)

__all__ = [
    'RESUMABLE',
    'STARRED',
    'Config',
    'check_names',
    'difference',
    'differing',
    'digest',
    'flatten',
    'from_json',
    'load',
    'override',
    'resolve',
    'steps',
    'with_values',
]
