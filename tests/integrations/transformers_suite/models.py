"""Our models for Transformers' own tests. Copied beside its `test_modeling_common.py` and run there, as test_models.py.

With ATTENTION=llmengine our attention is registered under the name "sdpa", so that Transformers' comparisons of "sdpa"
with "eager" are comparisons of ours. The number of calls that reached it goes to the file that CALLS names.
"""

from __future__ import annotations

import atexit
import os
import unittest
from pathlib import Path

import torch
import transformers
from transformers import AttentionInterface

from .test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

if os.environ["ATTENTION"] == "llmengine":
    from llmengine.integrations.transformers import attention

    calls = 0

    def counted(*args, **kwargs):
        global calls
        calls += 1
        return attention.attention(*args, **kwargs)

    attention.register("sdpa")
    AttentionInterface.register("sdpa", counted)
    atexit.register(lambda: Path(os.environ["CALLS"]).write_text(str(calls)))


class Tester:
    """What the mixin asks of each family: sizes, a config, and a batch with padding."""

    batch_size, seq_length, num_choices, is_training = 3, 7, 2, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    vocabulary, pad_token_id = 99, 0
    encoder_decoder = False

    def __init__(self, config: type, **fields) -> None:
        self.config, self.fields = config, fields

    def get_config(self):
        return self.config(vocab_size=self.vocabulary, **self.fields)

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocabulary).clamp(3)
        inputs = {"input_ids": ids, "attention_mask": random_attention_mask([self.batch_size, self.seq_length])}
        if self.encoder_decoder:
            inputs["decoder_input_ids"] = ids_tensor([self.batch_size, self.seq_length], self.vocabulary).clamp(3)
            inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
        return self.get_config(), inputs


class EncoderDecoderTester(Tester):
    encoder_decoder = True
    encoder_seq_length = decoder_seq_length = Tester.seq_length


def classes(*names: str) -> tuple[type, ...]:
    return tuple(getattr(transformers, name) for name in names)


CLASSIC = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37,
           "max_position_embeddings": 64}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class Bert(ModelTesterMixin, unittest.TestCase):
    all_model_classes = classes(
        "BertModel", "BertLMHeadModel", "BertForMaskedLM", "BertForMultipleChoice", "BertForNextSentencePrediction",
        "BertForPreTraining", "BertForQuestionAnswering", "BertForSequenceClassification", "BertForTokenClassification",
    )  # fmt: skip

    def setUp(self):
        self.model_tester = Tester(transformers.BertConfig, **CLASSIC)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is transformers.BertForPreTraining:
            tester = self.model_tester
            inputs["labels"] = torch.zeros(tester.batch_size, tester.seq_length, dtype=torch.long)
            inputs["next_sentence_label"] = torch.zeros(tester.batch_size, dtype=torch.long)
        return inputs


class Gpt2(ModelTesterMixin, unittest.TestCase):
    all_model_classes = classes(
        "GPT2Model", "GPT2LMHeadModel", "GPT2ForQuestionAnswering", "GPT2ForSequenceClassification",
        "GPT2ForTokenClassification",
    )  # fmt: skip

    def setUp(self):
        self.model_tester = Tester(transformers.GPT2Config, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPECIAL)


class Llama(ModelTesterMixin, unittest.TestCase):
    all_model_classes = classes(
        "LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaForQuestionAnswering",
        "LlamaForTokenClassification",
    )  # fmt: skip

    def setUp(self):
        self.model_tester = Tester(transformers.LlamaConfig, **CLASSIC, **SPECIAL, num_key_value_heads=2)


class Bart(ModelTesterMixin, unittest.TestCase):
    is_encoder_decoder = True
    test_missing_keys = False
    all_model_classes = classes("BartModel", "BartForConditionalGeneration", "BartForQuestionAnswering")

    def setUp(self):
        self.model_tester = EncoderDecoderTester(
            transformers.BartConfig, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=37, decoder_ffn_dim=37, max_position_embeddings=64,
            decoder_start_token_id=2, **SPECIAL,
        )  # fmt: skip


class T5(ModelTesterMixin, unittest.TestCase):
    is_encoder_decoder = True
    all_model_classes = classes("T5Model", "T5ForConditionalGeneration", "T5ForQuestionAnswering")

    def setUp(self):
        self.model_tester = EncoderDecoderTester(
            transformers.T5Config, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_decoder_layers=2, num_heads=4,
            relative_attention_num_buckets=8, decoder_start_token_id=0, **SPECIAL,
        )  # fmt: skip


class ModernBert(ModelTesterMixin, unittest.TestCase):
    all_model_classes = classes(
        "ModernBertModel", "ModernBertForMaskedLM", "ModernBertForSequenceClassification",
        "ModernBertForTokenClassification", "ModernBertForQuestionAnswering", "ModernBertForMultipleChoice",
    )  # fmt: skip

    def setUp(self):
        self.model_tester = Tester(
            transformers.ModernBertConfig, **CLASSIC, **SPECIAL, cls_token_id=1, sep_token_id=2, local_attention=4,
            global_attn_every_n_layers=2,
        )  # fmt: skip
