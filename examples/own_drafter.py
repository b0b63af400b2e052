"""How to write a drafter of your own: prompt lookup, which needs no training and runs on any checkpoint.

If the text's last N tokens stand somewhere before, the drafter proposes the tokens that followed them there.
Verification makes sure that the text stays that of plain decoding. The loop led by the host calls ``propose``, the loop
on the device calls ``stages``.

    python examples/own_drafter.py [MODEL]
"""

import sys

import torch

from kangaroo_kernels import Draft, Drafter, Kangaroo, Stage

N = 3


class PromptLookup(Drafter):
    """Proposes what followed the text's last N tokens where they stood before."""

    def __init__(self, target):
        self.target = target

    def propose(self, text, chooser, most, threshold):
        """Search backwards; without a match there is no draft."""
        tokens, end = text.tokens, text.tokens[-N:]
        places = (at for at in range(len(tokens) - N - 1, -1, -1) if tokens[at : at + N] == end)
        at = next(places, None)
        drafts = [] if at is None else tokens[at + N : at + N + most]
        hidden = self.target.embed([tokens[-1], *drafts])  # first_layer is 0: verification begins with embeddings
        return Draft(torch.tensor(drafts, dtype=torch.int64, device=self.target.device), hidden)

    def stages(self, iteration, reach):
        """The same search as one stage of fixed shapes, which never asks the host."""
        yield Stage("draft", lambda: self.look_up(iteration.buffers, iteration.max_drafts))

    def look_up(self, buffers, most):
        """Compare every place with the end of the text; take the last one that is the same."""
        text, length, device = buffers.text, buffers.length, self.target.device
        places = torch.arange(len(text) - N, device=device)
        end = text[(length - N + torch.arange(N, device=device)).clamp(min=0)]
        same = (text.unfold(0, N, 1)[:-1] == end).all(dim=1) & (places < length - N)
        at = torch.where(same, places, -1).max()
        follows = at + N + torch.arange(most, device=device)
        drafts = text[follows.clamp(max=len(text) - 1)]
        buffers.drafts.token.copy_(drafts)
        made = (at >= 0) & (follows < length) & (buffers.flags[0] > 0)
        buffers.flags[:most].copy_(made & (buffers.thresholds[:most] <= 1))  # "auto" forbids drafts by one above 1
        buffers.hidden(0, 1).copy_(buffers.newest)
        buffers.hidden(1, most + 1).copy_(self.target.weights.embedding[drafts])


if __name__ == "__main__":
    loaded = Kangaroo.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "demo")
    kangaroo = Kangaroo(loaded.target, PromptLookup(loaded.target), loaded.tokenizer)
    for kind, prompt in {"fresh": "class Stack:\n", "repeating": "a = [1, 2, 3]\nb = [1, 2, 3]\nc = "}.items():
        drafted, plain = (kangaroo.generate(prompt, max_new_tokens=64, plain=plain) for plain in (False, True))
        length = drafted.stats.mean_acceptance_length
        print(f"{kind} text: {length:.2f} tokens a step; as plain: {drafted.tokens == plain.tokens}")
