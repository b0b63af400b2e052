"""``kangaroo eval``: answer questions plainly and with Kangaroo, and report acceptance, speed and identity."""

import time
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import KangarooError
from .options import (
    INTERRUPTED,
    NOT_IDENTICAL,
    Adapter,
    Device,
    DraftConfidenceThreshold,
    DraftTree,
    Dtype,
    Json,
    KvDtype,
    Model,
    NumSpeculativeTokens,
    PromptLookup,
    Seed,
    Temperature,
    examples,
    print_json,
)

EXAMPLES = examples(
    "eval --model smollm2 --questions question.jsonl --out my-eval --per-category 8",
    "eval --model my-llama --adapter my-adapter --questions question.jsonl --out my-eval --against transformers",
)


def evaluate(
    model: Model,
    questions: Annotated[
        Path, typer.Option(help="Questions as Spec-Bench (.jsonl) or SPEED-Bench (.parquet, .jsonl) has them.")
    ],
    out: Annotated[Path, typer.Option(help="A folder for answers, report and pictures; a run in it goes on.")],
    adapter: Adapter = None,
    per_category: Annotated[
        int | None, typer.Option(help="Take this many questions of each category, the first ones.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 256,
    minutes: Annotated[float | None, typer.Option(help="Begin no question after this time.")] = None,
    against: Annotated[
        str | None, typer.Option(help="'transformers' also has transformers answer, greedily and assisted.")
    ] = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    prompt_lookup: PromptLookup = None,
    draft_tree: DraftTree = None,
    num_speculative_tokens: NumSpeculativeTokens = None,
    draft_confidence_threshold: DraftConfidenceThreshold = None,
    as_json: Json = False,
) -> None:
    """Answer questions plainly and with Kangaroo in turns; report acceptance, speed and identity by category.

    Spec-Bench's questions are at github.com/hemingkx/Spec-Bench, and its speed.py and equal.py read the answers.

    A run that was stopped goes on with the same command. The exit code is 1 if a text of Kangaroo's is not plain
    decoding's.
    """
    began = time.perf_counter()  # the imports take their time, too

    from ..evaluation.deadline import deadline_of
    from ..evaluation.evaluate import Run
    from ..evaluation.evaluate import evaluate as answer_all
    from ..evaluation.others import TRANSFORMERS, transformers_ways
    from ..evaluation.plots import draw
    from ..evaluation.questions import in_turns, read_questions
    from ..evaluation.report import Report
    from ..kangaroo import Kangaroo
    from ..request import Settings
    from .facts import environment
    from .show import show_evaluation, training_bars

    settings = Settings(
        max_new_tokens,
        num_speculative_tokens=num_speculative_tokens,
        draft_confidence_threshold=draft_confidence_threshold,
        temperature=temperature,
        seed=seed,
    )
    deadline = deadline_of(minutes, began)
    if against not in (None, TRANSFORMERS):
        raise KangarooError(f"--against is {against!r}; it must be {TRANSFORMERS!r}.")
    if against and temperature:
        raise KangarooError("--against compares greedy texts; leave --temperature out.")
    asked = {
        "model": model,
        "adapter": adapter,
        "questions": f"{questions.name}, CRC {zlib.crc32(questions.read_bytes()):08x}",
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "prompt_lookup": prompt_lookup,
        "draft_tree": draft_tree,
        "num_speculative_tokens": num_speculative_tokens,
        "draft_confidence_threshold": draft_confidence_threshold,
        "against": against,
    }
    run = Run(out, asked, in_turns(read_questions(questions), per_category))
    console = Console(stderr=as_json)
    with console.status("loading the model"):
        kangaroo = Kangaroo.from_pretrained(
            model,
            adapter,
            device=device,
            dtype=dtype,
            kv_dtype=kv_dtype,
            prompt_lookup=prompt_lookup,
            draft_tree=draft_tree,
        )
        others, missing = transformers_ways(kangaroo, model, adapter, dtype) if against else ({}, "")
    if missing:
        typer.echo(missing, err=True)
    stopped = False
    with training_bars() as progress:
        try:
            answer_all(kangaroo, settings, run, others, deadline, progress)
        except KeyboardInterrupt:
            stopped = True
    if not run.files:  # stopped before the first question
        raise typer.Exit(INTERRUPTED)
    report = Report(run, {"environment": asdict(environment())})
    if report.rows:
        report.write(out, draw(report.rows, out))
    if as_json:
        print_json(report.record)
    else:
        show_evaluation(console, out, report)
    if run.left:
        typer.echo(
            f"{len(run.left)} of {len(run.questions)} questions are left. The same command goes on with them.", err=True
        )
    if stopped:
        raise typer.Exit(INTERRUPTED)
    if not report.identical:
        raise typer.Exit(NOT_IDENTICAL)
