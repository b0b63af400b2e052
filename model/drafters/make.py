"""Make the drafter that drafts in a given way."""

from ..target.llama import Llama
from .adapter import DraftNetwork
from .kangaroo import KangarooDrafter
from .kangaroo_with_lookup import KangarooWithLookup
from .tree import TreeDrafter
from .ways import Way


def make_drafter(target: Llama, adapter: DraftNetwork, way: Way, persistent: bool = False) -> KangarooDrafter:
    """A drafter of chains, of chains beside prompt lookup, or of trees.

    Raises:
        KangarooError: the target or the adapter cannot draft so.
    """
    if way.draft_tree:
        return TreeDrafter(target, adapter, way.draft_tree)
    if way.prompt_lookup:
        return KangarooWithLookup(target, adapter)
    return KangarooDrafter(target, adapter, persistent)
