"""Drafting in one kernel: against the stages at sizes that fill the card, again and again, and in whole decodes.

Its own tests have sizes too small for an asynchronous copy, or for every program to have a tile. These come behind all
others, since what the kernel does wrong may end the process. In a smoke run of the report a tiny size runs in Triton's
interpreter.
"""

import draft_steps
import pytest
import torch
from gpu_measure import time_graph
from random_model import random_kangaroo, random_prompt, sharing_weights
from test_real_shapes import DTYPE, ON_GPU, QUIET, SHAPES, compare_decodes

from kangaroo_kernels.draft_loop import draft_loop, prepare_draft_loop
from kangaroo_kernels.launch_config import configured_by, files_for, pick

pytestmark = pytest.mark.gpu
SIZES = {  # hidden, inner, vocabulary, (H, H_kv, D); the smallest first: what is wrong there says most
    "heads of 64": (512, 1408, 8192, (8, 2, 64)),
    "heads of 128": (512, 1408, 8192, (4, 4, 128)),
    "Vicuna-7B": (4096, 11008, 32000, (32, 32, 128)),
    "Llama-3.1-8B": (4096, 14336, 128256, (32, 8, 128)),
}
CAPACITY = 2304
MOST, LAUNCHES, NAMES = (6, 500, SIZES) if ON_GPU else (2, 2, ("tiny",))


def drawer(seed, dtype, device):
    """Numbers drawn where they will live, in the place of the tests' own, which come from the host."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape, scale=1.0: torch.randn(*shape, generator=generator, device=device, dtype=dtype).mul_(scale)


@pytest.fixture
def as_shipped(device):
    """``with as_shipped():`` by the architecture's rules, as the loop's tiles: a tuned head's confidence may differ."""
    files = files_for(device)[-1:]
    return lambda: configured_by(lambda op, n, k, dtype: pick(files, op, n, k, str(dtype).removeprefix("torch.")))


@pytest.fixture
def model_of(monkeypatch, device):
    """``model_of(name)``: a drafter of two shallow layers; ``draft_steps`` takes sizes from globals of its own."""

    def make(name):
        if name == "tiny":
            return draft_steps.make_model(device, layers=1)
        hidden, inner, vocab, heads = SIZES[name]
        for what, value in {"HIDDEN": hidden, "INNER": inner, "VOCAB": vocab, "drawer": drawer}.items():
            monkeypatch.setattr(draft_steps, what, value)
        return draft_steps.make_model(device, DTYPE, 2, (), heads, heads, CAPACITY)

    yield make
    torch.cuda.empty_cache()


@pytest.mark.gpu_first
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_the_bits_of_the_stages(name, model_of, as_shipped):
    """Flags, tokens, confidences, exit states and caches of one launch."""
    model = model_of(name)
    for before in (20, 126, 300, 2000) if name != "tiny" else (20,):
        for sampling in ({}, {"temperature": 0.8, "seed": 3}) if name != "tiny" else ({},):
            for threshold in (0.0, 1.1):
                one, stages = (draft_steps.begin(model, MOST, before) for _ in range(2))
                draft_steps.by(draft_loop, model, one, threshold=threshold, **sampling)
                with as_shipped():
                    draft_steps.by_stages(model, stages, threshold=threshold, **sampling)
                draft_steps.same(one, stages)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_again_and_again(name, model_of, device, record_property):
    """Launched, then captured and replayed: the same bits and no error; how long a launch takes is noted."""
    model = model_of(name)
    step, fresh = (draft_steps.begin(model, MOST, 126) for _ in range(2))
    model = draft_steps.with_caches(model, step.caches)
    loop, wrong = prepare_draft_loop(model, MOST), torch.zeros((), dtype=torch.int64, device=device)

    def once():
        for mine, given in zip(step[:4], fresh[:4], strict=True):
            mine.copy_(given)
        draft_loop(model, *step[:4], threshold=0.0, prepared=loop, out=step.out)

    once()
    states, tokens = step.exit_hidden.clone(), step.out.token.clone()

    def repeat(launch):
        for _ in range(LAUNCHES):
            launch()
            wrong.add_((step.exit_hidden != states).sum() + (step.out.token != tokens).sum())
        assert int(wrong) == 0
        assert int(loop.error) == 0, "1 + the stage after which a program never came to the barrier"

    repeat(once)
    if ON_GPU:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        repeat(graph.replay)
        record_property("us_a_launch", time_graph([once], 20, 5).p50)


@pytest.mark.parametrize("temperature", [0.0, 0.8] if ON_GPU else [0.0])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_decode_in_one_kernel(shape, temperature, device):
    kangaroo = sharing_weights(random_kangaroo(shape, device, DTYPE, quiet=QUIET), persistent=True)
    compare_decodes(kangaroo, random_prompt(shape, 300 if ON_GPU else 20), temperature)
