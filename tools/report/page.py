"""The report as Markdown: tables of what every part found, and what went wrong first."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Values = Mapping[str, Any]
SMOKE_LABEL = "smoke, CPU: no figure is about a GPU"
MISSING = "not measured"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; the first column is left-aligned, the others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)] + [""]


def number(value: Any, digits: int = 0) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def percent(value: Any) -> str:
    """A share, or a dash."""
    return "-" if value is None else f"{100 * value:.1f} %"


def plural(count: int, noun: str) -> str:
    """``1 draft``, ``2 drafts``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


# ---- what went wrong


def complaints(report: Values) -> list[str]:
    """A sentence for everything that is not as it should be."""
    found = []
    for name, piece in report["parts"].items():
        if piece["status"] == "failed":
            last = next((line.strip() for line in reversed(piece.get("output", [])) if line.strip()), "no output")
            found.append(f"{name} failed: {last}")
        for cell in (*piece.get("cells", ()), *piece.get("steps", ())):
            if "error" in cell:
                found.append(f"{name}, {label_of(cell)}: {cell['error']}")
            if cell.get("equal") is False and not report["smoke"]:
                found.append(f"{name}, {label_of(cell)}: not equal: {'; '.join(cell['differing'])}")
        for failure in piece.get("failures", ()):
            found.append(f"{name}: {failure.get('test') or failure.get('benchmark')} failed: {failure['reason']}")
        if piece.get("total") and not piece["total"]["identical"]:
            found.append(f"{name}: Kangaroo's tokens differ from plain decoding's.")
    return found


def label_of(cell: Values) -> str:
    """What a cell is about."""
    return ", ".join(str(cell[key]) for key in ("model", "context", "way", "what", "drafts", "drafting") if key in cell)


def state_of(piece: Values) -> str:
    """How a part ended, and what it left out."""
    skipped = sum("skipped" in cell for cell in (*piece.get("cells", ()), *piece.get("steps", ())))
    left_out = skipped + (piece.get("not_run") or 0)
    state = f"stopped at its limit of {piece['limit']:.0f} s" if piece["status"] == "stopped" else str(piece["status"])
    return state + (f", {left_out} not reached" if left_out else "")


# ---- the parts


def environment(piece: Values) -> list[str]:
    """Machine, versions, ceilings."""
    gpu, before, ceilings = piece.get("gpu"), piece.get("before") or {}, piece.get("ceilings") or {}
    rows = []
    if gpu:
        rows.append(("GPU", f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors, L2 {gpu['l2_bytes'] >> 20} MiB"))
        rows.append(("driver", str(before.get("driver"))))
        clocks = (before.get("sm_mhz_max"), before.get("memory_mhz_max"), before.get("power_limit_w"))
        rows.append(("highest clocks, power limit", f"SM {clocks[0]} MHz, memory {clocks[1]} MHz, {clocks[2]} W"))
    rows.append(("CPU", f"{piece.get('cpu')}, {piece.get('cpu_count')} cores"))
    rows.append(
        ("versions", ", ".join(f"{name} {value}" for name, value in piece.get("versions", {}).items() if value))
    )
    if "read_gigabytes_per_second" in ceilings:
        rows.append(("memory read, measured", f"{number(ceilings['read_gigabytes_per_second'])} GB/s"))
        rows.append(("memory copied, read and written", f"{number(ceilings.get('copy_gigabytes_per_second'))} GB/s"))
    if "product_flops" in ceilings:
        what = f"matrix product, {ceilings['product_dtype']}, measured"
        rows.append((what, f"{number(ceilings['product_flops'] / 1e12, 2)} TFLOP/s"))
    if gpu:
        rows.append(("launch configurations", ", ".join(piece.get("launch_configs", ()))))
    return table(("", ""), rows)


def tests(piece: Values) -> list[str]:
    """Counts."""
    if "passed" not in piece:
        return [MISSING, ""]
    counts = (
        f"{piece['passed']} passed, {piece['failed']} failed, {piece['skipped']} skipped, {piece['not_run']} not run"
    )
    return [f"`{piece['ran']}`: {counts} of {piece['collected']}.", ""]


def equality(piece: Values) -> list[str]:
    """A line a comparison."""
    rows = [
        (
            cell["model"],
            cell["what"],
            str(cell.get("compared", "-")),
            {True: "equal", False: "not equal: " + "; ".join(cell.get("differing", ()))}.get(
                cell.get("equal"), cell.get("error") or cell.get("skipped") or "-"
            ),
        )
        for cell in piece.get("cells", ())
    ]
    note = "Rows and decodes by `torch.equal`, the operations to the last bit."
    return [note, "", *table(("model", "what", "comparisons", "result"), rows)]


def kernels(piece: Values) -> list[str]:
    """A line a kernel and shape; ratios are of PyTorch's time to the kernel's."""
    groups: dict[tuple[str, str], dict[tuple[str, int], Values]] = {}
    for cell in piece.get("cells", ()):
        detail = {"attention": f" {cell['length']}", "linear_residual": f" {cell['role']}"}.get(cell["op"], "")
        groups.setdefault((cell["model"], cell["op"] + detail), {})[cell["way"], cell["rows"]] = cell

    def us(cells: Mapping[tuple[str, int], Values], way: str, rows: int) -> float | None:
        cell = cells.get((way, rows))
        return None if cell is None else cell["us"]

    rows = []
    for (model, op), cells in groups.items():
        one = cells.get(("kernel", 1)) or cells.get(("reference", 1)) or {}
        eight = us(cells, "kernel", 8)
        ratios = []
        for way in ("eager", "compiled"):
            theirs, ours = us(cells, way, 1), us(cells, "kernel", 1)
            ratios.append(number(theirs / ours if theirs and ours else None, 2))
        speed, share = one.get("gigabytes_per_second"), percent(one.get("share_of_ceiling"))
        rows.append((model, op, number(one.get("us"), 1), number(speed), share, number(eight, 1), *ratios))
    header = (
        "model",
        "operation",
        "us, 1 row",
        "GB/s",
        "of the ceiling",
        "us, 8 rows",
        "eager / ours",
        "compiled / ours",
    )
    return table(header, rows)


def decode(piece: Values, baselines: Values, ceiling: float | None) -> list[str]:
    """Tokens a second of every way, a line a model and context."""
    cells = {(cell["model"], cell["context"], cell["way"]): cell for cell in piece.get("cells", ())}
    cells |= {(cell["model"], cell["context"], cell["way"]): cell for cell in baselines.get("cells", ())}
    ours, theirs = piece.get("ways", ()), baselines.get("ways", ())
    rows = []
    for model, context in dict.fromkeys((model, context) for model, context, _ in cells):
        speeds = {way: cells.get((model, context, way), {}).get("tokens_per_second") for way in (*ours, *theirs)}
        plain = speeds.get("plain")
        bytes_a_token = cells.get((model, context, "plain"), {}).get("bytes_per_token")
        share = None
        if plain and ceiling and bytes_a_token:
            share = plain * bytes_a_token / 1e9 / ceiling
        gains = [
            number(speed / plain if speed and plain else None, 2) for way, speed in speeds.items() if way in ours[1:]
        ]
        row = [model, str(context), number(plain, 1), percent(share)]
        for way, gain in zip(ours[1:], gains, strict=True):
            row += [number(speeds[way], 1), gain]
        rows.append((*row, *(number(speeds[way], 1) for way in theirs)))
    header = ["model", "context", "plain", "of the ceiling"]
    for way in ours[1:]:
        header += [way, "x plain"]
    return table((*header, *(f"transformers, {way}" for way in theirs)), rows)


def decode_notes(piece: Values, baselines: Values) -> list[str]:
    """What the figures assume."""
    notes = ["Tokens a second of the steps at batch 1, prefill left out, random weights, medians."]
    if "synthetic" in piece:
        synthetic = piece["synthetic"]
        notes.append(
            f"*{synthetic['assumption']}*: mean acceptance length {synthetic['mean_acceptance_length']:.3f}, "
            f"{synthetic['drafted_per_step']:.2f} drafts a step. Kangaroo without it is at its worst: random weights "
            "draft once a step, and next to nothing is accepted."
        )
    if "assistant" in baselines:
        notes.append(f"Assisted: {baselines['assistant']}; nearly nothing is accepted, its worst case.")
        if not baselines["compiled"]:
            notes.append("In a smoke run nothing is compiled, and plain and Kangaroo run on the references.")
    energy = [cell for cell in piece.get("cells", ()) if cell.get("joules_per_token")]
    lines = [" ".join(notes), ""]
    steps = {(step["model"], step["drafts"], step["drafting"]): step for step in piece.get("steps", ())}
    if steps:
        kinds = list(dict.fromkeys(drafting for _, _, drafting in steps))
        rows = [
            (
                model,
                str(drafts),
                *(number(steps.get((model, drafts, kind), {}).get("us_per_step"), 1) for kind in kinds),
            )
            for model, drafts in dict.fromkeys((model, drafts) for model, drafts, _ in steps)
        ]
        lines += table(("model", "drafts a step", *(f"us a step, drafting {kind}" for kind in kinds)), rows)
    if energy:
        rows = [(c["model"], str(c["context"]), c["way"], number(c["joules_per_token"], 2)) for c in energy]
        lines += table(("model", "context", "way", "J a token"), rows)
    return lines


def timeline(piece: Values) -> list[str]:
    """A line a stage."""
    if "stages" not in piece:
        return [MISSING, ""]
    rows = [
        (
            row["stage"],
            number(row["runs"], 1),
            number(row["us"], 1),
            number(row["gap_us"], 1),
            number(row["launches"], 1),
            number(row["gigabytes_per_second"]),
        )
        for row in piece["stages"]
    ]
    how = "replayed graphs" if piece["graphs"] else "launched one by one"
    note = (
        f"{piece['model']}, context {piece['context']}, at most {plural(piece['max_drafts'], 'draft')}, *synthetic "
        f"acceptance*, {how}; means over {piece['iterations']} iterations. The picture is the one of median "
        "length."
    )
    return [note, "", *table(("stage", "runs", "us", "of them gaps", "launches", "GB/s"), rows)]


def tuning(piece: Values) -> list[str]:
    """A line a shape."""
    if "cases" not in piece:
        return [piece.get("skipped", MISSING), ""]
    if not all("best" in case for case in piece["cases"]):
        tried = sum(case["candidates"] for case in piece["cases"])
        return [f"{tried} candidates for {plural(len(piece['cases']), 'shape')}, none timed.", ""]

    def us(figures: Values | None) -> float | None:
        return None if figures is None else figures["us"]["1"]["p50"]

    rows = []
    for case in piece["cases"]:
        best = case["best"] or {}
        config = f"{best.get('block_n') or '-'}, {best.get('num_warps', '-')}, {best.get('num_stages', '-')}"
        times = (number(us(case["default"]), 1), number(us(case["best"]), 1))
        rows.append((case["op"], str(case["n"]), str(case["k"]), *times, config))
    header = ("operation", "n", "k", "us, default", "us, best", "block_n, warps, stages")
    note = f"Copy `{piece['rules']}` to `kangaroo_kernels/configs/` to use these."
    return [*table(header, rows), note, ""]


def pair(piece: Values) -> list[str]:
    """A line a prompt, then the acceptance of every position."""
    if "total" not in piece:
        return [MISSING, ""]
    rows = [
        (
            row["name"],
            number(row["plain_tokens_per_second"], 1),
            number(row["kangaroo_tokens_per_second"], 1),
            number(row["speedup"], 2),
            number(row["mean_acceptance_length"], 2),
            percent(row["draft_acceptance_rate"]),
            "yes" if row["identical"] else "NO",
        )
        for row in (*piece["prompts"], piece["total"])
    ]
    header = ("prompt", "plain", "Kangaroo", "x plain", "mean acceptance length", "drafts accepted", "same tokens")
    rates = enumerate(piece["total"]["acceptance_rate_per_position"], 1)
    positions = [(str(position), percent(rate)) for position, rate in rates]
    about = (
        f"`{piece['name']}`: {piece['layers']} layers of {piece['hidden']}, exit layer {piece['exit_layer']}, at most "
        f"{plural(piece['num_speculative_tokens'], 'draft')}, threshold {piece['draft_confidence_threshold']:g}, "
        f"{piece['dtype']}, {piece['kernels']} kernels, greedy; tokens a second without prefill, medians."
    )
    return [about, "", *table(header, rows), *table(("position", "accepted, share of the steps"), positions)]


# ---- the page


def page(report: Values, pictures: Mapping[str, str]) -> str:
    """The whole report; ``pictures`` are the plots' file names by part."""
    parts: Mapping[str, Values] = report["parts"]
    ceilings = parts.get("environment", {}).get("ceilings") or {}
    title = report["gpu"] or "CPU"
    lines = [f"# {title}", ""]
    if report["smoke"]:
        lines += [f"**{SMOKE_LABEL}**", ""]
    lines += [f"`{report['command']}`, {report['date']}, commit {report['commit']}.", ""]
    wrong = complaints(report)
    if wrong:
        lines += ["What went wrong:", "", *(f"- {sentence}" for sentence in wrong), ""]
    rows = [
        (name, state_of(piece), f"{piece['seconds']:.0f}", piece["date"], piece["commit"])
        for name, piece in parts.items()
    ]
    lines += table(("part", "state", "seconds", "date", "commit"), rows)
    baselines = parts.get("baselines", {})
    sections = {
        "environment": ("Environment", environment),
        "tests": ("Tests", tests),
        "equality": ("Bit-equality", equality),
        "kernels": ("Kernels", kernels),
        "decode": (
            "Decoding",
            lambda piece: (
                decode(piece, baselines, ceilings.get("read_gigabytes_per_second")) + decode_notes(piece, baselines)
            ),
        ),
        "pair": ("A trained pair", pair),
        "timeline": ("An iteration", timeline),
        "tuning": ("Launch configurations", tuning),
    }
    shown = dict(parts) | ({"decode": parts.get("decode", {})} if "baselines" in parts else {})
    for name, (heading, section) in sections.items():
        if name in shown and shown[name].get("status") != "skipped":
            lines += [f"## {heading}", "", *section(shown[name])]
            if name in pictures:
                caption = heading + (f" ({SMOKE_LABEL})" if report["smoke"] else "")
                lines += [f"![{caption}]({pictures[name]})", ""]
    return "\n".join(lines)
