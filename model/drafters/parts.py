"""What an adapter may have besides its layer and its norm; each is an entry of ``config.json`` (docs/architecture.md).

None of them is the paper's form, which docs/experiments.md holds every one of them against.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS

from ..errors import KangarooError
from ..number import is_whole

LEAST_BLOCK = 2
"""A block of one draft would be a chain of one."""


class Parts(NamedTuple):
    """The parts of an adapter beyond the paper's; 0 and False leave a part out.

    Attributes:
        deep_state_size: the inner size of the SwiGLU over the target's last layer's output at the position before.
        draft_head_rank: the rank of a head of two factors of its own, in place of the target's.
        draft_block: the most drafts that it makes in one pass; 0 makes them one by one.
        trained_confidence: whether what is held against the threshold was trained.
    """

    deep_state_size: int = 0
    draft_head_rank: int = 0
    draft_block: int = 0
    trained_confidence: bool = False

    def check(self, hidden_size: int, named: str = "") -> "Parts":
        """The same, where an adapter of that hidden size can have them; errors begin with ``named``.

        Raises:
            KangarooError: a value out of its range, or parts that exclude each other.
        """
        most = MAX_SPECULATIVE_TOKENS
        for name, low, high, what in (
            ("deep_state_size", 1, None, "a whole number of at least 1"),
            (
                "draft_head_rank",
                1,
                hidden_size - 1,
                f"a whole number from 1 to {hidden_size - 1}, below the hidden size",
            ),
            ("draft_block", LEAST_BLOCK, most, f"a whole number from {LEAST_BLOCK} to {most}"),
        ):
            value = getattr(self, name)
            fits = is_whole(value) and (value == 0 or low <= value <= (value if high is None else high))
            if not fits:
                raise KangarooError(f"{named}{name} is {value!r}; it must be {what}, or 0 for none.")
        if not isinstance(self.trained_confidence, bool):
            raise KangarooError(f"{named}trained_confidence is {self.trained_confidence!r}; it must be true or false.")
        if self.draft_block and self.deep_state_size:
            raise KangarooError(
                f"{named}draft_block and deep_state_size exclude each other: a deep state is fed from draft to draft."
            )
        return self


PAPER_PARTS = Parts()


def read_parts(values: Mapping[str, Any], hidden_size: int, path: Path) -> Parts:
    """The parts that an adapter's ``config.json`` names.

    Raises:
        KangarooError: as ``Parts.check``.
    """
    named = {name: values[name] for name in Parts._fields if name in values}
    return Parts(**named).check(hidden_size, f"{path}: ")
