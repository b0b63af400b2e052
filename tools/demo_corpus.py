"""The corpora: the standard library and its language reference (the bundled pair), all installed sources (the presets).

A file is held out when the hash of its path says so, so that every stage (tokenizer, target, adapter, calibration,
prompts) agrees on the split without a list to keep.
"""

import hashlib
import pydoc_data.topics
import re
import sys
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PERCENT = 3
MAX_FILE_CHARS = 400_000
NEAR_COPY_SHARE = 0.5
LONG_LINE = 24
"""Characters; shorter lines are in every file."""
SKIPPED = ("pydoc_data/", "encodings/", "_sysconfigdata")
"""Beginnings of standard-library paths that hold tables."""


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


def _is_prose_or_code(text: str) -> bool:
    """False for generated tables: test vectors, dumps of numbers."""
    if not 200 <= len(text) <= MAX_FILE_CHARS:
        return False
    table = len(re.findall(r"\\x|0x|[0-9]|[^\x00-\x7f]", text))
    return table / len(text) < 0.15


def stdlib_documents() -> list[Document]:
    """Every readable Python source of the running interpreter's standard library, then the language reference."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or name.startswith(SKIPPED):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # the library's own tests of broken encodings
            continue
        if _is_prose_or_code(text):
            documents.append(Document(name, text, path))
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        documents.append(Document(f"pydoc_data/topics/{topic}", text))
    return documents


def _installed_files(packages: tuple[str, ...]) -> dict[str, Path]:
    """Every ``.py`` file by its ``Document.path``: of the named folders of the standard library, or of all there is."""
    library = Path(sysconfig.get_path("stdlib"))
    if packages:
        return {
            file.relative_to(library).as_posix(): file for name in packages for file in (library / name).rglob("*.py")
        }
    others = {
        Path(entry) for entry in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path) if entry
    }
    files: dict[str, Path] = {}
    for folder in sorted(others):
        if folder.name in ("site-packages", "dist-packages") and folder.is_dir():
            files |= {f"site-packages/{file.relative_to(folder).as_posix()}": file for file in folder.rglob("*.py")}
    for file in library.rglob("*.py"):
        name = file.relative_to(library).as_posix()
        if not {"site-packages", "dist-packages"}.intersection(file.parts) and not name.startswith(SKIPPED):
            files[name] = file
    return files


def _long_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= LONG_LINE]


def installed_documents(packages: tuple[str, ...] = (), max_characters: int = 240_000_000) -> list[Document]:
    """The Python sources of the running interpreter: the standard library's and those of the installed packages.

    In an order that the hashes of their paths fix, so that any beginning of the list is a fair sample; no text twice.
    Packages copy from each other: a held-out file of whose long lines more than ``NEAR_COPY_SHARE`` are in training
    files is in neither part.

    Args:
        packages: only these folders of the standard library.
        max_characters: where the list ends.
    """
    files = _installed_files(packages)
    documents, characters, texts = [], 0, set()
    for path in sorted(files, key=lambda path: hashlib.sha256(path.encode()).digest()):
        try:
            text = files[path].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # another encoding, a broken link, a file of another user
            continue
        content = hashlib.sha256(text.encode()).digest()
        if content in texts or not _is_prose_or_code(text):
            continue
        texts.add(content)
        documents.append(Document(path, text, files[path]))
        characters += len(text)
        if characters >= max_characters:
            break
    known = {hash(line) for document in documents if not document.held_out for line in _long_lines(document.text)}

    def is_near_copy(document: Document) -> bool:
        lines = _long_lines(document.text)
        return sum(hash(line) in known for line in lines) > NEAR_COPY_SHARE * len(lines)

    return [document for document in documents if not document.held_out or not is_near_copy(document)]


def cut_prompts(documents: list[Document], count: int, characters: int) -> dict[str, str]:
    """Up to ``count`` prompts by their document's path, one a document.

    Each begins with a class or function, has at least ``characters`` characters and whole lines, and half as much text
    of its file behind it. It has no newline at its end: a line's end and the next one's indentation are one token.
    """
    prompts: dict[str, str] = {}
    for document in documents:
        text = document.text
        for match in re.finditer(r"^(?:class|def|async def) ", text, re.MULTILINE):
            start = match.start()
            end = text.find("\n", start + characters)
            if end < 0 or len(text) - end < characters // 2:
                break
            prompt = text[start:end].rstrip()
            if len(prompt) >= characters:
                prompts[document.path] = prompt
                break
        if len(prompts) == count:
            break
    return prompts
