"""Tokens a second at batch 1: reading a prompt (prefill) and decoding with the cache, against transformers.

    python benchmarks/speed/decoding.py [--rounds 7] [--prompt 512] [--tokens 200]

12.2M parameters: 6 layers of width 384 and a vocabulary of 2,048. Both libraries have the same weights, and choose the
most likely token; the chosen tokens are compared. Only the logits after the last token of the prompt are computed.
Medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

from tinyllm import generate
from tinyllm.backend import Array
from tinyllm.models import ModelConfig, TransformerLM
from tinyllm.models.generation.decoder import Decoder
from tinyllm.system.cores import physical_cores
from tinyllm.tokenizer import CharTokenizer
from tinyllm.training.checkpoints import checkpoint

CONFIG = ModelConfig(
    vocab_size=2048, context_length=1024, num_layers=6, num_heads=6, hidden_size=384, head_scale=1.0
)


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to decode")
    args = parser.parse_args()
    model = TransformerLM(CONFIG, seed=1).eval()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "model", model, CharTokenizer("".join(map(chr, range(256, 2304)))))
        peer = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
    torch.set_num_threads(physical_cores())
    prompt = np.random.default_rng(0).integers(0, CONFIG.vocab_size, size=args.prompt)
    start = prompt[:16]
    batch, short = (torch.from_numpy(ids[None]) for ids in (prompt, start))

    def prefill() -> Array:
        logits: Array = Decoder(model)(prompt)
        return logits

    def torch_prefill() -> Array:
        with torch.no_grad():
            logits: Array = peer(batch, use_cache=True, logits_to_keep=1).logits[0, -1].numpy()
        return logits

    def decode() -> list[int]:
        return list(generate(model, start, args.tokens, temperature=0.0))

    def torch_decode() -> list[int]:
        with torch.no_grad():
            found = peer.generate(
                short,
                attention_mask=torch.ones_like(short),
                max_new_tokens=args.tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        ids: list[int] = found[0, len(start) :].tolist()
        return ids

    np.testing.assert_allclose(prefill(), torch_prefill(), rtol=0, atol=1e-3)
    same = sum(a == b for a, b in zip(decode(), torch_decode(), strict=True))
    print(f"{model.num_parameters():,} parameters; {same} of {args.tokens} decoded tokens are the same")
    for name, count, ours, theirs in (
        ("prefill", args.prompt, prefill, torch_prefill),
        ("decode", args.tokens, decode, torch_decode),
    ):
        times = [(seconds(ours), seconds(theirs)) for _ in range(args.rounds)]
        mine, other = (count / statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(b / a for a, b in times)
        print(f"{name}: tinyllm {mine:.0f} tokens/s, transformers {other:.0f}; {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
