"""Adapter files: what is saved comes back from the file alone, and no bad file or full disk does harm."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import (
    ALL,
    Builder,
    Delta,
    attention,
    cnn,
    embedding,
    fingerprint,
    input_for,
    lstm,
    mlp,
    nested,
    refused,
    single,
    tensor_bytes,
    tied,
    train,
)
from safetensors.torch import load_file, save
from torch import Tensor, nn

from gift_core import (
    FineTuningStrategy,
    FullFineTuningStrategy,
    Reparameterization,
    disable_fine_tuning,
    enable_fine_tuning,
    load_adapter,
    merge_and_unload,
    merge_strategies,
    merged,
    read_adapter_info,
    save_adapter,
)
from gift_core.adapter_file import _as_data, _base_digests, _describe, _lost_digits, tensor_digest
from gift_core.adapter_format import FORMAT, Description, Payload, decode, encode
from gift_core.errors import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterNotFoundError,
    AdapterWriteError,
    ModelError,
    StateError,
    StrategyError,
    UnknownStrategyError,
)
from gift_core.factories import is_instance, reparameterize
from gift_core.plugins import isolated_plugins, load_strategy, register_strategy, unregister_strategy
from gift_core.record import adopted_modules
from gift_lora_plugin import LoRAAllFineTuningStrategy, LoRAConvFineTuningStrategy, LoRALinearFineTuningStrategy

BOTH = merge_strategies(LoRALinearFineTuningStrategy(rank=2, targets="head"), FullFineTuningStrategy("conv"))


def tuned(builder: Builder = cnn, strategy: FineTuningStrategy | None = None) -> nn.Module:
    """A model that was enabled and trained, in eval mode."""
    model = builder()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        enable_fine_tuning(model, strategy or LoRAAllFineTuningStrategy(rank=2))
        train(model, input_for(builder))
    return model.eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the adapter goes."""
    return tmp_path / "adapter.safetensors"


def craft(
    path: Path,
    tensors: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
    description: Callable[[dict[str, Any]], object] = lambda description: None,
) -> None:
    """Change what a file holds and give it a digest that is right."""
    info, found = decode(path)
    content = dict(found.tensors)
    tensors(content)
    said = {key: value for key, value in info.to_dict().items() if key in Description.__dataclass_fields__}
    payload = Payload.of(content)
    _, start = encode(Description(**said), payload)
    length = int.from_bytes(start[:8], "little")
    header = json.loads(start[8 : 8 + length])
    described = json.loads(header["__metadata__"][FORMAT])
    # what was said of the base stays, because `encode` was given no more than the starts of its digests
    described["base_digest"] = info.base_digest
    description(described)
    header["__metadata__"][FORMAT] = json.dumps(described)
    text = json.dumps(header, separators=(",", ":")).encode()
    data = len(text).to_bytes(8, "little") + text + b"".join(payload.parts())
    place = data.index(header["__metadata__"]["digest"].encode())
    digest = hashlib.sha256(data[:place] + data[place + 64 :]).hexdigest()
    path.write_bytes(data[:place] + digest.encode() + data[place + 64 :])


STRATEGIES: dict[str, tuple[Builder, FineTuningStrategy]] = {
    **{f"lora {builder.__name__}": (builder, LoRAAllFineTuningStrategy(rank=2)) for builder in ALL},
    "linear": (cnn, LoRALinearFineTuningStrategy(rank=2, lora_alpha=4)),
    "conv": (cnn, LoRAConvFineTuningStrategy(rank=2)),
    "conv layout": (cnn, LoRAAllFineTuningStrategy(conv_layout="out_as_h", rank=2)),
    "train bias": (cnn, LoRAAllFineTuningStrategy(train_bias=True, rank=2)),
    "kept head": (cnn, merge_strategies(LoRAConvFineTuningStrategy(rank=2), FullFineTuningStrategy("head"))),
    "kept conv": (cnn, BOTH),
    "BatchNorm": (cnn, merge_strategies(LoRALinearFineTuningStrategy(rank=2), FullFineTuningStrategy("bn"))),
    "full": (cnn, FullFineTuningStrategy()),
    "full, tied": (tied, FullFineTuningStrategy("embedding")),
}


@pytest.mark.parametrize(("builder", "strategy"), STRATEGIES.values(), ids=STRATEGIES)
def test_from_the_file_alone(builder: Builder, strategy: FineTuningStrategy, path: Path) -> None:
    """A fresh base and the file give what the trained model gives, in every bit, merged and unmerged, and can be undone."""
    model, inputs = tuned(builder, strategy), input_for(builder)
    fresh = builder().eval()
    before = fingerprint(fresh)

    save_adapter(model, path)
    load_adapter(fresh, path)

    assert torch.equal(fresh(inputs), model(inputs))
    with merged(fresh), merged(model), torch.no_grad():
        assert torch.equal(fresh(inputs), model(inputs))
    assert {key: tensor_bytes(value) for key, value in fresh.state_dict().items()} == {
        key: tensor_bytes(value) for key, value in model.state_dict().items()
    }
    disable_fine_tuning(fresh)
    assert fingerprint(fresh) == before


def test_a_model_without_shapes_is_refused(path: Path) -> None:
    """A lazy model, whose shapes cannot be compared with a file's, is named, and told to run once."""
    save_adapter(tuned(), path)

    with pytest.raises(ModelError, match=r"'1' \(LazyLinear\) is lazy and has no shapes yet: run one forward pass first"):
        load_adapter(nn.Sequential(nn.ReLU(), nn.LazyLinear(2)), path)


def test_statistics_come_along(path: Path) -> None:
    """BatchNorm's statistics of the tuned model are in the file; statistics that did not move are the base's own."""
    model = tuned()
    still = cnn().eval()
    enable_fine_tuning(still, LoRAAllFineTuningStrategy(rank=2))

    assert "bn.running_mean" in save_adapter(model, path).tensors
    fresh = load_into(cnn(), path)
    assert torch.equal(fresh.get_buffer("bn.running_mean"), model.get_buffer("bn.running_mean"))
    assert "bn.running_mean" not in save_adapter(still, path).tensors
    load_adapter(fresh, path)
    assert torch.equal(fresh.get_buffer("bn.running_mean"), torch.zeros(6))


def load_into(model: nn.Module, path: Path) -> nn.Module:
    """Load and give the model."""
    load_adapter(model, path)
    return model


def test_scratch_buffers_stay_out(path: Path) -> None:
    """A buffer that is not persistent is no part of an adapter, so that a cache that grew does not hinder loading."""
    model = tuned(nested)
    model.register_buffer("scratch", torch.ones(5), persistent=False)

    info = save_adapter(model, path)

    assert "scratch" not in info.tensors
    load_adapter(nested(), path)


def test_what_the_file_says(path: Path) -> None:
    """The description names strategy, provider, sites, tensors and size, and reading gives what saving gave."""
    strategy = LoRAAllFineTuningStrategy(rank=2, conv_layout="out_as_h")
    model = tuned(strategy=strategy)

    info = save_adapter(model, path)

    assert read_adapter_info(path) == info
    assert info.strategy == strategy.to_config()
    assert info.provider is not None and info.provider["distribution"] == "gift-lora-plugin"
    assert info.sites == {"conv": {"weight": "LoRA"}, "head": {"weight": "LoRA"}}
    assert set(info.base) == {"conv.weight", "head.weight"}
    assert info.tensors["conv.lora_B"] == {"shape": [6, 2], "dtype": "float32"}
    assert info.file_bytes == path.stat().st_size
    assert json.loads(json.dumps(info.to_dict())) == info.to_dict()


def test_reading_needs_no_plugin_and_no_model(path: Path) -> None:
    """`read_adapter_info` imports no plugin."""
    save_adapter(tuned(), path)
    code = f"import sys, gift_core; gift_core.read_adapter_info({str(path)!r}); assert 'gift_lora_plugin' not in sys.modules"

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_tuned_model_takes_a_file(path: Path) -> None:
    """A file loads into a model that is tuned with the same strategy, merged or wrapped too, and what it had is replaced."""
    model, inputs = tuned(), input_for(cnn)
    save_adapter(model, path)
    target = cnn().eval()
    enable_fine_tuning(target, LoRAAllFineTuningStrategy(rank=2))
    wrapper = nn.Sequential(target)

    with torch.no_grad(), merged(target):
        base = target(inputs)
        load_adapter(wrapper, path)
        loaded = target(inputs)

    assert not torch.equal(base, loaded)
    assert torch.allclose(loaded, model(inputs), atol=1e-6)
    assert torch.equal(target(inputs), model(inputs))


def test_a_strategy_that_is_no_data(path: Path) -> None:
    """The adapter of a strategy made of functions loads where that strategy is enabled; a plain model is told why not."""

    def strategy() -> FineTuningStrategy:
        return FineTuningStrategy(module_caps=[(is_instance("Linear"), reparameterize(Delta))])

    model = tuned(mlp, strategy())
    save_adapter(model, path)
    target = mlp()
    enable_fine_tuning(target, strategy())

    load_adapter(target, path)

    assert torch.equal(target(input_for(mlp)), model(input_for(mlp)))
    with refused(plain := mlp(), AdapterMismatchError, "no registered name", "enable that strategy"):
        load_adapter(plain, path)


def test_a_plain_model_cannot_be_saved(path: Path) -> None:
    """Saving a model that is not tuned is an error, and no file appears."""
    with pytest.raises(StateError, match="enable_fine_tuning"):
        save_adapter(cnn(), path)

    assert not path.exists()


def test_nothing_is_drawn(path: Path) -> None:
    """Save, read, load (into plain and tuned models), merge and unload draw no random number."""
    model = tuned()
    random = torch.get_rng_state()

    save_adapter(model, path)
    read_adapter_info(path)
    load_adapter(cnn(), path)
    load_adapter(model, path)
    with merged(model):
        pass
    merge_and_unload(model)

    assert torch.equal(torch.get_rng_state(), random)


def test_the_digest_is_of_the_content(path: Path) -> None:
    """Saving the same adapter twice gives the same digest; after another step it is another."""
    model = tuned()
    first = save_adapter(model, path).digest

    again = save_adapter(model, path).digest
    train(model, input_for(cnn), steps=1)

    assert again == first
    assert save_adapter(model, path).digest != first


# --- files that are not sound


def test_no_file(path: Path) -> None:
    """A path without a file is an error of GIFt's and a FileNotFoundError."""
    with refused(model := cnn(), AdapterNotFoundError, str(path)):
        load_adapter(model, path)

    assert issubclass(AdapterNotFoundError, FileNotFoundError)


def test_a_folder(tmp_path: Path) -> None:
    """A folder is no adapter file."""
    with refused(model := cnn(), AdapterFileError, str(tmp_path)):
        load_adapter(model, tmp_path)


def test_truncated(path: Path) -> None:
    """A file that ends early, anywhere, is refused, and the model is as it was."""
    save_adapter(tuned(), path)
    data = path.read_bytes()
    model = cnn()
    before = fingerprint(model)

    for length in (*range(0, len(data), 97), len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(AdapterFileError):
            load_adapter(model, path)

    assert fingerprint(model) == before


def test_more_than_the_file(path: Path) -> None:
    """Bytes after the end are refused."""
    save_adapter(tuned(), path)
    path.write_bytes(path.read_bytes() + b"\0")

    with pytest.raises(AdapterFileError):
        read_adapter_info(path)


def test_every_flipped_bit(path: Path) -> None:
    """No single flipped bit goes unnoticed, and each raises AdapterFileError."""
    model = single()
    # numbers with an exponent and letters outside ASCII have several spellings in JSON
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1, lora_alpha=1e-05))
    save_adapter(model, path)
    craft(path, description=lambda description: description.update(strategy_text="é ∂"))
    data = path.read_bytes()
    read_adapter_info(path)
    silent, other = [], []

    with io.FileIO(path, "r+") as file:
        for bit in range(8 * len(data)):
            _write_at(file, bit // 8, data[bit // 8] ^ (1 << bit % 8))
            try:
                read_adapter_info(path)
                silent.append(bit)
            except AdapterFileError:
                pass
            except Exception as error:
                other.append((bit, error))
            _write_at(file, bit // 8, data[bit // 8])

    assert not silent
    assert not other


def _write_at(file: io.FileIO, position: int, byte: int) -> None:
    file.seek(position)
    file.write(bytes([byte]))


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "text": b"not an adapter\n" * 20,
        "zeros": bytes(4096),
        "ones": b"\xff" * 4096,
        "pickle": pickle.dumps({"weight": [1.0] * 100}),
        "safetensors": save({"weight": torch.ones(3)}),
        "other metadata": save({"weight": torch.ones(3)}, {"format": "pt"}),
        "description no JSON": save({"weight": torch.ones(3)}, {"format": "pt", FORMAT: "{"}),
        "description a list": save({"weight": torch.ones(3)}, {"format": "pt", FORMAT: "[]"}),
        "description empty": save({"weight": torch.ones(3)}, {"format": "pt", FORMAT: "{}"}),
        "deep JSON": save({"weight": torch.ones(3)}, {"format": "pt", FORMAT: "[" * 100_000}),
        "header a list": (2).to_bytes(8, "little") + b"[]",
        "huge header": (2**62).to_bytes(8, "little") + bytes(100),
    }.items(),
    ids=lambda item: item[0],
)
def test_other_formats(content: tuple[str, bytes], path: Path) -> None:
    """A file of another format is refused by its content, whatever it is called, and the model is as it was."""
    path.write_bytes(content[1])

    with refused(model := cnn(), AdapterFileError, str(path)):
        load_adapter(model, path)


def test_a_checkpoint_of_torch(path: Path) -> None:
    """A file of `torch.save` is refused and never unpickled."""
    buffer = io.BytesIO()
    torch.save(_Explodes(), buffer)
    path.write_bytes(buffer.getvalue())

    with pytest.raises(AdapterFileError):
        read_adapter_info(path)


class _Explodes:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_another_format_version(version: object, path: Path) -> None:
    """A format version that this core does not know is refused with the version it reads."""
    save_adapter(tuned(), path)
    craft(path, description=lambda description: description.update(format_version=version))

    with refused(model := cnn(), AdapterFileError, repr(version), "reads 1 and 2"):
        load_adapter(model, path)


@pytest.mark.parametrize("key", ["strategy", "sites", "structure", "base", "base_digest", "provider"])
def test_an_incomplete_description(key: str, path: Path) -> None:
    """A description that lacks a part, or has it of another kind, is refused."""
    save_adapter(tuned(), path)
    craft(path, description=lambda description: description.update({key: 3}))

    with refused(model := cnn(), AdapterFileError, key):
        load_adapter(model, path)


# --- sound files that do not fit


def check_refused(path: Path, *says: str, model: nn.Module | None = None) -> None:
    """Neither a plain nor a tuned model takes the file, and both are as they were."""
    tuned_model = cnn()
    enable_fine_tuning(tuned_model, LoRAAllFineTuningStrategy(rank=2))
    for target in (model,) if model is not None else (cnn(), tuned_model):
        with refused(target, AdapterMismatchError, *says):
            load_adapter(target, path)


def test_another_model(path: Path) -> None:
    """A base of other names or shapes is refused."""
    save_adapter(tuned(), path)

    check_refused(path, model=mlp())
    check_refused(path, model=nn.Sequential(cnn()))
    wider = cnn()
    wider.head = nn.Linear(6, 5)
    check_refused(path, model=wider)
    check_refused(path, "names or shapes", model=tuned(mlp))


def test_another_base(path: Path) -> None:
    """A base of the same shapes with other weights is refused by name, unless the check is switched off."""
    save_adapter(tuned(), path)
    other = cnn()
    with torch.no_grad():
        other.get_parameter("conv.weight")[0, 0, 0, 0] += 1e-6

    check_refused(path, "conv.weight", "trained on", model=other)
    load_adapter(other, path, check_base=False)
    assert torch.equal(other.get_parameter("conv.lora_A"), tuned().get_parameter("conv.lora_A"))


def test_another_dtype(path: Path) -> None:
    """The base in another dtype is another base; with the check off, the adapter takes its dtype."""
    save_adapter(tuned(), path)
    half = cnn().to(torch.bfloat16)

    check_refused(path, model=half)
    load_adapter(half, path, check_base=False)
    assert half.get_parameter("conv.lora_A").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        (LoRAAllFineTuningStrategy(rank=3), "rank is 3 in the model, 2 in the file"),
        (LoRAAllFineTuningStrategy(rank=2, lora_alpha=8), "lora_alpha is 8 in the model, None in the file"),
        (LoRAAllFineTuningStrategy(rank=2, train_bias=True), "train_bias"),
        (LoRAAllFineTuningStrategy(rank=2, conv_layout="out_as_h"), "conv_layout"),
        (LoRALinearFineTuningStrategy(rank=2), "'lora-linear', the file was made with 'lora'"),
        (FullFineTuningStrategy(), "in the file alone ['conv', 'head']"),
    ],
    ids=["rank", "alpha", "bias", "layout", "linear", "full"],
)
def test_another_strategy(strategy: FineTuningStrategy, says: str, path: Path) -> None:
    """A model that is tuned otherwise than the file says is refused with the difference."""
    save_adapter(tuned(), path)

    check_refused(path, says, model=tuned(strategy=strategy))


def test_a_missing_tensor(path: Path) -> None:
    """A file without one of the adapter's tensors is refused by name."""
    save_adapter(tuned(), path)
    craft(path, lambda tensors: tensors.pop("conv.lora_A"))

    check_refused(path, "missing: conv.lora_A")


@pytest.mark.parametrize("key", ["extra", "conv.weight", "conv.bias", "conv.merged_weight"])
def test_an_extra_tensor(key: str, path: Path) -> None:
    """A file with a tensor that is no part of the adapter is refused; it can never write into the frozen base."""
    save_adapter(tuned(), path)
    shape = cnn().get_parameter(key).shape if key in ("conv.weight", "conv.bias") else (2,)
    craft(path, lambda tensors: tensors.update({key: torch.zeros(shape)}))

    check_refused(path, f"unexpected: {key}")


def test_a_misshapen_tensor(path: Path) -> None:
    """A tensor of another shape is refused, also where it could be broadcast."""
    save_adapter(tuned(), path)
    craft(path, lambda tensors: tensors.update({"conv.lora_B": torch.zeros(1, 2)}))

    check_refused(path, "conv.lora_B is (1, 2) in the file, (18, 2) in the model")


@pytest.mark.parametrize("key", ["conv.lora_A", "bn.running_var"])
def test_nan(key: str, path: Path) -> None:
    """NaN in a file is refused by the tensor's name."""
    save_adapter(tuned(), path)
    craft(path, lambda tensors: tensors[key][-1:].fill_(float("nan")))

    check_refused(path, f"{key} holds NaN")


def test_every_problem_at_once(path: Path) -> None:
    """One error lists everything that does not fit."""
    save_adapter(tuned(), path)

    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["conv.lora_A"]
        tensors["head.lora_A"][0, 0] = float("nan")
        tensors["head.lora_B"] = torch.zeros(5, 2)
        tensors["extra"] = torch.zeros(1)

    craft(path, spoil)

    check_refused(path, "missing: conv.lora_A", "head.lora_A holds NaN", "head.lora_B is (5, 2)", "unexpected: extra")


def test_other_sites(path: Path) -> None:
    """A file that says it adapts other sites than the strategy does is refused."""
    save_adapter(tuned(), path)
    craft(path, description=lambda said: said.update(sites=[["LoRA", "weight", ["conv"]]], base=said["base"][:8]))

    check_refused(path, "in the model alone ['head']")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"name": "no-such-method", "parameters": {}}, "no-such-method"),
        ({"name": "os:system", "parameters": {"command": "true"}}, "os:system"),
        ({"name": "lora", "parameters": {"rank": 0}}, "rank"),
        ({"name": "lora", "parameters": {"size": 1}}, "size"),
        ({"name": "lora"}, "parameters"),
        ({"name": ["lora"], "parameters": {}}, "name"),
    ],
    ids=["unknown", "module", "value", "parameter", "no parameters", "name"],
)
def test_a_strategy_that_cannot_be_built(config: dict[str, Any], says: str, path: Path) -> None:
    """A strategy that is unknown or malformed is an error of GIFt's own; a file can never name a module."""
    from gift_core.errors import GiftError

    save_adapter(tuned(), path)
    craft(path, description=lambda description: description.update(strategy=config))

    with refused(model := cnn(), GiftError, says):
        load_adapter(model, path)


def test_the_plugin_is_not_installed(path: Path) -> None:
    """Without the strategy's plugin the error names the distribution that has it."""
    save_adapter(tuned(), path)
    lost = {"name": "lora-of-tomorrow", "parameters": {}}
    provider = {"distribution": "gift-tomorrow", "version": "3.1"}
    craft(path, description=lambda description: description.update(strategy=lost, provider=provider))

    with refused(model := cnn(), UnknownStrategyError, "lora-of-tomorrow", "pip install gift-tomorrow") as _:
        load_adapter(model, path)
    try:
        load_adapter(model, path)
    except UnknownStrategyError as error:
        assert (error.name, error.distribution, error.version) == ("lora-of-tomorrow", "gift-tomorrow", "3.1")


def test_a_strategy_of_this_process(path: Path) -> None:
    """A strategy that was registered without a package is recorded by its name and found again by it."""
    lora = load_strategy("lora")

    class Mine(lora):  # type: ignore[valid-type, misc]
        name = "mine"

    register_strategy("mine", Mine)
    try:
        model = tuned(mlp, Mine(rank=1))
        save_adapter(model, path)
        fresh = load_into(mlp(), path)
    finally:
        unregister_strategy("mine")

    assert torch.equal(fresh(input_for(mlp)), model(input_for(mlp)))
    with refused(plain := mlp(), UnknownStrategyError, "mine"):
        load_adapter(plain, path)


# --- saving


def test_saving_replaces_the_file(path: Path) -> None:
    """The second save takes the place of the first, in one step, and leaves nothing else behind."""
    model = tuned()
    save_adapter(model, path)
    handle = path.open("rb")
    first = path.read_bytes()
    train(model, input_for(cnn))

    save_adapter(model, path)

    with handle:
        assert handle.read() == first  # who has the old file open keeps it whole
    assert path.read_bytes() != first
    assert os.listdir(path.parent) == [path.name]


def test_nan_is_not_saved(path: Path) -> None:
    """A model whose training went wrong is not saved over a good file."""
    model = tuned()
    save_adapter(model, path)
    good = path.read_bytes()
    with torch.no_grad():
        model.get_parameter("conv.lora_A")[0, 0] = float("nan")

    with pytest.raises(AdapterFileError, match=r"conv\.lora_A"):
        save_adapter(model, path)

    assert path.read_bytes() == good
    assert os.listdir(path.parent) == [path.name]


def _no_folder(tmp_path: Path) -> Path:
    return tmp_path / "missing" / "adapter"


def _under_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("text")
    return tmp_path / "file" / "adapter"


def _a_folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    return tmp_path / "adapter"


def _read_only(tmp_path: Path) -> Path:
    if os.geteuid() == 0:  # root may write anywhere but where the kernel does not keep files
        if not os.path.isdir("/proc/self"):
            pytest.skip("no folder that root cannot write")
        return Path("/proc/self/adapter")
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o555)
    return folder / "adapter"


def _long_name(tmp_path: Path) -> Path:
    return tmp_path / ("a" * 300)


def _here(tmp_path: Path) -> Path:
    return Path("")


@pytest.mark.parametrize("place", [_no_folder, _under_a_file, _a_folder, _read_only, _long_name, _here])
def test_a_place_that_takes_no_file(place: Callable[[Path], Path], tmp_path: Path) -> None:
    """A path that cannot be written is an AdapterWriteError, an OSError too, that says so; nothing appears there."""
    model, target = tuned(), place(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(AdapterWriteError, match="could not be written") as caught:
        save_adapter(model, target)

    assert isinstance(caught.value, OSError)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX")
def test_a_full_disk(path: Path) -> None:
    """A disk that fills while saving is an AdapterWriteError; the old file is intact and no temporary one is left."""
    save_adapter(tuned(), path)
    before = path.read_bytes()
    script = f"""
        import resource, signal
        import torch
        from torch import nn
        import gift_core
        from gift_core.errors import AdapterWriteError

        model = nn.Linear(400, 400)
        gift_core.enable_fine_tuning(model, "lora")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for limit in (0, 100, 3000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                gift_core.save_adapter(model, {str(path)!r})
            except AdapterWriteError:
                continue
            raise SystemExit(f"saved within {{limit}} bytes")
    """

    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)

    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_an_interrupt_while_saving(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the file is written leaves the old file and no temporary one."""
    model = tuned()
    save_adapter(model, path)
    before = path.read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gift_core.adapter_file.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, path)

    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_the_file_is_a_safetensors_file(path: Path) -> None:
    """Any reader of safetensors finds the same tensors in the file, of every dtype that torch trains, and of no numbers."""
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64):
        model = nn.Module()
        model.odd, model.empty = nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(0, 4, dtype=dtype))
        model.brief = nn.Parameter(torch.full((5,), 0.5, dtype=torch.bfloat16))
        model.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        enable_fine_tuning(model, "full")
        model.steps.add_(2)

        save_adapter(model, path)
        read = load_file(path)

        state = model.state_dict()
        assert read.keys() == state.keys()
        assert all(read[key].dtype == state[key].dtype and torch.equal(read[key], state[key]) for key in read)
        assert all(torch.equal(value, read[key]) for key, value in decode(path)[1].tensors.items())


@pytest.mark.parametrize("layers", [60, 600])
def test_a_file_is_little_more_than_its_numbers(layers: int, path: Path) -> None:
    """The description of many small layers with long names takes less than a tenth of what their numbers take."""
    model = nn.ModuleDict({f"model_layers_{layer}_self_attention_q_proj": nn.Linear(64, 64) for layer in range(layers)})
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=8))

    info = save_adapter(model, path)

    assert info.file_bytes < 1.1 * sum(value.nbytes for value in model.state_dict().values())


@pytest.mark.parametrize("config", [{"name": 3, "parameters": {}}, {"parameters": {}}, ["lora"], {"name": "a", "parameters": {1j}}])
def test_a_config_that_is_no_data(config: Any, path: Path) -> None:
    """A strategy whose own config has no name, or is no JSON, is an error of ours when it is saved, and no file is written."""

    class Odd(FullFineTuningStrategy):
        def to_config(self) -> dict[str, Any]:
            return config  # type: ignore[no-any-return]

    enable_fine_tuning(model := cnn(), Odd())

    with pytest.raises(StrategyError, match="not saved"):
        save_adapter(model, path)
    assert not path.exists()


def test_weights_are_digested_alike_alone_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many weights are looked at in one step, each has the digest that it has alone."""
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(7)], nn.Linear(3, 4))
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=1))
    alone = {f"{place}.weight": tensor_digest(layer._parameters["weight"]) for place, layer in enumerate(model)}

    for size in (0, 80, 2**22):
        monkeypatch.setattr("gift_core.adapter_file._STRETCH", size)
        assert _base_digests(adopted_modules(model)) == alone


# --- digests


def summed(weight: Tensor) -> str:
    """A digest by its definition: SHA-256 over what a weight is, and the sums of its bits along columns and rows."""
    numbers = weight.detach().clone(memory_format=torch.contiguous_format)
    size = weight.element_size() // (2 if weight.is_complex() else 1)
    bits = np.frombuffer(tensor_bytes(numbers), dtype="uint8" if size == 1 else f"int{8 * size}").astype(object)
    matrix = bits.reshape(weight.shape[0], bits.size // weight.shape[0])
    sums = np.concatenate([matrix.sum(0), matrix.sum(1)])
    digest = hashlib.sha256()
    for part in (f"{weight.dtype}{list(weight.shape)}".encode(), b"".join((int(each) % 2**64).to_bytes(8, "little") for each in sums)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


@pytest.mark.parametrize("stretch", [1, 100, 2**19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.uint8])
def test_a_digest_is_what_it_is_said_to_be(dtype: torch.dtype, stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A digest is that of the sums along columns and rows, in how many steps they may be taken, and however the weight lies."""
    monkeypatch.setattr("gift_core.adapter_file._STRETCH", stretch)
    weights = [torch.randn(shape).mul(50).to(dtype) for shape in ((7, 5), (6, 3, 2, 2), (1, 9), (9, 1), (9,), (3, 0))]
    weights += [weights[0].mT, torch.randn(4, 6).to(dtype)[:, ::2]]

    assert [tensor_digest(weight) for weight in weights] == [summed(weight) for weight in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int8])
def test_a_digest_changes_with_every_number(dtype: torch.dtype) -> None:
    """The digest of a weight differs from that of a weight in which one bit, two rows or the shape differ."""
    weight = torch.arange(12.0).reshape(3, 4).to(dtype)
    digests = [tensor_digest(weight), tensor_digest(weight.flip(0)), tensor_digest(weight.flip(1)), tensor_digest(weight.view(4, 3))]
    flat = weight.view(torch.uint8).flatten()
    for byte in range(flat.numel()):
        other = flat.clone()
        other[byte] ^= 1
        digests.append(tensor_digest(other.view(dtype).view(3, 4)))

    assert len(set(digests)) == len(digests)
    assert tensor_digest(weight.t().contiguous().t()) == digests[0]


@pytest.mark.parametrize("builder", [attention, lstm, embedding])
def test_a_failed_load_leaves_a_tuned_model(builder: Builder, path: Path) -> None:
    """A file that does not fit leaves every value and object of a tuned model as it was."""
    save_adapter(tuned(), path)

    check_refused(path, model=tuned(builder))


class FixedDirection(Reparameterization):
    """A method with a frozen parameter and a buffer of its own, drawn at random: W + s * (D + O), as in methods with random bases."""

    def init_parameters(self, weight: Tensor) -> None:
        self.fixed_direction = nn.Parameter(torch.randn_like(weight), requires_grad=False)
        self.register_buffer("fixed_offset", torch.randn_like(weight))
        self.fixed_size = nn.Parameter(weight.new_zeros(()))

    def reparameterize(self, weight: Tensor) -> Tensor:
        return weight + self.fixed_size * (self.fixed_direction + self.fixed_offset)


def test_what_a_method_draws_and_does_not_train_is_saved(tmp_path: Path) -> None:
    """Frozen parameters and buffers that a method registers belong to the adapter: the file and the state dict bring them back."""

    def enabled(seed: int) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3))
        torch.manual_seed(seed)
        enable_fine_tuning(model, FineTuningStrategy([(is_instance(nn.Linear), reparameterize(FixedDirection))]))
        return model

    model, by_file, by_dict = enabled(1), enabled(2), enabled(3)
    with torch.no_grad():
        model[0].fixed_size.fill_(0.5)
    x = torch.randn(2, 4)
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(by_file, tmp_path / "a.safetensors")
    by_dict.load_state_dict(model.state_dict())

    assert set(model.state_dict()) == {"0.fixed_direction", "0.fixed_offset", "0.fixed_size"}
    assert torch.equal(by_file(x), model(x))
    assert torch.equal(by_dict(x), model(x))


class SpecializedDelta(Delta):
    """A second implementation of the same method."""


def test_a_file_does_not_depend_on_which_specialization_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that gains a specialized class later still loads the files that its first class wrote."""
    strategy = FineTuningStrategy([(is_instance(nn.Linear), reparameterize(Delta))])
    old, new = mlp(), mlp()
    enable_fine_tuning(old, strategy)
    x = input_for(mlp)
    train(old, x)
    save_adapter(old, tmp_path / "a.safetensors")
    monkeypatch.setattr(Delta, "specialize", classmethod(lambda cls, module: SpecializedDelta))
    enable_fine_tuning(new, strategy)
    load_adapter(new, tmp_path / "a.safetensors")

    assert torch.equal(new(x), old(x))


def test_a_file_survives_a_strategy_that_gains_a_parameter(tmp_path: Path) -> None:
    """A new parameter with a default leaves older files loadable, into a plain and into a tuned model."""

    class First(FineTuningStrategy):
        name = "growing"

        def __init__(self, size: int = 1) -> None:
            super().__init__([(is_instance(nn.Linear), reparameterize(Delta))])

    class Second(FineTuningStrategy):
        name = "growing"

        def __init__(self, size: int = 1, fast: bool = False) -> None:
            super().__init__([(is_instance(nn.Linear), reparameterize(Delta))])

    old, plain, tuned, other = mlp(), mlp(), mlp(), mlp()
    x = input_for(mlp)
    with isolated_plugins():
        register_strategy("growing", First)
        enable_fine_tuning(old, "growing")
        train(old, x)
        save_adapter(old, tmp_path / "a.safetensors")
    with isolated_plugins():
        register_strategy("growing", Second)
        enable_fine_tuning(tuned, "growing")
        enable_fine_tuning(other, Second(fast=True))
        load_adapter(plain, tmp_path / "a.safetensors")
        load_adapter(tuned, tmp_path / "a.safetensors")
        with pytest.raises(AdapterMismatchError, match="fast is True in the model, False in the file"):
            load_adapter(other, tmp_path / "a.safetensors")

    assert torch.equal(plain(x), old(x))
    assert torch.equal(tuned(x), old(x))


class Nameless(FineTuningStrategy):
    """A full update beside each linear weight, of a strategy that has no registered name."""

    def __init__(self) -> None:
        super().__init__([(is_instance(nn.Linear), reparameterize(Delta))])


class EarlyName(Nameless):
    """The same under a name."""

    name = "a-name-of-no-package"


class LateName(Nameless):
    """The same under another name."""

    name = "z-name-of-no-package"


def test_a_file_without_a_strategys_name_fits_by_its_sites(tmp_path: Path) -> None:
    """An adapter of a strategy without a name loads into a model tuned in the same way under a name, and the other way round."""
    for saved, loaded in ((Nameless, EarlyName), (EarlyName, Nameless)):
        save_adapter(source := tuned(mlp, saved()), path := tmp_path / "adapter.safetensors")
        enable_fine_tuning(model := mlp(), loaded())

        load_adapter(model, path)

        assert torch.equal(model.eval()(x := input_for(mlp)), source(x))


@pytest.mark.parametrize(("saved", "loaded"), [(EarlyName, LateName), (LateName, EarlyName)])
def test_another_strategys_name_is_told(saved: type[Nameless], loaded: type[Nameless], tmp_path: Path) -> None:
    """A file of a strategy of another name is refused, and both names are told."""
    save_adapter(tuned(mlp, saved()), path := tmp_path / "adapter.safetensors")
    enable_fine_tuning(model := mlp(), loaded())

    with refused(model, AdapterMismatchError, f"is tuned with {loaded.name!r}, the file was made with {saved.name!r}"):
        load_adapter(model, path)


def test_what_is_checked_is_said_by_name(tmp_path: Path) -> None:
    """The model and the path may be given by name, and whether the base is checked only so."""
    save_adapter(module=tuned(mlp, Nameless()), path=(path := tmp_path / "adapter.safetensors"))
    enable_fine_tuning(model := mlp(), Nameless())

    load_adapter(module=model, path=path, check_base=False)
    with pytest.raises(TypeError, match="positional"):
        load_adapter(model, path, False)  # type: ignore[misc]


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool, torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str)
def test_a_tensor_of_each_dtype_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    """What a method registers beside its parameters is saved and loaded in its own dtype, bit for bit."""

    class Noted(Delta):
        def init_parameters(self, weight: Tensor, **params: Any) -> None:
            super().init_parameters(weight, **params)
            self.register_buffer("note", torch.zeros(3, dtype=dtype))

    strategy = FineTuningStrategy([(is_instance(nn.Linear), reparameterize(Noted))])
    enable_fine_tuning(source := mlp(), strategy)
    source[0].note += torch.tensor([0, 1, 1], dtype=dtype)
    save_adapter(source, path := tmp_path / "adapter.safetensors")
    enable_fine_tuning(model := mlp(), strategy)

    load_adapter(model, path)

    assert model[0].note.dtype is dtype
    assert model[0].note.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (torch.ones(2).to(torch.complex64), "complex64 in the file"),
        (torch.ones(2).to(torch.int32), "int32 in the file"),
        (torch.ones(2).to(torch.bool), "bool in the file"),
        (torch.tensor([1.0, 1e300], dtype=torch.float64), "no room"),
        (torch.ones(2).to(torch.float8_e4m3fn), None),
        (torch.tensor([1.0, torch.inf], dtype=torch.float64), None),
        (torch.ones(2, dtype=torch.bfloat16), None),
    ],
    ids=["complex", "whole", "bool", "overflow", "float8", "infinity", "bfloat16"],
)
def test_a_file_of_another_dtype_is_rounded_or_refused(tmp_path: Path, given: Tensor, problem: str | None) -> None:
    """Real numbers of another width are rounded into the model's dtype; what would lose its meaning is refused by name."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    enable_fine_tuning(model, FullFineTuningStrategy())
    save_adapter(model, tmp_path / "a.safetensors")
    _, payload = decode(tmp_path / "a.safetensors")
    _, start = encode(_describe(model), changed := Payload.of({**payload.tensors, "0.bias": given}))
    (tmp_path / "b.safetensors").write_bytes(b"".join(map(bytes, (start, *changed.parts()))))

    if problem:
        with pytest.raises(AdapterMismatchError, match=rf"0\.bias .*{problem}"):
            load_adapter(model, tmp_path / "b.safetensors")
    else:
        load_adapter(model, tmp_path / "b.safetensors")
        assert torch.equal(model[0].bias, given.to(torch.float32))


def test_real_numbers_take_the_place_of_complex_ones() -> None:
    """Real numbers in a file become complex ones without an imaginary part, and complex ones are rounded as real ones are."""
    real, wave = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.complex64)

    assert _lost_digits("key", real, wave) is None
    assert _lost_digits("key", wave.to(torch.complex128), wave) is None
    assert _lost_digits("key", 1e300 * real, wave) == "key holds numbers that torch.complex64 has no room for"
    assert _lost_digits("key", wave, real) is not None


def test_a_config_that_goes_round_in_circles_is_refused() -> None:
    """A strategy whose config holds itself has no form as data, and nothing is saved."""
    config: dict[str, Any] = {"name": "round"}
    config["parameters"] = config

    with pytest.raises(StrategyError, match="no plain JSON data"):
        _as_data(config)


def _put_a_head(model: nn.Module) -> str:
    model.head = nn.Linear(6, 5)
    return "head.bias, head.weight came in the place"


def _put_a_frozen_head(model: nn.Module) -> str:
    model.head = nn.Linear(6, 5).requires_grad_(False)
    return "head.bias, head.weight came in the place"


def _put_other_statistics(model: nn.Module) -> str:
    model.bn = nn.BatchNorm2d(6, affine=False)
    return "bn.num_batches_tracked, bn.running_mean, bn.running_var came in the place"


def _let_the_head_train(model: nn.Module) -> str:
    model.get_submodule("head").requires_grad_()
    return "head.bias, head.weight train"


def _add_a_layer(model: nn.Module) -> str:
    model.extra = nn.Linear(2, 2)
    return "extra.bias, extra.weight train"


@pytest.mark.parametrize("change", [_put_a_head, _put_a_frozen_head, _put_other_statistics, _let_the_head_train, _add_a_layer])
def test_what_a_file_cannot_bring_back_is_not_left_out(change: Callable[[nn.Module], str], path: Path) -> None:
    """What trains and is unknown to tuning, or came in the base's place, is no part of a file: saving refuses it by name, and says how
    to keep it.
    """
    model = cnn()
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2, targets="conv"))
    save_adapter(model, path)
    before = path.read_bytes()
    names = change(model)

    with pytest.raises(StateError, match=rf"not saved: {names}.*merge_strategies.*state_dict\(\) holds"):
        save_adapter(model, path)

    assert path.read_bytes() == before


def test_what_is_frozen_or_shared_is_no_obstacle_to_saving(path: Path) -> None:
    """A frozen module beside the base, and a layer that took over another's tensors, are left out as the base is."""
    model = cnn()
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2, targets="conv"))
    expected = save_adapter(model, path).digest
    model.teacher = cnn().requires_grad_(False)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)

    assert save_adapter(model, path).digest == expected
