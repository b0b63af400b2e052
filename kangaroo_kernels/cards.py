"""The GPUs that the kernels are built for."""

from typing import NamedTuple

LATENCY = 1e-6
"""Seconds from a load to its data while the memory is busy, generously: bandwidth times this must be under way."""


class Card(NamedTuple):
    """A GPU.

    Attributes:
        name: in a report.
        architecture: 80 for sm_80.
        sms: streaming multiprocessors.
        sm_shared: bytes that an SM has for its programs; one program may have all of them but the system's.
        bandwidth: bytes a second, as others measured it.
    """

    name: str
    architecture: int
    sms: int
    sm_shared: int
    bandwidth: float

    @property
    def bytes_needed(self) -> float:
        """Bytes that an SM must have under way to keep the memory busy."""
        return self.bandwidth * LATENCY / self.sms


CARDS = (
    Card("A100", 80, 108, 164 << 10, 1.7e12),
    Card("H100", 90, 132, 228 << 10, 3.0e12),
    Card("H200", 90, 132, 228 << 10, 4.3e12),
)
ARCHITECTURES = tuple(dict.fromkeys(card.architecture for card in CARDS))


def cards_of(architecture: int) -> tuple[Card, ...]:
    """The cards of an architecture; they differ in bandwidth alone."""
    return tuple(card for card in CARDS if card.architecture == architecture)
