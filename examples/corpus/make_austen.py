"""Makes llmengine/data/corpora/austen from Debian's package r-cran-janeaustenr.

    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb unpacked
    python examples/corpus/make_austen.py unpacked llmengine/data/corpora/austen

R's lazy-load database is a row of blocks, one for each book: a 4-byte length, then a zlib stream of an R vector of
strings in XDR (big-endian) form. Lines are joined as they are; what an editor of our time added is left out.
"""

from __future__ import annotations

import lzma
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
STRING = b"\x00\x04\x00\x09"  # how XDR announces an R string of ASCII or UTF-8; the last byte is its type
EDITORS_NOTE = "A NOTE ON THE TEXT"  # of a 20th-century edition of Northanger Abbey, after the novel's end
TITLES = ("Emma", "Mansfield Park", "Northanger Abbey", "Persuasion", "Pride and Prejudice", "Sense and Sensibility")


def books(database: bytes) -> Iterator[str]:
    """The text of every book."""
    position = 0
    while position < len(database):
        stream = zlib.decompressobj()
        block = stream.decompress(database[position + 4 :])
        position = len(database) - len(stream.unused_data)
        yield "\n".join(strings(block))


def strings(block: bytes) -> Iterator[str]:
    at = block.index(STRING)
    while at + 8 <= len(block) and block[at + 3] == STRING[3]:
        (length,) = struct.unpack(">i", block[at + 4 : at + 8])
        yield block[at + 8 : at + 8 + max(length, 0)].decode("utf-8")
        at += 8 + max(length, 0)


def main(unpacked: str, output: str) -> None:
    found = {}
    for book in books((Path(unpacked) / DATABASE).read_bytes()):
        text = book.partition(EDITORS_NOTE)[0].strip() + "\n"
        title = next(title for title in TITLES if text.lower().startswith(title.lower()))
        assert "gutenberg" not in text.lower(), title
        found[title] = text
    assert sorted(found) == sorted(TITLES), sorted(found)
    for title, text in found.items():
        path = Path(output) / f"{title.lower().replace(' ', '_')}.txt.xz"
        path.write_bytes(lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))
        print(f"{path.name}: {len(text)} characters, {path.stat().st_size} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
