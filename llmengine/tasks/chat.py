"""Instruction tuning: a decoder learns the assistant's replies of conversations."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from llmengine import metrics
from llmengine.data.chat_template import ASSISTANT, ChatTemplate, Message
from llmengine.data.examples import IGNORED
from llmengine.data.tokenizer import Tokenizer
from llmengine.metrics import Judgement
from llmengine.objectives.likelihood import each_log_likelihood
from llmengine.tasks.rows import check_characters, placed, tell, text_of, wrong
from llmengine.tasks.task import Answer, Row, Task, TaskExamples
from llmengine.tasks.writing import Writing, written

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ChatOptions(Writing):
    """Options of writing, and

    template: the conversations' Jinja template; None: the tokenizer's, or the plain one of data/chat_template.py.
    turns: which of an assistant's turns are learnt: "all" or the "last" of each conversation.
    keep: which part of a conversation longer than max_length remains: its "end" or its "beginning".
    max_new_tokens: the most tokens of an answer; None: half of max_length.
    """

    longest: ClassVar[str] = "max_new_tokens"
    template: str | None = None
    turns: str = "all"
    keep: str = "end"
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, allowed in (("turns", self.turns, ("all", "last")), ("keep", self.keep, ("end", "beginning"))):
            if value not in allowed:
                raise ValueError(f"task 'chat': {name} {value!r} is not one of {', '.join(allowed)}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"task 'chat': max_new_tokens must be 1 or more, got {self.max_new_tokens}")


class Chat(Task):
    """Conversations are one text, as a template has them; the assistant's tokens and their ends have labels.

    A row is {messages: [{role, content}, …]} or {prompt, response}. The answer to a row is the reply to what precedes
    its last turn of the assistant, or to all of it where it ends with another's; a prompt without room for an answer
    loses its beginning. Where the row has that reply, the answer also holds `nll` and `tokens`: minus the logarithm of
    its probability, and how many tokens it is. Special tokens written out in a message are text.
    """

    name = "chat"
    objective = "clm"
    columns: ClassVar[dict[str, str]] = {
        "messages": "a conversation: [{role, content}, …]; or prompt and response, two texts"
    }
    asked = ("messages",)
    Options = ChatOptions

    def __init__(self, tokenizer: Tokenizer, max_length: int, labels: Sequence[str], options: ChatOptions) -> None:
        super().__init__(tokenizer, max_length, labels, options)
        self.template = ChatTemplate(tokenizer, options.template)
        eos = tokenizer.eos_id
        self._ends = [self.template.end_id, *([] if eos in (None, self.template.end_id) else [eos])]
        self.max_new_tokens = options.max_new_tokens or max_length // 2
        if self.max_new_tokens >= max_length:
            raise ValueError(
                f"task 'chat': max_length {max_length} leaves no room for a prompt beside max_new_tokens "
                f"{self.max_new_tokens}"
            )

    def examples(self, rows: Sequence[Row], *, seed: int = 0) -> TaskExamples:
        made, long, mute = [], 0, 0
        for place, row in placed(rows):
            messages, reply = conversation(self.name, row, place)
            example = self._example(place, [*messages, *reply], self.options.turns == "last")
            long += len(example["input_ids"]) > self.max_length
            example = self._cut(example, self.options.keep)
            if (example["labels"] == IGNORED).all():
                mute += 1
            else:
                made.append(example)
        tell(self.name, long, len(rows), f"conversations are longer than {self.max_length} tokens: the "
             f"{self.options.keep} is kept")  # fmt: skip
        tell(self.name, mute, len(rows), "conversations hold nothing of the assistant's to learn, and are left out")
        if not made and rows:
            raise ValueError("task 'chat': no row holds a reply of the assistant; give conversations with replies")
        return TaskExamples(made, self)

    def answers(self, model: Any, rows: Sequence[Row], *, batch_tokens: int = 4096) -> Iterator[Answer]:
        self._check(model)
        prompts, replied, room, long = [], [], self.max_length - self.max_new_tokens, 0
        for place, row in placed(rows):
            messages, reply = conversation(self.name, row, place)
            prompt = in_row(self.name, place, self.template.prompt, messages)
            long += len(prompt) > room
            prompts.append(prompt[-room:])
            replied.append([self._cut(self._example(place, [*messages, *reply], True), "end")] if reply else [])
        tell(self.name, long, len(rows), f"prompts are longer than the {room} tokens that max_new_tokens "
             f"{self.max_new_tokens} leaves, and lose their beginning")  # fmt: skip
        texts = written(model, prompts, self._ends, new_tokens=self.max_new_tokens, options=self.options,
                        batch_tokens=batch_tokens)  # fmt: skip
        likelihoods = each_log_likelihood(model, [example for one in replied for example in one], batch_tokens)
        for ids, one in zip(texts, replied, strict=True):
            answer: Answer = {"text": self.tokenizer.decode(ids)}
            if one:
                total, tokens = next(likelihoods)
                answer |= {"nll": -total, "tokens": tokens}
            yield answer

    def judge(self, rows: Sequence[Row], answers: Sequence[Answer]) -> Judgement:
        """How near answers are to the rows' own replies, and how probable those are: perplexity. Rows without a reply
        are left out."""
        judged, replies = [], []
        for (place, row), answer in zip(placed(rows), answers, strict=True):
            for reply in conversation(self.name, row, place)[1]:
                judged.append(answer)
                replies.append(reply["content"])
        judgement = metrics.texts([answer["text"] for answer in judged], replies)
        surprise = metrics.perplexity([answer["nll"] for answer in judged], [answer["tokens"] for answer in judged])
        return replace(judgement, scores={**judgement.scores, **surprise.scores})

    def wrap(self, model: Any) -> Any:
        self._check(model)
        return model

    def _check(self, model: Any) -> None:
        if model.config.token_task != self.objective:
            raise ValueError(
                f"task 'chat': needs a decoder with objective 'clm'; the model is {model.config.architecture!r} with "
                f"{list(model.config.objectives)}"
            )

    def _example(self, place: str, messages: Sequence[Message], last_only: bool) -> dict[str, Tensor]:
        ids, replies = in_row(self.name, place, self.template.encode, messages, last_only=last_only)
        input_ids = torch.tensor(ids, dtype=torch.int64)
        return {"input_ids": input_ids, "labels": torch.where(torch.tensor(replies), input_ids, IGNORED)}

    def _cut(self, example: dict[str, Tensor], keep: str) -> dict[str, Tensor]:
        part = slice(-self.max_length, None) if keep == "end" else slice(self.max_length)
        example = {name: x[part].clone() for name, x in example.items()}
        example["labels"][:1] = IGNORED  # nothing precedes it
        return example


def conversation(task: str, row: Row, place: str) -> tuple[list[Message], list[Message]]:
    """A row's messages up to the last turn of the assistant, and that turn: one message, or none."""
    if "messages" not in row:
        messages: list[Message] = [{"role": "user", "content": text_of(task, row, place, "prompt")}]
        if row.get("response") is None:
            return messages, []
        return messages, [{"role": ASSISTANT, "content": text_of(task, row, place, "response")}]
    messages = list(messages_of(task, row, place, "messages"))
    if messages[-1]["role"] != ASSISTANT:
        return messages, []
    if len(messages) == 1:
        raise ValueError(f"task {task!r}: {place}: messages holds a reply alone; expected what it replies to")
    return messages[:-1], messages[-1:]


def messages_of(task: str, row: Row, place: str, column: str) -> Sequence[Message]:
    """A row's column, which must be a conversation."""
    messages = row[column]
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise wrong(task, place, column, messages, "a list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(
                f"task {task!r}: {place}: message {i + 1} is {reprlib.repr(message)}; expected "
                "{role, content}, two texts"
            )
        check_characters(task, place, f"content of message {i + 1}", message["content"])
    return messages


def in_row(task: str, place: str, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """What a template gives; its errors name the row."""
    try:
        return call(*arguments, **options)
    except ValueError as error:
        raise ValueError(f"task {task!r}: {place}: {error}") from None
