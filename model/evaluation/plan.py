"""What decoding would reach on a machine: tokens a second from bytes, measured shares and how often drafts are right.

A pass takes ``operations * seconds_per_operation + bytes / bandwidth * (1 + row_cost * (rows - 1))``, since at batch 1
reading the weights is the work. Tensor parallel cards read a share of the bytes each and exchange twice a layer. With
``a(i)`` the chance that draft i of a step is accepted and ``d(i)`` the chance that it is made,

    tokens a step = 1 + sum a(i)
    seconds a step = sum d(i) * (shallow layers, adapter, head) + (shallow layers)
                     + (other layers and head over 1 + sum d(i) rows)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kangaroo_kernels.cards import CARDS, Card
from kangaroo_kernels.workloads import LARGER_MODELS, MODELS, ModelShape, workloads

from ..errors import KangarooError
from ..load import open_model
from ..named import find_pair
from ..target.config import load_config_values, parse_config

SHARE, SECONDS_PER_OPERATION, ROW_COST, EXCHANGE = 0.85, 2e-6, 0.005, 10e-6
"""Assumed of every GPU, since none was measured by this project: the share of the memory's measured bandwidth, the time
that each launch adds within a CUDA graph, what a further row adds to a pass, the seconds of an exchange among cards."""

LAYER_OPERATIONS, ADAPTER_OPERATIONS = 5, 3
MOST_DRAFTS = 8
"""Of the picture."""


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


@dataclass(frozen=True)
class Profile:
    """How often drafts are right.

    Attributes:
        accepted: the share of steps that accept a draft at each position.
        blind: the share of drafts that are made all the same behind a draft that will be refused.
        source: where the figures come from.
    """

    accepted: tuple[float, ...]
    blind: float
    source: str

    @classmethod
    def of(cls, accepted: Sequence[float], drafts: float, source: str) -> "Profile":
        """From the number of drafts a step: those that are not behind an accepted one were made blindly."""
        before = [1.0, *accepted[:-1]]
        refused = sum(1 - share for share in before)
        blind = (drafts - sum(before)) / refused if refused else 0.0
        return cls(tuple(accepted), min(max(blind, 0.0), 1.0), source)

    def first(self, most: int) -> tuple[list[float], list[float]]:
        """The share of steps that accept, and that make, each of ``most`` drafts.

        A draft beyond the profile's last is as likely after the one before as that last one was.
        """
        accepted = [1.0, *self.accepted]
        going_on = accepted[-1] / accepted[-2] if accepted[-1] else 0.0
        while len(accepted) <= most:
            accepted.append(accepted[-1] * going_on)
        made = [share + self.blind * (1 - share) for share in accepted[:most]]
        return accepted[1 : most + 1], made


def geometric(length: float, drafts: int, source: str) -> Profile:
    """The profile in which every draft is as likely as the one before, for a mean acceptance length."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**place for place in range(drafts + 1)) < length else (low, middle)
    return Profile(tuple(low**place for place in range(1, drafts + 1)), 0.0, source)


PAPER = geometric(
    1.93,
    6,
    "1.93 tokens a step as in the paper on Vicuna-7B; all drafts equally likely, none made behind a refused one",
)


def read_profile(report: Any, source: str) -> Profile:
    """The profile of a report of ``kangaroo eval``, ``generate --compare`` or ``demo``, all of its texts together.

    Raises:
        KangarooError: it has no acceptance rates, or nothing was drafted.
    """
    row = report if isinstance(report, Mapping) else {}
    row = row.get("total") or row.get("comparison") or (row.get("categories") or [row])[-1]
    try:
        if "acceptance_histogram" in row:
            histogram, steps = row["acceptance_histogram"], row["num_spec_steps"]
            accepted = [sum(histogram[place:]) / steps for place in range(1, len(histogram))]
            drafts = row["num_draft_tokens"] / steps
        else:
            accepted = row["acceptance_rate_per_position"]
            drafts = sum(accepted) / row["draft_acceptance_rate"]
        return Profile.of([float(share) for share in accepted] or [0.0], drafts, source)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise KangarooError(
            f"{source} has no acceptance rates; give the JSON of kangaroo eval or of --compare."
        ) from error


class Prediction(NamedTuple):
    """Seconds and tokens.

    Attributes:
        plain_tokens_per_second: of plain decoding.
        kangaroo_tokens_per_second: with drafts.
        speedup: the second over the first.
        tokens_per_step: the mean acceptance length.
        break_even_tokens_per_step: how many there must be for a speedup of 1.
        drafts_per_step: that are made.
        draft_ms: of a draft: shallow layers, adapter, head.
        verify_ms: of the pass over the rest.
        plain_ms: of a plain step.
    """

    plain_tokens_per_second: float
    kangaroo_tokens_per_second: float
    speedup: float
    tokens_per_step: float
    break_even_tokens_per_step: float
    drafts_per_step: float
    draft_ms: float
    verify_ms: float
    plain_ms: float


@dataclass(frozen=True)
class Plan:
    """A model on a machine.

    Attributes:
        shape: the model's.
        machine: where it runs.
        profile: how often drafts are right.
        cards: how many share the model.
        length: of the text, whose keys and values a step reads.
        itemsize: bytes of a weight.

    Raises:
        KangarooError: a number of cards that does not divide the heads.
    """

    shape: ModelShape
    machine: Machine
    profile: Profile = PAPER
    cards: int = 1
    length: int = 1024
    itemsize: int = 2

    def __post_init__(self) -> None:
        if self.cards < 1 or self.shape.heads % self.cards:
            raise KangarooError(
                f"tensor_parallel is {self.cards}; it must divide the {self.shape.heads} attention heads."
            )
        if self.cards > 1 and self.machine is CPU:
            raise KangarooError(f"tensor_parallel is {self.cards}, and CPUs do not share a model; give a GPU.")

    @property
    def bytes_per_card(self) -> float:
        """Of weights, and of keys and values, that each card holds."""
        layer, _, head = self._bytes()
        return (layer * self.shape.layers + 2 * head) / self.cards  # at most: many models tie their embeddings

    def _bytes(self) -> tuple[int, int, int]:
        """Of a layer, of an adapter and of the head, keys and values included."""
        each = [
            work.bytes_moved(1, self.length, self.itemsize) for work in workloads(self.shape)[: LAYER_OPERATIONS + 1]
        ]
        return sum(each[:LAYER_OPERATIONS]), sum(each[:ADAPTER_OPERATIONS]), each[-1]

    def seconds(self, layers: int, adapters: int, heads: int, rows: float = 1.0) -> float:
        """Of a pass of ``rows`` through so many layers, adapters and heads."""
        machine, exchanges = self.machine, 2 * layers + adapters + heads
        moved = sum(count * size for count, size in zip((layers, adapters, heads), self._bytes(), strict=True))
        operations = LAYER_OPERATIONS * layers + ADAPTER_OPERATIONS * adapters + heads
        reading = moved / self.cards / machine.bandwidth * (1 + machine.row_cost * (rows - 1))
        return operations * machine.seconds_per_operation + reading + (self.cards > 1) * exchanges * machine.exchange

    def predict(self, exit_layer: int, most: int) -> Prediction:
        """Decoding with the adapter behind ``exit_layer`` layers and at most ``most`` drafts a step.

        Raises:
            KangarooError: an exit layer that the model does not have.
        """
        if not 1 <= exit_layer < self.shape.layers:
            raise KangarooError(f"exit_layer is {exit_layer}; {self.shape.name} allows 1 to {self.shape.layers - 1}.")
        accepted, made = self.profile.first(most)
        tokens, drafts = 1 + sum(accepted), sum(made)
        plain, draft = self.seconds(self.shape.layers, 0, 1), self.seconds(exit_layer, 1, 1)
        verify = self.seconds(self.shape.layers - exit_layer, 0, 1, rows=1 + drafts)
        step = drafts * draft + self.seconds(exit_layer, 0, 0) + verify
        return Prediction(
            plain_tokens_per_second=1 / plain,
            kangaroo_tokens_per_second=tokens / step,
            speedup=tokens * plain / step,
            tokens_per_step=tokens,
            break_even_tokens_per_step=step / plain,
            drafts_per_step=drafts,
            draft_ms=1e3 * draft,
            verify_ms=1e3 * verify,
            plain_ms=1e3 * plain,
        )

    def grid(self) -> dict[int, list[float]]:
        """The speedup by exit layer, up to the middle of the model, for 1 to 8 drafts a step."""
        depths = range(1, max(2, self.shape.layers // 2 + 1))
        return {depth: [self.predict(depth, most).speedup for most in range(1, MOST_DRAFTS + 1)] for depth in depths}

    def assumptions(self) -> list[str]:
        """What the figures rest on, a sentence each."""
        said = [
            f"{self.machine.name}: {self.machine.source}.",
            f"Drafts: {self.profile.source}.",
            "The drafter is as often right behind every exit layer; drafts beyond the profile's go on as its last one.",
            "The adapter is attention alone, with the target's head.",
            f"A weight takes {self.itemsize} bytes, and so does each number of {self.length} tokens' keys and values.",
        ]
        if self.cards > 1:
            said.append(
                f"{self.cards} cards share every matrix evenly and exchange twice a layer, for "
                f"{1e6 * self.machine.exchange:g} us each (assumed). This runtime uses one card: an engine would do it."
            )
        return said


SHAPES = {
    shape.name.lower(): shape
    for shape in (*MODELS, *LARGER_MODELS, ModelShape("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152, 30))
}


def find_shape(model: str) -> ModelShape:
    """The shape of a model: by its name, or from a folder, GGUF file, hub name or ``config.json``.

    Raises:
        KangarooError: neither a known name nor a model.
    """
    if model.lower() in SHAPES:
        return SHAPES[model.lower()]
    path = Path(model)
    if path.suffix == ".json":
        config = parse_config(load_config_values(path.parent, "model"), path)
    else:
        config = open_model(find_pair(model, None)[0]).config
    return ModelShape(
        path.parent.name if path.suffix == ".json" else path.name,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.vocab_size,
        config.num_hidden_layers,
    )
