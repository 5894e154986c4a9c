"""All of this is slow, for importing torch takes seconds; skipped where a peer is not installed.

docs/interop.md says how to install them.
"""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == 'parity':
            item.add_marker(pytest.mark.slow)
            # What peers warn of is theirs.
            item.add_marker(pytest.mark.filterwarnings('ignore'))
