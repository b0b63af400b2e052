"""The persistent loop at sizes that fill the card, against the stages that it must equal to the bit.

The project's GPU tests try it at sizes too small for an asynchronous copy, or for every program to have a tile.
"""

import draft_steps
import gpu_measure as gm
import torch
from report.job import one_line

from kangaroo_kernels.draft_loop import draft_loop, prepare_draft_loop

LOOPS = {  # hidden, inner, vocabulary, (H, H_kv, D)
    "heads of 64": (512, 1408, 8192, (8, 2, 64)),
    "heads of 128": (512, 1408, 8192, (4, 4, 128)),
    "Vicuna-7B": (4096, 11008, 32000, (32, 32, 128)),
    "Llama-3.1-8B": (4096, 14336, 128256, (32, 8, 128)),
}
MOST, CAPACITY, LAUNCHES = 6, 2304, 500


def drawer(seed, dtype, device):
    """Numbers drawn where they will live, in the place of the tests' own, which come from the host."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape, scale=1.0: torch.randn(*shape, generator=generator, device=device, dtype=dtype).mul_(scale)


def drafter(job, name):
    """Two shallow layers; ``draft_steps`` takes the sizes from globals of its own."""
    if job.smoke:
        return draft_steps.make_model(job.device, layers=1)
    draft_steps.HIDDEN, draft_steps.INNER, draft_steps.VOCAB, heads = LOOPS[name]
    draft_steps.drawer = drawer
    return draft_steps.make_model(job.device, job.dtype, 2, (), heads, heads, CAPACITY)


@torch.inference_mode()
def bits(job, name):
    """One launch against the stages: flags, tokens, confidences, exit states and caches."""
    model, compared, differing = drafter(job, name), 0, []
    for before in (20,) if job.smoke else (20, 126, 300, 2000):
        for sampling in ({},) if job.smoke else ({}, {"temperature": 0.8, "seed": 3}):
            for threshold in (0.0, 1.1):
                one, stages = (draft_steps.begin(model, MOST, before) for _ in range(2))
                draft_steps.by(draft_loop, model, one, threshold=threshold, **sampling)
                draft_steps.by_stages(model, stages, threshold=threshold, **sampling)
                compared += 1
                try:
                    draft_steps.same(one, stages)
                except AssertionError as error:
                    differing.append(f"{before} {sampling} {threshold}: {one_line(error)}")
    return {"right": not differing, "compared": compared, "differing": differing}


@torch.inference_mode()
def again(job, name):
    """Launched again and again, then captured and replayed: the same bits, no error; and how long a launch takes."""
    model = drafter(job, name)
    step, fresh = (draft_steps.begin(model, MOST, 126) for _ in range(2))
    model = draft_steps.with_caches(model, step.caches)
    loop, wrong = prepare_draft_loop(model, MOST), torch.zeros((), dtype=torch.int64, device=job.device)

    def once():
        for mine, given in zip(step[:4], fresh[:4], strict=True):
            mine.copy_(given)
        draft_loop(model, *step[:4], threshold=0.0, prepared=loop, out=step.out)

    once()
    states, tokens = step.exit_hidden.clone(), step.out.token.clone()

    def repeat(launch):
        for _ in range(2 if job.smoke else LAUNCHES):
            launch()
            wrong.add_((step.exit_hidden != states).sum() + (step.out.token != tokens).sum())
        return {"differing": int(wrong), "error_word": int(loop.error), "drafts": int((step.flags > 0).sum()) - 1}

    runs, us = {"launched": repeat(once)}, {}
    if job.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        runs["replayed"] = repeat(graph.replay)
        us = {"us_a_launch": gm.time_graph([once], 20, 5).p50}
    right = all(not run["differing"] and not run["error_word"] for run in runs.values())
    return {"right": right} | us | runs
