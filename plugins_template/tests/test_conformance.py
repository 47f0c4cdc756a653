"""The strategy keeps every promise that a strategy makes."""

from __future__ import annotations

from collections.abc import Callable

from gift_core.testing import parametrize_with_checks

from gift_template_plugin import TemplateStrategy


@parametrize_with_checks([TemplateStrategy()])
def test_conformance(check: Callable[[], None]) -> None:
    """Each check of the conformance kit passes on every model that the strategy suits."""
    check()
