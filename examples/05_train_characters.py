"""Train a character-level model in a plain loop: no Trainer, nothing hidden.

python examples/05_train_characters.py [STEPS]
"""

import sys

import numpy as np

from tinyllm import data, generate_text, gradients, ops
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.optim import AdamW, clip_grad_norm, cosine_schedule
from tinyllm.tokenizer import CharTokenizer

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
text = data.embedded_corpus()
tokenizer = CharTokenizer.train(text)
train, validation = data.split_by_position(tokenizer.encode_to_array(text), validation_fraction=0.1)
config = ModelConfig(
    vocab_size=tokenizer.vocab_size, context_length=32, num_layers=2, num_heads=2, hidden_size=64
)
model = TransformerLM(config, seed=0)
parameters = dict(model.named_parameters())
optimizer = AdamW(parameters.items(), lr=4e-3, betas=(0.9, 0.95))
batches = data.RandomWindows(train, config.context_length, batch_size=8, seed=0)
print(
    f"{model.num_parameters():,} parameters, {len(train):,} characters, {tokenizer.vocab_size} of them different"
)

first = last = 0.0
for step in range(steps):
    inputs, targets = next(batches)  # (B, T) each
    loss = ops.cross_entropy(model(inputs), targets)
    grads = gradients(loss, list(parameters.values()))
    norm = clip_grad_norm(grads, 1.0)
    factor = cosine_schedule(step, steps, warmup_steps=steps // 10)
    optimizer.step(dict(zip(parameters, grads, strict=True)), factor)
    last = loss.item()
    first = first or last
    if step % max(1, steps // 10) == 0:
        print(f"step {step:4}  loss {last:.3f}  gradient norm {norm:.2f}")

print(f"from {first:.3f} (log V is {np.log(tokenizer.vocab_size):.3f}) to {last:.3f}")
print("".join(generate_text(model, tokenizer, "The ", 120, temperature=0.7, seed=0)))
