"""The demo pair's corpus: the Python standard library's sources and the language reference in ``pydoc_data``.

A file is held out when the hash of its path says so, so that every stage (tokenizer, target, adapter, calibration,
prompts) agrees on the split without a list to keep.
"""

import hashlib
import pydoc_data.topics
import re
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_PERCENT = 3
MAX_FILE_CHARS = 400_000


@dataclass(frozen=True)
class Document:
    """One source file or language-reference topic: its path below the standard library, its text, its file."""

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
        if "site-packages" in name or name.startswith(("pydoc_data/", "encodings/", "_sysconfigdata")):
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
