"""A fixture for the tests of a plugin; load it with ``pytest_plugins = ["gift_core.plugins.pytest_plugin"]``.

Nothing of the core imports this module, so that the core needs no pytest.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gift_core.plugins import registry
from gift_core.plugins.settings import PluginSettings


@pytest.fixture
def isolated_plugins() -> Iterator[PluginSettings]:
    """A test in which no installed plugin is seen, only the core's names and what the test registers."""
    with registry.isolated_plugins() as settings:
        yield settings
