"""Byte-pair encoding merge by merge: the textbook algorithm, then the fast one on the same text.

python examples/08_byte_pair_encoding.py
"""

from collections import Counter

from tinyllm import data
from tinyllm.tokenizer import BPETokenizer
from tinyllm.tokenizer.bpe import reference
from tinyllm.tokenizer.patterns import Pattern

text = "low lower lowest, new newer newest, wide wider widest; the newest is the lowest"
pieces = Counter(piece.encode() for piece in Pattern("gpt2").split(text))
print("pieces:", ", ".join(f"{piece.decode()!r} x{count}" for piece, count in pieces.most_common(6)), "...")

merges = reference.train(pieces, num_merges=12)
strings = [bytes([i]) for i in range(256)]
for a, b in merges:
    strings.append(strings[a] + strings[b])
    print(f"token {len(strings) - 1} = {strings[a].decode()!r} + {strings[b].decode()!r}")
print("' lowest' is", [strings[token].decode() for token in reference.encode(b" lowest", merges)])

# The fast one learns the same merges, in the same order.
fast = BPETokenizer.train([text], vocab_size=256 + 12, pattern="gpt2", min_frequency=1)
assert fast.merges == [(strings[a], strings[b]) for a, b in merges]

tokenizer = BPETokenizer.train([data.embedded_corpus()], vocab_size=1024, special_tokens=["<|endoftext|>"])
ids = tokenizer.encode("The statement raises an exception.<|endoftext|>", allowed_special="all")
print("|".join(tokenizer.decode([id]) for id in ids))
assert tokenizer.decode(ids) == "The statement raises an exception.<|endoftext|>"
