"""Text into sentences, by punctuation: what BERT's sentence pairs are made of."""

from __future__ import annotations

import re

PARAGRAPH = re.compile(r"\n\s*\n")
# closing quotes and brackets belong to the sentence; Chinese and Japanese need no space after a stop
END = re.compile(r"[.!?…]+[\"'”’»)\]_]*(?=\s)|[!?]+[”’»)]*(?=[\u4e00-\u9fff])|[。！？｡]+[…。！？｡]*[”’」』）》〉】〕]*")
ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'“‘])(?:[A-Z]|Mr|Mrs|Ms|Messrs|Dr|Prof|Rev|Hon|St|Sr|Jr|Col|Capt|Gen|Lt|Sgt|No|vs|etc|e\.g|i\.e|cf|viz)\.$"
)
OPENING = "\"'“‘«([_-–—"


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, white space between words made one space. A paragraph's end always ends one.

    Every word of the text is in exactly one sentence, in order. Rules, not a model: a stop ends a sentence unless
    it closes an abbreviation or a lower-case word follows. In Chinese 。！？ end one, with the quotes and brackets that
    close behind them; … does so only before a space, as it is as often a pause.
    """
    return [sentence for paragraph in PARAGRAPH.split(text) for sentence in _of_paragraph(" ".join(paragraph.split()))]


def _of_paragraph(text: str) -> list[str]:
    sentences, start = [], 0
    for match in END.finditer(text):
        at = match.end()
        # a straight quotation mark closes what was opened in the sentence; after a space it is as with others
        if text[at : at + 1] == '"' and text.count('"', start, at) % 2:
            at += 1
        following = text[at : at + 8].lstrip().lstrip(OPENING)[:1]
        if following.islower() or (match.group()[0] == "." and ABBREVIATION.search(text, max(start, at - 8), at)):
            continue
        sentences.append(text[start:at].strip())
        start = at
    return [sentence for sentence in [*sentences, text[start:].strip()] if sentence]
