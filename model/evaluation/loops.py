"""Greedy text of a small model often ends in a loop, which drafts foresee with ease: figures say how much of it did."""

from collections.abc import Sequence

LONGEST_PERIOD = 128
LEAST_REPEATED = 16
"""Fewer repeated tokens are no loop: a ruled line, an indentation."""


def looping_tokens(tokens: Sequence[int]) -> int:
    """How many tokens are in loops."""
    return sum(in_loops(tokens))


def in_loops(tokens: Sequence[int]) -> list[bool]:
    """Of each token: whether it repeats what stood one period before it, in a stretch that says the same three times.

    A stretch counts when it repeats at least two periods and at least 16 tokens, without a token between that differs;
    what it repeats, the first period, does not count.
    """
    looping = [False] * len(tokens)
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // 3) + 1):
        begin = period
        for at in range(period, len(tokens) + 1):
            if at == len(tokens) or tokens[at] != tokens[at - period]:
                if at - begin >= max(2 * period, LEAST_REPEATED):
                    looping[begin:at] = [True] * (at - begin)
                begin = at + 1
    return looping
