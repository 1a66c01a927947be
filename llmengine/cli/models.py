"""A trained model by path: a run folder (finished or not), or a model directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmengine.data import Tokenizer
    from llmengine.models import Transformer
    from llmengine.training import RunConfig


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
    from llmengine.training import RunConfig
    from llmengine.training.run import Folder, pick_device

    folder, config, directory = Folder(path), None, path
    if folder.config.is_file():
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
