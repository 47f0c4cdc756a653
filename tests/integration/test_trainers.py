"""The Hugging Face Trainer and Accelerate: a run that was interrupted and resumed is the run that was not, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import cnn, tensor_bytes
from torch import Tensor, nn

from gift_core import (
    FineTuningStrategy,
    FullFineTuningStrategy,
    disable_fine_tuning,
    enable_fine_tuning,
    full_state_dict,
    load_adapter,
    merge_strategies,
    save_adapter,
)
from gift_lora_plugin import LoRAAllFineTuningStrategy

accelerate: Any = pytest.importorskip("accelerate", reason="accelerate is not installed")
transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")

load_file: Any = pytest.importorskip("safetensors.torch").load_file

#: Gradient checkpointing; under its older name the reentrant kind was once the default, which needs inputs that require gradients.
CHECKPOINTING: dict[str, Any] = (
    {"activation_checkpointing": True}
    if hasattr(transformers.TrainingArguments, "activation_checkpointing")
    else {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
)
STEPS = 6
INTERRUPTED_AT = 3


class Classifier(nn.Module):
    """A convolutional net with BatchNorm that answers as models of transformers do; it is none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cnn()

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def bert() -> nn.Module:
    """A small classifier of texts, with dropout."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=32, max_position_embeddings=16, **shape)
    return transformers.BertForSequenceClassification(config)  # type: ignore[no-any-return]


def gpt2() -> nn.Module:
    """A small language model with dropout, whose embedding is tied to its output layer."""
    special = {"bos_token_id": 0, "eos_token_id": 1, "loss_type": "ForCausalLM"}
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, **special)
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def texts(classes: bool) -> list[dict[str, Tensor]]:
    """Eight texts of six tokens, with a class each, or with the tokens themselves to predict."""
    tokens = torch.randint(2, 32, (8, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": text, "labels": torch.tensor(number % 2) if classes else text} for number, text in enumerate(tokens)]


def images() -> list[dict[str, Tensor]]:
    """Eight images of four classes."""
    pixels = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "labels": torch.tensor(number % 4)} for number, image in enumerate(pixels)]


@pytest.fixture(autouse=True)
def _no_state_of_another_test() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


Job = tuple[Callable[[], nn.Module], FineTuningStrategy, list[dict[str, Tensor]]]

#: What is trained: each a model, a strategy and data.
JOBS: dict[str, Job] = {
    "lora": (gpt2, LoRAAllFineTuningStrategy(rank=2, lora_dropout=0.1), texts(classes=False)),
    "lora and head": (
        bert,
        merge_strategies([FullFineTuningStrategy(targets="classifier"), LoRAAllFineTuningStrategy(rank=2, exclude="classifier")]),
        texts(classes=True),
    ),
    "all of a tied model": (gpt2, FullFineTuningStrategy(), texts(classes=False)),
    "statistics": (Classifier, LoRAAllFineTuningStrategy(rank=2), images()),
}


def tuned(job: str) -> nn.Module:
    """The model of a job, tuned; the base has the same values each time."""
    build, strategy, _ = JOBS[job]
    torch.manual_seed(0)
    model = build()
    enable_fine_tuning(model, strategy)
    return model


def state_of(model: nn.Module) -> dict[str, bytes]:
    """The bytes of everything that the model saves."""
    return {key: tensor_bytes(tensor) for key, tensor in model.state_dict().items()}


class Interruption(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Ends a run early, as a lost machine would, after its checkpoint was written."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == INTERRUPTED_AT


def trainer(job: str, folder: Path, **options: Any) -> Any:
    """A Trainer of the job's model, which saves and evaluates at every third step."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=INTERRUPTED_AT,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **options,
    )
    data = JOBS[job][2]
    return transformers.Trainer(tuned(job), arguments, train_dataset=data, eval_dataset=data)


def losses(run: Any) -> list[float]:
    """The loss of every step that a Trainer has in its history."""
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")  # of transformers 4.50 with bf16 on a CPU
@pytest.mark.parametrize(
    ("job", "options"),
    [
        *((job, {}) for job in JOBS),
        ("lora", {"bf16": True}),
        ("lora", CHECKPOINTING),
        ("lora", {"optim": "adafactor"}),
    ],
)
def test_trainer_resumes_bit_for_bit(job: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Resumed from a checkpoint on a fresh model, a Trainer goes on as if it had not stopped: losses, weights, optimizer, schedule."""
    whole = trainer(job, tmp_path / "whole", **options)
    whole.train()
    interrupted = trainer(job, tmp_path / "parts", **options)
    interrupted.add_callback(Interruption())
    interrupted.train()
    resumed = trainer(job, tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=True)

    assert interrupted.state.global_step == INTERRUPTED_AT
    assert losses(resumed) == losses(whole)
    assert state_of(resumed.model) == state_of(whole.model)
    torch.testing.assert_close(resumed.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"], rtol=0, atol=0)
    assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()


@pytest.mark.parametrize("job", ["lora", "statistics"])
def test_a_checkpoint_of_the_trainer_holds_the_trained_part(job: str, tmp_path: Path) -> None:
    """The model's file in a checkpoint has the keys of the trained part and no frozen weight, and loads into a tuned model."""
    run = trainer(job, tmp_path)
    run.train()

    saved = load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors")

    assert set(saved) == set(run.model.state_dict())
    again = tuned(job)
    again.load_state_dict(saved)
    assert state_of(again) == state_of(run.model)


def test_gradient_checkpointing_of_the_trainer_changes_nothing(tmp_path: Path) -> None:
    """A Trainer told to checkpoint gradients takes the steps that it takes otherwise, bit for bit."""
    plain, checkpointed = (trainer("lora", tmp_path), trainer("lora", tmp_path, **CHECKPOINTING))
    for run in (plain, checkpointed):
        transformers.set_seed(0)
        run.train()

    assert losses(checkpointed) == losses(plain)
    assert state_of(checkpointed.model) == state_of(plain.model)


def test_trainer_brings_the_best_model_back(tmp_path: Path) -> None:
    """With ``load_best_model_at_end`` the model ends with the weights of its best checkpoint, and its adapter file loads elsewhere."""
    # the largest loss counts as the best, so that it is not the last
    run = trainer("lora", tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, greater_is_better=True)
    run.train()
    save_adapter(run.model, tmp_path / "adapter.safetensors")

    assert run.state.best_global_step == INTERRUPTED_AT
    torch.manual_seed(0)
    fresh = gpt2()
    load_adapter(fresh, tmp_path / "adapter.safetensors")
    best = tuned("lora")
    best.load_state_dict(load_file(tmp_path / "checkpoint-3" / "model.safetensors"))
    assert state_of(fresh) == state_of(run.model) == state_of(best)


def test_trainer_leaves_a_model_that_is_given_back(tmp_path: Path) -> None:
    """After a run of the Trainer, ``disable_fine_tuning`` gives back the base, bit for bit."""
    run = trainer("lora", tmp_path)
    run.train()
    torch.manual_seed(0)

    assert state_of(disable_fine_tuning(run.model)) == state_of(gpt2())


class Loop:
    """A training loop of the user's own with Accelerate."""

    def __init__(self, job: str, precision: str) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        model = tuned(job)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=STEPS)
        data = torch.utils.data.DataLoader(JOBS[job][2], batch_size=2)
        self.model, self.optimizer, self.data, self.schedule = self.accelerator.prepare(model, optimizer, data, schedule)

    def train(self, steps: int) -> list[float]:
        """Steps over the batches in turn, with their losses."""
        batches = list(self.data)
        return [self._step(batches[number % len(batches)]) for number in range(steps)]

    def _step(self, batch: dict[str, Tensor]) -> float:
        loss = self.model(**batch)["loss"]
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.item()  # type: ignore[no-any-return]


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "torch"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("job", JOBS)
def test_accelerate_resumes_bit_for_bit(job: str, precision: str, safe: bool, tmp_path: Path) -> None:
    """``load_state`` on a fresh model goes on as if there had been no stop, also under autocast, from either form of file."""
    whole = Loop(job, precision)
    whole.train(4)
    whole.accelerator.save_state(str(tmp_path), safe_serialization=safe)
    expected = whole.train(4)

    resumed = Loop(job, precision)
    resumed.accelerator.load_state(str(tmp_path))

    assert resumed.train(4) == expected
    assert state_of(resumed.accelerator.unwrap_model(resumed.model)) == state_of(whole.accelerator.unwrap_model(whole.model))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_accelerate_prepared_is_saved_and_given_back(precision: str, tmp_path: Path) -> None:
    """The unwrapped model saves an adapter that a plain model loads, and is disabled to the base, bit for bit."""
    loop = Loop("lora", precision)
    loop.train(2)
    model = loop.accelerator.unwrap_model(loop.model)
    save_adapter(model, tmp_path / "adapter.safetensors")

    torch.manual_seed(0)
    fresh = gpt2()
    base = state_of(fresh)
    load_adapter(fresh, tmp_path / "adapter.safetensors")

    assert state_of(fresh) == state_of(model)
    assert state_of(disable_fine_tuning(model)) == base


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("job", ["lora", "lora and head"])
def test_offloaded_weights_come_with_their_adapters(job: str, where: str, tmp_path: Path) -> None:
    """Offloaded by Accelerate within ``full_state_dict``, a tuned model computes the same bits."""
    model, inputs = tuned(job).eval(), {"input_ids": torch.stack([row["input_ids"] for row in JOBS[job][2]])}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.fill_(0.1)
        expected = model(**inputs).logits

        with full_state_dict(model):
            place = {"cpu": (accelerate.cpu_offload, ()), "disk": (accelerate.disk_offload, (str(tmp_path),))}
            offload, arguments = place[where]
            offload(model, *arguments, execution_device=torch.device("cpu"))

        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert torch.equal(model(**inputs).logits, expected)
