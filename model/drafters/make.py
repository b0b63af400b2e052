"""Make the drafter that drafts in a given way."""

from ..target.llama import Llama
from .adapter import DraftNetwork
from .kangaroo import KangarooDrafter
from .kangaroo_with_lookup import KangarooWithLookup
from .tree import TreeDrafter
from .tree_with_lookup import TreeWithLookup
from .ways import Way


def make_drafter(
    target: Llama, adapter: DraftNetwork, way: Way, persistent: bool = False, num_draft_steps: int | None = None
) -> KangarooDrafter:
    """A drafter of chains or of trees, alone or beside prompt lookup.

    ``num_draft_steps`` bounds the adapter's own drafts of a step beside prompt lookup; None takes its own number.

    Raises:
        KangarooError: the target or the adapter cannot draft so.
    """
    if way.draft_tree and way.prompt_lookup:
        return TreeWithLookup(target, adapter, way.draft_tree, num_draft_steps)
    if way.draft_tree:
        return TreeDrafter(target, adapter, way.draft_tree)
    if way.prompt_lookup:
        return KangarooWithLookup(target, adapter, num_draft_steps)
    return KangarooDrafter(target, adapter, persistent)
