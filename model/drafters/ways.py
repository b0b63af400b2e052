"""How an adapter drafts: chains or trees, alone or beside prompt lookup. One of them is the adapter's own default."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kangaroo_kernels.contract import MAX_SPECULATIVE_TOKENS

from ..errors import KangarooError
from ..number import is_whole
from .parts import Parts


class Way(NamedTuple):
    """A way of drafting.

    Attributes:
        draft_tree: the most drafts of a tree; 0 drafts chains.
        prompt_lookup: whether prompt lookup drafts besides.
    """

    draft_tree: int = 0
    prompt_lookup: bool = False

    def __str__(self) -> str:
        drafts = f"trees of {self.draft_tree}" if self.draft_tree else "chains"
        return f"{drafts} and lookup" if self.prompt_lookup else drafts


CHAINS = Way()


def read_way(values: Mapping[str, Any], path: Path) -> Way:
    """The default that an adapter's ``config.json`` names by ``draft_tree`` and ``prompt_lookup``.

    Raises:
        KangarooError: values that name no way.
    """
    tree, lookup, most = values.get("draft_tree", 0), values.get("prompt_lookup", False), MAX_SPECULATIVE_TOKENS
    if not is_whole(tree) or not 0 <= tree <= most:
        raise KangarooError(
            f"{path}: draft_tree is {tree!r}; it must be a whole number from 1 to {most}, or 0 for chains."
        )
    if not isinstance(lookup, bool):
        raise KangarooError(f"{path}: prompt_lookup is {lookup!r}; it must be true or false.")
    return Way(tree, lookup)


def check_way(parts: Parts, way: Way, alike: bool) -> None:
    """Raise unless an adapter with these parts can draft that way.

    ``alike`` says whether keys and values are kept in the dtype in which the model computes.
    """
    if parts.draft_block and way != CHAINS:
        asked = "draft_tree" if way.draft_tree else "prompt_lookup"
        raise KangarooError(f"the adapter drafts blocks, and these alone; leave {asked} out.")
    if not way.draft_tree:
        return
    if parts.deep_state_size:
        raise KangarooError("the adapter has a deep state, which is fed along a chain; leave draft_tree out.")
    if parts.trained_confidence:
        raise KangarooError(
            "the adapter's trained confidence is that of the likeliest token alone, and a tree has others; leave "
            "draft_tree out."
        )
    if not alike:
        raise KangarooError(
            "in a float16 cache a tree's rows have other bits than plain decoding's; leave kv_dtype or draft_tree out."
        )


def choose_way(
    default: Way | None, draft_tree: int | None, prompt_lookup: bool | None, *, persistent: bool = False
) -> Way:
    """The way that a caller asks for; the adapter's default decides what is left open. None stands for no adapter.

    ``persistent`` drafts chains of the adapter alone, whatever the default is.

    Raises:
        KangarooError: what is asked for is out of range, needs an adapter, or cannot be had together.
    """
    most = MAX_SPECULATIVE_TOKENS
    if draft_tree is not None and (not is_whole(draft_tree) or not 0 <= draft_tree <= most):
        raise KangarooError(
            f"draft_tree is {draft_tree!r}; it must be a whole number from 1 to {most}, or 0 for chains."
        )
    for name, flag in (("persistent", persistent), ("prompt_lookup", prompt_lookup)):
        if not isinstance(flag, bool | None):
            raise KangarooError(f"{name} is {flag!r}; it must be True or False.")
    if default is None:
        for name, given in (("draft_tree", draft_tree), ("persistent", persistent)):
            if given:
                raise KangarooError(f"{name} needs an adapter; give one, or leave {name} out.")
        if prompt_lookup is False:
            raise KangarooError(
                "without an adapter prompt lookup alone drafts; give an adapter, leave prompt_lookup=False out, or "
                "decode with plain=True."
            )
        return CHAINS
    if draft_tree and persistent:
        raise KangarooError("persistent=True drafts chains; leave it or draft_tree out.")
    if prompt_lookup and persistent:
        raise KangarooError("persistent=True drafts with the adapter alone; leave it or prompt_lookup out.")
    if persistent:
        return CHAINS
    return Way(
        default.draft_tree if draft_tree is None else draft_tree,
        default.prompt_lookup if prompt_lookup is None else prompt_lookup,
    )
