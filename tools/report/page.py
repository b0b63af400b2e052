"""The report as Markdown: what went wrong first, then what every part found. ``page.md.jinja`` has its text."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

Values = Mapping[str, Any]
SMOKE_LABEL = "smoke, CPU: no figure is about a GPU"
CELL_KEYS = ("model", "prompt", "context", "way", "drafts", "drafting")


def number(value: Any, digits: int = 0) -> str:
    """A figure, or a dash where there is none."""
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else "-"


def percent(value: Any) -> str:
    """A share, or a dash."""
    return f"{number(100 * value, 1)} %" if isinstance(value, int | float) else "-"


def cells_of(piece: Values) -> list[Values]:
    """All that a part measured one by one."""
    return [*piece.get("cells", ()), *piece.get("steps", ())]


def complaints(parts: Mapping[str, Values]) -> Iterator[str]:
    """A sentence for everything that is not as it should be."""
    for name, piece in parts.items():
        at = f" (at: {piece['at']})" if "at" in piece else ""
        if piece["status"] == "failed":
            last = next((line.strip() for line in reversed(piece.get("output", [])) if line.strip()), "no output")
            yield f"{name} failed{at}: {last}"
        if piece["status"] == "stopped":
            yield f"{name} did not end within its {piece['limit']:.0f} s and was stopped{at}."
        for cell in cells_of(piece):
            if "error" in cell:
                label = ", ".join(str(cell[key]) for key in CELL_KEYS if key in cell)
                yield f"{name}, {label}: {cell['error']}"
        for failure in piece.get("failures", ()):
            yield f"{name}: {failure['test']} failed: {failure['reason']}"
        if piece.get("total") and not piece["total"]["identical"]:
            yield f"{name}: Kangaroo's tokens differ from plain decoding's."


def state_of(piece: Values) -> str:
    """How a part ended, and what it left out."""
    left_out = sum("skipped" in cell for cell in cells_of(piece)) + (piece.get("not_run") or 0)
    return f"{piece['status']}" + (f", {left_out} not reached" if left_out else "")


def kernel_rows(cells: Sequence[Values]) -> list[dict[str, Any]]:
    """A row a kernel and shape: its cells at 1 and 8 rows, and how many times longer every other way takes at 1."""
    groups: dict[tuple[str, str], dict[Any, Values]] = {}
    for cell in cells:
        detail = {"attention": f" {cell['length']}", "linear_residual": f" {cell['role']}"}.get(cell["op"], "")
        way = "kernel" if cell["way"] == "reference" else cell["way"]
        groups.setdefault((cell["model"], cell["op"] + detail), {})[way, cell["rows"]] = cell
    rows = []
    for (model, op), found in groups.items():
        one, eight = found.get(("kernel", 1), {}), found.get(("kernel", 8), {})
        others = [found.get((way, 1)) for way in ("chained", "eager", "compiled")]
        ratios = [other["us"]["p50"] / one["us"]["p50"] if other and one else None for other in others]
        rows.append({"model": model, "op": op, "one": one, "eight": eight, "ratios": ratios})
    return rows


def decode_cells(parts: Mapping[str, Values]) -> list[Values]:
    """Those of the library and of transformers."""
    return [cell for name in ("decode", "baselines") for cell in parts.get(name, {}).get("cells", ())]


def decode_rows(cells: Sequence[Values], ceiling: float | None) -> list[dict[str, Any]]:
    """The cells with their speed over plain decoding and, of a plain one, the share of the measured bandwidth."""
    known = {(cell["model"], cell["context"], cell["way"]): cell.get("tokens_per_second") for cell in cells}
    rows = []
    for cell in cells:
        speed, plain = cell.get("tokens_per_second"), known.get((cell["model"], cell["context"], "plain"))
        moved = cell.get("bytes_per_token")
        share = speed * moved / 1e9 / ceiling if speed and moved and ceiling else None
        rows.append({**cell, "gain": speed / plain if speed and plain else None, "share": share})
    return rows


def page(report: Values, pictures: Sequence[str] = ()) -> str:
    """The whole report; ``pictures`` are the parts that have one."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.ChainableUndefined,
        finalize=lambda value: value.replace("|", r"\|") if isinstance(value, str) else value,  # it would end a column
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters |= {"number": number, "percent": percent, "state": state_of}
    parts: Mapping[str, Values] = report["parts"]
    text = environment.get_template("page.md.jinja").render(
        report=report,
        parts=parts,
        pictures=pictures,
        label=SMOKE_LABEL,
        wrong=list(complaints(parts)),
        kernels=kernel_rows(parts.get("kernels", {}).get("cells", ())),
        decodes=decode_rows(decode_cells(parts), parts.get("environment", {}).get("ceiling", {}).get("read")),
    )
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", text)).rstrip() + "\n"
