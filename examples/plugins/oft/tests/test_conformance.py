"""The strategy keeps every promise of the conformance kit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from gift_oft_plugin import OFTFineTuningStrategy

from gift_core import isolated_plugins, register_strategy
from gift_core.testing import parametrize_with_checks


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The strategy under its name, also where the project is not installed."""
    with isolated_plugins():
        register_strategy("oft", OFTFineTuningStrategy)
        yield


@parametrize_with_checks([OFTFineTuningStrategy()])
def test_conformance(check: Callable[[], None]) -> None:
    """The strategy keeps the promise that the check's docstring states."""
    check()
