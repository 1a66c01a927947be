"""Fairseq's, OpenNMT-py's and Eole's Transformers by their published formulas, as functions of a checkpoint's tensors.

Oracles: plain loops over plain PyTorch functions, which share no line with llmengine.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llmengine import Transformer

WORDS, WIDTH, INNER, HEADS, PAD = 37, 16, 24, 4, 1
SOURCE_WORDS = 41  # where the source has a vocabulary of its own
State = dict[str, Tensor]
# what fairseq's loader gives (padding of the source on the left, of the target on the right), and OpenNMT's
LEFT = torch.tensor([[PAD, PAD, 5, 9, 30, 2], [4, 8, 15, 16, 23, 2]])
RIGHT = torch.tensor([[5, 9, 30, 2, PAD, PAD], [4, 8, 15, 16, 23, 2]])
TARGET = torch.tensor([[2, 7, 11, 3, 20], [2, 6, 10, PAD, PAD]])
VOCABULARY = ["<unk>", "<blank>", "<s>", "</s>", *(f"w{i}" for i in range(WORDS - 4))]


def logits_of(model: Transformer, source: Tensor, target: Tensor) -> Tensor:
    out = model(source, (source != PAD).long(), decoder_input_ids=target, decoder_attention_mask=(target != PAD).long())
    return out.logits[target != PAD]


def check_words(ours: Transformer, apart: bool) -> None:
    """That there are as many word embeddings as vocabularies, of their sizes."""
    sizes = [len(p) for name, p in ours.named_parameters() if name.endswith("embeddings.word.weight")]
    assert sizes == ([SOURCE_WORDS, WORDS] if apart else [WORDS])
    assert ours.config.share_embeddings != apart and ours.config.vocab_size == WORDS
    assert ours.config.source_vocab_size == (SOURCE_WORDS if apart else WORDS)


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """(batch, length, width) each; seen: bool, broadcast to (batch, queries, keys)."""
    d = WIDTH // HEADS
    results = []
    for head in range(HEADS):
        part = slice(head * d, (head + 1) * d)
        scores = queries[..., part] @ keys[..., part].transpose(1, 2) / math.sqrt(d)
        results.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ values[..., part])
    return torch.cat(results, -1)


def random_state(shapes: dict[str, tuple[int, ...]], seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in state:
        if "norm" in name and name.endswith("weight"):
            state[name] += 1
    return state


# ---- Fairseq ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fairseq:
    """TransformerModel (fairseq 0.12). apart: source and target have a dictionary each."""

    pre_norm: bool = False
    learned: bool = False
    embed_norm: bool = False
    scaled: bool = True
    tied: bool = True
    apart: bool = False
    activation: str = "relu"
    layers: tuple[int, int] = (2, 3)
    max_positions: int = 30

    def options(self) -> argparse.Namespace:
        both = {
            "embed_dim": WIDTH, "ffn_embed_dim": INNER, "attention_heads": HEADS, "normalize_before": self.pre_norm,
            "learned_pos": self.learned,
        }  # fmt: skip
        return argparse.Namespace(
            arch="transformer", activation_fn=self.activation, dropout=0.1, attention_dropout=0.0,
            activation_dropout=0.0, no_scale_embedding=not self.scaled, layernorm_embedding=self.embed_norm,
            share_all_embeddings=self.tied and not self.apart,
            share_decoder_input_output_embed=self.tied, max_source_positions=self.max_positions,
            max_target_positions=self.max_positions, adaptive_softmax_cutoff=None,
            encoder_layers=self.layers[0], decoder_layers=self.layers[1],
            **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in both.items()},
        )  # fmt: skip

    def state(self, seed: int = 0) -> State:
        shapes: dict[str, tuple[int, ...]] = {}

        def dense(name: str, out: int, in_: int) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, in_), (out,)

        def normed(name: str) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (WIDTH,), (WIDTH,)

        for side, count in zip(("encoder", "decoder"), self.layers, strict=True):
            words = SOURCE_WORDS if self.apart and side == "encoder" else WORDS
            shapes[f"{side}.embed_tokens.weight"] = (words, WIDTH)
            if self.learned:
                shapes[f"{side}.embed_positions.weight"] = (self.max_positions + PAD + 1, WIDTH)
            if self.embed_norm:
                normed(f"{side}.layernorm_embedding")
            for i in range(count):
                layer = f"{side}.layers.{i}"
                for block in ("self_attn", "encoder_attn")[: 1 + (side == "decoder")]:
                    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                        dense(f"{layer}.{block}.{part}", WIDTH, WIDTH)
                    normed(f"{layer}.{block}_layer_norm")
                dense(f"{layer}.fc1", INNER, WIDTH)
                dense(f"{layer}.fc2", WIDTH, INNER)
                normed(f"{layer}.final_layer_norm")
            if self.pre_norm:
                normed(f"{side}.layer_norm")
        shapes["decoder.output_projection.weight"] = (WORDS, WIDTH)
        state = random_state(shapes, seed)
        if not self.apart:
            state["decoder.embed_tokens.weight"] = state["encoder.embed_tokens.weight"]
        if self.tied:
            state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"]
        for side in ("encoder", "decoder"):
            state[f"{side}.version"] = torch.tensor([3.0])
            if not self.learned:
                state[f"{side}.embed_positions._float_tensor"] = torch.zeros(1)
        return state

    def logits(self, state: State, source: Tensor, target: Tensor) -> Tensor:
        seen = (source != PAD)[:, None]
        x = self._embed(state, "encoder", source) * (source != PAD)[..., None]
        for i in range(self.layers[0]):
            x = self._layer(state, f"encoder.layers.{i}", x, seen)
        memory = norm(state, "encoder.layer_norm", x, 1e-5) if self.pre_norm else x
        x = self._embed(state, "decoder", target)
        past = torch.ones(target.shape[1], target.shape[1]).tril().bool() & (target != PAD)[:, None]
        for i in range(self.layers[1]):
            x = self._layer(state, f"decoder.layers.{i}", x, past, memory, seen)
        x = norm(state, "decoder.layer_norm", x, 1e-5) if self.pre_norm else x
        return linear(state, "decoder.output_projection", x)

    def _embed(self, state: State, side: str, tokens: Tensor) -> Tensor:
        x = state[f"{side}.embed_tokens.weight"][tokens] * (math.sqrt(WIDTH) if self.scaled else 1.0)
        places = (tokens != PAD).cumsum(1) * (tokens != PAD) + PAD  # of words after the padding's own
        if self.learned:
            x = x + state[f"{side}.embed_positions.weight"][places]
        else:
            x = x + torch.tensor([[self._sinusoid(int(place)) for place in row] for row in places])
        return norm(state, f"{side}.layernorm_embedding", x, 1e-5) if self.embed_norm else x

    @staticmethod
    def _sinusoid(place: int) -> list[float]:
        half = WIDTH // 2
        angles = [place * math.exp(-k * math.log(10000) / (half - 1)) for k in range(half)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    def _layer(self, state: State, name: str, x: Tensor, seen: Tensor, memory=None, source_seen=None) -> Tensor:
        def attend(block: str, x: Tensor, y: Tensor, seen: Tensor) -> Tensor:
            q, k, v = (
                linear(state, f"{name}.{block}.{part}_proj", z) for part, z in zip("qkv", (x, y, y), strict=True)
            )
            return linear(state, f"{name}.{block}.out_proj", attention(q, k, v, seen))

        def residual(x: Tensor, norm_name: str, block: Callable[[Tensor], Tensor]) -> Tensor:
            if self.pre_norm:
                return x + block(norm(state, f"{name}.{norm_name}", x, 1e-5))
            return norm(state, f"{name}.{norm_name}", x + block(x), 1e-5)

        activation = {"relu": torch.relu, "gelu": functional.gelu}[self.activation]
        x = residual(x, "self_attn_layer_norm", lambda x: attend("self_attn", x, x, seen))
        if memory is not None:
            x = residual(x, "encoder_attn_layer_norm", lambda x: attend("encoder_attn", x, memory, source_seen))
        return residual(
            x, "final_layer_norm", lambda x: linear(state, f"{name}.fc2", activation(linear(state, f"{name}.fc1", x)))
        )


# ---- OpenNMT-py ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenNMT:
    """The Transformer of OpenNMT-py 2 and 3. apart: source and target have embeddings of their own."""

    attention_bias: bool = True
    tied: bool = False
    apart: bool = False
    activation: str = "relu"
    layers: tuple[int, int] = (3, 2)
    eps: float = 1e-6

    def options(self) -> argparse.Namespace:
        return argparse.Namespace(
            model_task="seq2seq", encoder_type="transformer", decoder_type="transformer", heads=HEADS,
            enc_layers=self.layers[0], dec_layers=self.layers[1], transformer_ff=INNER, position_encoding=True,
            max_relative_positions=0, self_attn_type="scaled-dot", pos_ffn_activation_fn=self.activation,
            dropout=[0.1], attention_dropout=[0.0], share_decoder_embeddings=self.tied, copy_attn=False,
        )  # fmt: skip

    def state(self, seed: int = 0) -> tuple[State, State]:
        """Tensors of the model, and of its generator."""
        shapes: dict[str, tuple[int, ...]] = {}

        def dense(name: str, out: int, in_: int, bias: bool = True) -> None:
            shapes[f"{name}.weight"] = (out, in_)
            if bias:
                shapes[f"{name}.bias"] = (out,)

        def normed(name: str) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (WIDTH,), (WIDTH,)

        lists = {"encoder": "encoder.transformer", "decoder": "decoder.transformer_layers"}
        for (side, layers), count in zip(lists.items(), self.layers, strict=True):
            words = SOURCE_WORDS if self.apart and side == "encoder" else WORDS
            shapes[f"{side}.embeddings.make_embedding.emb_luts.0.weight"] = (words, WIDTH)
            for i in range(count):
                for block in ("self_attn", "context_attn")[: 1 + (side == "decoder")]:
                    for part in ("linear_keys", "linear_values", "linear_query", "final_linear"):
                        dense(f"{layers}.{i}.{block}.{part}", WIDTH, WIDTH, self.attention_bias)
                for name in ("layer_norm",) if side == "encoder" else ("layer_norm_1", "layer_norm_2"):
                    normed(f"{layers}.{i}.{name}")
                dense(f"{layers}.{i}.feed_forward.w_1", INNER, WIDTH)
                dense(f"{layers}.{i}.feed_forward.w_2", WIDTH, INNER)
                normed(f"{layers}.{i}.feed_forward.layer_norm")
            normed(f"{side}.layer_norm")
        shapes |= {"generator.weight": (WORDS, WIDTH), "generator.bias": (WORDS,)}
        state = random_state(shapes, seed)
        table = "embeddings.make_embedding.emb_luts.0.weight"
        if not self.apart:
            state[f"decoder.{table}"] = state[f"encoder.{table}"]
        if self.tied:
            state["generator.weight"] = state[f"decoder.{table}"]
        for side in lists:
            rows = [self._sinusoid(place) for place in range(50)]
            state[f"{side}.embeddings.make_embedding.pe.pe"] = torch.tensor(rows)[:, None]
        generator = {kind: state.pop(f"generator.{kind}") for kind in ("weight", "bias")}
        return state, generator

    def logits(self, state: State, generator: State, source: Tensor, target: Tensor) -> Tensor:
        seen = (source != PAD)[:, None]
        x = self._embed(state, "encoder", source)
        for i in range(self.layers[0]):
            name = f"encoder.transformer.{i}"
            normed = norm(state, f"{name}.layer_norm", x, self.eps)
            x = self._feed_forward(state, name, x + self._attend(state, f"{name}.self_attn", normed, normed, seen))
        memory = norm(state, "encoder.layer_norm", x, self.eps)
        x = self._embed(state, "decoder", target)
        past = torch.ones(target.shape[1], target.shape[1]).tril().bool() & (target != PAD)[:, None]
        for i in range(self.layers[1]):
            name = f"decoder.transformer_layers.{i}"
            normed = norm(state, f"{name}.layer_norm_1", x, self.eps)
            x = x + self._attend(state, f"{name}.self_attn", normed, normed, past)
            normed = norm(state, f"{name}.layer_norm_2", x, self.eps)
            x = self._feed_forward(state, name, x + self._attend(state, f"{name}.context_attn", normed, memory, seen))
        return functional.linear(norm(state, "decoder.layer_norm", x, self.eps), generator["weight"], generator["bias"])

    def _embed(self, state: State, side: str, tokens: Tensor) -> Tensor:
        words = state[f"{side}.embeddings.make_embedding.emb_luts.0.weight"][tokens]
        return self._placed(state, side, words)

    def _placed(self, state: State, side: str, words: Tensor) -> Tensor:
        return words * math.sqrt(WIDTH) + torch.tensor([self._sinusoid(place) for place in range(words.shape[1])])

    @staticmethod
    def _sinusoid(place: int) -> list[float]:
        row = []
        for k in range(0, WIDTH, 2):
            angle = place * math.exp(-k * math.log(10000.0) / WIDTH)
            row += [math.sin(angle), math.cos(angle)]
        return row

    def _attend(self, state: State, name: str, x: Tensor, y: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (linear(state, f"{name}.linear_{part}", z) for part, z in (("query", x), ("keys", y), ("values", y)))
        return linear(state, f"{name}.final_linear", attention(q, k, v, seen))

    def _feed_forward(self, state: State, name: str, x: Tensor) -> Tensor:
        activation = {"relu": torch.relu, "gelu": functional.gelu, "silu": functional.silu}[self.activation]
        inner = linear(state, f"{name}.feed_forward.w_1", norm(state, f"{name}.feed_forward.layer_norm", x, self.eps))
        return x + linear(state, f"{name}.feed_forward.w_2", activation(inner))


# ---- Eole ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Eole(OpenNMT):
    """Its Transformer is OpenNMT-py's; names, files and some positions are its own."""

    positions: str = "SinusoidalInterleaved"
    eps: float = 1e-5

    def config(self) -> dict:
        side = {"heads": HEADS, "hidden_size": WIDTH, "transformer_ff": INNER, "mlp_activation_fn": self.activation}
        side |= {"add_qkvbias": self.attention_bias, "add_ffnbias": True}
        embeddings = {"position_encoding_type": self.positions, "word_vec_size": WIDTH}
        embeddings |= {"n_positions": self.PLACES} if self.positions == "Learned" else {}
        return {
            "training": {"dropout": [0.2, 0.1], "attention_dropout": [0.0]},
            "model": {
                "architecture": "transformer", "eole_version": "0.6.4", "share_embeddings": not self.apart,
                "share_decoder_embeddings": self.tied, "embeddings": embeddings,
                "encoder": side | {"encoder_type": "transformer", "layers": self.layers[0]},
                "decoder": side | {"decoder_type": "transformer", "layers": self.layers[1]},
            },
        }  # fmt: skip

    PLACES = 30
    NAMES = (
        ("embeddings.make_embedding.emb_luts.0", "embeddings"), ("embeddings.make_embedding.pe.pe", "pe.pe"),
        ("encoder.transformer.", "encoder.transformer_layers."),
        ("feed_forward.layer_norm", "post_attention_layernorm"), ("feed_forward.w_1", "mlp.gate_up_proj"),
        ("feed_forward.w_2", "mlp.down_proj"),
        ("layer_norm_1", "input_layernorm"), ("layer_norm_2", "precontext_layernorm"),
    )  # fmt: skip

    def file(self) -> State:
        """Tensors as Eole names and writes them: those that modules share are there once."""
        state, generator = self.state()
        result = {f"generator.{kind}": tensor for kind, tensor in generator.items()}
        for name, tensor in state.items():
            for old, new in self.NAMES:
                name = name.replace(old, new)
            if ".transformer_layers." in name and name.startswith("encoder"):
                name = name.replace(".layer_norm.", ".input_layernorm.")
            if name.split(".")[1] in ("embeddings", "pe"):
                name = {"encoder": "src_emb", "decoder": "tgt_emb"}[name.split(".")[0]] + name[len("encoder") :]
            result[name] = tensor
        result |= {f"decoder.transformer_layers.{i}.layer_scalar": torch.ones(1) for i in range(self.layers[1])}
        if self.positions == "Learned":
            result |= {f"{side}_emb.pe.weight": self._table(place) for place, side in enumerate(("src", "tgt"))}
            result = {name: tensor for name, tensor in result.items() if not name.endswith("pe.pe")}
        if not self.apart:
            del result["tgt_emb.embeddings.weight"]
        if self.tied:
            del result["generator.weight"]
        return {name: tensor.contiguous() for name, tensor in result.items()}

    def _table(self, seed: int) -> Tensor:
        return torch.randn(self.PLACES, WIDTH, generator=torch.Generator().manual_seed(seed))

    def _placed(self, state: State, side: str, words: Tensor) -> Tensor:
        length = words.shape[1]
        if self.positions == "Learned":
            return words + self._table(("encoder", "decoder").index(side))[:length]
        if self.positions == "SinusoidalInterleaved":
            return super()._placed(state, side, words)
        half = WIDTH // 2
        angles = [[place * 10000.0 ** (-k / (half - 1)) for k in range(half)] for place in range(length)]
        rows = [[math.sin(a) for a in row] + [math.cos(a) for a in row] for row in angles]
        return words * math.sqrt(WIDTH) + torch.tensor(rows)
