"""Broken and hostile folders of PEFT's files: each is refused by an error of ours, and the model is as it was. PEFT is not needed."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gift_core import disable_fine_tuning, enable_fine_tuning
from gift_core.errors import (
    AdapterFileError,
    AdapterFormatError,
    AdapterMismatchError,
    AdapterNotFoundError,
    AdapterWriteError,
    GiftError,
    ParameterError,
)
from gift_lora_plugin import LoRAAllFineTuningStrategy
from gift_lora_plugin.peft_config import alphas, config_from, ranks
from gift_lora_plugin.peft_directory import MAX_HEADER_BYTES
from gift_lora_plugin.peft_files import PEFT, export_peft, import_peft, load_peft
from gift_lora_plugin.peft_source import _site_problem

RANK, ALPHA = 2, 5.0
TOKENS = torch.tensor([[0, 4, 2], [10, 4, 1]])
FILES = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same numbers."""
    torch.manual_seed(0)


class Net(nn.Module):
    """A small model with a layer of each kind that the files adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)
        self.fc = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.norm(self.conv(self.embed(x).transpose(1, 2))).transpose(1, 2)))  # type: ignore[no-any-return]


def tuned_net() -> nn.Module:
    """A tuned model whose adapter is not the one it began with."""
    model = Net().double().eval()
    enable_fine_tuning(model, LoRAAllFineTuningStrategy(RANK, ALPHA, targets=["fc", "conv"], conv_layout="out_as_h"))
    return stir(model)


def stir(model: nn.Module) -> nn.Module:
    """Move every trainable parameter, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound export of a small adapter."""
    export_peft(tuned_net(), tmp_path / "peft")
    return tmp_path / "peft"


def refused(folder: Path, error: type[GiftError], match: str) -> str:
    """That load_peft raises, and leaves the model as it was."""
    model = Net().double()
    before, types = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(error, match=match) as caught:
        load_peft(model, folder)

    assert [type(module) for module in model.modules()] == types
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    """A missing file is an error that names it."""
    (folder / name).unlink()

    refused(folder, AdapterNotFoundError, f"there is no {name}")


def test_a_pickle_is_never_read(folder: Path) -> None:
    """A folder with a pickle instead of safetensors is refused with the way out."""
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")

    refused(folder, AdapterFileError, "a pickle, which could run code")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{",
        '{"r": 1, "r": 2}',
        '{"lora_alpha": NaN}',
        "[" * 100_000,
        '{"x": "\ud800"}'.encode("utf-8", "surrogatepass"),
        b"\xff\x00",
    ],
    ids=["empty", "list", "cut", "twice", "nan", "deep", "surrogate", "bytes"],
)
def test_broken_json_is_refused(folder: Path, text: str | bytes) -> None:
    """A configuration that is no JSON object is an error of ours, whatever is in it."""
    (folder / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    refused(folder, AdapterFileError, "adapter_config.json")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'; it must be a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_dropout": 1.5}, r"lora_dropout is 1.5; it must be a number in \[0, 1\)"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"alpha_pattern": {"fc": None}}, "alpha_pattern is"),
        ({"alpha_pattern": ["fc"]}, "alpha_pattern is"),
        ({"r": "2"}, "r is '2'; it must be a whole number from 1 up"),
        ({"r": 0}, "r is 0; it must be"),
        ({"rank_pattern": {"fc": 2.5}}, "rank_pattern is .*names with whole numbers"),
        ({"r": 16}, "fc: lora_A has rank 2, and the configuration says 16"),
        ({"rank_pattern": {"^fc": 3}}, "fc: lora_A has rank 2, and the configuration says 3"),
        ({"modules_to_save": "head"}, "modules_to_save is 'head'"),
        ({"use_dora": "yes"}, "use_dora is 'yes'"),
        ({"lora_bias": True}, "lora_bias: the factor B has a bias"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"target_parameters": ["w"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"a_switch_of_2030": {"x": 1}}, "'a_switch_of_2030' is unknown, and set to"),
        ({"use_dora": True}, r"fc: lora_magnitude_vector is missing"),
    ],
    ids=str,
)
def test_configurations_without_a_form_are_refused(folder: Path, change: dict[str, Any], match: str) -> None:
    """What would change the answers and has no form here is refused by its key."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))

    refused(folder, AdapterFileError, match)


def test_unknown_keys_may_be_passed_over(folder: Path) -> None:
    """A key of a later version that is off is no matter, and one that is on can be ignored by name."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"a_switch": False, "another": None, "on": 3}))
    model = Net().double()

    with pytest.raises(AdapterFormatError, match="'on' is unknown"):
        load_peft(model, folder)
    assert load_peft(model, folder, ignore=["on"]).layers == 2


def says(folder: Path, **values: Any) -> None:
    """Write entries of the configuration anew."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("ignore", [3, [[1]], None, ["on", 3], [{}], True], ids=str)
def test_what_is_ignored_is_named_by_keys(folder: Path, ignore: Any) -> None:
    """Anything but a key or several is told with its value and what is allowed, before a file is read or written."""
    model, adapter = Net().double(), folder / "a.safetensors"
    says(folder, on=3)
    message = re.escape(f"ignore must be a key of PEFT's configuration, or a list of keys, got {ignore!r}.")

    with pytest.raises(ParameterError, match=message):
        load_peft(model, folder / "not there", ignore=ignore)
    with pytest.raises(ParameterError, match=message):
        import_peft(folder, adapter, model, ignore=ignore)
    with pytest.raises(ParameterError, match=message):
        PEFT.import_(folder, adapter, model=model, ignore=ignore)
    assert not adapter.exists()
    assert type(model.fc) is nn.Linear


@pytest.mark.parametrize("ignore", ["on", ["on"], ("on",), {"on"}, iter(["on"])], ids=lambda value: type(value).__name__)
def test_one_key_or_several_are_ignored(folder: Path, ignore: Any) -> None:
    """One key as text is that key, and no list of letters."""
    says(folder, on=3)

    assert load_peft(Net().double(), folder, ignore=ignore).layers == 2


def edit(folder: Path, **changes: Tensor | None) -> None:
    """Write tensors of the file anew, under keys without PEFT's prefix; None takes one away."""
    file = folder / "adapter_model.safetensors"
    tensors: dict[str, Any] = load_file(file) | {f"base_model.model.{key}": value for key, value in changes.items()}
    save_file({key: value for key, value in tensors.items() if value is not None}, file)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"fc.lora_B.weight": None}, "fc: lora_B.weight is missing"),
        ({"fc.lora_A.weight": torch.zeros(2, 7)}, r"fc: lora_A.weight has shape \(2, 7\), and the layer takes \(2, 6\)"),
        ({"fc.lora_A.weight": torch.zeros(3, 6)}, r"fc: lora_B.weight has shape \(6, 2\), and the layer takes \(6, 3\)"),
        ({"fc.lora_A.weight": torch.zeros(0, 6)}, "at least rank 1"),
        ({"fc.lora_A.weight": torch.zeros(())}, r"has shape \(\)"),
        ({"fc.lora_A.weight": torch.full((2, 6), torch.nan)}, "fc: lora_A.weight holds NaN"),
        ({"fc.lora_A.weight": torch.full((2, 6), torch.inf)}, "fc: lora_A.weight holds NaN or infinity"),
        ({"fc.lora_B.bias": torch.zeros(6)}, "unexpected: fc.lora_B.bias"),
        ({"gone.lora_A.weight": torch.zeros(2, 6)}, "gone: the model has no such layer"),
        ({"norm.lora_A.weight": torch.zeros(2, 6)}, "norm: PEFT files have no form for a BatchNorm1d"),
        ({"head.weight": torch.zeros(3, 6)}, "head.weight is frozen, and the file holds other values"),
        ({"embed.base_layer.weight": torch.zeros(12, 6)}, r"embed.weight is \(12, 6\) in the file, \(11, 6\) in the model"),
        ({"fc.lora_magnitude_vector": torch.ones(6)}, "fc: lora_magnitude_vector is unexpected"),
        ({"\x1b[2J.lora_A.weight": torch.zeros(2, 6)}, r"'\\x1b\[2J': the model has no such layer"),
        ({"__class__.lora_A.weight": torch.zeros(2, 6)}, "__class__: the model has no such layer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_tensors_that_do_not_fit_are_named(folder: Path, changes: dict[str, Tensor | None], match: str) -> None:
    """A tensor that is missing, unknown, misshapen or no number is named, and the model is as it was."""
    edit(folder, **changes)

    refused(folder, AdapterMismatchError, match)


def test_wider_numbers_than_the_adapters_are_refused(folder: Path) -> None:
    """Double precision in the file never becomes single precision in silence."""
    with pytest.raises(AdapterMismatchError, match=r"fc: lora_A.weight is of torch.float64, and would lose digits"):
        load_peft(Net(), folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key", ["head.weight", "fc.base_layer.bias", "norm.running_var"])
def test_wider_numbers_than_the_models_own_are_refused(folder: Path, key: str, dtype: torch.dtype) -> None:
    """Double precision of a trained module or a bias never becomes single precision in silence, as that of a factor does not."""
    model = Net().to(dtype)
    single = {name: value.float() for name, value in load_file(folder / FILES[1]).items()}
    save_file(single, folder / FILES[1])
    says(folder, modules_to_save=["head", "norm"], bias="all")
    place = key.replace(".base_layer", "")
    value = torch.rand_like(model.state_dict()[place])
    edit(folder, **{key: value.double()})

    with pytest.raises(AdapterMismatchError, match=f"{place} is of torch.float64, and would lose digits"):
        load_peft(model, folder)
    edit(folder, **{key: value.float()})
    load_peft(model, folder)

    assert torch.equal(model.state_dict()[place], value)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str
)
@pytest.mark.parametrize("key", ["fc.lora_A.weight", "conv.lora_B.weight", "head.weight", "head.bias"])
def test_numbers_of_another_kind_are_named(folder: Path, key: str, dtype: torch.dtype) -> None:
    """Eight-bit floats, whole and complex numbers in the place of factors or trained values are problems, told with key and dtype."""
    says(folder, modules_to_save=["head"])
    shapes = {"fc.lora_A.weight": (2, 6), "conv.lora_B.weight": (6, 2, 1), "head.weight": (3, 6), "head.bias": (3,)}
    edit(folder, **{key: torch.zeros(shapes[key]).to(dtype)})

    where = key.replace(".lora", ": lora")
    refused(folder, AdapterMismatchError, rf"{where} is of {dtype}; float16, bfloat16, float32 or float64 is needed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e5m2, torch.complex64], ids=str)
def test_a_count_is_a_whole_number(folder: Path, dtype: torch.dtype) -> None:
    """The integer buffers of a trained module are read from integers, and from nothing else."""
    says(folder, modules_to_save=["norm"])
    edit(folder, **{"norm.num_batches_tracked": torch.tensor(7, dtype=torch.int32)})
    model = Net().double()
    load_peft(model, folder)
    assert model.norm.num_batches_tracked == 7

    edit(folder, **{"norm.num_batches_tracked": torch.tensor(7.5).to(dtype)})
    refused(folder, AdapterMismatchError, rf"norm.num_batches_tracked is of {dtype}; an integer or bool is needed")


def test_a_frozen_weight_that_is_complex_is_another(folder: Path) -> None:
    """A frozen weight in the file is compared with its imaginary part, too."""
    edit(folder, **{"head.weight": torch.zeros(3, 6, dtype=torch.complex64)})

    refused(folder, AdapterMismatchError, "head.weight is frozen, and the file holds other values")


def test_every_problem_is_reported_at_once(folder: Path) -> None:
    """One error lists all that does not fit."""
    edit(folder, **{"fc.lora_B.weight": None, "conv.lora_A.weight": torch.zeros(2, 5, 3), "x.lora_A.weight": torch.zeros(1, 1)})
    message = refused(folder, AdapterMismatchError, "nothing was loaded")

    assert all(f"\n  {name}: " in message for name in ("fc", "conv", "x"))


def test_cut_and_flipped_files_are_errors_of_ours(folder: Path) -> None:
    """Cut at any place, or with any byte of the header flipped, the tensors load whole or not at all, and only our error escapes."""
    file = folder / "adapter_model.safetensors"
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    broken = [data[:length] for length in range(0, len(data), 37)]
    broken += [data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :] for at in range(header)]
    model = Net().double()
    load_peft(model, folder)
    sound = copy.deepcopy(model.state_dict())
    disable_fine_tuning(model)
    for one in broken:
        file.write_bytes(one)
        try:
            load_peft(model, folder)
        except AdapterFileError:
            assert type(model.fc) is nn.Linear
        else:
            found = model.state_dict()
            assert found.keys() == sound.keys()
            assert all(torch.equal(value, sound[key]) for key, value in found.items())
            disable_fine_tuning(model)


def test_frozen_weights_written_along_must_be_the_models(folder: Path) -> None:
    """A frozen weight in the file, as PEFT writes one for an embedding, is accepted if it is the model's own."""
    model = Net().double()
    edit(folder, **{"embed.base_layer.weight": model.embed.weight.detach().clone(), "head.weight": model.head.weight.detach().clone()})

    assert load_peft(model, folder).modules_to_save == ()


def test_keys_without_prefix_and_with_the_adapters_name_are_read(folder: Path) -> None:
    """The spellings of other writers are the same adapter."""
    first, second = Net().double(), Net().double()
    second.load_state_dict(first.state_dict())
    load_peft(first, folder)
    file = folder / "adapter_model.safetensors"
    plain = {key.removeprefix("base_model.model."): value for key, value in load_file(file).items()}
    save_file({key.replace(".weight", ".default.weight"): value for key, value in plain.items()}, file)
    load_peft(second, folder)

    assert torch.equal(first.eval()(TOKENS), second.eval()(TOKENS))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("fc.lora_A.weight", "fc.lora_A.default.weight"),
        ("embed.lora_embedding_B", "embed.lora_embedding_B.default"),
        ("fc.lora_magnitude_vector", "fc.lora_magnitude_vector.weight"),
        ("fc.lora_magnitude_vector.default", "fc.lora_magnitude_vector.default.weight"),
        ("head.weight", "head.modules_to_save.default.weight"),
        ("head.modules_to_save.weight", "head.modules_to_save.default.weight"),
        ("fc.bias", "fc.base_layer.bias"),
        ("conv.weight", "conv.base_layer.weight"),
    ],
)
def test_two_keys_of_one_tensor_are_refused(folder: Path, first: str, second: str) -> None:
    """Two spellings of one tensor's key that hold different values are named, instead of the last one winning."""
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": ["head"], "bias": "all"}))
    edit(folder, **{first: torch.zeros(2, 6), second: torch.ones(2, 6)})

    said = refused(folder, AdapterMismatchError, "the file holds this tensor under another key too")
    assert f"{first}: the file holds" in said or f"{second}: the file holds" in said


def test_odd_names_are_taken_literally(tmp_path: Path) -> None:
    """Names that would mean something in a pattern, here or in PEFT, stand for themselves."""
    base = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("re:x", "a*", "ab", "a[b]", "(c)+", "c")})
    tuned = copy.deepcopy(base)
    enable_fine_tuning(tuned, LoRAAllFineTuningStrategy(RANK, targets=["re[:]x", "a[*]", "a[[]b]", "(c)+"]))
    export_peft(stir(tuned), tmp_path)
    load_peft(base, tmp_path)
    mine, again = tuned.state_dict(), base.state_dict()

    assert mine.keys() == again.keys()
    assert all(torch.equal(mine[key], again[key]) for key in mine)


@pytest.mark.parametrize(
    "key", ["(a+)+b", "fc|x", ".*fc", "[a]", "layers\\.\\d", "a$b", "^", "a\\", "x" * 2000], ids=lambda key: key[:10]
)
def test_a_real_regular_expression_is_refused(key: str) -> None:
    """A key that PEFT would run as a regular expression is never run here: it is refused by name."""
    config = config_from({"peft_type": "LORA", "alpha_pattern": {key: 1.0}})

    with pytest.raises(AdapterFormatError, match="alpha_pattern"):
        alphas(config, ["fc", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaac"])

    config = config_from({"peft_type": "LORA", "r": 4, "rank_pattern": {key: 1}})
    assert ranks(config, ["fc"]) == {}  # what the tensors say is not checked then
    config = config_from({"peft_type": "LORA", "r": 4, "rank_pattern": {key: 1}, "init_lora_weights": "pissa"})
    with pytest.raises(AdapterFormatError, match="rank_pattern"):
        ranks(config, ["fc"])


@pytest.mark.parametrize("change", [{"r": None}, {"rank_pattern": {"f.*": 7}}], ids=str)
def test_a_rank_that_the_configuration_does_not_tell_is_the_tensors(folder: Path, change: dict[str, Any]) -> None:
    """Without a rank, or with one by a real regular expression, the shapes of the factors stand alone, and load."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))

    assert load_peft(Net().double(), folder).layers == 2


def test_a_start_of_fewer_directions_is_no_other_rank(folder: Path) -> None:
    """Factors with fewer rows than the configuration says are a start's where the weight has no more directions, and else an error."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 8, "init_lora_weights": "olora", "rank_pattern": {"conv": 2}}))

    refused(folder, AdapterMismatchError, r"fc: lora_A has rank 2, and .* says 8, of which a weight of shape \(6, 6\) has 6")


# --- places that are no files, and files that are too much


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", FILES)
def test_a_pipe_is_refused(folder: Path, name: str) -> None:
    """A pipe in the place of a file is refused, instead of waiting for somebody to write into it."""
    (folder / name).unlink()
    os.mkfifo(folder / name)

    refused(folder, AdapterFileError, f"{name} cannot be read: it is no regular file")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no endless device")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", FILES)
def test_an_endless_device_is_refused(folder: Path, name: str) -> None:
    """A link to a device without an end is refused before a byte is read."""
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")

    refused(folder, AdapterFileError, f"{name} cannot be read: it is no regular file")


def test_a_long_header_is_refused_before_it_is_parsed(folder: Path) -> None:
    """A list of tensors above the limit is refused by its length, and takes next to no memory."""
    with open(folder / "adapter_model.safetensors", "wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(2 * MAX_HEADER_BYTES)
    tracemalloc.start()
    try:
        refused(folder, AdapterFileError, "16,777,217 bytes; 16,777,216 are allowed")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 2**22


def test_a_long_configuration_is_refused(folder: Path) -> None:
    """A configuration above the limit is refused by its length."""
    os.truncate(folder / "adapter_config.json", 17 * 2**20)

    refused(folder, AdapterFileError, "17,825,792 bytes; 16,777,216 are allowed")


@pytest.mark.parametrize("names", [[f"x{at}" for at in range(5000)], ["x" * 100_000]], ids=["many", "long"])
def test_a_message_stays_short(folder: Path, names: list[str]) -> None:
    """However many keys do not fit, and however long they are, the message lists the first and counts the others."""
    edit(folder, **{f"{name}.lora_A.weight": torch.zeros(0) for name in names})
    assert len(refused(folder, AdapterMismatchError, "nothing was loaded")) < 5000

    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict.fromkeys(names, 1)))
    assert len(refused(folder, AdapterFormatError, "is unknown")) < 5000


# --- writing


def test_two_names_of_one_file_are_refused(folder: Path) -> None:
    """Where both names lead to one file, an export is refused, and the file is as it was."""
    config = folder / "adapter_config.json"
    before = config.read_bytes()
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(config.name)

    with pytest.raises(AdapterWriteError, match="lead to one file"):
        export_peft(tuned_net(), folder, force=True)

    assert config.read_bytes() == before


class Killed(BaseException):
    """Stands for a process that ends where it stands."""


@pytest.mark.parametrize("calls", range(1, 6))
def test_the_pair_of_a_killed_export_is_brought_back(folder: Path, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever an export is killed, the next one finds a whole pair, refuses to overwrite it unasked, and sweeps what was left."""
    before = {name: (folder / name).read_bytes() for name in FILES}
    left = [calls]
    replace = os.replace

    def dies(source: Any, target: Any) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", dies)
        patched.setattr(Path, "unlink", lambda *arguments, **keywords: None)
        with pytest.raises(Killed) if calls < 5 else contextlib.nullcontext():
            export_peft(tuned_net(), folder, force=True)
    with pytest.raises(AdapterWriteError, match=r"adapter_config.json and adapter_model.safetensors already"):
        export_peft(tuned_net(), folder)

    assert ({name: (folder / name).read_bytes() for name in FILES} == before) == (calls < 5)
    load_peft(Net().double(), folder)
    export_peft(tuned_net(), folder, force=True)
    assert sorted(os.listdir(folder)) == FILES


@pytest.mark.parametrize("place", ["a\0b", "\0"])
def test_a_path_that_cannot_be_one(place: str, tmp_path: Path) -> None:
    """A path with a null character is an error of ours, both ways."""
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
        load_peft(Net(), tmp_path / place)
    with pytest.raises(AdapterWriteError, match="cannot be written"):
        export_peft(tuned_net(), tmp_path / place)


def test_the_base_model_may_be_a_path(tmp_path: Path) -> None:
    """A path names the base model as its text does, and what is no text is refused before anything is written."""
    tuned = tuned_net()
    export_peft(tuned, tmp_path / "peft", base_model=Path("models") / "base")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())

    assert config["base_model_name_or_path"] == os.path.join("models", "base")
    with pytest.raises(ParameterError, match=r"base_model must be text.*got 3"):
        export_peft(tuned, tmp_path / "other", base_model=3)  # type: ignore[arg-type]
    assert not (tmp_path / "other").exists()


LoRA = type("LoRA", (nn.Linear,), {"forward": nn.Linear.forward})


def test_another_packages_method_of_that_name_is_told_apart() -> None:
    """A method that is called LoRA too, and is another's, is a reason that names where it is from."""
    assert "it is adapted with the LoRA of " in str(_site_problem("fc", {"fc": LoRA(3, 3)}, {"weight": "LoRA"}, {}))
