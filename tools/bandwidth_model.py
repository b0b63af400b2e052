"""A model of what share of a card's bandwidth the projections reach, from the code that they compile to.

    python tools/bandwidth_model.py [--model NAME] [--json]

Every figure is a model's and none a measurement. What it assumes stands in ``ASSUMPTIONS``. From the compiled kernels
it takes the instructions of the loop over a weight, its longest chain of dependent products, the bytes under way, and
how many programs are resident.
"""

import json
import math
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from compiled import CompiledLaunch, compile_only
from kernel_calls import META, STEPS
from kernel_report import Models, select, tile_of
from occupancy import resident_programs
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sass import Loop

from kangaroo_kernels.cards import Card, cards_of
from kangaroo_kernels.shared.tiles import K_STEP_BYTES
from kangaroo_kernels.workloads import ModelShape, Settings

NAME = Path(__file__).stem
ARCHITECTURE, LENGTH = 90, 4096


class Assumptions(NamedTuple):
    """What no compiled kernel says.

    Attributes:
        clock: of an SM, a second; an H100's in a long run.
        schedulers: instructions that an SM begins in a cycle.
        product: cycles from a product of the tensor cores to the next that adds to its result.
        turn: cycles of a step that hide behind nothing: the wait for a tile, the barrier in the program, the loads from
            shared memory before the first product.
        latency: seconds from a load to its data while the memory is busy.
        start: seconds of a launch in which the memory does not yet work, or no longer: its start in a graph, the first
            tile's way, the drain.
        chained: the same where launches are chained, which hides about half of it.
    """

    clock: float = 1.7e9
    schedulers: int = 4
    product: int = 33
    turn: int = 250
    latency: float = 1e-6
    start: float = 3.1e-6
    chained: float = 1.55e-6


ASSUMPTIONS = Assumptions()
"""The cycles of a product are those that arXiv 2402.13499 measured on an H100. ``start`` and ``turn`` are estimates of
which nothing is known but that with them the kernels before LOG 13 come out as an earlier model had them: 10.9 us for
Vicuna-7B's output projection on an H200, and 49 % of the bandwidth for Llama-3.2-1B's down projection."""


class Figure(NamedTuple):
    """A projection on a card.

    Attributes:
        model: whose.
        matrix: the projection.
        card: the GPU.
        programs: that are launched.
        resident: programs on an SM at once.
        us: microseconds.
        share: of the card's bandwidth.
        chained: the same with chained launches.
        bound: what keeps it from all of it: ``memory``, ``chain`` or ``issue`` in the loop over the weight.
    """

    model: str
    matrix: str
    card: str
    programs: int
    resident: int
    us: float
    share: float
    chained: float
    bound: str


def step_seconds(loop: Loop, launch: CompiledLaunch, card: Card, active: int, given: Assumptions) -> tuple[float, str]:
    """How long a program's step along K takes with ``active`` programs on the card, and what bounds it."""
    tile, on_an_sm = tile_of(launch), math.ceil(active / card.sms)
    bounds = {
        "memory": tile * active / card.bandwidth,
        "flight": given.latency / max(loop.depth, 1),
        "chain": (loop.chain * given.product + given.turn) / given.clock,
        "issue": on_an_sm * loop.instructions * launch.num_warps / (given.schedulers * given.clock),
    }
    bound = max(bounds, key=bounds.__getitem__)
    return bounds[bound], bound


def seconds_of(launch: CompiledLaunch, card: Card, steps: int, given: Assumptions) -> tuple[float, str]:
    """How long the loops of a launch take: one wave of resident programs after the other, as fast as what binds it."""
    loop = max(launch.code.loops, key=attrgetter("instructions"))
    slots, left = card.sms * max(1, resident_programs(card, launch)), launch.programs
    total, bound = 0.0, ""
    while left:
        active = min(slots, left)
        step, why = step_seconds(loop, launch, card, active, given)
        total, bound, left = total + steps * step, bound or why, left - active
    return total, bound


def figures(shape: ModelShape, given: Assumptions = ASSUMPTIONS) -> list[Figure]:
    """The projections of a layer and the head, at one row."""
    found = []
    calls = [call for step in STEPS if step.name in ("layer", "top-1 head") for call in step.calls(shape, SETTINGS)]
    with compile_only(ARCHITECTURE) as launches:
        for call in calls:
            before = len(launches)
            call.launch()
            launch = launches[before]
            if launch.kernel == "attention_kernel":
                continue
            weight = next(each for each in call.args[::-1] if each.ndim == 2 and each.numel() * 2 == call.bytes_moved)
            steps = math.ceil(weight.shape[1] * weight.element_size() / K_STEP_BYTES.value)
            for card in cards_of(ARCHITECTURE):
                seconds, bound = seconds_of(launch, card, steps, given)
                least = (call.bytes_moved or 0) / card.bandwidth
                on_an_sm, whole = resident_programs(card, launch), seconds + given.start
                shares = least / whole, least / (seconds + given.chained)
                place = shape.name, call.role, card.name
                found.append(Figure(*place, launch.programs, on_an_sm, 1e6 * whole, *shares, bound))
    return found


SETTINGS = Settings(1, LENGTH, torch.bfloat16, META)


def show(found: list[Figure]) -> None:
    """Print the table as Markdown has it."""
    cards = [card.name for card in cards_of(ARCHITECTURE)]
    table = Table("model", "matrix", "programs", "an SM", *cards, "bound by", title="a model, no measurement")
    for figure in found:
        if figure.card == cards[0]:
            on = {each.card: each for each in found if each[:2] == figure[:2]}
            shares = [f"{on[card].us:.1f} us {on[card].share:.0%}, chained {on[card].chained:.0%}" for card in cards]
            shares.append(" ".join(dict.fromkeys(on[card].bound for card in cards)))
            table.add_row(figure.model, figure.matrix, str(figure.programs), str(figure.resident), *shares)
    Console(width=120).print(table)


def main(
    model: Models = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead.")] = False,
) -> None:
    """Say what share of an H100's and an H200's bandwidth the projections should reach: a model, no measurement."""
    shapes = select(NAME, model, None, None, None)[0]
    found: list[Any] = []
    for shape in track(shapes, "compiling", console=Console(stderr=True), transient=True):
        found += figures(shape)
    if as_json:
        typer.echo(json.dumps([each._asdict() for each in found], indent=1))
    else:
        show(found)


if __name__ == "__main__":
    typer.run(main)
