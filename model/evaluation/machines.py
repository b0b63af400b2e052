"""The machines that ``kangaroo plan`` knows: what a pass costs on each, and where its figures come from."""

from dataclasses import dataclass

from kangaroo_kernels.cards import CARDS, Card

from ..errors import KangarooError

SHARE, SECONDS_PER_OPERATION, ROW_COST, EXCHANGE = 0.85, 2e-6, 0.005, 10e-6
"""Assumed of every GPU, since none was measured by this project: the share of the memory's measured bandwidth, the time
that each launch adds within a CUDA graph, what a further row adds to a pass, the seconds of an exchange among cards."""


@dataclass(frozen=True)
class Machine:
    """What a pass of the model costs.

    Attributes:
        name: in a report.
        bandwidth: bytes of weights a second.
        seconds_per_operation: that each operation adds.
        row_cost: what every further row adds to the reading of the weights, as a share.
        exchange: seconds of an exchange among tensor parallel cards.
        source: where the figures come from.
    """

    name: str
    bandwidth: float
    seconds_per_operation: float
    row_cost: float
    exchange: float
    source: str


def gpu(card: Card) -> Machine:
    """A card at the assumed share of its bandwidth."""
    source = (
        f"assumed, not measured: {SHARE:.0%} of the {card.bandwidth / 1e12:g} TB/s that others measured, "
        f"{1e6 * SECONDS_PER_OPERATION:g} us a launch, {ROW_COST:.1%} a further row"
    )
    return Machine(card.name, SHARE * card.bandwidth, SECONDS_PER_OPERATION, ROW_COST, EXCHANGE, source)


CPU = Machine(
    name="CPU",
    bandwidth=21.5e9,
    seconds_per_operation=5.5e-6,
    row_cost=0.13,
    exchange=0.0,
    source="two cores of an AMD EPYC (Zen 5): bandwidth and time of an operation fitted to the plain decoding in "
    "bench/results/cpu/decode.json and smollm2.json; a further row as docs/LOG.md has it",
)
MACHINES = {machine.name: machine for machine in (*map(gpu, CARDS), CPU)}


def find_machine(name: str) -> Machine:
    """A machine by its name, in whatever case.

    Raises:
        KangarooError: an unknown name.
    """
    found = next((machine for known, machine in MACHINES.items() if known.lower() == name.lower()), None)
    if found is None:
        raise KangarooError(f"the card is {name!r}; known are {', '.join(MACHINES)}.")
    return found
