"""Make the drafter that drafts in a given way."""

from ..target.llama import Llama
from .adapter import DraftNetwork
from .block import BlockDrafter
from .kangaroo import KangarooDrafter
from .kangaroo_with_lookup import KangarooWithLookup
from .tree import TreeDrafter
from .tree_with_lookup import TreeWithLookup
from .ways import Way, check_way


def make_drafter(
    target: Llama, adapter: DraftNetwork, way: Way, persistent: bool = False, num_draft_steps: int | None = None
) -> KangarooDrafter:
    """A drafter of chains, blocks or trees, alone or beside prompt lookup.

    ``num_draft_steps`` bounds the adapter's own drafts of a step beside prompt lookup; None takes its own number.

    Raises:
        KangarooError: the target or the adapter cannot draft so.
    """
    check_way(adapter.config.parts, way, target.kv_dtype == target.dtype)
    if adapter.block is not None:
        return BlockDrafter(target, adapter)
    if way.draft_tree and way.prompt_lookup:
        return TreeWithLookup(target, adapter, way.draft_tree, num_draft_steps)
    if way.draft_tree:
        return TreeDrafter(target, adapter, way.draft_tree)
    if way.prompt_lookup:
        return KangarooWithLookup(target, adapter, num_draft_steps)
    return KangarooDrafter(target, adapter, persistent)
