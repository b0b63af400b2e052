"""How many programs of a compiled kernel fit on a GPU at once."""

import math

from compiled import CompiledLaunch

from kangaroo_kernels.cards import Card

REGISTERS = 65536
"""Of a streaming multiprocessor (SM)."""

REGISTER_UNIT = 8
"""A thread's registers are handed out in such steps."""

THREADS, PROGRAMS = 2048, 32
"""The most that an SM holds."""

RESERVED_SHARED = 1024
"""Bytes that the system takes with every program."""


def resident_programs(card: Card, launch: CompiledLaunch) -> int:
    """Programs of a launch that the busiest SM holds at once."""
    code = launch.code
    registers = math.ceil(code.registers / REGISTER_UNIT) * REGISTER_UNIT * launch.threads
    shared = launch.dynamic_shared + code.static_shared + RESERVED_SHARED
    return min(
        card.sm_shared // shared,
        REGISTERS // registers,
        THREADS // launch.threads,
        PROGRAMS,
        math.ceil(launch.programs / card.sms),
    )


def waves(card: Card, launch: CompiledLaunch) -> float:
    """How often the card is filled by a launch."""
    return launch.programs / (card.sms * max(1, resident_programs(card, launch)))


def programs_under_way(card: Card, launch: CompiledLaunch) -> float:
    """Programs that an SM holds at once, the average over the card."""
    return min(resident_programs(card, launch), launch.programs / card.sms)
