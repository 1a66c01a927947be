"""A trained model by path: a run folder (finished or not), or a model directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmengine.data import Tokenizer
    from llmengine.models import Transformer
    from llmengine.training import RunConfig

READABLE = "A model directory (Hugging Face's, Eole's or ours), a run folder, or a file of Fairseq, OpenNMT-py or GGUF."
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Trained:
    model: Transformer
    tokenizer: Tokenizer
    config: RunConfig | None
    """The run's; None for a model directory."""
    source: Path
    """Where the weights come from."""


def load(path: Path, device: str = "auto") -> Trained:
    """Raises FileNotFoundError or ValueError saying what is missing and what to do."""
    from llmengine.data import Tokenizer
    from llmengine.models import Transformer
    from llmengine.tasks import FILE
    from llmengine.training import RunConfig
    from llmengine.training.run import Folder, model_directory, pick_device

    folder, config, directory = Folder(path), None, path
    if (folder.model / FILE).is_file():  # of `finetune`: the model's directory says all
        directory = model_directory(path)
    elif folder.config.is_file():
        config, directory = RunConfig.from_file(folder.config), folder.model
    elif not (path / "config.json").is_file():
        what = "has neither config.yaml (a run folder) nor config.json (a model directory)"
        raise FileNotFoundError(f"{path} {what if path.is_dir() else 'does not exist'}; give what `train` wrote")
    if config is not None and not (directory / "model.safetensors").is_file():
        trained = _unfinished(folder, config)
    else:
        model: Any = Transformer.from_pretrained(directory) if config is None else _finished(directory, config)
        trained = Trained(model, Tokenizer.load(directory), config, directory)
    trained.model.to(pick_device(device)).eval()
    return trained


def _finished(directory: Path, config: RunConfig) -> Any:
    from llmengine import objectives

    return objectives.load_model(config.objective, directory, **config.data.options)


def _unfinished(folder, config: RunConfig) -> Trained:
    """From the newest checkpoint of a run that did not end."""
    import typer

    from llmengine import objectives
    from llmengine.data import Tokenizer
    from llmengine.training import checkpoint

    saved = checkpoint.newest(folder.checkpoints, lambda sentence: typer.echo(sentence, err=True))
    if saved is None:
        raise FileNotFoundError(
            f"{folder.path} has no checkpoint yet; wait for one, or go on with: llmengine train --resume {folder.path}"
        )
    tokenizer = Tokenizer.load(folder.model)
    shape = config.transformer(
        tokenizer.vocab_size, pad_id=tokenizer.pad_id, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id
    )
    model: Any = objectives.make_model(config.objective, shape, **config.data.options)
    model.load_state_dict(saved.tensors("model"))
    return Trained(model, tokenizer, config, saved.path)


# ---- weights alone ---------------------------------------------------------------------------------------------------


def weights_of(path: Path) -> Path:
    """The model directory of a run folder; any other path as it is."""
    from llmengine.training.run import Folder

    folder = Folder(path)
    return folder.model if folder.config.is_file() else path


def read(path: Path, dtype: str | None = None) -> Transformer:
    """A model from a directory or file, on the CPU; dtype None: as stored."""
    import torch

    from llmengine.models import Transformer

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return Transformer.from_pretrained(path, dtype=None if dtype is None else getattr(torch, dtype))


def describe(model: Transformer) -> str:
    """Family, size, number format and heads in a line."""
    config = model.config
    count = sum(parameter.numel() for parameter in model.parameters())
    dtypes = ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}))
    heads = f"heads {', '.join(config.objectives)}" if config.objectives else "no heads"
    return f"{config.family}, {config.architecture}, {count:,} parameters, {dtypes}, {heads}"
