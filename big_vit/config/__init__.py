"""Configs: a Python file of choices, checked against one schema before anything runs."""

from big_vit.config.config import (
    RESUMABLE,
    STARRED,
    Config,
    check_keys,
    check_names,
    difference,
    differing,
    digest,
    flatten,
    from_json,
    load,
    nearest_key,
    override,
    resolve,
    steps,
    with_values,
)

__all__ = [
    'RESUMABLE',
    'STARRED',
    'Config',
    'check_keys',
    'check_names',
    'difference',
    'differing',
    'digest',
    'flatten',
    'from_json',
    'load',
    'nearest_key',
    'override',
    'resolve',
    'steps',
    'with_values',
]
