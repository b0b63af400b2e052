"""What pairs learn from: the standard library and its language reference, or all installed Python sources.

A file is held out when the hash of its path says so, so that every stage (tokenizer, target, adapter, calibration,
prompts) agrees on the split without a list to keep.
"""

import hashlib
import pydoc_data.topics
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

HELD_OUT_PERCENT = 3
MAX_FILE_CHARS = 400_000
NEAR_COPY_SHARE = 0.5
LONG_LINE = 24
"""Characters; shorter lines are in every file."""
SKIPPED = ("pydoc_data/", "encodings/", "_sysconfigdata")
"""Beginnings of standard-library paths that hold tables."""
PACKAGES = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Document:
    """One source file or language-reference topic.

    Attributes:
        path: below the standard library; of an installed package behind ``site-packages/``.
        file: None for what is no UTF-8 file: a topic, or a source in another encoding.
    """

    path: str
    text: str
    file: Path | None = None

    @property
    def held_out(self) -> bool:
        """True for about ``HELD_OUT_PERCENT`` of the paths, chosen by a hash of the path alone."""
        return int(hashlib.sha256(self.path.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def _library_files() -> dict[str, Path]:
    """Every source of the running interpreter's standard library by its ``Document.path``, in the paths' order."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*.py"))}
    return {
        name: file
        for name, file in files.items()
        if not name.startswith(SKIPPED) and not set(PACKAGES).intersection(file.parts)
    }


def _installed_files(packages: tuple[str, ...]) -> dict[str, Path]:
    """Every source by its ``Document.path``: of the named folders of the standard library, or of all there is."""
    library = _library_files()
    if packages:
        return {name: file for name, file in library.items() if name.partition("/")[0] in packages}
    entries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path} - {""}
    folders = [folder for folder in sorted(map(Path, entries)) if folder.name in PACKAGES and folder.is_dir()]
    of_packages = {
        f"site-packages/{file.relative_to(folder).as_posix()}": file
        for folder in folders
        for file in folder.rglob("*.py")
    }
    return of_packages | library


def _read(files: Iterable[tuple[str, Path]]) -> Iterator[Document]:
    """What can be read, without generated tables (test vectors, dumps of numbers)."""
    for path, file in files:
        utf8: Path | None = file
        try:
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                utf8 = None
                with tokenize.open(file) as source:
                    text = source.read()
        except (OSError, SyntaxError, UnicodeDecodeError):  # a broken link, or the library's tests of broken encodings
            continue
        if 200 <= len(text) <= MAX_FILE_CHARS:
            table = len(re.findall(r"\\x|0x|[0-9]|[^\x00-\x7f]", text))
            if table / len(text) < 0.15:
                yield Document(path, text, utf8)


def stdlib_documents() -> list[Document]:
    """Every readable source of the running interpreter's standard library, then the language reference."""
    topics = sorted(pydoc_data.topics.topics.items())
    return [
        *_read(_library_files().items()),
        *(Document(f"pydoc_data/topics/{topic}", text) for topic, text in topics),
    ]


def _long_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= LONG_LINE]


def installed_documents(packages: tuple[str, ...] = (), max_characters: int = 240_000_000) -> list[Document]:
    """The UTF-8 sources of the running interpreter: the standard library's and those of the installed packages.

    In an order that the hashes of their paths fix, so that any beginning of the list is a fair sample; no text twice.
    Packages copy from each other: a held-out file of whose long lines more than ``NEAR_COPY_SHARE`` are in training
    files is in neither part.

    Args:
        packages: only these folders of the standard library.
        max_characters: where the list ends.
    """
    files = sorted(_installed_files(packages).items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())
    documents, characters, texts = [], 0, set()
    for document in _read(files):
        content = hashlib.sha256(document.text.encode()).digest()
        if content in texts or document.file is None:
            continue
        texts.add(content)
        documents.append(document)
        characters += len(document.text)
        if characters >= max_characters:
            break
    known = {hash(line) for document in documents if not document.held_out for line in _long_lines(document.text)}

    def is_near_copy(document: Document) -> bool:
        lines = _long_lines(document.text)
        return sum(hash(line) in known for line in lines) > NEAR_COPY_SHARE * len(lines)

    return [document for document in documents if not document.held_out or not is_near_copy(document)]


def beginning(documents: list[Document], characters: float) -> list[Document]:
    """The first documents, until they have this many characters."""
    before = accumulate((len(document.text) for document in documents), initial=0)
    return [document for document, total in zip(documents, before, strict=False) if total < characters]


def cut_prompts(documents: list[Document], count: int, characters: int) -> dict[str, str]:
    """Up to ``count`` prompts by their document's path, one a document.

    Each begins with a class or function, has at least ``characters`` characters and whole lines, and half as much text
    of its file behind it. It has no newline at its end: a line's end and the next one's indentation are one token.
    """
    prompts: dict[str, str] = {}
    for document in documents:
        text = document.text
        for match in re.finditer(r"^(?:class|def|async def) ", text, re.MULTILINE):
            end = text.find("\n", match.start() + characters)
            prompt = text[match.start() : end].rstrip()
            if end >= 0 and len(text) - end >= characters // 2 and len(prompt) >= characters:
                prompts[document.path] = prompt
                break
        if len(prompts) == count:
            break
    return prompts
