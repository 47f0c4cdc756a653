from __future__ import annotations

import dataclasses
import json

import pytest
import torchvision
from models import ALL, Builder, cnn, mlp, shared, tied
from torch import nn

from gift_core import OptimizerReport, enable_fine_tuning, merge_strategies, plan_fine_tuning
from gift_core.info import CapMatches, Count, Report, collect_trainable_parameters, table_info
from gift_lora_plugin import LoRAAllFineTuningStrategy


def test_resnet18_gives_the_numbers_of_the_seed_example() -> None:
    """LoRA of rank 3 trains 75,063 of resnet18's 11,689,512 numbers, in 42 tensors with the documented names and shapes."""
    net = torchvision.models.resnet18()
    assert collect_trainable_parameters(net)[1] == 11_689_512

    enable_fine_tuning(net, LoRAAllFineTuningStrategy())
    rows, total = collect_trainable_parameters(net)

    assert (total, len(rows)) == (75_063, 42)
    assert rows[0] == [0, "conv1.lora_B", [448, 3], 1344]
    assert rows[1] == [1, "conv1.lora_A", [3, 21], 63]
    assert rows[40] == [40, "fc.lora_B", [1000, 3], 3000]
    assert rows[41] == [41, "fc.lora_A", [3, 512], 1536]


@pytest.mark.parametrize("build", ALL, ids=lambda build: build.__name__)
def test_the_rows_are_what_trains(build: Builder) -> None:
    """One row for each trainable parameter, in torch's order, and their sum; a shared parameter counts once."""
    model = build()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)

    rows, total = collect_trainable_parameters(model)

    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert rows == [[index, name, list(p.shape), p.numel()] for index, (name, p) in enumerate(trainable)]
    assert total == sum(p.numel() for _, p in trainable)


def test_nothing_trains() -> None:
    """A frozen model has no rows and a sum of zero."""
    assert collect_trainable_parameters(mlp().requires_grad_(False)) == ([], 0)


def test_the_table_is_drawn_as_in_the_seed_example() -> None:
    """A rule of dashes, the header, a rule, the rows padded and joined by bars, a rule."""
    rows = [[0, "conv1.lora_B", "LoRAConv2d", [448, 3]], [10, "fc", "Linear", [3]]]

    assert table_info(rows, ["index", "Name", "Type", "Shape"]).splitlines() == [
        "-" * 44,
        "index | Name         | Type       | Shape   ",
        "-" * 44,
        "0     | conv1.lora_B | LoRAConv2d | [448, 3]",
        "10    | fc           | Linear     | [3]     ",
        "-" * 44,
    ]


@pytest.mark.parametrize("rows", [[], [["", "x"]], [[None, 3.5], ["a much longer cell", ()]]])
def test_every_line_of_a_table_is_equally_long(rows: list[list[object]]) -> None:
    """Columns are padded to their widest cell, the header's included, also without rows."""
    lines = table_info(rows, ["first", "second"]).splitlines()

    assert len(lines) == len(rows) + 4
    assert len({len(line) for line in lines}) == 1
    assert lines[0] == lines[2] == lines[-1] == "-" * len(lines[0])


def test_rows_of_another_length_are_refused() -> None:
    """A row that does not fit the header is an error, not a table that drops cells."""
    with pytest.raises(ValueError):
        table_info([[1, 2, 3]], ["a", "b"])


def test_a_count_adds_tensors_numbers_and_bytes() -> None:
    """Bytes follow the dtype of each parameter."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1).half())

    assert Count.of(model.parameters()) == Count(4, 8 + 3, 8 * 4 + 3 * 2)
    assert "11 in 4 tensors" in str(Count.of(model.parameters()))


def test_a_count_says_its_size_in_megabytes() -> None:
    """A megabyte is a million bytes, and two decimals are shown."""
    assert str(Count(3, 1_234_567, 4_938_268)) == "1,234,567 in 3 tensors, 4.94 MB"


def report_of(sites: int) -> Report:
    """A report of one cap that matched so many sites."""
    names = tuple(f"layer{number}" for number in range(sites))
    return Report("s", (CapMatches("module", "rule", names),), (), (), (), Count(1, 2, 3), Count(0, 0, 0))


@pytest.mark.parametrize(
    ("sites", "shown"),
    [(4, "layer0, layer1, layer2, layer3 "), (5, "layer0, layer1, layer2, layer3, ... layer4"), (99, "layer2, layer3, ... layer98")],
)
def test_a_long_list_of_sites_is_cut(sites: int, shown: str) -> None:
    """Up to four sites are all named; of more, the first four and the last."""
    text = str(report_of(sites)).replace("\n", " \n")

    assert shown in text
    assert f"| {sites} " in text


def test_a_report_stays_as_it_was_made() -> None:
    """A report, its counts, its matches and what is said of an optimizer cannot be changed afterwards."""
    report = report_of(1)

    parts = (report, "strategy"), (report.before, "numbers"), (report.caps[0], "cap"), (OptimizerReport((), (), 0), "strangers")
    for part, field in parts:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, field, "other")


@pytest.mark.parametrize("build", [cnn, tied, shared], ids=lambda build: build.__name__)
def test_the_report_agrees_with_the_model(build: Builder) -> None:
    """Counts before and after are those of the model, each shared tensor once."""
    model = build()
    before = Count.of(model.parameters())

    report = enable_fine_tuning(model, LoRAAllFineTuningStrategy(rank=2))

    everything = [parameter for _, parameter in model.named_parameters()]
    assert report.before == report.trainable_before == before
    assert report.after == Count.of(everything)
    assert report.trainable == Count.of(model.parameters())
    assert (report.total_after, report.trainable_after) == (report.after.numbers, report.trainable.numbers)


def test_the_report_lists_what_each_cap_matched() -> None:
    """One entry for each cap with the full names of its sites, and the parameters that no cap wanted."""
    report = enable_fine_tuning(cnn(), merge_strategies("lora-conv", "lora-linear"))

    assert [(match.kind, match.sites) for match in report.caps] == [("module", ("conv",)), ("module", ("head",))]
    assert report.frozen == ("bn.weight", "bn.bias")


def test_what_is_shared_is_said() -> None:
    """The names of one tensor or module are reported together."""
    assert any("second" in line and "first" in line for line in plan_fine_tuning(shared(), "lora").report.shared)
    assert any("embedding.weight" in line and "output.weight" in line for line in plan_fine_tuning(tied(), "lora").report.shared)


def test_one_report_prints_renders_and_is_data() -> None:
    """Text and HTML hold the caps and counts, HTML is escaped, and the dict is JSON."""
    report = enable_fine_tuning(cnn(), LoRAAllFineTuningStrategy(targets="re:(?P<x>conv|head)"))

    text, page, data = str(report), report._repr_html_(), report.to_dict()

    for part in ("conv, head", "trainable before", "trainable after"):
        assert part in text
        assert part in page
    assert "<x>" in text
    assert "<x>" not in page
    assert "&lt;x&gt;" in page
    assert json.loads(json.dumps(data))["caps"][0]["sites"] == ["conv", "head"]


def test_a_plan_reports_without_an_after() -> None:
    """A plan applies nothing, so its report has the counts before, and prints the same table."""
    plan = plan_fine_tuning(cnn(), "lora")

    assert plan.report.after is None
    assert plan.report.trainable is None
    assert (plan.report.total_after, plan.report.trainable_after) == (plan.report.before.numbers,) * 2
    assert "trainable after" not in str(plan)
    assert str(plan) == str(plan.report)
    assert plan._repr_html_() == plan.report._repr_html_()
