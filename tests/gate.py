"""Choose which parameters of a test run in `make test`; the others are slow proofs."""

from collections.abc import Container, Iterable

import pytest


def mostly_slow(values: Iterable, *keep: object) -> list:
    """Mark all parameters as slow but those to keep, which are values or names."""
    return [_param(value, keep) for value in values]


def _param(value: object, keep: Container):
    parts = value if isinstance(value, tuple) else (value,)
    return pytest.param(*parts, marks=() if value in keep else pytest.mark.slow)
