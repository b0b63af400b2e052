"""``kangaroo generate``: continue a prompt."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import KangarooError
from .options import (
    INTERRUPTED,
    NOT_IDENTICAL,
    Acceptance,
    Adapter,
    Device,
    DraftConfidenceThreshold,
    DraftTree,
    Dtype,
    ExitLayer,
    IgnoreEos,
    Json,
    Kernels,
    KvDtype,
    LogitBias,
    Logprobs,
    MinNewTokens,
    MinP,
    Model,
    NumSpeculativeTokens,
    PromptLookup,
    RepetitionPenalty,
    Seed,
    Temperature,
    Timeout,
    TopK,
    TopP,
    examples,
    print_json,
    read_biases,
)

EXAMPLES = examples(
    "generate --model demo --prompt 'class Stack:' --compare",
    "generate --model smollm2 --prompt 'Gravity is'",
    "generate --model my-llama --adapter my-adapter --prompt-file prompt.txt --temperature 0.7 --seed 1",
    "generate --model my-llama --plain --json < prompt.txt",
)


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A UTF-8 file with the text to continue; by default stdin.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to write.")] = 128,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text to stop before; may be repeated.", metavar="<str>")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Decode without drafting.")] = False,
    with_comparison: Annotated[
        bool, typer.Option("--compare", help="Also decode plainly; show both speeds and whether the tokens agree.")
    ] = False,
    ignore_eos: IgnoreEos = False,
    min_new_tokens: MinNewTokens = 0,
    timeout: Timeout = None,
    logprobs: Logprobs = None,
    as_json: Json = False,
    adapter: Adapter = None,
    exit_layer: ExitLayer = None,
    device: Device = None,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    kernels: Kernels = None,
    prompt_lookup: PromptLookup = None,
    draft_tree: DraftTree = None,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    logit_bias: LogitBias = None,
    num_speculative_tokens: NumSpeculativeTokens = None,
    draft_confidence_threshold: DraftConfidenceThreshold = None,
    acceptance: Acceptance = "coupled",
) -> None:
    """Continue a prompt: new text goes to stdout as it is committed, statistics go to stderr.

    Ctrl-C ends it and keeps what was generated.
    """
    if plain and with_comparison:
        raise KangarooError("--plain and --compare exclude each other; give one of them.")
    if logprobs is not None and not as_json:
        raise KangarooError("--logprobs are printed with --json alone; add it.")
    text = read_prompt(prompt, prompt_file)

    from ..evaluation.compare import compare
    from ..kangaroo import Kangaroo
    from ..request import Settings
    from ..results import DecodeStats, Generation
    from .show import show_comparisons, summary

    settings = Settings(  # checked before the long work of loading
        max_new_tokens=max_new_tokens,
        stop=stop or (),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        repetition_penalty=repetition_penalty,
        logit_bias=read_biases(logit_bias),
        ignore_eos=ignore_eos,
        min_new_tokens=min_new_tokens,
        timeout=timeout,
        logprobs=logprobs,
        num_speculative_tokens=num_speculative_tokens,
        draft_confidence_threshold=draft_confidence_threshold,
        acceptance=acceptance,
        plain=plain,
    ).with_seed()
    console = Console(stderr=True)
    generation = Generation("", [], DecodeStats(), "context")  # stands if the prompt leaves no room for a step
    comparison = None
    try:
        with console.status("loading the model"):
            kangaroo = Kangaroo.from_pretrained(
                model,
                adapter,
                exit_layer=exit_layer,
                device=device,
                dtype=dtype,
                kernels=kernels,
                kv_dtype=kv_dtype,
                prompt_lookup=prompt_lookup,
                draft_tree=draft_tree,
            )
        for step in kangaroo.progress(text, settings):
            generation = step.generation
            if not as_json:
                typer.echo(step.text, nl=False)
        if with_comparison:
            comparison = compare(kangaroo, text, settings, name="the prompt", rounds=1)
    except KeyboardInterrupt:
        generation = replace(generation, finish_reason="interrupted")

    if as_json:
        compared = {"comparison": comparison.as_dict()} if comparison is not None else {}
        print_json(generation.as_dict() | compared)
    else:
        if generation.text and not generation.text.endswith("\n"):
            typer.echo(err=not sys.stdout.isatty())  # what is piped on is the text alone
        typer.echo(summary(generation), err=True)
        if seed is None:
            typer.echo(f"The seed was {generation.seed}.", err=True)
        if comparison is not None:
            show_comparisons(console, [comparison])
    if generation.finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)
    # with rejection sampling, drafts change the tokens and keep their distribution
    if comparison is not None and not comparison.identical and (acceptance == "coupled" or temperature == 0):
        raise typer.Exit(NOT_IDENTICAL)


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The text of exactly one source: the option, the file or, without either, stdin.

    Raises:
        KangarooError: both options, a file that cannot be read, a terminal as stdin, or anything but UTF-8.
    """
    if prompt is not None and prompt_file is not None:
        raise KangarooError("--prompt and --prompt-file exclude each other; give one of them.")
    if prompt is not None:
        source, content = "--prompt", prompt.encode("utf-8", "surrogateescape")  # as the shell gave it
    elif prompt_file is not None:
        try:
            source, content = f"prompt file {prompt_file}", prompt_file.read_bytes()
        except OSError as error:
            raise KangarooError(f"prompt file {prompt_file} cannot be read: {error.strerror}.") from error
    elif sys.stdin.isatty():
        raise KangarooError("no prompt was given; add --prompt or --prompt-file, or pipe a text in.")
    else:
        source, content = "stdin", sys.stdin.buffer.read()
    try:
        return content.decode("utf-8-sig")  # some editors put a byte order mark before the text
    except UnicodeDecodeError as error:
        raise KangarooError(f"{source} is not UTF-8 text (byte {error.start}).") from error
