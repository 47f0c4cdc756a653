"""What every part of the table of refusals is made of: a case, models in some state, and ways to call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from click.testing import CliRunner
from low_rank import LowRankStrategy
from models import cnn, input_for, train
from torch import nn

from gift_core import enable_fine_tuning, merge
from gift_core.cli import main
from gift_core.errors import GiftError
from gift_core.factories import is_instance

#: A name, a model, the call that is refused with a folder of its own, and what the message has to name.
Case = tuple[str, Callable[[], nn.Module], Callable[[Any, Path], Any], str]

LINEAR = is_instance("Linear")


def bystander() -> nn.Module:
    """A model for a call that is about none."""
    return nn.Linear(1, 1)


def tuned(builder: Callable[[], nn.Module] = cnn) -> Callable[[], nn.Module]:
    """A builder of a trained model."""

    def build() -> nn.Module:
        model = builder()
        enable_fine_tuning(model, LowRankStrategy(rank=2))
        train(model, input_for(builder))
        return model

    return build


def merged_model() -> nn.Module:
    """A trained model, merged."""
    model = tuned()().eval()
    merge(model)
    return model


def broken(fault: Callable[[Any], Any], builder: Callable[[], nn.Module] = cnn) -> Callable[[], nn.Module]:
    """A builder of a model to which something was done."""

    def build() -> nn.Module:
        model = builder()
        return fault(model) or model

    return build


def enabling(strategy: Callable[[], Any]) -> Callable[[Any, Path], Any]:
    """Making a strategy and enabling it."""
    return lambda model, _: enable_fine_tuning(model, strategy())


def everything(*_: Any) -> bool:
    """A check that every site passes."""
    return True


def prepared(call: Callable[[Any, Path], Any]) -> Callable[[Any, Path], Any]:
    """The call, in which what comes before the refusal may draw random numbers."""

    def run(model: Any, folder: Path) -> Any:
        with torch.random.fork_rng(devices=[]):
            return call(model, folder)

    return run


def write_then(text: str, call: Callable[[Any, Path], Any], name: str = "adapter.safetensors") -> Callable[[Any, Path], Any]:
    """Writing a text into a file, and a call with its path."""

    def run(model: Any, folder: Path) -> Any:
        (folder / name).write_text(text)
        return call(model, folder / name)

    return run


def command(*arguments: str) -> Callable[[Any, Path], Any]:
    """Running ``gift`` with arguments, in which ``{folder}`` is the case's; the error is the one whose message it shows."""

    def run(_: Any, folder: Path) -> Any:
        with torch.random.fork_rng(devices=[]):  # a model that is built draws
            given = [argument.replace("{folder}", str(folder)) for argument in arguments]
            result = CliRunner().invoke(main, given, standalone_mode=False)
        error = result.exception
        if isinstance(error, click.ClickException) and isinstance(error.__cause__, GiftError):
            assert error.message == str(error.__cause__) and error.exit_code in (1, 3)
        if error is not None:
            try:
                raise error
            except click.ClickException:
                raise error.__cause__ or error  # noqa: B904 - its own cause stays, and the other becomes its context

    return run
