"""Draw where a drafter can live and what it costs there: the picture of docs/engines.md.

python tools/draw_engines.py --out docs/img/engines.svg

The bytes are computed from the shapes of Vicuna-7B with an adapter behind layer 2, in bfloat16; none is measured.
"""

from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from kangaroo_kernels.workloads import MODELS, ModelShape

SHAPE, EXIT_LAYER, BYTES = MODELS[0], 2, 2
COLUMN, LEFT, TOP = 240, 140, 96
FILLS = {"target": "#c9d6e8", "shared": "none", "adapter": "#7cc48d", "copy": "#f2b279"}
LEGEND = {
    "target": "the target's weights",
    "shared": "the same weights, shared",
    "adapter": "the adapter",
    "copy": "weights that are there a second time, or zero",
}


class Block(NamedTuple):
    """A part of a stack: its label, its kind in ``FILLS``, and its height."""

    label: str
    kind: str
    height: int


class Home(NamedTuple):
    """A column: title and subtitle, two stacks with their captions, and its ``FACTS``."""

    title: str
    subtitle: str
    stacks: dict[str, list[Block]]
    weights: str
    cache: str
    shallow: str
    stops: str


def gigabytes(parameters: int) -> str:
    """Their bytes, for people."""
    return f"{parameters * BYTES / 1e9:.2f} GB"


def stack(kind: str, deep: Block, *more: Block) -> list[Block]:
    """Embedding, the first layers, what follows them, and the head; all but what follows are of a kind."""
    ends = Block("embedding", kind, 28), Block(f"layers 0-{EXIT_LAYER - 1}", kind, 36)
    return [*ends, deep, *more, Block("head", kind, 28)]


def homes(shape: ModelShape) -> list[Home]:
    """The columns, with bytes computed from a model's shape; the adapter has the target's heads."""
    rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    attention = shape.hidden * (rows + shape.heads * shape.head_dim) + shape.hidden
    mlp = 3 * shape.hidden * shape.inner + shape.hidden
    ends = 2 * shape.vocab_size * shape.hidden
    target = shape.layers * (attention + mlp) + ends + shape.hidden
    adapter = attention + shape.hidden
    cache = 2 * shape.kv_heads * shape.head_dim * BYTES // 1024
    own = stack("target", Block(f"layers {EXIT_LAYER}-{shape.layers - 1}", "target", 112))
    once = Block("adapter", "adapter", 24)
    beside = {"target": own, "drafter": stack("shared", once)}
    inside = {"its model": [block._replace(kind="copy") for block in own], "this runtime": [*own[:3], once, own[3]]}
    exported = {"target": own, "drafter": stack("copy", once, Block("zero MLP", "copy", 24))}
    small, full = gigabytes(adapter), gigabytes(target + adapter)
    whole = gigabytes(EXIT_LAYER * (attention + mlp) + adapter + mlp + ends)
    here, anew = f"{cache} KiB", f"{(EXIT_LAYER + 1) * cache} KiB"
    return [
        Home("this runtime", "Kangaroo.generate", beside, small, here, "once", "yes"),
        Home("transformers", "assistant(model, adapter)", beside, small, anew, "twice", "yes"),
        Home("transformers", "custom_generate", inside, full, here, "once", "yes"),
        Home("vLLM, SGLang", "kangaroo export", exported, whole, anew, "twice", "no, a fixed length"),
    ]


FACTS = ("weights beside the", "cache beside the", "layers before the", "stops when unsure")
CONTINUED = ("target's", "target's, a token", "exit run", "")


def write(x: float, y: float, text: str, style: str = "") -> str:
    """A line of text."""
    return f'<text x="{x:g}" y="{y:g}"{" " if style else ""}{style}>{text}</text>'


def draw_rectangle(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A rectangle of a kind; shared ones are dashed."""
    dashes = ' stroke-dasharray="4 3"' if kind == "shared" else ""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{FILLS[kind]}"{dashes}/>'


def draw(columns: list[Home]) -> str:
    """The whole picture."""
    bottom = TOP + 28 + 36 + 112 + 24 + 28 + 40
    width, height = LEFT + len(columns) * COLUMN, bottom + 44 * len(FACTS) + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, '
        'sans-serif" font-size="13" fill="#1c2733">',
        "<title>One drafter and its four homes: what is shared, and what it costs</title>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    for index, home in enumerate(columns):
        x = LEFT + index * COLUMN
        parts.append(write(x + 10, 36, home.title, 'font-size="17" font-weight="bold"'))
        parts.append(write(x + 10, 56, home.subtitle, 'font-family="monospace"'))
        for side, (caption, blocks) in enumerate(home.stacks.items()):
            y = TOP
            parts.append(write(x + 56 + side * 104, TOP - 10, caption, 'text-anchor="middle" fill="#5b6773"'))
            parts.append('<g stroke="#5b6773">')
            for block in blocks:
                left, label = x + 10 + side * 104, 'text-anchor="middle" stroke="none"'
                parts.append(
                    draw_rectangle(left, y, 92, block.height, block.kind)
                    + write(left + 46, y + block.height / 2 + 4, block.label, label)
                )
                y += block.height + 4
            parts.append("</g>")
        parts += [write(x + 10, bottom + 44 * row + 8, fact, 'font-size="15"') for row, fact in enumerate(home[3:])]
    for row, (fact, more) in enumerate(zip(FACTS, CONTINUED, strict=True)):
        y = bottom + 44 * row
        parts.append(f'<path d="M12 {y - 18}H{width - 12}" stroke="#d5dbe1"/>')
        parts += [write(14, y, fact, 'fill="#5b6773"'), write(14, y + 16, more, 'fill="#5b6773"')]
    x = 14
    for kind, meaning in LEGEND.items():
        parts.append(f'<g stroke="#5b6773">{draw_rectangle(x, height - 34, 22, 14, kind)}</g>')
        parts.append(write(x + 30, height - 22, meaning))
        x += 60 + 7 * len(meaning)
    return "\n".join([*parts, "</svg>", ""])


def main(out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("docs/img/engines.svg")) -> None:
    """Write the picture."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(draw(homes(SHAPE)), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
