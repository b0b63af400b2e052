"""The bundled pair's tokens in every way to launch: graphs or none, chained or not; in one kernel, by lookup, in trees.

In a smoke run of the report a random model in Triton's interpreter drafts in one kernel.
"""

import pytest
import torch
from random_model import SMOKE, random_kangaroo, sharing_weights

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.launch_config import chained

ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.gpu
WAYS = {
    "graphs": {},
    "launch by launch": {"graphs": False},
    "chained": {},
    "chained, launch by launch": {"graphs": False},
    "in one kernel": {"persistent": True},
    "in one kernel, launch by launch": {"persistent": True, "graphs": False},
    "prompt lookup": {"prompt_lookup": True},
    "prompt lookup, chained": {"prompt_lookup": True},
    "trees": {"draft_tree": 15},
    "trees, chained": {"draft_tree": 15},
    "trees, launch by launch": {"draft_tree": 15, "graphs": False},
    "trees beside prompt lookup": {"draft_tree": 15, "prompt_lookup": True},
    "trees beside prompt lookup, chained": {"draft_tree": 15, "prompt_lookup": True},
}
PROMPT = "class Stack:\n    def push(self, item):\n"


def decodes(way, temperature, device, tokens):
    """The tokens of plain decoding and of two drafting decodes."""
    prompt, settings = PROMPT, {"max_new_tokens": tokens, "temperature": temperature, "seed": 5}
    if tokens > 8:
        kangaroo = Kangaroo.from_pretrained("demo", device=device, dtype="bfloat16", kernels="triton", **WAYS[way])
    else:
        kangaroo, prompt = random_kangaroo(SMOKE, device, torch.float32, quiet=0.1), [1, 2, 3]
        kangaroo = sharing_weights(kangaroo, **WAYS[way])
    with chained("chained" in way):
        yield kangaroo.generate(prompt, plain=True, **settings).tokens
        for threshold in (0.6, 0.0):
            yield kangaroo.generate(prompt, draft_confidence_threshold=threshold, **settings).tokens


@pytest.mark.gpu_first
@pytest.mark.parametrize("temperature", [0.0, 0.8] if ON_GPU else [0.0])
@pytest.mark.parametrize("way", WAYS if ON_GPU else ["in one kernel"])
def test_every_way_gives_the_same_tokens(way, temperature, device):
    tokens = 300 if ON_GPU else 4
    wanted = next(decodes("launch by launch" if ON_GPU else way, temperature, device, tokens))
    assert all(got == wanted for got in decodes(way, temperature, device, tokens))
