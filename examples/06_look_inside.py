"""Look inside a small transformer: what ran, what it is made of, where a NaN began, and the graph as a picture.

python examples/06_look_inside.py [FOLDER]

The pictures go into FOLDER, by default a temporary one.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from tinyllm import ops
from tinyllm.debug import AnomalyError, detect_anomaly, graph, summary, trace
from tinyllm.models import ModelConfig, TransformerLM

config = ModelConfig(vocab_size=50, context_length=16, num_layers=2, num_heads=4, hidden_size=32)
model = TransformerLM(config, seed=0)
tokens = np.random.default_rng(0).integers(0, 50, size=(2, 17))  # (B, T + 1)
inputs, targets = tokens[:, :-1], tokens[:, 1:]

print("What the model is made of\n")
print(summary(model))

print("\nWhat runs in its first block, forward and backward\n")
report = trace(model, tokens)
header, *lines = str(report).splitlines()
print("\n".join([header, *[line for line in lines if line.startswith(("blocks.0", "total"))]]))
slowest = max(report.rows, key=lambda row: row.forward_ms + row.backward_ms)
print(f"\nthe slowest op is {slowest.op} in {slowest.module or 'no module'}")

print("\nWhat goes wrong when one weight is not a number\n")
weight = model.blocks[1].attention.key.weight
kept = weight.data[0, 0]
weight.data[0, 0] = np.nan
found = ""
try:
    with detect_anomaly():
        model(inputs)
except AnomalyError as error:
    found = error.module
    print(error)
weight.data[0, 0] = kept
assert found == "blocks.1.attention.key"

# The graph is drawn before backward, which frees it. A tooltip on each box says what does not fit into it.
loss = ops.cross_entropy(model(inputs), targets)
folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="tinyllm-"))
folder.mkdir(parents=True, exist_ok=True)
collapsed = graph(loss, gradients=True)
collapsed.save(folder / "model.svg")
collapsed.save(folder / "model.dot")
graph(loss, expand="blocks.0", gradients=True).save(folder / "block.svg")
graph(loss, expand="blocks.0.attention", gradients=True).save(folder / "attention.svg")

print("\nThe residual stream, and what the loss wants of it\n")
for node in collapsed.nodes:
    assert node.gradient is not None
    print(f"{node.label:14} {node.value!s:38} gradient {node.gradient}")
print("\nin", folder)
for picture in sorted(folder.iterdir()):
    print(f"  {picture.name}")
assert collapsed.find("embedding").gradient is not None
assert len(collapsed.nodes) == 2 + 4
