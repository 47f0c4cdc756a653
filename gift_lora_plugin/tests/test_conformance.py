"""LoRA keeps every promise of the conformance kit."""

from __future__ import annotations

from collections.abc import Callable

from gift_core.testing import check_distribution, parametrize_with_checks
from gift_lora_plugin import LoRAAllFineTuningStrategy, LoRAConvFineTuningStrategy, LoRALinearFineTuningStrategy


@parametrize_with_checks([LoRAAllFineTuningStrategy(), LoRALinearFineTuningStrategy(rank=2), LoRAConvFineTuningStrategy()])
def test_conformance(check: Callable[[], None]) -> None:
    """Each strategy keeps the promise that the check's docstring states."""
    check()


def test_packaging() -> None:
    """The distribution is packaged as the kit asks."""
    wrong = [str(result) for result in check_distribution("gift-lora-plugin") if not result.ok]

    assert wrong == []
