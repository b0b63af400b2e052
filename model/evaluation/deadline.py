"""When a command's minutes are over."""

import math

from ..errors import KangarooError


def deadline_of(minutes: float | None, began: float) -> float:
    """When the time is over, as ``time.perf_counter`` counts; never without ``minutes``.

    Raises:
        KangarooError: minutes that are no time.
    """
    if minutes is None:
        return math.inf
    if not 0 < minutes < math.inf:
        raise KangarooError(f"minutes is {minutes!r}; it must be a finite number above 0.")
    return began + 60 * minutes
