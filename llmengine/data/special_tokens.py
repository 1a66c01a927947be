"""Special tokens of tokenizers, by role and family."""

from __future__ import annotations

ROLES = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
WORDPIECE = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
}  # fmt: skip
BPE = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
# special tokens of byte-level BPE vocabularies by family, in the order of their ids, and what is put around a text
FAMILIES = {
    "gpt2": BPE,
    "bart": {
        "bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>",
        "cls_token": "<s>", "sep_token": "</s>",
    },
    "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    "xlnet": {
        "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "cls_token": "<cls>", "sep_token": "<sep>",
        "pad_token": "<pad>", "mask_token": "<mask>",
    },
}  # fmt: skip
# around a text, and around a pair, as Hugging Face's tokenizers of the family put them; a number is a token type
AROUND = {
    "bart": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "t5": ("$A </s>", "$A </s> $B </s>"),
    "xlnet": ("$A <sep> <cls>:2", "$A <sep> $B:1 <sep>:1 <cls>:2"),
}
SENTINEL, SENTINELS = "<extra_id_{}>", 100  # T5's stand for spans; the first is the last of the vocabulary
