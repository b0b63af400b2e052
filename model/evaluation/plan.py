"""What decoding would reach on a machine: tokens a second from bytes, measured shares and how often drafts are right.

A pass takes ``operations * seconds_per_operation + bytes / bandwidth * (1 + row_cost * (rows - 1))``, since at batch 1
reading the weights is the work. Tensor parallel cards read a share of the bytes each and exchange twice a layer. With
``a(i)`` the chance that draft i of a step is accepted, ``d(i)`` the chance that it is made, ``s`` the draft steps that
a draft takes and ``r`` the rows that stand for it (more than 1 in a tree),

    tokens a step = 1 + sum a(i)
    seconds a step = s * sum d(i) * (shallow layers, adapter, the adapter's head) + (shallow layers)
                     + (other layers and head over 1 + r * sum d(i) rows)

A block takes one draft step, and beyond it the adapter's head for every draft but the first.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kangaroo_kernels.workloads import LARGER_MODELS, MODELS, ModelShape, workloads

from ..drafters.adapter import AdapterConfig, load_adapter_config
from ..drafters.parts import PAPER_PARTS, Parts
from ..drafters.vocabulary import check_size
from ..errors import KangarooError
from ..load import open_model
from ..named import find_pair
from ..target.config import LlamaConfig, load_config_values, parse_config
from ..target.hub import find_folder
from .acceptance import PAPER, Profile
from .machines import CPU, Machine

ATTENTION_OPERATIONS, LAYER_OPERATIONS = 3, 5
MOST_DRAFTS = 8
"""Of the picture."""


class AdapterForm(NamedTuple):
    """What a draft reads behind the shallow layers.

    Attributes:
        shape: of a model with the adapter's layer alone: ``inner`` is 0 where it has no MLP, and ``vocab_size`` counts
            the rows of its head.
        parts: what it has besides its layer.
    """

    shape: ModelShape
    parts: Parts = PAPER_PARTS

    def with_parts(
        self,
        intermediate_size: int | None = None,
        draft_vocabulary: int | None = None,
        deep_state_size: int | None = None,
        draft_head_rank: int | None = None,
        draft_block: int | None = None,
    ) -> "AdapterForm":
        """The form with some parts replaced; None keeps them.

        Raises:
            KangarooError: a size that no adapter of this model can have.
        """
        shape, given = self.shape, {"deep_state_size": deep_state_size}
        given |= {"draft_head_rank": draft_head_rank, "draft_block": draft_block}
        for name, size in {"intermediate_size": intermediate_size, **given}.items():
            if size is not None and size < 1:
                raise KangarooError(f"{name} is {size}; it must be a whole number of at least 1.")
        if intermediate_size is not None:
            shape = shape._replace(inner=intermediate_size)
        if draft_vocabulary is not None:
            check_size(draft_vocabulary, shape.vocab_size, "draft_vocabulary")
            shape = shape._replace(vocab_size=draft_vocabulary)
        sizes: dict[str, Any] = {name: size for name, size in given.items() if size is not None}
        parts = self.parts._replace(**sizes)
        return AdapterForm(shape, parts.check(shape.hidden))

    def describe(self, target: ModelShape) -> str:
        """The form in a sentence."""
        mlp = f"attention and an MLP of {self.shape.inner:,}" if self.shape.inner else "attention alone"
        heads, theirs = self.shape.heads, target.heads
        of_its_own = "" if (heads, self.shape.kv_heads) == (theirs, target.kv_heads) else " with heads of its own"
        size, rank, block, _ = self.parts
        deep = f", with a deep state of {size:,}" if size else ""
        rows = self.shape.vocab_size
        head = f"a head of rank {rank:,}" if rank else "the target's head"
        if rows < target.vocab_size:
            head = f"{rows:,} rows of {head}"
        pace = f", {block} in a pass" if block else ""
        return f"The adapter is {mlp}{of_its_own}{deep}, and drafts{pace} with {head}."


def paper_form(target: ModelShape) -> AdapterForm:
    """The paper's adapter: attention alone, with the target's own heads and LM head."""
    return AdapterForm(target._replace(inner=0, layers=1))


@dataclass(frozen=True)
class Work:
    """A part of a pass.

    Attributes:
        operations: that are launched.
        size: bytes that they read.
        exchanges: among tensor parallel cards.
    """

    operations: int
    size: int
    exchanges: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, self.size + other.size, self.exchanges + other.exchanges)

    def __mul__(self, count: int) -> "Work":
        return Work(count * self.operations, count * self.size, count * self.exchanges)


class Prediction(NamedTuple):
    """Seconds and tokens.

    Attributes:
        plain_tokens_per_second: of plain decoding.
        kangaroo_tokens_per_second: with drafts.
        speedup: the second over the first.
        tokens_per_step: the mean acceptance length.
        break_even_tokens_per_step: how many there must be for a speedup of 1.
        drafts_per_step: that are made.
        draft_ms: of a draft step: shallow layers, adapter, the adapter's head.
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
        form: the adapter's; None is the paper's.
        cards: how many share the model.
        length: of the text, whose keys and values a step reads.
        itemsize: bytes of a weight.

    Raises:
        KangarooError: a number of cards that does not divide the heads.
    """

    shape: ModelShape
    machine: Machine
    profile: Profile = PAPER
    form: AdapterForm | None = None
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
    def adapter(self) -> AdapterForm:
        """The adapter's form."""
        return self.form or paper_form(self.shape)

    @property
    def bytes_per_card(self) -> float:
        """Of weights, and of keys and values, that each card holds."""
        held = self.layers(self.shape.layers) + self.head * 2  # at most: many models tie their embeddings
        own_rows = self.adapter.shape.vocab_size < self.shape.vocab_size or self.adapter.parts.draft_head_rank
        held += self.draft(0) if own_rows else self._own
        return held.size / self.cards

    def _work(self, shape: ModelShape, first: int, last: int, exchanges: int) -> Work:
        moved = [each.bytes_moved(1, self.length, self.itemsize) for each in workloads(shape)[first:last]]
        return Work(len(moved), sum(moved), exchanges)

    def _layer(self, shape: ModelShape) -> Work:
        """A layer of that shape, keys and values included."""
        operations = LAYER_OPERATIONS if shape.inner else ATTENTION_OPERATIONS
        return self._work(shape, 0, operations, exchanges=2 if shape.inner else 1)

    def _head(self, shape: ModelShape) -> Work:
        return self._work(shape, LAYER_OPERATIONS, LAYER_OPERATIONS + 1, exchanges=1)

    def layers(self, count: int) -> Work:
        """So many of the model's layers."""
        return self._layer(self.shape) * count

    @property
    def head(self) -> Work:
        """The model's head."""
        return self._head(self.shape)

    @property
    def plain(self) -> Work:
        """A plain step."""
        return self.layers(self.shape.layers) + self.head

    def draft(self, exit_layer: int) -> Work:
        """A draft step behind so many layers: these, the adapter and its head."""
        return self.layers(exit_layer) + self._own + self._choice

    @property
    def _own(self) -> Work:
        """The adapter's layer and its deep state."""
        shape, parts = self.adapter
        return self._layer(shape) + self._matrices(2, 3 * parts.deep_state_size)

    @property
    def _choice(self) -> Work:
        """What each draft takes of the adapter's head; in a block, the correction by the draft before, too."""
        shape, parts = self.adapter
        narrow = self._matrices(1, parts.draft_head_rank)
        head = self._head(shape._replace(hidden=parts.draft_head_rank or shape.hidden))
        return narrow + head + self._matrices(1, shape.hidden if parts.draft_block else 0)

    def _matrices(self, operations: int, rows: int) -> Work:
        """So many operations that read so many rows of the hidden size; nothing where there are none."""
        size = self.itemsize * rows * self.adapter.shape.hidden
        return Work(operations, size, 1) if rows else Work(0, 0, 0)

    def seconds(self, work: Work, rows: float = 1.0) -> float:
        """Of a pass of ``rows`` that does such work."""
        machine = self.machine
        reading = work.size / self.cards / machine.bandwidth * (1 + machine.row_cost * (rows - 1))
        exchanging = work.exchanges * machine.exchange if self.cards > 1 else 0.0
        return work.operations * machine.seconds_per_operation + reading + exchanging

    def predict(self, exit_layer: int, most: int) -> Prediction:
        """Decoding with the adapter behind ``exit_layer`` layers and at most ``most`` drafts a step.

        Raises:
            KangarooError: an exit layer that the model does not have.
        """
        if not 1 <= exit_layer < self.shape.layers:
            raise KangarooError(f"exit_layer is {exit_layer}; {self.shape.name} allows 1 to {self.shape.layers - 1}.")
        block = self.adapter.parts.draft_block
        accepted, made = self.profile.first(min(most, block or most))
        tokens, places = 1 + sum(accepted), sum(made)
        drafts, steps = places * self.profile.rows_per_draft, places * self.profile.steps_per_draft
        choices = 0.0
        if block:  # its first draft takes the step, each later one its own choice
            steps, choices = made[0], places - made[0]
        plain, draft = self.seconds(self.plain), self.seconds(self.draft(exit_layer))
        verify = self.seconds(self.layers(self.shape.layers - exit_layer) + self.head, rows=1 + drafts)
        step = steps * draft + choices * self.seconds(self._choice) + self.seconds(self.layers(exit_layer)) + verify
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
        """The speedup by exit layer, up to the middle of the model, for 1 to 8 drafts a step, or all of the profile."""
        depths = range(1, max(2, self.shape.layers // 2 + 1))
        lengths = range(1, max(MOST_DRAFTS, len(self.profile.accepted)) + 1)
        return {depth: [self.predict(depth, most).speedup for most in lengths] for depth in depths}

    def assumptions(self) -> list[str]:
        """What the figures rest on, a sentence each."""
        said = [
            f"{self.machine.name}: {self.machine.source}.",
            f"Drafts: {self.profile.source}.",
            "The drafter is as often right behind every exit layer; drafts beyond the profile's go on as its last one.",
            self.adapter.describe(self.shape),
            f"A weight takes {self.itemsize} bytes, and so does each number of {self.length} tokens' keys and values.",
        ]
        if not self.profile.of_chains and not self.adapter.parts.draft_block:
            said.append(
                f"A place's draft takes {self.profile.steps_per_draft:.2f} draft steps and "
                f"{self.profile.rows_per_draft:.2f} rows, as in the profile of {len(self.profile.accepted)} places; "
                "what fewer places would take is not known."
            )
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


class Found(NamedTuple):
    """A model, and the adapter that was given for it or comes with it.

    Attributes:
        shape: the model's.
        form: the adapter's; the paper's where there is none.
        adapter: its configuration; None where there is none.
    """

    shape: ModelShape
    form: AdapterForm
    adapter: AdapterConfig | None = None


def find_shapes(model: str, adapter: str | None = None, exit_layer: int | None = None) -> Found:
    """A model by its name, or from a folder, GGUF file, hub name or ``config.json``, and its adapter.

    Raises:
        KangarooError: neither a known name nor a model; an adapter that is not this model's, or one for a mere name.
    """
    if model.lower() in SHAPES:
        shape = SHAPES[model.lower()]
        if adapter is not None:
            raise KangarooError(
                f"{shape.name} is a shape without files, and {adapter} is made for a model; give that model's folder "
                "or config.json, or the adapter's form by --intermediate-size and the like."
            )
        return Found(shape, paper_form(shape))
    path = Path(model)
    files, drafter = find_pair(model, adapter)
    if path.suffix == ".json":
        config, name = parse_config(load_config_values(path.parent, "model"), path), path.parent.name
    else:
        config, name = open_model(files).config, path.name
    shape = shape_of(config, name)
    if drafter is None:
        return Found(shape, paper_form(shape))
    folder = find_folder(drafter, "adapter")
    trained = load_adapter_config(folder, config, exit_layer)
    rows = config.vocab_size if trained.vocabulary is None else len(trained.vocabulary.tokens)
    form = AdapterForm(shape_of(trained.llama, "adapter")._replace(vocab_size=rows), trained.parts)
    return Found(shape, form, trained)


def shape_of(config: LlamaConfig, name: str) -> ModelShape:
    """The sizes of a configuration."""
    return ModelShape(
        name,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.vocab_size,
        config.num_hidden_layers,
    )
