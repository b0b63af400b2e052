"""``kangaroo export``: take a drafter to another engine."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import Adapter, ExitLayer, Model, examples

EXAMPLES = examples(
    "export --model my-llama --adapter my-adapter --out my-drafter",
    "export --model my-llama --adapter my-adapter --out my-llama-kangaroo --transformers",
)


def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="A new folder to write.")],
    adapter: Adapter = None,
    exit_layer: ExitLayer = None,
    transformers: Annotated[
        bool,
        typer.Option("--transformers", help="Write the whole model with our decoding as its custom_generate instead."),
    ] = False,
) -> None:
    """Write a drafter as a small stock Llama, which vLLM, SGLang and transformers take as their draft model.

    --transformers writes the whole model with its adapter and a custom_generate folder: generate and 'transformers
    serve' then decode with this runtime.
    """
    from ..integrations.export import export_drafter, export_for_transformers

    if transformers:
        export_for_transformers(model, adapter, out, exit_layer)
        typer.echo(f"{out} holds the model, its adapter and our decoding. Use it in either way:")
        typer.echo(f"  model.generate(**inputs, max_new_tokens=128, custom_generate='{out}', trust_remote_code=True)")
        typer.echo(f"  transformers serve {out} --trust-remote-code")
        return
    drafter = export_drafter(model, adapter, out, exit_layer).adapter_config
    settings = {"method": "draft_model", "model": str(out), "num_speculative_tokens": drafter.num_speculative_tokens}
    typer.echo(f"{out} holds the drafter as a Llama of {drafter.exit_layer + 1} layers. Use it in either way:")
    typer.echo(f"  vLLM:          --speculative-config '{json.dumps(settings)}'")
    typer.echo(f"  transformers:  assistant_model=AutoModelForCausalLM.from_pretrained('{out}')")
