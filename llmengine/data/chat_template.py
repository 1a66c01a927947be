"""Conversations as one text: chat templates, and which tokens are replies.

A template is Jinja, as Hugging Face's tokenizers carry it. It is given messages [{"role", "content"}, …],
add_generation_prompt (whether the beginning of a reply follows) and the tokenizer's special tokens by role (bos_token,
…); its text has all special tokens that a model is to see. What it writes within {% generation %} is a reply. Where a
template has no such block, a reply is what an assistant's message adds to the text of the messages before it and the
beginning of a reply. Templates run in Jinja's sandbox and see no clock: a text depends on its messages alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from llmengine.data.tokenizer import Tokenizer

Message = Mapping[str, str]
ASSISTANT = "assistant"
# For tokenizers that bring none: "user:", a line with the message, an empty line; replies end with {end}.
PLAIN = """\
{{{{ {begin} }}}}{{% for message in messages %}}{{{{ message['role'] + ':\\n' }}}}\
{{% if message['role'] == 'assistant' %}}{{% generation %}}{{{{ message['content'] + {end} }}}}{{% endgeneration %}}\
{{% else %}}{{{{ message['content'] }}}}{{% endif %}}{{{{ '\\n\\n' }}}}{{% endfor %}}\
{{% if add_generation_prompt %}}{{{{ 'assistant:\\n' }}}}{{% endif %}}"""
# Stands within a special token that somebody wrote into a message, which so remains text. Of a private plane.
BROKEN = "\U000f0000"


class ChatTemplate:
    """A template with its tokenizer."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        """template: the Jinja text; None: the tokenizer's own, or `plain`. Raises ValueError where it is no template,
        or where its replies end with no special token: a model would never learn to end them."""
        self.tokenizer = tokenizer
        self.text = template or tokenizer.chat_template or plain(tokenizer)
        self._marks_replies = "endgeneration" in self.text
        self._template, self._replies = _compiled(self.text)
        added = tokenizer.backend.get_added_tokens_decoder()
        self._added = set(added)
        # the longest first: one may be a part of another
        special = (token.content for token in added.values() if token.special and len(token.content) > 1)
        self._special = sorted(special, key=len, reverse=True)
        ids, labelled = self.encode([{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": "a"}])
        reply = [token for token, is_reply in zip(ids, labelled, strict=True) if is_reply]
        if not reply or reply[-1] not in self._added:
            raise ValueError(
                "chat template: an assistant's message does not end with a special token"
                + (" within {% generation %}" if self._marks_replies else "")
                + ": a model could not learn where its replies end"
            )
        self.end_id: int = reply[-1]
        """The token that ends a reply."""

    def encode(self, messages: Sequence[Message], *, last_only: bool = False) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them are replies, or the last reply, their ends included."""
        safe = self._safe(messages)
        text, replies = self._render(safe, False)
        if not self._marks_replies:
            replies = self._found(safe, text)
        ids, offsets = self._ids(text)
        labelled = [False] * len(ids)
        for begin, end in replies[-1:] if last_only else replies:
            within = [i for i, (first, last) in enumerate(offsets) if last > begin and first < end]
            if within:
                labelled[within[0] : within[-1] + 1] = [True] * (within[-1] + 1 - within[0])
        return ids, labelled

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of messages and the beginning of a reply."""
        return self._ids(self._render(self._safe(messages), True)[0])[0]

    def _safe(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        return [{name: self._broken(value) for name, value in message.items()} for message in messages]

    def _broken(self, value: Any) -> Any:
        """A text in which special tokens are broken in two."""
        if not isinstance(value, str):
            return value
        value = value.replace(BROKEN, "")
        for token in self._special:
            value = value.replace(token, token[0] + BROKEN + token[1:])
        return value

    def _render(self, messages: Sequence[Message], prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text and where in it replies are, as far as the template marks them."""
        from jinja2 import TemplateError

        pieces: list[str] = []
        self._replies.begin(pieces)
        try:
            for piece in self._template.generate(
                messages=messages, add_generation_prompt=prompt, tools=None, documents=None, **self.tokenizer.roles
            ):
                pieces.append(piece)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"chat template: {error}") from None
        return "".join(pieces), self._replies.found

    def _found(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Where replies are in the text of a template that does not mark them."""
        replies = []
        for i, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before, after = self._render(messages[:i], True)[0], self._render(messages[: i + 1], False)[0]
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"chat template: what message {i + 1} adds to the text cannot be told, as the template writes a "
                    "message differently where others follow it; mark replies in it by {% generation %}"
                )
            # white space behind the token that ends a reply belongs to what follows
            stripped = after.rstrip()
            ended = any(stripped.endswith(token) for token in self._special)
            replies.append((len(before), len(stripped) if ended else len(after)))
        return replies

    def _ids(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and where in the text each is."""
        backend = self.tokenizer.backend
        backend.encode_special_tokens = False
        pieces = text.split(BROKEN)
        starts = accumulate((len(piece) + len(BROKEN) for piece in pieces), initial=0)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, piece in zip(starts, pieces, strict=False):
            encoding = backend.encode(piece, add_special_tokens=False)
            ids += encoding.ids
            offsets += [(start + first, start + last) for first, last in encoding.offsets]
        return ids, offsets


def plain(tokenizer: Tokenizer) -> str:
    """A template of words: "user:", "assistant:"; replies end with eos (sep, where there is none).

    It begins with the tokens that the tokenizer's own template puts before a text.
    """
    end = next((token for token in (tokenizer.eos_id, tokenizer.sep_id) if token is not None), None)
    if end is None:
        raise ValueError("chat template: the tokenizer has neither an eos nor a sep token to end a reply with")
    begin = "".join(map(tokenizer.token, tokenizer.template().sides[0]))
    return PLAIN.format(begin=json.dumps(begin), end=json.dumps(tokenizer.token(end)))


class _Replies:
    """Where in the text the template that is being rendered marks replies."""

    def begin(self, pieces: list[str]) -> None:
        """pieces: what has been rendered, as it grows."""
        self.pieces, self.found = pieces, []

    def add(self, reply: str) -> None:
        begin = sum(map(len, self.pieces))
        self.found.append((begin, begin + len(reply)))

    found: list[tuple[int, int]]


def _compiled(text: str) -> tuple[Any, _Replies]:
    """The template, and what its replies are told to."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    replies = _Replies()

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            reply = caller()
            replies.add(reply)
            return reply

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    # as transformers has it
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(text), replies
    except TemplateError as error:
        raise ValueError(f"chat template: {error}") from None


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
            sort_keys: bool = False) -> str:  # fmt: skip
    """Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
