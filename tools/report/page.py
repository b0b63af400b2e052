"""The report as Markdown: tables of what every part found, and what went wrong first."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Values = Mapping[str, Any]
SMOKE_LABEL = "smoke, CPU: no figure is about a GPU"
MISSING = "not measured"
FIGURE = re.compile(r"-?[\d.,]*( %| of \d+)?")
NAMES = {"kangaroo": "Kangaroo, unforced", "kangaroo, synthetic": "Kangaroo, synthetic acceptance"}


def name_of(way: str) -> str:
    """A way to decode, as a reader sees it."""
    return NAMES.get(way, way)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; columns of figures are right-aligned, columns of text left."""
    rows = list(rows)
    columns = [[row[index] for row in rows] for index in range(len(header))]
    rule = ["---:" if column and all(map(FIGURE.fullmatch, column)) else "---" for column in columns]
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (header, rule, *rows)]
    return [f"| {' | '.join(row)} |" for row in cells] + [""]


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
            found.append(f"{name} failed{at(piece)}: {last}")
        if piece["status"] == "stopped":
            found.append(f"{name} did not end within its {piece['limit']:.0f} s and was stopped{at(piece)}.")
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


CELL_KEYS = ("model", "prompt", "context", "way", "what", "drafts", "drafting")


def at(piece: Values) -> str:
    """What a part was doing when it ended."""
    return f" (at: {piece['at']})" if "at" in piece else ""


def label_of(cell: Values) -> str:
    """What a cell is about."""
    return ", ".join(str(cell[key]) for key in CELL_KEYS if key in cell)


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
        rows.append(
            (
                "highest clocks, power limit",
                f"SM {number(clocks[0])} MHz, memory {number(clocks[1])} MHz, {number(clocks[2])} W",
            )
        )
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

    def lengths(cell: Values) -> str:
        """Of decodes: texts are compared in vain where no draft was accepted."""
        found = [run["mean_acceptance_length"] for run in cell.get("runs", ())]
        return f"{min(found):.2f} to {max(found):.2f}" if found else "-"

    rows = [
        (
            cell["model"],
            cell["what"],
            str(cell.get("compared", "-")),
            {True: "equal", False: "not equal: " + "; ".join(cell.get("differing", ()))}.get(
                cell.get("equal"), cell.get("error") or cell.get("skipped") or "-"
            ),
            lengths(cell),
        )
        for cell in piece.get("cells", ())
    ]
    note = (
        "Rows and decodes by `torch.equal`, the operations to the last bit; random weights whose layers behind the "
        "exit add little, so that drafts are accepted."
    )
    return [note, "", *table(("model", "what", "comparisons", "result", "mean acceptance lengths"), rows)]


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
    note = "Medians on the device, bfloat16; GB/s are the bytes that must move over the time, for one row."
    if any(cell["way"] == "reference" for cell in piece.get("cells", ())):
        note = "The PyTorch references at small shapes, float32."
    return [note, "", *table(header, rows)]


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
        header += [name_of(way), "x plain"]
    return table((*header, *(f"transformers, {way}" for way in theirs)), rows)


def decode_notes(piece: Values, baselines: Values) -> list[str]:
    """What the figures assume."""
    notes = [
        "Tokens a second of the steps at batch 1, prefill left out, random weights, medians. Of the ceiling: the bytes "
        "that a plain step must read over its time, and the card's measured read speed."
    ]
    if "synthetic" in piece:
        synthetic = piece["synthetic"]
        notes.append(
            f"*{synthetic['assumption']}*: mean acceptance length {synthetic['mean_acceptance_length']:.3f}, "
            f"{synthetic['drafted_per_step']:.2f} drafts a step. Unforced, Kangaroo is at its worst: random weights "
            "draft once a step, and next to nothing is accepted."
        )
    if "assistant" in baselines:
        notes.append(
            f"Of transformers the first {baselines['settled']} tokens are left out, too: the compiled way records its "
            "graphs anew in every call."
        )
        notes.append(f"Assisted: {baselines['assistant']}; nearly nothing is accepted, its worst case.")
        if not baselines["compiled"]:
            notes.append("In a smoke run nothing is compiled, and plain and Kangaroo run on the references.")
    return [" ".join(notes), ""]


def steps(piece: Values, smoke: bool) -> list[str]:
    """Microseconds of steps with a fixed number of drafts, a line a model and number, and a column a way to draft.

    In a smoke run all ways are the same references: one has figures.
    """
    keys = ("model", "context", "drafts", "drafting")
    found = {tuple(step[key] for key in keys): step for step in piece.get("steps", ())}
    if not found:
        return []
    kinds = list(dict.fromkeys(drafting for *_, drafting in found))
    if smoke:
        found = {key: step for key, step in found.items() if key[-1] == kinds[0]}
    rows = [
        (
            model,
            str(context),
            str(drafts),
            *(number(found.get((model, context, drafts, kind), {}).get("us_per_step"), 1) for kind in kinds),
        )
        for model, context, drafts in dict.fromkeys(tuple(key[:3]) for key in found)
    ]
    header = ("model", "context", "drafts a step", *(f"us a step, drafting {kind}" for kind in kinds))
    note = "Steps that make so many drafts, whatever their confidence, verification included."
    if smoke:
        note += " In a smoke run every way to draft is the same references."
    return [note, "", *table(header, rows)]


def energy(piece: Values) -> list[str]:
    """Joules a token, a line a model, context and way."""
    cells = [cell for cell in piece.get("cells", ()) if cell.get("joules_per_token")]
    if not cells:
        return []
    rows = [(c["model"], str(c["context"]), name_of(c["way"]), number(c["joules_per_token"], 2)) for c in cells]
    note = "Energy of the whole card, from its own counter, which moves a few times a second: rough for short decodes."
    return [note, "", *table(("model", "context", "way", "J a token"), rows)]


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
        f"{piece['dtype']}, {piece['kernels']} kernels, greedy, on held-out prompts; tokens a second without prefill, "
        "medians."
    )
    positions_table = table(("position", "accepted, share of the steps"), positions)
    return [about, "", *table(header, rows), *beside_transformers(piece), *positions_table]


def beside_transformers(piece: Values) -> list[str]:
    """A line a prompt: the target in transformers' ``generate``."""
    baselines = {total["way"]: total for total in piece.get("baselines", ())}
    if not baselines:
        return []
    cells = {(cell["prompt"], cell["way"]): cell for cell in piece["cells"] if "agreeing_tokens" in cell}

    def columns(cell: Values) -> list[str]:
        same = f"{cell['agreeing_tokens']} of {cell['new_tokens']}" if cell.get("new_tokens") else "-"
        return [number(cell.get("tokens_per_second"), 1), number(cell.get("kangaroo_speedup"), 2), same]

    rows = []
    for name in (row["name"] for row in piece["prompts"]):
        found = [cells.get((name, way), {}) for way in baselines]
        rows.append([name, *(column for cell in found for column in columns(cell))])
    counts = {total["prompts"] for total in baselines.values()}
    everything = "all" if counts == {len(piece["prompts"])} else "all that were reached"
    rows.append([everything, *(column for total in baselines.values() for column in columns(total))])
    header = ["prompt"]
    for way in baselines:
        header += [f"transformers, {way}", "Kangaroo / it", "same tokens until a difference"]
    note = (
        "The same target and prompts in transformers' `generate`: tokens a second without the prefill and the first "
        "tokens, in which the compiled way records its graphs. Its text may differ from ours by rounding."
    )
    if not piece["compiled"]:
        note += " In a smoke run nothing is compiled."
    return [note, "", *table(header, rows)]


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
                decode_notes(piece, baselines)
                + decode(piece, baselines, ceilings.get("read_gigabytes_per_second"))
                + steps(piece, report["smoke"])
                + energy(piece)
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
