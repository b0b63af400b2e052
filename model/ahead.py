"""Compile ahead: every kernel that decoding a model launches goes into Triton's cache, for a GPU that need not be here.

Nothing is computed and no weight is read: the model lies on PyTorch's ``meta`` device, and the decode's own code
launches its kernels there (``kangaroo_kernels/shared/absent_gpu.py``).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kangaroo_kernels.contract import (
    MAX_ROWS,
    MAX_SPECULATIVE_TOKENS,
    WIDEST_HEAD,
    Experience,
    Hint,
    Match,
    Ranked,
    Top1,
    Tree,
)

from .backend import triton_backend
from .drafters.adapter import Adapter
from .drafters.adapter_weights import load_adapter
from .drafters.block import BlockDrafter
from .drafters.kangaroo import KangarooDrafter
from .drafters.kangaroo_with_lookup import MATCHES, USUAL
from .drafters.make import make_drafter
from .drafters.prompt_lookup import LEAST_MATCH, PromptLookup
from .drafters.protocol import Drafter
from .drafters.tree import TreeDrafter
from .drafters.ways import CHAINS, Way, choose_way
from .errors import KangarooError
from .load import open_pair, resolve_dtype
from .loop.graphs import GraphRunner
from .loop.iteration import Iteration
from .loop.prefill import reach_of
from .loop.state import TextState
from .request import Request
from .sampling import Chooser, Sampling
from .target.cache import Branches
from .target.config import LlamaConfig
from .target.llama import Llama
from .target.weights import load_target

META, GPU = torch.device("meta"), torch.device("cuda")
OLDEST, CHAINS_FROM = 80, 90
"""The lowest architecture that the kernels are written for, and the first that can chain launches."""

SAMPLINGS = (Sampling(), Sampling(temperature=0.8), *(Sampling(0.8, *each) for each in ((2,), (2, 0.9), (None, 0.9))))
"""Every combination of filters. A head with no more rows than top-k has none of it; every head has more than two."""

LENGTHS = (8, 300)
"""Texts with room for one split of the attention, and for several. A text as long as the model takes them comes third:
there a launch of its own merges the splits of many rows. Which kernels are launched depends on no more."""

DRAFTS = (1, 2, 13, MAX_SPECULATIVE_TOKENS)
"""Numbers of drafts. Triton has kernels of their own for sizes of 1 and for multiples of 16: those that count drafts,
positions (three more) and rows (one more)."""

TREE_ROUNDS = 2
"""No kernel of a tree depends on how many rounds or rows it has: the first round's are those of the newest token, the
second's those of any later one."""

TEXT = [0, 0, 0]


class Work(NamedTuple):
    """A part of the compiling.

    Attributes:
        name: what is compiled, for people.
        run: compiles it.
    """

    name: str
    run: Callable[[], None]


def read_architecture(name: str | None) -> int:
    """90 for ``sm_90``; None means the GPU that is here.

    Raises:
        KangarooError: no such architecture, one that is too old, or no GPU.
    """
    if name is None:
        if not torch.cuda.is_available():
            raise KangarooError("there is no GPU here to compile for; name its architecture, as in --arch sm_90.")
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor
    number = name.removeprefix("sm_")
    if not number.isascii() or not number.isdigit() or int(number) < OLDEST:
        raise KangarooError(f"architecture {name!r} is unknown; it must be sm_{OLDEST} (an A100) or later, as sm_90.")
    return int(number)


def blank_pair(
    model: str | Path,
    adapter: str | Path | None = None,
    exit_layer: int | None = None,
    dtype: str | None = None,
    draft_tree: int | None = None,
) -> tuple[Llama, Drafter]:
    """A model and its drafter as ``from_pretrained`` makes them for a GPU, without their numbers.

    Of the model, only the configuration is read. The layers are alike, so those up to the first behind the exit stand
    for all of them.

    Raises:
        KangarooError: as ``load_pair``.
    """
    checkpoint, _, settings = open_pair(model, adapter, exit_layer)
    config = checkpoint.config
    precision = resolve_dtype(dtype, GPU, config.dtype)
    way = choose_way(None if settings is None else settings.way, draft_tree, None)
    if settings is None:
        target = blank_target(replace(config, num_hidden_layers=1), precision)
        return target, PromptLookup(target)
    target = blank_target(replace(config, num_hidden_layers=settings.exit_layer + 1), precision)
    weights = load_adapter(None, settings.llama, META, precision, target.backend.layout, parts=settings.parts)
    return target, make_drafter(target, Adapter(settings, weights, target), way)


def blank_target(config: LlamaConfig, dtype: torch.dtype) -> Llama:
    """A model on ``meta``."""
    try:
        backend = triton_backend()
    except ImportError as error:
        raise KangarooError("Triton is not installed here; install triton.") from error
    return Llama(config, load_target(None, config, META, dtype, backend.layout), backend)


def decode_works(target: Llama, drafter: Drafter) -> Iterator[Work]:
    """Everything that decoding on a GPU launches, plain and drafted, on both loops; for use within ``compile_for``.

    An adapter drafts chains, and alone and beside prompt lookup, whatever its own way is: a caller may ask for it. One
    with a block drafts blocks alone.
    """
    chains = make_drafter(target, drafter.adapter, CHAINS) if isinstance(drafter, KangarooDrafter) else drafter
    blocks = isinstance(chains, BlockDrafter)
    for length in (*LENGTHS, target.config.context_length):
        yield Work("led by the host", partial(lead_by_host, target, chains, length))
        if isinstance(drafter, TreeDrafter):
            yield Work("trees led by the host", partial(lead_a_tree, target, drafter, length))
            tree, tree_beside = (
                make_drafter(target, drafter.adapter, Way(drafter.draft_tree, lookup)) for lookup in (False, True)
            )
            yield Work("trees, lookup", partial(iterate, target, tree_beside, Sampling(), TREE_ROUNDS, length))
        if isinstance(drafter, KangarooDrafter) and not blocks:
            beside = make_drafter(target, drafter.adapter, Way(prompt_lookup=True))
            for drafts in DRAFTS:
                yield Work(f"{drafts} drafts, lookup", partial(iterate, target, beside, Sampling(), drafts, length))
        for sampling in SAMPLINGS:
            yield Work("plain", partial(iterate, target, None, sampling, 0, length))
            for drafts in DRAFTS:
                yield Work(f"{drafts} drafts", partial(iterate, target, chains, sampling, drafts, length))
            if isinstance(drafter, TreeDrafter):
                yield Work("trees", partial(iterate, target, tree, sampling, TREE_ROUNDS, length))
            persistent = in_one_launch(chains)
            if persistent is not None:
                works = partial(iterate, target, persistent, sampling)
                yield Work("persistent", partial(works, drafter.num_speculative_tokens, length))


def in_one_launch(drafter: Drafter) -> KangarooDrafter | None:
    """The drafter with ``persistent=True``; None where it has no adapter, or one that ``draft_loop`` does not take."""
    if not isinstance(drafter, KangarooDrafter) or isinstance(drafter, BlockDrafter):
        return None
    parts, heads = drafter.adapter.config.parts, (drafter.target.config.head_dim, drafter.adapter.config.llama.head_dim)
    if parts.draft_head_rank or parts.trained_confidence:  # which draft step by step
        return None
    if drafter.target.dtype == torch.float32 or max(heads) > WIDEST_HEAD:
        return None
    return KangarooDrafter(drafter.target, drafter.adapter, persistent=True)


def blank_text(target: Llama, drafter: Drafter | None, length: int) -> TextState:
    """A text whose caches have room for ``length`` tokens."""
    text = TextState(list(TEXT), target.new_cache())
    text.cache.reserve(reach_of(length), length)
    if drafter is not None:
        text.memory = drafter.new_memory()
        drafter.prefill(text, None, reach_of(length), length)
    return text


def iterate(target: Llama, drafter: Drafter | None, sampling: Sampling, drafts: int, length: int) -> None:
    """An iteration of the loop on the device."""
    text = blank_text(target, drafter, length)
    request = Request(
        tokens=tuple(TEXT),
        length=length,
        limited_by_context=False,
        sampling=sampling,
        max_drafts=drafts,
        threshold=0.6,
        stop_tokens=frozenset(target.config.eos_token_ids),
        stop_strings=(),
    )
    Iteration(target, drafter, text, request, GraphRunner(META, capture=False)).run(text.cache.capacity)


def choosers_of(target: Llama) -> list[Chooser]:
    """What picks tokens on the loop led by the host, for every kind of sampling."""
    return [Chooser(each.without_idle_filters(target.config.vocab_size), target.backend) for each in SAMPLINGS]


def stops_of(target: Llama) -> list[Tensor]:
    """Stop tokens: none, and as many as the model has."""
    counts = {0, len(target.config.eos_token_ids)}
    return [torch.empty(count, dtype=torch.int64, device=META) for count in counts]


def lead_by_host(target: Llama, drafter: Drafter, length: int) -> None:
    """The launches of the loop led by the host, whose positions are numbers."""
    text, backend, layers = blank_text(target, drafter, length), target.backend, target.config.num_hidden_layers
    for rows in (1, 2, MAX_ROWS):
        hidden = target.run(target.embed([0] * rows), text.cache, len(TEXT), 0, layers)
        wanted = Top1.empty(rows, META)
        for stops in stops_of(target):
            backend.accept(wanted.token[1:], wanted.token, stops, len(TEXT), length, confidence=wanted.confidence)
    match = backend.look_up(wanted.token[:2], 1, MAX_SPECULATIVE_TOKENS, LEAST_MATCH)
    for chooser in choosers_of(target):
        chooser.target(hidden[:1], target.head, len(TEXT))
        chooser.logits(hidden[:1], target.head)
    if isinstance(drafter, KangarooDrafter):
        thresholds, experience = torch.empty(1, device=META), Experience.none(MATCHES, USUAL, META)
        backend.weigh(match.matched, thresholds, len(TEXT), length, experience)
        states = None if drafter.adapter.state is None else hidden
        for work in (drafter.adapter.append, drafter.adapter.run):
            work(hidden, text.memory.cache, len(TEXT) - 1, states)
        if isinstance(drafter, BlockDrafter):
            drafter.correct(hidden[:1], hidden[:1])
        for chooser in choosers_of(target):
            drafter.guess(hidden[:1], chooser, len(TEXT))
            chooser.logits(hidden[:1], drafter.adapter.head)


def lead_a_tree(target: Llama, drafter: TreeDrafter, length: int) -> None:
    """The launches of the loop led by the host that a tree has besides."""
    text, backend, layers = blank_text(target, drafter, length), target.backend, target.config.num_hidden_layers
    for rows in (1, 2, MAX_ROWS):
        where = Branches(len(TEXT), torch.empty(rows, dtype=torch.int32, device=META))
        states = target.embed([0] * rows)
        hidden = target.run(states, text.cache, where, 0, layers)
        drafter.adapter.run(states, text.memory.cache, where)
    wanted, ancestors = Top1.empty(2, META), where.ancestors[:2]
    looked_up = Hint(torch.empty(1, dtype=torch.int64, device=META), *Match.empty(0, META)[1:], wanted.confidence[:1])
    for hint in (None, looked_up):
        backend.grow(Tree.root(2, META), Ranked.empty(1, 1, META), 0, 1, wanted.confidence[:1], hint=hint)
    for stops in stops_of(target):
        tokens, bounds = (wanted.token[1:], wanted.token), (stops, len(TEXT), length)
        found = backend.walk(*tokens, ancestors, *bounds, confidence=wanted.confidence)
    for rows_of in (text.cache.rows, text.memory.cache.rows, text.memory.exit_hidden[None]):
        backend.straighten(found.path, len(TEXT), rows_of)
    for chooser in choosers_of(target):
        chooser.target(hidden, target.head, len(TEXT), ancestors=where.ancestors)


def default_folder() -> Path:
    """Where Triton keeps what it compiles."""
    from triton import knobs

    return Path(knobs.cache.dir)


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Within it, Triton's cache is ``folder``."""
    from triton import knobs

    with knobs.cache.scope():
        knobs.cache.dir = str(folder.resolve())
        yield


def works_for(pairs: Sequence[tuple[Llama, Drafter]], architecture: int) -> list[Work]:
    """All the works of some models, each chained and not where the architecture can chain launches."""
    from kangaroo_kernels.launch_config import chained

    def within(on: bool, work: Work) -> Work:
        def run() -> None:
            with chained(on), torch.inference_mode():
                work.run()

        return Work(work.name + on * ", chained", run)

    ways = (False, True) if architecture >= CHAINS_FROM else (False,)
    return [within(on, work) for pair in pairs for on in ways for work in decode_works(*pair)]


def compile_ahead(works: Sequence[Work], architecture: int, folder: Path, done: Callable[[Work], None]) -> int:
    """Do all works; ``done`` is told of each. Return how many kernels were compiled that ``folder`` did not have.

    Raises:
        KangarooError: Triton interprets here, or its assembler fails.
    """
    from triton import knobs
    from triton.runtime.errors import PTXASError

    from kangaroo_kernels.launch_config import files_for
    from kangaroo_kernels.shared.absent_gpu import compile_for

    if knobs.runtime.interpret:
        raise KangarooError("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it.")
    here = torch.cuda.is_available() and read_architecture(None) == architecture
    files = files_for(torch.device("cuda", torch.cuda.current_device())) if here else ()
    before = set(folder.iterdir()) if folder.is_dir() else set[Path]()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with kept_in(folder), compile_for(architecture, files):
            for work in works:
                work.run()
                done(work)
    except (PTXASError, RuntimeError) as error:
        if "ptxas" not in str(error).lower():
            raise
        raise KangarooError(f"Triton's assembler cannot compile for sm_{architecture}: {str(error).strip()}") from error
    return sum(any(path.glob("*.cubin")) for path in set(folder.iterdir()) - before)
