"""``draft_loop``: the drafting loop as one persistent kernel. ``kernel.py`` has it, with its launcher."""

from kangaroo_kernels.draft_loop.kernel import DraftLoop, draft_loop, draft_loop_kernel, prepare_draft_loop

__all__ = ["DraftLoop", "draft_loop", "draft_loop_kernel", "prepare_draft_loop"]
