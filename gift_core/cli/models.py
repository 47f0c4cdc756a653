"""MODEL on the command line: from text to a module.

======================================  ===========================================================================
``torchvision:resnet18``                a model of torchvision by its name, with random weights
``package.module:callable``             a function, or a class, of a module that can be imported from here
``file.py:callable``                    the same of a file
======================================  ===========================================================================

The callable takes no arguments and gives a module. Nothing here imports torch before a model is built.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from gift_core.errors import ModelError
from gift_core.plugins import nearest

if TYPE_CHECKING:
    from torch import nn

FORMS = "torchvision:resnet18, package.module:callable or file.py:callable"


class ModelNotFoundError(ModelError, LookupError):
    """There is no model, module, file or callable of the name given as MODEL."""


def model_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """The argument MODEL, which the verb gets as text for `build_model`."""
    return click.argument("model", callback=well_formed)(command)


def build_model(text: str) -> nn.Module:
    """Build the model that MODEL names.

    Raises:
        ModelNotFoundError: if the package, module, file or callable is not there; the message has the nearest names.
        ModelError: if importing or calling it fails, it wants arguments, or it gives no module.
    """
    place, _, name = text.rpartition(":")
    if place == "torchvision":
        return _build(_torchvision(name), text)
    import torch  # noqa: F401 - before the user's folder is searched, where a file may be named like one that torch imports

    with _importing_from(Path(place).parent if _is_file(place) else Path.cwd()):
        return _build(_callable(_module(place), place, name), text)


def well_formed(ctx: click.Context, argument: click.Parameter, text: str | None) -> str | None:
    """The callback of an option, or an argument, that takes MODEL: refuses as wrong usage what has none of its forms."""
    if text is None:
        return None
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise click.BadParameter(f"{text!r} is not of the form {FORMS}.", ctx, argument)
    return text


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    # a console script, other than "python file.py" and "python -m", does not search the folder it is run in
    before = list(sys.path)
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path[:] = before


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place or "\\" in place


# --- torchvision


def _torchvision(name: str) -> Callable[[], object]:
    try:
        models = importlib.import_module("torchvision").models
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise _failure("importing torchvision", error) from error
        raise ModelNotFoundError("torchvision is not installed: pip install torchvision, or name a model of your own.") from error
    except Exception as error:
        raise _failure("importing torchvision", error) from error
    names = models.list_models()
    if name not in names:
        raise ModelNotFoundError(f"torchvision has no model {name!r}{_suggest(name, names)}")
    # a detection model downloads the weights of its backbone unless it is told not to
    takes = inspect.signature(models.get_model_builder(name)).parameters
    none = {key: None for key in ("weights", "weights_backbone") if key in takes}
    return lambda: models.get_model(name, **none)


# --- modules and files


def _module(place: str) -> ModuleType:
    return _from_file(Path(place)) if _is_file(place) else _from_package(place)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        siblings = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ModelNotFoundError(f"there is no file {str(path)!r}{_suggest(path.name, siblings)}")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if spec is None or spec.loader is None:
        raise ModelError(f"{str(path)!r} is no Python file: name one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    # registered as an import would, since dataclasses and pickles look their module up; never over one that is there
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if sys.modules.get(path.stem) is module:
            del sys.modules[path.stem]
        raise _failure(f"importing {str(path)!r}", error) from error
    return module


def _from_package(place: str) -> ModuleType:
    if not all(part.isidentifier() for part in place.split(".")):
        raise ModelNotFoundError(f"{place!r} is no module name: write MODEL as {FORMS}.")
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise _failure(f"importing {place!r}", error) from error
        parent, _, missing = error.name.rpartition(".")
        raise ModelNotFoundError(f"there is no module {error.name!r}{_suggest(missing, _modules_in(parent))}") from error
    except (Exception, SystemExit) as error:
        raise _failure(f"importing {place!r}", error) from error


def _modules_in(parent: str) -> list[str]:
    path = getattr(sys.modules.get(parent), "__path__", ()) if parent else None
    return [module.name for module in pkgutil.iter_modules(path)]


def _callable(module: ModuleType, place: str, name: str) -> object:
    target: object = module
    for part in name.split("."):
        try:
            target = getattr(target, part)
        except AttributeError as error:
            names = [other for other in dir(target) if not other.startswith("_") and callable(getattr(target, other, None))]
            raise ModelNotFoundError(f"{place} has no {part!r}{_suggest(part, names)}") from error
    return target


# --- building


def _build(target: object, text: str) -> nn.Module:
    from torch import nn

    if isinstance(target, nn.Module):
        return target
    if not callable(target):
        raise ModelError(f"{text} is {_kind(target)}: name a callable that takes no arguments and gives a torch.nn.Module.")
    _refuse_arguments(target, text)
    try:
        model = target()
    except (Exception, SystemExit) as error:
        raise _failure(f"calling {text}", error) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{text} gave {_kind(model)}: name a callable that gives a torch.nn.Module.")
    return model


def _refuse_arguments(target: Callable[..., object], text: str) -> None:
    try:
        signature = inspect.signature(target)
    except ValueError:
        return  # written in C, without a signature: calling it tells
    try:
        signature.bind()
    except TypeError as error:
        raise ModelError(f"{text} wants arguments ({error}): write a function without any that calls it, and name that.") from error


def _kind(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _suggest(name: str, names: Iterable[str]) -> str:
    similar = nearest(name, names)
    return f"; did you mean {' or '.join(map(repr, similar))}?" if similar else "."


def _failure(doing: str, error: BaseException) -> ModelError:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    what = "ended the program" if isinstance(error, SystemExit) else f"raised {type(error).__name__}: {error}"
    return ModelError(f"{doing} {what}{place}.")
