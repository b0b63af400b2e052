"""``kangaroo chat``: a conversation in the terminal."""

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..errors import KangarooError
from ..named import SMOLLM2
from ..results import Generation
from .options import (
    INTERRUPTED,
    Acceptance,
    Adapter,
    Device,
    DraftConfidenceThreshold,
    DraftTree,
    Dtype,
    ExitLayer,
    Kernels,
    KvDtype,
    MinP,
    Model,
    NumSpeculativeTokens,
    PromptLookup,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
    examples,
)

if TYPE_CHECKING:
    from ..request import Settings
    from ..session import Session

EXAMPLES = examples(
    "chat",
    "chat --temperature 0.2 --top-p 0.9 --repetition-penalty 1.1  # small models loop without it",
    "chat --model my-llama --adapter my-adapter --system 'You answer in one sentence.' --temperature 0.7",
    "chat < questions.txt > answers.txt",
)
PROMPT = "> "
HELP = """/system TEXT  set the system prompt; without a text, there is none
/reset        forget the conversation, but not the system prompt
/save FILE    write the messages as JSON
/help         show this
/quit         leave, as Ctrl-D does

Ctrl-C stops an answer; what was written of it stays."""


def chat(
    model: Model = SMOLLM2,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 512,
    plain: Annotated[bool, typer.Option("--plain", help="Decode without drafting.")] = False,
    color: Annotated[
        bool, typer.Option("--color", help="Colour each token by its origin: drafted, or the target's own.")
    ] = False,
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
    num_speculative_tokens: NumSpeculativeTokens = None,
    draft_confidence_threshold: DraftConfidenceThreshold = None,
    acceptance: Acceptance = "coupled",
) -> None:
    """Talk with a model that was trained to chat.

    Answers go to stdout as they are committed, a line of figures about each goes to stderr. Each turn runs only what is
    new. /help lists what else can be said; without a terminal, each line of stdin is a message. Ctrl-C stops an answer,
    and Ctrl-D leaves.
    """
    from ..chat import check_template
    from ..kangaroo import Kangaroo
    from ..request import Settings
    from .show import show_legend

    settings = Settings(  # checked before the long work of loading
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        repetition_penalty=repetition_penalty,
        num_speculative_tokens=num_speculative_tokens,
        draft_confidence_threshold=draft_confidence_threshold,
        acceptance=acceptance,
        plain=plain,
    ).with_seed()
    notes = Console(stderr=True, highlight=False)
    try:
        with notes.status("loading the model"):
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
        check_template(kangaroo.tokenizer)
        colored = Console() if color and sys.stdout.isatty() else None
        chatting = Chat(kangaroo.session(), settings, notes, colored, system)
        if sys.stdin.isatty():
            chatting.note("/help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.")
        if colored is not None:
            show_legend(colored)
        for line in lines():
            if not chatting.say(line):
                break
    except KeyboardInterrupt as interrupt:
        raise typer.Exit(INTERRUPTED) from interrupt


def lines() -> Iterator[str]:
    """What is typed, with the terminal's history and editing, or the lines of stdin; empty ones are left out.

    Raises:
        KangarooError: a line of stdin that is not UTF-8.
    """
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin.buffer, start=1):
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise KangarooError(f"line {number} of stdin is not UTF-8 text.") from error
            if text:
                yield text
        return
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (importing it is what gives input() its history)
    while True:
        try:
            line = input(PROMPT).strip()
        except KeyboardInterrupt:  # as a shell does it: away with the line
            typer.echo()
            continue
        except EOFError:
            typer.echo()
            return
        if line:
            yield line


@dataclass
class Chat:
    """A conversation and where it is shown.

    Attributes:
        session: holds what has been said in its caches.
        settings: of every answer.
        notes: takes everything but the answers.
        colored: shows answers in the colours of their tokens' origin; None prints them as they are.
        system: the system prompt; None without one.
        messages: said so far, the system prompt not among them.
    """

    session: "Session"
    settings: "Settings"
    notes: Console
    colored: Console | None = None
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def conversation(self) -> list[dict[str, str]]:
        """All messages, the system prompt first."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return first + self.messages

    def say(self, line: str) -> bool:
        """Answer a message or follow a command; False ends the conversation."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command == "/quit":
            return False
        if command == "/help":
            self.note(HELP)
        elif command == "/system":
            self.system = argument or None
            self.note("The system prompt is set." if argument else "There is no system prompt.")
        elif command == "/reset":
            self.messages.clear()
            self.note("The conversation is forgotten.")
        elif command == "/save":
            self._save(argument)
        elif command.startswith("/"):
            self.note(f"{command} is no command; /help lists them.")
        else:
            self._answer(line)
        return True

    def note(self, text: str) -> None:
        """Say something that is not part of the conversation."""
        self.notes.print(text, style="dim", markup=False, soft_wrap=True)

    def _save(self, name: str) -> None:
        if not name:
            self.note("/save needs the name of a file.")
            return
        try:
            text = json.dumps(self.conversation, indent=2, ensure_ascii=False)
            Path(name).expanduser().write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            self.note(f"{name} cannot be written: {error.strerror}.")
        else:
            self.note(f"{len(self.conversation)} messages are in {name}.")

    def _answer(self, question: str) -> None:
        """One turn. A question without an answer is taken back; of one that was stopped, what was written stays."""
        self.messages.append({"role": "user", "content": question})
        try:
            generation = self._write()
        except KangarooError as error:
            self.messages.pop()
            self.note(f"{error} The message was taken back; /reset begins a new conversation.")
            return
        if generation.tokens:
            self.messages.append({"role": "assistant", "content": generation.text})
        else:
            self.messages.pop()
        self.note(figures(generation))

    def _write(self) -> Generation:
        """Write the next answer and show it."""
        from .show import show_step

        text = self.session.progress(settings=self.settings, messages=self.conversation)
        shown = text.outcome.generation()
        try:
            for step in text:
                shown = step.generation  # before it is shown: who sees a text may stop it at once
                if self.colored is None:
                    typer.echo(step.text, nl=False)
                else:
                    show_step(self.colored, step)
        except KeyboardInterrupt:
            text.close()
            return replace(shown, finish_reason="interrupted")
        finally:
            typer.echo()
        return text.outcome.generation()


def figures(generation: Generation) -> str:
    """A line about one answer."""
    from .show import ENDINGS

    stats = generation.stats
    facts = [f"{stats.new_tokens} tokens", f"{stats.tokens_per_second:.0f} tokens/s"]
    if stats.drafted:
        facts.append(f"{stats.mean_acceptance_length:.2f} tokens a verification step")
    if stats.cached_tokens:
        facts.append(
            f"{stats.cached_tokens} of {stats.cached_tokens + stats.prefilled_tokens + 1} prompt tokens cached"
        )
    ending = "" if generation.finish_reason == "stop" else f"; {ENDINGS[generation.finish_reason or 'interrupted']}"
    hint = "; /reset begins a new conversation" if generation.finish_reason == "context" else ""
    return f"{', '.join(facts)}{ending}{hint}."
