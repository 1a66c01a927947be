"""Pretraining as a run: its parts, made from its config alone: corpus, tokenizer, examples, model, optimizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from llmengine import convert, objectives
from llmengine.data.batches import Step, StepBatches
from llmengine.data.pairs import Pairs
from llmengine.data.shards import Corpus, Shards, read_corpus, split_corpus
from llmengine.data.tokenizer import Tokenizer
from llmengine.models import Transformer, TransformerConfig
from llmengine.nn import keep_fp8_weights
from llmengine.objectives.electra import Electra
from llmengine.training.config import RunConfig
from llmengine.training.evaluation import evaluate
from llmengine.training.flops import model_flops
from llmengine.training.memory import StreamMemory
from llmengine.training.metrics import Record
from llmengine.training.optimizer import adamw
from llmengine.training.run import Folder, Run
from llmengine.training.streams import INITIAL_WEIGHTS, reseed


@dataclass(kw_only=True)
class Pretraining(Run):
    config: RunConfig
    model: Transformer | Electra

    @classmethod
    def prepare(cls, config: RunConfig, folder: Folder, device: torch.device) -> Pretraining:
        """Reads and makes everything; writes nothing."""
        documents = read_corpus(config.corpus, pairs=objectives.OBJECTIVES[config.objective].pairs)
        held_out: Corpus = ()
        digest = digest_of(documents)
        if config.data.held_out:
            documents, held_out = split_corpus(documents, config.data.held_out, config.seed)
        tokenizer = tokenizer_of(config, documents, folder.model)
        shape = config.transformer(
            tokenizer.vocab_size, pad_id=tokenizer.pad_id, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id
        )
        check_can_be_saved(shape)
        batches = _batches(config, documents, tokenizer, shuffle=True)
        reseed(config.seed, INITIAL_WEIGHTS)
        model = objectives.make_model(config.objective, shape, **config.data.options).to(
            device
        )  # drawn on the CPU: the same weights on every device
        keep_fp8_weights(model, config.data.accumulation > 1)
        return cls(
            config=config,
            title=config.objective,
            steps=config.steps,
            schedule=config.schedule,
            folder=folder,
            device=device,
            tokenizer=tokenizer,
            model=model,
            optimizer=adamw(model, config.optimizer),
            batches=batches,
            held_out=_batches(config, held_out, tokenizer, shuffle=False) if held_out else None,
            digest=digest,
            source=f"the texts of corpus {config.corpus!r}",
            memory=None if batches.examples.follows(0) is None else StreamMemory(),
        )

    def flops(self, batch: Step) -> int:
        return model_flops(self.model, batch.micro_batches, batch.items["tokens"], batch.streams)

    def evaluate(self) -> Record | None:
        if self.held_out is None:
            return None
        return evaluate(self.model, self.held_out, self.device, self.config.precision)

    def finish(self, whole: bool) -> None:
        self.model.save_pretrained(self.folder.model)


def check_can_be_saved(shape: TransformerConfig) -> None:
    """That the model's family has files for what the config asks: else the run would fail when it is done."""
    if (family := convert.FAMILIES.get(shape.family)) is not None:
        family.write_config(shape.to_dict(), TransformerConfig.defaults())


def _batches(config: RunConfig, documents: Corpus, tokenizer: Tokenizer, *, shuffle: bool) -> StepBatches:
    data = config.data
    examples = objectives.build(
        config.objective,
        documents,
        tokenizer,
        sequence_length=data.sequence_length,
        seed=config.seed,
        **data.options,
    )
    accumulation = data.accumulation if shuffle else 1
    return StepBatches(
        examples, batch_tokens=data.batch_tokens, accumulation=accumulation, seed=config.seed, shuffle=shuffle
    )


def digest_of(documents: Corpus) -> str:
    """What a resumed run compares, to go on with the same text."""
    if isinstance(documents, Shards | Pairs):
        return documents.digest
    return hashlib.sha256("\0".join(documents).encode()).hexdigest()


def tokenizer_of(config: RunConfig, documents: Corpus, directory: Path) -> Tokenizer:
    """The run's tokenizer: as saved in `directory`, or, the first time, read or trained as the config says."""
    if (directory / "tokenizer.json").is_file():
        return Tokenizer.load(directory)
    section = config.tokenizer
    if section.path is not None:
        return Tokenizer.load(section.path)
    if isinstance(documents, Shards):
        raise ValueError(
            f"tokenizer: {documents.directory} is tokenised already; leave out tokenizer, or give its tokenizer.path"
        )
    family = objectives.OBJECTIVES[config.objective].family
    texts = documents.texts if isinstance(documents, Pairs) else documents
    return Tokenizer.train(texts, **section.model_dump(exclude_none=True), family=family)
