"""``kangaroo serve``: an OpenAI-compatible endpoint."""

import json
import os
import shlex
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import KangarooError
from ..named import SMOLLM2
from .options import Adapter, Device, DraftTree, Dtype, ExitLayer, Kernels, KvDtype, Model, PromptLookup, examples

if TYPE_CHECKING:
    from ..kangaroo import Kangaroo

KEY = "KANGAROO_API_KEY"
SERVING = "Serving"
MOST_CONTEXT = 8192
"""The longest text by default: every session has room for it from the beginning on."""

EXAMPLES = examples(
    "serve",
    "serve --model my-llama --adapter my-adapter --parallel 8",
    "serve --host 0.0.0.0  # with a key in KANGAROO_API_KEY",
)


def serve(
    model: Model = SMOLLM2,
    host: Annotated[str, typer.Option(help="Where to listen.", rich_help_panel=SERVING)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", rich_help_panel=SERVING)] = 8000,
    parallel: Annotated[
        int, typer.Option(help="Texts that grow side by side; each has caches of its own.", rich_help_panel=SERVING)
    ] = 4,
    queue: Annotated[
        int, typer.Option(help="Requests that may wait for one of them to end.", rich_help_panel=SERVING)
    ] = 64,
    context: Annotated[
        int | None,
        typer.Option(
            help=f"The most tokens of a text, prompt included; by default the model's own, at most {MOST_CONTEXT}.",
            rich_help_panel=SERVING,
        ),
    ] = None,
    no_key: Annotated[
        bool, typer.Option("--no-key", help="Serve other machines without an API key.", rich_help_panel=SERVING)
    ] = False,
    adapter: Adapter = None,
    exit_layer: ExitLayer = None,
    device: Device = None,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    kernels: Kernels = None,
    prompt_lookup: PromptLookup = None,
    draft_tree: DraftTree = None,
) -> None:
    """Serve a model as OpenAI's API does: chat, completions, models; also /health and /metrics.

    Clients must send the key that is in KANGAROO_API_KEY, if there is one. Ctrl-C lets the texts under way come to
    their end.
    """
    check_numbers(port, parallel, queue, context)
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise KangarooError(f"kangaroo serve needs packages that are missing; run: pip install {' '.join(missing)}.")
    from rich.console import Console

    from ..kangaroo import Kangaroo
    from ..serving.desk import Desk
    from ..serving.server import Server, bind, reaches_out, url_of

    key = os.environ.get(KEY) or None
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    with bind(host, port) as listening:
        if reaches_out(listening) and key is None and not no_key:
            raise KangarooError(
                f"{host} can be reached from other machines; set {KEY} to a key that clients must send, or add "
                "--no-key to serve everyone who reaches it."
            )
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
            desk = Desk(kangaroo, parallel, queue, longest_text(kangaroo, context))

        def tell() -> None:
            url, size = url_of(listening), desk.pool.free[-1].nbytes / 1e6
            notes.print(f"{kangaroo.name} is served at {url} (Ctrl-C stops it): {parallel} texts side by side, each of")
            notes.print(f"at most {desk.context} tokens and {size:.0f} MB. Try it:")
            notes.print(f"  {curl_line(kangaroo, url, key is not None)}", markup=False)

        Server(desk, key, tell).run([listening])


def check_numbers(port: int, parallel: int, queue: int, context: int | None) -> None:
    """Raise unless they can be meant.

    Raises:
        KangarooError: one that cannot.
    """
    if not 0 <= port < 1 << 16:
        raise KangarooError(f"--port is {port}; it must be from 0 to 65535.")
    for name, value, least in (("parallel", parallel, 1), ("queue", queue, 0), ("context", context, 2)):
        if value is not None and value < least:
            raise KangarooError(f"--{name} is {value}; it must be at least {least}.")


def longest_text(kangaroo: "Kangaroo", asked: int | None) -> int:
    """The most tokens of a text.

    Raises:
        KangarooError: more than the model's context.
    """
    own = kangaroo.target.config.context_length
    if asked is not None and asked > own:
        raise KangarooError(f"--context is {asked}; the model's own context has {own} tokens, so give at most {own}.")
    return min(own, MOST_CONTEXT) if asked is None else asked


def curl_line(kangaroo: "Kangaroo", url: str, with_key: bool) -> str:
    """A request that can be pasted into a shell."""
    body: dict[str, object] = {"model": kangaroo.name}
    if getattr(kangaroo.tokenizer, "chat_template", None) is not None:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": "Why is the sky blue?"}]
    else:
        path, body["prompt"] = "completions", "def hello"
    header = f' -H "Authorization: Bearer ${KEY}"' if with_key else ""
    return f"curl {url}/{path}{header} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
