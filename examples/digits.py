"""Teach a small network new digits with LoRA, save what it learnt as one file, and load that into a fresh base.

A network trained on scikit-learn's digits 0-4 learns 5-9 from 200 labels. Needs torch and scikit-learn; takes seconds.

    python digits.py [--epochs 30]
"""

import argparse
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

from gift_core import FullFineTuningStrategy, enable_fine_tuning, load_adapter, merge, merge_strategies, save_adapter
from gift_lora_plugin import LoRAAllFineTuningStrategy

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=30)
epochs = parser.parse_args().epochs
torch.set_num_threads(1)
torch.manual_seed(0)


def network():
    """A small convolutional network for 8x8 images and five classes."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
            conv2=nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            conv3=nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            fc=nn.Sequential(nn.Linear(256, 64), nn.ReLU()),
            head=nn.Linear(64, 5),
        )
    )


def train(model, inputs, labels, epochs, learning_rate):
    """Train what is trainable in the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()


# The data: digits 0-4 to pre-train on, 200 labels of the digits 5-9 to adapt to, the others to test on.
data = load_digits()
inputs = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(data.target)
known, new = torch.where(labels < 5)[0], torch.where(labels >= 5)[0]
chosen, test = train_test_split(new, train_size=200, stratify=labels[new], random_state=0)

# The base model, as it would come from somewhere else.
pretrained = network()
train(pretrained, inputs[known], labels[known], epochs=max(1, epochs // 3), learning_rate=1e-3)


def build_base():
    """A new copy of the base model, with a head for the new task."""
    base = network()
    base.load_state_dict(pretrained.state_dict())
    base.head = nn.Linear(64, 5)
    return base


# Choose what is tuned: the head in full, three layers by LoRA. The rest is frozen.
strategy = merge_strategies(
    [FullFineTuningStrategy(targets="head"), LoRAAllFineTuningStrategy(rank=4, targets=["conv2", "conv3", "fc"])]
)
model = build_base()
report = enable_fine_tuning(model, strategy)
print(f"{report.trainable_after:,} of {report.total_after:,} numbers train")

# Train as ever: model.parameters() gives what trains.
train(model, inputs[chosen], labels[chosen] - 5, epochs, learning_rate=5e-3)


@torch.no_grad()
def answers_of(model):
    """The class that the model gives each test digit."""
    return model.eval()(inputs[test]).argmax(1)


answers = answers_of(model)
print(f"accuracy on {len(test)} test digits: {(answers == labels[test] - 5).double().mean():.1%}")

# Save, and load into a new copy of the base: the file alone gives the same answers.
path = Path(tempfile.mkdtemp()) / "digits.safetensors"
print(f"{save_adapter(model, path).file_bytes:,} bytes in {path}")
fresh = build_base()
load_adapter(fresh, path)
print("a new base with the adapter gives the same answers:", torch.equal(answers_of(fresh), answers))

# Merge for inference at the base model's speed.
merge(fresh)
print("and so when merged:", torch.equal(answers_of(fresh), answers))
