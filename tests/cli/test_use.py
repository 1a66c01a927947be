"""`generate`, `fill`, `evaluate`, `inspect`, `info`: a trained model in use."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import llmengine
from llmengine import TransformerConfig
from llmengine.cli.info import describe, gather
from llmengine.data import Tokenizer
from llmengine.data.tokenizer_files import around
from llmengine.testing import poison
from llmengine.training.predict import continuations
from tests.cli.conftest import MODEL, call, succeed

# ---- generate --------------------------------------------------------------------------------------------------------


def test_generate_goes_on_with_the_prompt(runs):
    run = runs["clm"].path
    text = succeed("generate", run, "--prompt", "It was", "--seed", 1)
    assert text.startswith("It was") and len(text) > 20
    assert succeed("generate", run, "--prompt", "It was", "--seed", 1) == text
    assert succeed("generate", run, "--prompt", "It was", "--seed", 2) != text
    assert succeed("generate", run / "model", "--prompt", "It was", "--seed", 1) == text, "a model directory will do"


def test_generate_is_the_models_own_generation(runs):
    directory = runs["clm"].path / "model"
    tokenizer = Tokenizer.load(directory)
    ids = torch.tensor([tokenizer.encode("It was")])
    model = llmengine.Transformer.from_pretrained(directory)
    for options, flags in (({}, ["--greedy"]), ({"num_beams": 3}, ["--beams", 3])):
        expected = tokenizer.decode(model.generate(ids, max_new_tokens=7, **options)[0].tolist())
        assert succeed("generate", directory, "--prompt", "It was", "--new-tokens", 7, *flags) == expected + "\n"


def test_a_published_decoder_reads_what_its_tokenizer_puts_before_a_text(runs, tmp_path):
    """As Llama's do, `<s>`; and its text ends where its config says, too."""
    directory = shutil.copytree(runs["clm"].path / "model", tmp_path / "model")
    tokenizer, model = Tokenizer.load(directory), llmengine.Transformer.from_pretrained(directory)
    tokenizer.backend.post_processor = around(tokenizer.backend, "<|endoftext|> $A", "<|endoftext|> $A $B")
    tokenizer.save(directory)
    ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode("It was")]])
    new = model.generate(ids, max_new_tokens=7)[0, ids.shape[1] :].tolist()
    asked = ("generate", directory, "--prompt", "It was", "--new-tokens", 7, "--greedy")
    assert succeed(*asked) == "It was" + tokenizer.decode(new) + "\n"
    config = json.loads((directory / "config.json").read_text())
    config["eos_token_id"] = [config["eos_token_id"], new[3]]
    (directory / "config.json").write_text(json.dumps(config))
    assert succeed(*asked) == "It was" + tokenizer.decode(new[: new.index(new[3])]) + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-p", "caf\udce9"), "'caf\\udce9' has half a surrogate pair, which is no character"),
        (("-p", "It", "--seed", 2**63), "seed is 9223372036854775808; it must be in [0, 2**63)"),
    ],
)
def test_what_generate_cannot_read_is_told(runs, options, message):
    result = call("generate", runs["clm"].path, *options)
    assert result.exit_code == 2 and message in result.stderr


def test_the_lowest_temperature_is_greedy(runs):
    asked = ("generate", runs["clm"].path, "-p", "It was", "--new-tokens", 7)
    assert succeed(*asked, "--temperature", 1e-45) == succeed(*asked, "--greedy")


def test_generate_prints_several_samples(runs):
    printed = succeed("generate", runs["clm"].path, "-p", "It was", "--samples", 3, "--seed", 0, "--top-k", 50)
    texts = printed.split("\n\n---\n\n")
    assert len(texts) == 3 and len(set(texts)) == 3 and all(text.startswith("It was") for text in texts)


def test_prompts_of_different_lengths_do_not_disturb_each_other(runs):
    """Under poison: what an unwritten place of the cache holds must not count."""
    directory = runs["clm"].path / "model"
    model, tokenizer = llmengine.Transformer.from_pretrained(directory), Tokenizer.load(directory)
    prompts = ["It was a truth that she had never", "I", "She was"]
    with poison():
        together = continuations(model, tokenizer, prompts, new_tokens=12)
        assert together == [continuations(model, tokenizer, [prompt], new_tokens=12)[0] for prompt in prompts]


@pytest.fixture(scope="module")
def reader(runs, tmp_path_factory) -> Path:
    """An encoder-decoder that knows nothing; its tokenizer puts <s> and </s> around a text."""
    from llmengine.data import read_documents

    directory = tmp_path_factory.mktemp("reader")
    tokenizer = Tokenizer.train([read_documents("austen")[0][:20_000]], "bpe", 400, family="bart")
    shape = {**MODEL, "vocab_size": tokenizer.vocab_size, "init_std": 0.2}
    torch.manual_seed(0)
    marks = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = TransformerConfig.preset("bart-tiny", **shape, **marks, decoder_start_token_id=tokenizer.eos_id)
    llmengine.Transformer(config).save_pretrained(directory)
    tokenizer.save(directory)
    return directory


def test_generate_lets_an_encoder_decoder_write(reader):
    tokenizer, model = Tokenizer.load(reader), llmengine.Transformer.from_pretrained(reader).eval()
    ids = [tokenizer.bos_id, *tokenizer.encode("It was a truth"), tokenizer.eos_id]
    expected = model.generate(torch.tensor([ids]), max_new_tokens=9)[0, 1:].tolist()
    printed = succeed("generate", reader, "--prompt", "It was a truth", "--new-tokens", 9, "--greedy")
    assert printed == tokenizer.decode(expected[: [*expected, tokenizer.eos_id].index(tokenizer.eos_id)]) + "\n"
    assert len(printed.strip()) > 3
    samples = succeed("generate", reader, "-p", "It was a truth", "--samples", 3, "--seed", 0).split("\n\n---\n\n")
    assert len(set(samples)) == 3


def test_sources_of_different_lengths_do_not_disturb_each_other(reader):
    model, tokenizer = llmengine.Transformer.from_pretrained(reader), Tokenizer.load(reader)
    sources = ["It was a truth that she had never", "I", "She was"]
    with poison():
        together = continuations(model, tokenizer, sources, new_tokens=12)
        assert together == [continuations(model, tokenizer, [source], new_tokens=12)[0] for source in sources]
    assert len(set(together)) == 3


def test_a_source_that_is_too_long_is_an_error(reader):
    result = call("generate", reader, "--prompt", "x " * 100)
    assert result.exit_code == 2 and re.search(r"the prompt has \d+ tokens; the model reads 64", result.stderr)


def test_an_unfinished_run_speaks_from_its_newest_checkpoint(runs, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(runs["clm"].path, run)
    finished = succeed("generate", run, "--prompt", "It was", "--greedy")
    (run / "model" / "model.safetensors").unlink()
    assert succeed("generate", run, "--prompt", "It was", "--greedy") == finished
    shutil.rmtree(run / "checkpoints")
    result = call("generate", run, "--prompt", "It was")
    assert result.exit_code == 2 and "no checkpoint yet" in result.stderr


# ---- fill ------------------------------------------------------------------------------------------------------------


def test_fill_prints_candidates_by_probability(runs):
    printed = succeed("fill", runs["bert"].path, "She was [MASK] to [MASK].", "--top", 4)
    first, *groups = re.split(r"\nmask \d+\n", printed)
    assert first.startswith("she was ") and "[MASK]" not in first
    assert len(groups) == 2
    for group in groups:
        shares = [float(share) for share in re.findall(r"(\d+\.\d) %", group)]
        assert len(shares) == 4 and shares == sorted(shares, reverse=True) and 0 < shares[0] <= 100
    best = [group.split()[2] for group in groups]
    assert first.replace(" ", "").startswith(f"shewas{best[0]}to{best[1]}".replace("##", ""))


# ---- evaluate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["bert", "clm"])
def test_evaluate_repeats_the_runs_last_evaluation(runs, objective: str):
    run = runs[objective].path
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "evaluation"
    result = json.loads(succeed("evaluate", run, "--json"))
    assert result["losses"] == pytest.approx(last["losses"], rel=1e-5)
    assert result["perplexity"] == pytest.approx(last["perplexity"], rel=1e-5)
    assert result.get("accuracy") == last.get("accuracy")
    assert f"perplexity  {last['perplexity']:.2f}" in succeed("evaluate", run)


def test_evaluate_takes_another_corpus(runs, corpus: Path):
    run = runs["clm"].path
    other = json.loads(succeed("evaluate", run, "--corpus", corpus / "2.txt", "--json"))
    assert other["examples"] > 3 and other["loss"] != json.loads(succeed("evaluate", run, "--json"))["loss"]


# ---- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_shows_what_is_masked_and_what_is_a_pair(configs):
    printed = succeed("inspect", configs["bert"], "--sequences", 2)
    predicted, of = map(int, re.search(r"predicted: (\d+) of (\d+) tokens", printed).groups())
    assert 0.1 < predicted / of < 0.2
    kinds = [int(n) for n in re.findall(r"(\d+) (?:masked|random|kept) \([\d.]+ %", printed)]
    assert len(kinds) == 3 and sum(kinds) == predicted
    follow, random = map(int, re.search(r"pairs: (\d+) follow .*?(\d+) random", printed).groups())
    assert follow + random == int(re.search(r"in (\d+) sequences", printed)[1])
    sequences = re.split(r"\nsequence \d+:", printed)[1:]
    assert len(sequences) == 2
    for sequence in sequences:
        assert "[CLS]" in sequence and sequence.count("[SEP]") >= 2 and "→[MASK]" in sequence


def test_inspect_prints_the_same_batch_that_the_model_is_given(configs):
    """The truth on the left of the arrows and the plain tokens are a text of the corpus."""
    printed = succeed("inspect", configs["clm"], "--sequences", 1)
    words = printed.split("tokens\n")[-1].split()
    text = "".join(words).replace("Ġ", " ").replace("Ċ", "\n")
    corpus_of = Path(re.search(r"corpus: (.+)", configs["clm"].read_text())[1])
    assert any(text in path.read_text(encoding="utf-8") for path in corpus_of.iterdir())
    assert "every token but the first of each sequence" in printed


def test_inspect_takes_a_run_folder_and_writes_nothing(runs):
    run = runs["bert"].path
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert "400 tokens" in succeed("inspect", run, "--step", 3, "--set", "data.accumulation=2")
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}


MODELS = {
    "denoising": {"architecture": "encoder_decoder"},
    "span_corruption": {"architecture": "encoder_decoder"},
    "plm": {"architecture": "encoder", "positions": "relative", "norm_place": "post", "final_norm": False},
    "sop": {"architecture": "encoder", "type_vocab_size": 2, "pooler": "cls_tanh"},
}


def shown(objective: str, corpus: Path, tmp_path: Path, **options) -> str:
    fields = {
        "corpus": str(corpus), "objective": objective, "steps": 4, "tokenizer": {"vocab_size": 500},
        "model": {**MODEL, **MODELS[objective]},
        "data": {"sequence_length": 32, "batch_tokens": 256, "held_out": 0.2, "options": options},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return succeed("inspect", path, "--sequences", 1)


@pytest.mark.parametrize("objective", ["denoising", "span_corruption"])
def test_inspect_shows_both_sides(objective, corpus, tmp_path):
    printed = shown(objective, corpus, tmp_path)
    assert re.search(r"predicted: every token of the targets, \d+; the sources have \d+", printed)
    head, *sides = re.split(r"\n the encoder reads\n| the decoder reads\n| and is to write\n", printed)
    source, shifted, target = (side.split() for side in sides)
    assert shifted[1:] == target[:-1] and target[-1] == source[-1] == "</s>"
    counts = re.search(r"sequence 0: (\d+) tokens and (\d+) of the target", head)
    assert (len(source), len(target)) == tuple(map(int, counts.groups()))
    mark = "<mask>" if objective == "denoising" else "<extra_id_0>"
    assert mark in source and (mark in target) == (objective == "span_corruption")


def test_inspect_shows_the_order(corpus, tmp_path):
    printed = shown("plm", corpus, tmp_path)
    predicted = int(re.search(r"predicted: (\d+) of \d+ tokens", printed)[1])
    words = printed.split("tokens\n")[-1].split()
    numbers = [int(n) for n in re.findall(r"(?:^|\s)\(?(\d+)(?:→|\))", " ".join(words))]
    assert sorted(numbers) == list(range(1, len(numbers) + 1)) and 3 <= len(numbers) <= predicted
    assert re.fullmatch(r"\(\d+\)<cls>", words[-1]) and re.fullmatch(r"\(\d+\)<sep>", words[-2])


def test_inspect_shows_two_parts(corpus, tmp_path):
    """Of the second one the text is told from what all see."""
    printed = shown("plm", corpus, tmp_path, reuse=8, two_segments=True)
    words = printed.split("tokens\n")[-1].split()
    seconds = [i for i, word in enumerate(words) if word.startswith("·")]
    assert len(seconds) >= 8 and seconds[0] >= 8 and not any("→" in word for word in words if word.startswith("·"))
    assert sum(word.endswith("<sep>") for word in words) == 2 and words[-1].endswith("<cls>")


def test_inspect_shows_swapped_pairs(corpus, tmp_path):
    printed = shown("sop", corpus, tmp_path)
    assert re.search(r"pairs: \d+ follow \(label 0\), \d+ swapped \(label 1\)", printed)
    assert re.search(r"sequence 0: \d+ tokens, the second segment (follows|precedes the first)", printed)


def test_histogram_counts_every_sequence():
    import numpy

    from llmengine.cli.inspect import histogram

    for lengths in (numpy.array([5]), numpy.array([7, 7, 8]), numpy.arange(3, 400), numpy.array([1, 128, 128])):
        bars = histogram(lengths)
        assert sum(int(re.search(r"to +\d+ +(\d+)", bar)[1]) for bar in bars) == len(lengths)
        assert max(bar.count("#") for bar in bars) == 40


# ---- info ------------------------------------------------------------------------------------------------------------


def test_info_tells_which_backend_runs_what():
    facts = json.loads(succeed("info", "--json"))
    assert facts["versions"]["llmengine"] == llmengine.__version__
    assert facts["cpu"]["active_instruction_set"] in facts["cpu"]["instruction_sets"]
    printed = succeed("info")
    for operator in facts["operators"]:
        row = re.search(rf"^{operator} +(.*)$", printed, flags=re.M)[1].split()
        usable = [
            "yes" if b["unavailable"] is None and operator in b["operators"] else "-"
            for b in facts["backends"].values()
        ]
        assert row == usable and row[-1] == "yes", "plain PyTorch runs every operator"
    for backend in facts["backends"].values():
        assert backend["unavailable"] is None or backend["unavailable"] in printed


def test_info_tells_of_an_instruction_set_that_the_system_refuses():
    facts = gather()
    facts["cpu"]["notice"] = ""
    assert not re.search("^notice", describe(facts), flags=re.M)
    facts["cpu"]["notice"] = "refused: using avx2"
    assert re.search("^notice +refused: using avx2$", describe(facts), flags=re.M)
