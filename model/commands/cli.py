"""The ``kangaroo`` command: ``demo``, ``generate``, ``train`` and ``info``.

PyTorch takes seconds to import, so each command fetches what it needs when it runs.
"""

import json
import os
import sys
import warnings
from collections.abc import Container, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from kangaroo_kernels import __version__

from ..demo import DEMO_MODEL, bundled_pair, find_pair
from ..errors import KangarooError

NOT_IDENTICAL, USER_ERROR, INTERRUPTED = 1, 2, 130

LOADING, SAMPLING, DRAFTING, TRAINING = "Loading", "Sampling", "Drafting", "Training"
Model = Annotated[
    str, typer.Option(help="A checkpoint's folder or hub name, or 'demo': the bundled pair.", rich_help_panel=LOADING)
]
Adapter = Annotated[str | None, typer.Option(help="The adapter's folder or hub name.", rich_help_panel=LOADING)]
ExitLayer = Annotated[
    int | None, typer.Option(help="For an adapter that does not name its exit layer.", rich_help_panel=LOADING)
]
Device = Annotated[
    str | None, typer.Option(help="'cpu' or 'cuda'; by default a GPU where there is one.", rich_help_panel=LOADING)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="'float32', 'float16' or 'bfloat16'; by default float32 on a CPU, the checkpoint's own on a GPU.",
        rich_help_panel=LOADING,
    ),
]
Kernels = Annotated[
    str | None,
    typer.Option(help="'triton' or 'reference'; by default 'triton' on a GPU alone.", rich_help_panel=LOADING),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=SAMPLING)]
TopK = Annotated[int | None, typer.Option(help="Sample among so many tokens.", rich_help_panel=SAMPLING)]
TopP = Annotated[
    float | None, typer.Option(help="Sample within this share of the probability.", rich_help_panel=SAMPLING)
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.", rich_help_panel=SAMPLING)]
Acceptance = Annotated[
    str,
    typer.Option(
        help="'coupled' gives the tokens of plain sampling, 'rejection' only their distribution.",
        rich_help_panel=DRAFTING,
    ),
]
NumSpeculativeTokens = Annotated[
    int | None,
    typer.Option(help="The most drafts a step, 1 to 15; by default the adapter's own.", rich_help_panel=DRAFTING),
]
DraftConfidenceThreshold = Annotated[
    float | None,
    typer.Option(help="Drafting stops below it, 0 to 1; by default the adapter's own.", rich_help_panel=DRAFTING),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


def examples(*commands: str) -> str:
    """The end of a command's help."""
    return "\n\n".join(("Examples:", *(f"  $ kangaroo {command}" for command in commands)))


app = typer.Typer(
    help="Llama models decode faster without changing a token: the model's first layers and a small adapter draft, "
    "the remaining layers verify.",
    epilog=examples("demo", "generate --model demo --prompt 'class Stack:'", "generate --help"),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Run the command; a user's mistake becomes one sentence and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers heeds it, too
    warnings.simplefilter("ignore")
    try:
        app()
    except (KangarooError, OSError) as error:
        refuse(str(error))
    except RuntimeError as error:  # PyTorch's kind for a full memory, on a CPU and on a GPU
        if "memory" not in str(error):
            raise
        refuse(f"there is not enough memory for this; PyTorch says: {str(error).splitlines()[0]}")


def refuse(sentence: str) -> None:
    """Say what was wrong and end."""
    typer.echo(f"kangaroo: {' '.join(sentence.split())}", err=True)
    sys.exit(USER_ERROR)


def show_version(wanted: bool) -> None:
    """Answer ``--version``."""
    if wanted:
        typer.echo(f"kangaroo-kernels {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that go before a command."""


@app.command(epilog=examples("demo", "demo --temperature 0.8 --seed 1", "demo --json > demo.json"))
def demo(
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to write for a prompt.")] = 192,
    rounds: Annotated[int, typer.Option(help="Timed runs of each kind; the median counts.", min=1)] = 3,
    as_json: Json = False,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    num_speculative_tokens: NumSpeculativeTokens = None,
    draft_confidence_threshold: DraftConfidenceThreshold = None,
) -> None:
    """Decode held-out prompts with the bundled pair, plainly and with Kangaroo, side by side.

    The exit code is 1 if the two ever differ in a token.
    """
    from ..evaluation.compare import compare_all, report
    from ..kangaroo import Kangaroo, check_lengths
    from ..sampling import Sampling
    from .show import show_comparisons, show_legend, show_steps, track

    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "num_speculative_tokens": num_speculative_tokens,
        "draft_confidence_threshold": draft_confidence_threshold,
    }
    Sampling(temperature, seed=seed)
    check_lengths(max_new_tokens, num_speculative_tokens, draft_confidence_threshold)
    prompts, kangaroo = bundled_pair().prompts(), Kangaroo.from_pretrained(DEMO_MODEL)
    console, comparisons, finish_reason = Console(), [], "complete"
    try:
        if not as_json:
            # every request is checked here, and decoded where it is shown
            texts = [(name, prompt, kangaroo.progress(prompt, **settings)) for name, prompt in prompts.items()]
            show_legend(console)
            for text in texts:
                show_steps(console, *text)
        measuring = compare_all(kangaroo, prompts, rounds=rounds, **settings)
        for comparison in track(measuring, "measuring", len(prompts)):
            comparisons.append(comparison)
    except KeyboardInterrupt:
        finish_reason = "interrupted"
    if as_json:
        print_json({"finish_reason": finish_reason, **report(comparisons)})
    else:
        console.print()
        show_comparisons(console, comparisons)
    if finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if not all(comparison.identical for comparison in comparisons):
        raise typer.Exit(NOT_IDENTICAL)


@app.command(
    epilog=examples(
        "generate --model demo --prompt 'class Stack:' --compare",
        "generate --model my-llama --adapter my-adapter --prompt-file prompt.txt --temperature 0.7 --seed 1",
        "generate --model my-llama --plain --json < prompt.txt",
    )
)
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A UTF-8 file that holds it; without either, stdin does.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to write.")] = 128,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text to stop before; may be repeated.", metavar="<str>")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Decode without drafting.")] = False,
    with_comparison: Annotated[
        bool, typer.Option("--compare", help="Decode plainly as well; say whether tokens agree, and both speeds.")
    ] = False,
    as_json: Json = False,
    adapter: Adapter = None,
    exit_layer: ExitLayer = None,
    device: Device = None,
    dtype: Dtype = None,
    kernels: Kernels = None,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    num_speculative_tokens: NumSpeculativeTokens = None,
    draft_confidence_threshold: DraftConfidenceThreshold = None,
    acceptance: Acceptance = "coupled",
) -> None:
    """Continue a prompt: new text goes to stdout as it is committed, statistics go to stderr.

    Ctrl-C ends it and keeps what was generated.
    """
    if plain and with_comparison:
        raise KangarooError("--plain and --compare exclude each other; give one of them.")
    text = read_prompt(prompt, prompt_file)
    if find_pair(model, adapter)[1] is None and not plain:
        raise KangarooError("no adapter was given; add --adapter, or --plain to decode without one.")

    from ..evaluation.compare import compare
    from ..kangaroo import Generation, Kangaroo, check_lengths
    from ..loop.decode import DecodeStats
    from ..sampling import Sampling
    from .show import show_comparisons, summary

    # before the long work of loading
    Sampling(temperature, top_k, top_p, seed, acceptance)
    check_lengths(max_new_tokens, num_speculative_tokens, draft_confidence_threshold)

    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "stop": stop or (),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "num_speculative_tokens": num_speculative_tokens,
        "draft_confidence_threshold": draft_confidence_threshold,
        "acceptance": acceptance,
    }
    console = Console(stderr=True)
    generation = Generation("", [], DecodeStats(), "context")  # stands if the prompt leaves no room for a step
    comparison = None
    try:
        with console.status("loading the model"):
            kangaroo = Kangaroo.from_pretrained(model, adapter, exit_layer, device, dtype, kernels)
        for step in kangaroo.progress(text, plain=plain, **settings):
            generation = step.generation
            if not as_json:
                typer.echo(step.text, nl=False)
        if with_comparison:
            comparison = compare(kangaroo, text, name="the prompt", rounds=1, **settings)
    except KeyboardInterrupt:
        generation = replace(generation, finish_reason="interrupted")

    if as_json:
        compared = {"comparison": comparison.as_dict()} if comparison is not None else {}
        print_json(generation.as_dict() | compared)
    else:
        if sys.stdout.isatty():
            typer.echo()
        typer.echo(summary(generation), err=True)
        if comparison is not None:
            show_comparisons(console, [comparison])
    if generation.finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)
    # by rejection sampling, drafts change the tokens and keep their distribution
    if comparison is not None and not comparison.identical and (acceptance == "coupled" or temperature == 0):
        raise typer.Exit(NOT_IDENTICAL)


class FileLists(TyperCommand):
    """A command whose ``--data`` and ``--held-out`` take every file up to the next option, as from a shell's ``*``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse with those options repeated before each file."""
        return super().parse_args(ctx, list(repeat_options(args, {"--data", "--held-out"})))


def repeat_options(arguments: Iterable[str], names: Container[str]) -> Iterable[str]:
    """``--data a b`` as ``--data a --data b``, for the options in ``names``."""
    option, values = "", 0
    for argument in arguments:
        if argument.startswith("-"):
            option, values = argument, 0
        else:
            if option in names and values:
                yield option
            values += 1
        yield argument


@app.command(
    cls=FileLists,
    epilog=examples(
        "train --model my-llama --data *.txt --exit-layer 2 --out my-adapter",
        "train --model my-llama --data *.txt --exit-layer 2 --out my-adapter --self-generated --steps 5000",
    ),
)
def train(
    model: Model,
    data: Annotated[list[Path], typer.Option(help="UTF-8 text files to train on.", metavar="FILES...")],
    exit_layer: Annotated[int, typer.Option(help="How many of the model's layers run before the adapter.")],
    out: Annotated[Path, typer.Option(help="The adapter's folder; a run that was stopped goes on from there.")],
    held_out: Annotated[
        list[Path] | None,
        typer.Option(help="Text files to measure on; by default the end of the data.", metavar="FILES..."),
    ] = None,
    as_json: Json = False,
    self_generated: Annotated[
        bool,
        typer.Option(
            "--self-generated", help="Train on the model's own continuations of the text.", rich_help_panel=TRAINING
        ),
    ] = False,
    generated_windows: Annotated[
        int, typer.Option(help="How many continuations the model writes.", rich_help_panel=TRAINING)
    ] = 2048,
    steps: Annotated[int, typer.Option(help="Training steps.", rich_help_panel=TRAINING)] = 1000,
    minutes: Annotated[
        float | None, typer.Option(help="Train for so long, whatever the steps.", rich_help_panel=TRAINING)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows a step.", rich_help_panel=TRAINING)] = 16,
    reuse: Annotated[
        int, typer.Option(help="Steps that use a window; 4 to 8 suit a slow machine.", rich_help_panel=TRAINING)
    ] = 1,
    sequence_length: Annotated[int, typer.Option(help="Tokens a window.", rich_help_panel=TRAINING)] = 256,
    num_attention_heads: Annotated[
        int | None, typer.Option(help="The adapter's heads; by default the model's own.", rich_help_panel=TRAINING)
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="At its height.", rich_help_panel=TRAINING)] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of the windows and the sampling.", rich_help_panel=TRAINING)] = 0,
    device: Device = None,
) -> None:
    """Train an adapter for a model, on text files or on the model's own continuations of them.

    Reports how often drafter and model agree on held-out text.

    After Ctrl-C, the same command goes on from the last checkpoint.
    """
    from ..training.settings import TrainingSettings
    from ..training.trainer import train_adapter
    from .show import show_training, training_bars

    settings = TrainingSettings(
        model=model,
        data=tuple(data),
        exit_layer=exit_layer,
        out=out,
        self_generated=self_generated,
        held_out=tuple(held_out or ()),
        minutes=minutes,
        steps=steps,
        batch_size=batch_size,
        reuse=reuse,
        sequence_length=sequence_length,
        generated_windows=generated_windows,
        num_attention_heads=num_attention_heads,
        learning_rate=learning_rate,
        seed=seed,
        device=device,
    )
    with training_bars() as progress:
        report = train_adapter(settings, progress)
    if as_json:
        print_json(report)
    else:
        show_training(Console(), out, report)


@app.command(epilog=examples("info", "info --model demo", "info --model my-llama --adapter my-adapter --json"))
def info(
    model: Annotated[
        str | None,
        typer.Option(help="Also a model's shape, and the bytes a step of it reads.", rich_help_panel=LOADING),
    ] = None,
    adapter: Adapter = None,
    exit_layer: ExitLayer = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Show versions, devices, what is supported here, and what a model costs a step."""
    from .info import environment, footprint
    from .show import show_environment, show_footprint

    if model is None and adapter is not None:
        raise KangarooError("--adapter was given without --model; give both or neither.")
    here, cost = environment(), None
    if model is not None:
        cost = footprint(model, adapter, exit_layer, device, dtype)
    if as_json:
        print_json(asdict(here) | {"model": None if cost is None else asdict(cost)})
        return
    console = Console()
    show_environment(console, here)
    if cost is not None:
        show_footprint(console, cost)


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The text of exactly one source: the option, the file or, without either, stdin.

    Raises:
        KangarooError: both, a file that cannot be read, a terminal as stdin, or anything but UTF-8.
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
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise KangarooError(f"{source} is not UTF-8 text (byte {error.start}).") from error


def print_json(values: Any) -> None:
    """Print ``values`` as JSON to stdout."""
    typer.echo(json.dumps(values, indent=2))
