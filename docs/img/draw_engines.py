"""Write the bytes into the picture of docs/engines.md: where a drafter can live, and what it costs there.

python docs/img/draw_engines.py --out docs/img/engines.svg

The bytes are computed from the shapes of Vicuna-7B with an adapter behind layer 2, in bfloat16; none is measured. The
picture itself is drawn by hand; a text in it whose ``id`` is a figure's name is replaced.
"""

import re
from pathlib import Path
from typing import Annotated

import typer

from kangaroo_kernels.workloads import MODELS, ModelShape

SHAPE, EXIT_LAYER, BYTES = MODELS[0], 2, 2
PICTURE = Path(__file__).resolve().parent / "engines.svg"


def figures(shape: ModelShape) -> dict[str, str]:
    """What each home takes beside the target, by the names in the picture; the adapter has the target's heads."""
    rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    attention = shape.hidden * (rows + shape.heads * shape.head_dim) + shape.hidden
    mlp = 3 * shape.hidden * shape.inner + shape.hidden
    ends = 2 * shape.vocab_size * shape.hidden
    target = shape.layers * (attention + mlp) + ends + shape.hidden
    adapter = attention + shape.hidden
    weights = {
        "runtime": adapter,
        "assistant": adapter,
        "custom_generate": target + adapter,
        "export": EXIT_LAYER * (attention + mlp) + adapter + mlp + ends,
    }
    layer = 2 * shape.kv_heads * shape.head_dim * BYTES // 1024  # of the cache, a token
    found = {f"{home}-weights": f"{parameters * BYTES / 1e9:.2f} GB" for home, parameters in weights.items()}
    own = ("runtime", "custom_generate")  # they share the first layers' cache
    return found | {f"{home}-cache": f"{layer if home in own else (EXIT_LAYER + 1) * layer} KiB" for home in weights}


def main(out: Annotated[Path, typer.Option(help="The picture to write.")] = PICTURE) -> None:
    """Write the picture with its figures."""
    picture = PICTURE.read_text(encoding="utf-8")
    for name, figure in figures(SHAPE).items():
        picture, count = re.subn(rf'(<text id="{name}"[^>]*>)[^<]*', rf"\g<1>{figure}", picture)
        assert count == 1, name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
