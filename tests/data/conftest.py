"""The store in memory as a fixture."""

import fsspec
import pytest
from stores import Store


@pytest.fixture
def store():
    fsspec.register_implementation('counted', Store, clobber=True)
    Store.reset()
    yield Store
    Store.reset()
