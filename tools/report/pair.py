"""A trained pair on held-out prompts: real acceptance, real speed, and whether the tokens are plain decoding's."""

from dataclasses import asdict
from typing import Any

from kangaroo_kernels import Kangaroo
from kangaroo_kernels.model.compare import compare, summarise
from kangaroo_kernels.model.demo import DemoPair

from .job import Job

NEW_TOKENS, ROUNDS, PROMPTS = 256, 3, 12


def run(job: Job) -> None:
    """Every prompt, plain and Kangaroo in turns, then all of them together."""
    assert job.pair is not None
    device = "cpu" if job.smoke else "cuda"
    pair = DemoPair(job.pair)
    kangaroo = Kangaroo.from_pretrained(pair.target, pair.adapter, device=device)
    assert kangaroo.drafter is not None
    config, adapter = kangaroo.target.config, kangaroo.drafter.adapter.config
    job.note(
        name=job.pair.name,
        dtype=str(kangaroo.target.dtype).removeprefix("torch."),
        kernels=kangaroo.target.operations.kernels,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        exit_layer=adapter.exit_layer,
        num_speculative_tokens=adapter.num_speculative_tokens,
        draft_confidence_threshold=adapter.draft_confidence_threshold,
        greedy=True,
        not_run=0,
    )
    prompts = list(pair.prompts().items())[: 2 if job.smoke else PROMPTS]
    comparisons, rows = [], list[dict[str, Any]]()
    settings = {"max_new_tokens": 24 if job.smoke else NEW_TOKENS, "rounds": 1 if job.smoke else ROUNDS}
    for name, prompt in prompts:
        if job.left <= 0:
            job.note(not_run=len(prompts) - len(rows))
            break
        job.doing(name)
        comparison = compare(kangaroo, prompt, name=name, **settings)
        comparisons.append(comparison)
        rows.append(comparison.as_dict())
        job.note(prompts=rows, total=summarise(comparisons).as_dict(), counts=asdict(summarise(comparisons).stats))
