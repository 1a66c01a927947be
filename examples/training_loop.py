"""Your own training loop: a small GPT on the built-in novels, of llmengine only model, optimizer and data.

    python examples/training_loop.py [steps]

The model takes and returns what Hugging Face's do, so that the loop is the one you have already.
"""

from __future__ import annotations

import sys

import torch

import llmengine
from llmengine.data import Tokenizer, read_documents

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 150
torch.manual_seed(0)

# Text to a (sequences, 64) table of token ids.
documents = read_documents("austen")  # or your own: a file, a folder, a list of them
tokenizer = Tokenizer.train(documents, kind="bpe", vocab_size=1024)
ids = torch.tensor([token for document in tokenizer.encode_many(documents) for token in document])
sequences = ids[: len(ids) // 64 * 64].view(-1, 64)

config = llmengine.TransformerConfig.preset(
    "gpt-tiny", vocab_size=tokenizer.vocab_size, max_positions=128,
    bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
)  # fmt: skip
model = llmengine.Transformer(config)
optimizer = llmengine.optim.AdamW(model.parameters(), lr=3e-3)

for step in range(1, steps + 1):
    input_ids = sequences[torch.randint(len(sequences), (16,))]
    loss = model(input_ids, labels=input_ids).loss  # labels are not shifted: the model does it
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 25 == 0 or step == 1:
        print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)

prompt = torch.tensor([tokenizer.encode("It was")])
print(tokenizer.decode(model.generate(prompt, max_new_tokens=40, do_sample=True, top_k=40, seed=0)[0].tolist()))

model.save_pretrained("my-model")  # transformers' from_pretrained loads it
tokenizer.save("my-model")  # and AutoTokenizer this
