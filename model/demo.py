"""The bundled pair of target and adapter, and its held-out prompts decoded plainly and with Kangaroo."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .compare import Comparison, compare, summarise
from .errors import KangarooError
from .generate import Kangaroo

PAIR = Path(__file__).parent / "demo_pair"


@dataclass(frozen=True)
class Prompt:
    """The beginning of a text that the pair was not trained on."""

    name: str
    text: str


@dataclass(frozen=True)
class DemoPair:
    """A folder with ``target/``, ``adapter/`` and ``prompts.json``.

    Raises:
        KangarooError: where one of them is missing.
    """

    folder: Path = PAIR

    def __post_init__(self) -> None:
        for path in (self.target, self.adapter, self.prompts_file):
            if not path.exists():
                raise KangarooError(f"the demo pair is not complete: {path} does not exist.")

    @property
    def target(self) -> Path:
        """The target's checkpoint."""
        return self.folder / "target"

    @property
    def adapter(self) -> Path:
        """The adapter's folder."""
        return self.folder / "adapter"

    @property
    def prompts_file(self) -> Path:
        """A JSON list of names and prompts."""
        return self.folder / "prompts.json"

    def prompts(self) -> list[Prompt]:
        """The held-out prompts."""
        entries = json.loads(self.prompts_file.read_text(encoding="utf-8"))
        return [Prompt(entry["name"], entry["prompt"]) for entry in entries]

    def load(self) -> Kangaroo:
        """The target with its adapter."""
        return Kangaroo.from_pretrained(self.target, self.adapter)


def compare_prompts(
    kangaroo: Kangaroo, prompts: Sequence[Prompt], *, rounds: int, **settings: Any
) -> Iterator[Comparison]:
    """One comparison a prompt, each as soon as it is measured."""
    for prompt in prompts:
        yield compare(kangaroo, prompt.text, name=prompt.name, rounds=rounds, **settings)


def report(comparisons: Sequence[Comparison], *, finished: bool) -> dict[str, Any]:
    """The demo's figures by name, for JSON."""
    return {
        "finish_reason": "complete" if finished else "interrupted",
        "prompts": [comparison.as_dict() for comparison in comparisons],
        "total": summarise(comparisons).as_dict() if comparisons else None,
    }
