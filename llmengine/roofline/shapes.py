"""The shapes that training gives operators: on a GPU, on a CPU, tiny ones for tests, and those that goals name."""

from __future__ import annotations

Shape = tuple[int, ...]

# Shapes that goals of ours name, of a GPU: more than a lent one has time for beside all else.
GOALS: dict[str, list[Shape]] = {
    "linear": [  # tokens, in, out
        *[(n, n, n) for n in (2048, 4096, 8192, 16384)],
        (8192, 768, 2304), (8192, 768, 768), (8192, 768, 3072), (8192, 3072, 768),  # GPT-2
        (16384, 1024, 3072), (16384, 1024, 1024), (16384, 1024, 4096), (16384, 4096, 1024),  # BERT-large
        (8192, 4096, 6144), (8192, 4096, 4096), (8192, 4096, 28672), (8192, 14336, 4096),  # Llama 3 8B
    ],
    "ffn": [(65536, 768, 3072), (16384, 1024, 4096), (8192, 4096, 16384)],  # tokens, d_model, d_ff
    "gated_ffn": [(8192, 2048, 8192), (8192, 4096, 14336)],  # Llama 3.2 1B, Llama 3 8B
    "linear_cross_entropy": [(8192, 4096, 128256), (8192, 2304, 256000)],  # tokens, d_model, classes: Llama 3, Gemma 2
    "head_options": [(4096, 4096, 128256)],
}  # fmt: skip
# Rows do not fit a processor's last cache where they stand for memory's speed ("cpu": 64 MiB of float32 and more).
SHAPES: dict[str, dict[str, list[Shape]]] = {
    "cuda": {
        "attention": [  # batch, heads, tokens, head_dim
            (8, 16, 2048, 128),  # 16k tokens, 2048 wide
            (2, 16, 8192, 128),
            (8, 32, 2048, 64),
            (4, 8, 4096, 256),
            (1, 16, 16384, 128),
            (32, 16, 512, 128),
            (8, 16, 2048, 96),
            (8, 8, 2048, 192),
        ],
        "sinks": [(8, 16, 2048, 128)],  # as attention's
        "options": [(8, 16, 2048, 128)],  # as attention's
        "ffn": [(8192, 1024, 4096), (8192, 4096, 16384)],  # tokens, d_model, d_ff
        "gated_ffn": [(8192, 4096, 14336)],
        "linear": [(8192, 768, 2304), (8192, 4096, 4096)],  # tokens, in, out
        "linear_cross_entropy": [(8192, 4096, 32768), (8192, 4096, 128256)],  # tokens, d_model, classes
        "head_options": [],
        "rows": [(8192, 768), (8192, 4096), (4096, 16384)],
        "logits": [(8192, 32768), (8192, 131072)],
        # batch, heads, key heads, tokens, head_dim
        "cache": [(1, 32, 8, 32768, 128), (32, 32, 8, 4096, 128), (64, 32, 32, 1024, 128)],
        "rotary": [(16384, 32, 128)],  # tokens, heads, head_dim
        "embedding": [(16384, 50257, 768), (16384, 131072, 4096)],  # tokens, rows of the table, width
        "parameters": [(148, 1 << 22)],  # parameters, elements of each
    },
    "cpu": {
        "attention": [(2, 12, 1024, 64), (1, 12, 4096, 64), (2, 6, 1024, 128)],
        "sinks": [(2, 12, 1024, 64)],
        "options": [(2, 12, 1024, 64)],
        "ffn": [(2048, 768, 3072)],
        "gated_ffn": [(2048, 768, 2048)],
        "linear": [(1024, 768, 2304), (2048, 768, 768)],
        "linear_cross_entropy": [(1024, 768, 50257)],
        "head_options": [],
        "rows": [(512, 768), (16384, 1024)],
        "logits": [(512, 50257)],
        "cache": [(8, 12, 12, 4096, 64), (4, 32, 8, 4096, 128)],
        "rotary": [(16384, 16, 64)],
        "embedding": [(4096, 50257, 768)],
        "parameters": [(74, 1 << 19)],
    },
    "small": {
        "attention": [(1, 2, 40, 16)],
        "sinks": [(1, 2, 40, 16)],
        "options": [(1, 2, 40, 16)],
        "ffn": [(8, 16, 32)],
        "gated_ffn": [(8, 16, 32)],
        "linear": [(8, 16, 24)],
        "linear_cross_entropy": [(8, 16, 40)],
        "head_options": [(8, 16, 40)],
        "rows": [(5, 48)],
        "logits": [(6, 50)],
        "cache": [(2, 4, 2, 140, 16)],
        "rotary": [(6, 2, 16)],
        "embedding": [(20, 30, 16)],
        "parameters": [(3, 40)],
    },
    "goals": GOALS,
}
