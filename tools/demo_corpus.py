"""What pairs learn from: the standard library and its language reference, or all installed Python sources.

A file is held out when the hash of its path says so, so that every stage (tokenizer, target, adapter, calibration,
prompts) agrees on the split without a list to keep.
"""

import hashlib
import pydoc_data.topics
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

HELD_OUT_PERCENT = 3
MAX_FILE_CHARS = 400_000
MAX_CHARS = 240_000_000
"""Of all installed sources together."""
NEAR_COPY_SHARE = 0.5
LONG_LINE = 24
"""Characters; shorter lines are in every file."""
SKIPPED = ("pydoc_data/", "encodings/", "_sysconfigdata")
"""Beginnings of standard-library paths that hold tables."""
TABLE = re.compile(r"\\x|0x|[0-9]|[^\x00-\x7f]")
"""What generated tables are made of."""
PACKAGES = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Document:
    """One source file or language-reference topic.

    Attributes:
        path: below the standard library; of an installed package behind ``site-packages/``.
        file: None for a topic.
    """

    path: str
    text: str
    file: Path | None = None

    @property
    def held_out(self) -> bool:
        """True for about ``HELD_OUT_PERCENT`` of the paths, chosen by a hash of the path alone."""
        return int(hashlib.sha256(self.path.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def _library() -> dict[str, Path]:
    """Every source of the standard library by its ``Document.path``, in the paths' order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*.py"))}
    return {
        name: file
        for name, file in files.items()
        if not name.startswith(SKIPPED) and not set(PACKAGES).intersection(file.parts)
    }


def _read(files: Iterable[tuple[str, Path]]) -> Iterator[Document]:
    """What can be read as UTF-8, without generated tables (test vectors, dumps of numbers)."""
    for path, file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # a broken link, or one of the library's tests of encodings
            continue
        if 200 <= len(text) <= MAX_FILE_CHARS and len(TABLE.findall(text)) / len(text) < 0.15:
            yield Document(path, text, file)


def stdlib_documents() -> list[Document]:
    """Every readable source of the running interpreter's standard library, then the language reference."""
    topics = sorted(pydoc_data.topics.topics.items())
    return [*_read(_library().items()), *(Document(f"pydoc_data/topics/{topic}", text) for topic, text in topics)]


def installed_documents(packages: tuple[str, ...] = ()) -> list[Document]:
    """The sources of the running interpreter: the standard library's and those of the installed packages.

    In an order that the hashes of their paths fix, so that any beginning of the list is a fair sample; no text twice.
    Packages copy from each other: a held-out file of whose long lines more than ``NEAR_COPY_SHARE`` are in training
    files is in neither part.

    Args:
        packages: only these folders of the standard library.
    """
    files = _library()
    if packages:
        files = {name: file for name, file in files.items() if name.partition("/")[0] in packages}
    else:
        for folder in {Path(entry) for entry in sys.path if Path(entry).name in PACKAGES}:
            files |= {f"site-packages/{file.relative_to(folder).as_posix()}": file for file in folder.rglob("*.py")}
    in_order = sorted(files.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())
    unique: dict[str, Document] = {}
    for document in beginning(_read(in_order), MAX_CHARS):
        unique.setdefault(document.text, document)
    known = {hash(line) for text, document in unique.items() if not document.held_out for line in _long_lines(text)}

    def is_near_copy(document: Document) -> bool:
        lines = _long_lines(document.text)
        return sum(hash(line) in known for line in lines) > NEAR_COPY_SHARE * len(lines)

    return [document for document in unique.values() if not document.held_out or not is_near_copy(document)]


def _long_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= LONG_LINE]


def beginning(documents: Iterable[Document], characters: float) -> list[Document]:
    """The first documents, until they have this many characters."""
    chosen: list[Document] = []
    for document in documents:
        if characters <= 0:
            break
        chosen.append(document)
        characters -= len(document.text)
    return chosen


def cut_prompts(documents: list[Document], count: int, characters: int) -> dict[str, str]:
    """Up to ``count`` prompts by their document's path, one a document.

    Each begins with a class or function, has at least ``characters`` characters and whole lines, and half as much text
    of its file behind it. It has no newline at its end: a line's end and the next one's indentation are one token.
    """
    pattern = rf"^(?:class|def|async def) .{{{characters},}}?\S(?=\n.{{{characters // 2}}})"
    found = ((document.path, re.search(pattern, document.text, re.MULTILINE | re.DOTALL)) for document in documents)
    return dict(islice(((path, match[0]) for path, match in found if match), count))
