"""The GPUs that the kernels are built for, and how many programs of a compiled kernel fit on them."""

import math
from typing import NamedTuple

from compiled import CompiledLaunch

REGISTERS = 65536
"""Of a streaming multiprocessor (SM)."""

REGISTER_UNIT = 8
"""A thread's registers are handed out in such steps."""

THREADS, PROGRAMS = 2048, 32
"""The most that an SM holds."""

RESERVED_SHARED = 1024
"""Bytes that the system takes with every program."""

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

    def resident_programs(self, launch: CompiledLaunch) -> int:
        """Programs of a launch that the busiest SM holds at once."""
        code = launch.code
        registers = math.ceil(code.registers / REGISTER_UNIT) * REGISTER_UNIT * launch.threads
        shared = launch.dynamic_shared + code.static_shared + RESERVED_SHARED
        return min(
            self.sm_shared // shared,
            REGISTERS // registers,
            THREADS // launch.threads,
            PROGRAMS,
            math.ceil(launch.programs / self.sms),
        )

    def waves(self, launch: CompiledLaunch) -> float:
        """How often the card is filled by a launch."""
        return launch.programs / (self.sms * max(1, self.resident_programs(launch)))

    def programs_under_way(self, launch: CompiledLaunch) -> float:
        """Programs that an SM holds at once, the average over the card."""
        return min(self.resident_programs(launch), launch.programs / self.sms)


CARDS = (
    Card("A100", 80, 108, 164 << 10, 1.7e12),
    Card("H100", 90, 132, 228 << 10, 3.0e12),
    Card("H200", 90, 132, 228 << 10, 4.3e12),
)
ARCHITECTURES = tuple(dict.fromkeys(card.architecture for card in CARDS))


def cards_of(architecture: int) -> tuple[Card, ...]:
    """The cards of an architecture; they differ in bandwidth alone."""
    return tuple(card for card in CARDS if card.architecture == architecture)
