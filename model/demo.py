"""The bundled pair: a small target with its adapter, and prompts from files that neither was trained on."""

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import KangarooError

PAIR = Path(__file__).parent / "demo_pair"
DEMO_MODEL = "demo"
"""The bundled pair's name wherever a model is asked for; a folder of this name must be given as ``./demo``."""

QUESTIONS = {
    "explain": "Why is the sky blue? Answer in three sentences.",
    "code": "Write a Python function that tells whether a word is a palindrome, and explain it.",
    "correct": "Correct the mistakes in this text, and give me the whole text: 'The kangaroo are a marsupial from the "
    "family Macropodidae. It use its strong hind legs to leaping, and it tail for balance. Kangaroos is found in "
    "Australia and New Guinea.'",
}
"""What the demo asks SmolLM2: two answers are new text, and the third repeats most of its question."""


@dataclass(frozen=True)
class DemoPair:
    """A folder with ``target/``, ``adapter/`` and ``prompts.json``.

    Raises:
        KangarooError: where one of them is missing.
    """

    folder: Path

    def __post_init__(self) -> None:
        for path in (self.target, self.adapter, self.prompts_file):
            if not path.exists():
                raise KangarooError(f"the demo pair is incomplete: {path} does not exist.")

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
        """A JSON list of objects with ``name`` and ``prompt``."""
        return self.folder / "prompts.json"

    def prompts(self) -> dict[str, str]:
        """The held-out prompts by name."""
        entries = json.loads(self.prompts_file.read_text(encoding="utf-8"))
        return {entry["name"]: entry["prompt"] for entry in entries}


def bundled_pair() -> DemoPair:
    """The pair that comes with the package."""
    return DemoPair(PAIR)
