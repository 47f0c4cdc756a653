"""Whole state dicts on disk: reading a base model's weights, writing merged ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gift_core.atomic import atomic_path
from gift_core.errors import AdapterWriteError, StateDictError


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a base model's weights, strictly.

    Args:
        model: the model; it is not tuned.
        path: a safetensors file, or one of `torch.save` with a state dict in it, which is read without running code.

    Raises:
        StateDictError: if the file cannot be read, holds no state dict, or one that does not fit the model.
    """
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise StateDictError(f"{path} does not fit the model: {error}\nLoad the weights of this very model.") from error


def save_weights(model: nn.Module, path: Path, *, force: bool) -> int:
    """Write a model's state dict as safetensors, atomically.

    Tensors that share memory, as tied weights do, are written once under each of their names.

    Returns:
        The file's size in bytes.

    Raises:
        StateDictError: if the state dict holds something that is no tensor.
        AdapterWriteError: if the file cannot be written, or is there and ``force`` is false; what was there is intact.
    """
    refuse_overwriting(path, force)
    tensors = {key: _apart(key, value) for key, value in model.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    return path.stat().st_size


def refuse_overwriting(path: Path, force: bool) -> None:
    """Refuse to write where something is.

    Raises:
        AdapterWriteError: if there is a file, and ``force`` is false.
    """
    if path.exists() and not force:
        raise AdapterWriteError(f"{path} exists already: choose another name, or overwrite it with --force.")


def _apart(key: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise StateDictError(f"{key!r} is of type {type(value).__name__}, and safetensors holds tensors only: save it apart.")
    # safetensors refuses tensors that share memory
    return value.detach().to("cpu", copy=True).contiguous()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise StateDictError(f"{path} cannot be read as safetensors: {error}. Get a fresh copy.") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets
        raise StateDictError(
            f"{path} cannot be read as a state dict saved by torch.save ({type(error).__name__}: {error}). "
            "Files that need code to be read are refused: save model.state_dict() instead."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        keys = f" with {', '.join(map(str, list(state)[:5]))}" if isinstance(state, Mapping) else ""
        raise StateDictError(f"{path} holds a {type(state).__name__}{keys}, no state dict: save model.state_dict() by itself.")
    return dict(state)
