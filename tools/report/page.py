"""The report as Markdown: what went wrong first, then what every part found."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Values = Mapping[str, Any]
SMOKE_LABEL = "smoke, CPU: no figure is about a GPU"
SMOKE_NOTE = f"**{SMOKE_LABEL}**; every way runs on the PyTorch references in float32, and nothing is compiled."
STAGE_COLUMNS: tuple[tuple[str, str, int | str], ...] = (
    *(("stage", "stage", ""), ("runs", "runs", 1), ("us", "us", 1), ("of them gaps", "gap_us", 1)),
    *(("launches", "launches", 1), ("bytes", "bytes_moved", 0), ("GB/s", "gigabytes_per_second", 0)),
)
"""Of ``iteration_profile.stage_rows``; on a CPU launches are operations."""
SAME = "same tokens", "same", ""
CELL_KEYS = ("model", "prompt", "context", "way", "drafts", "drafting")


def shown(value: Any, how: int | str) -> str:
    """A text (``how`` is ""), a share ("%") or a number with so many digits; a dash where there is none."""
    if how == "" or not isinstance(value, int | float):
        return "-" if value is None or how != "" else str(value).replace("|", r"\|")  # a bar would end the column
    return f"{100 * value:,.1f} %" if how == "%" else f"{value:,.{how}f}"


def table(rows: Iterable[Values], *columns: tuple[str, str, int | str]) -> str:
    """A table whose columns are a head, the key of a row's value, and how it is ``shown``."""
    lines = [[head for head, _, _ in columns], ["---" if how == "" else "---:" for _, _, how in columns]]
    lines += [[shown(row.get(key), how) for _, key, how in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        for index, (width, (_, _, how)) in enumerate(zip(widths, columns, strict=True)):
            line[index] = line[index].ljust(width) if how == "" else line[index].rjust(width)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- what a part found


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
                yield f"{name}, {label_of(cell)}: {cell['error']}"
            elif name == "decode" and cell.get("agreeing_tokens", cell.get("new_tokens")) != cell.get("new_tokens"):
                yield f"{name}, {label_of(cell)}: its tokens differ from plain decoding's."
        for failure in piece.get("failures", ()):
            yield f"{name}: {failure['test']} failed: {failure['reason']}"
        if piece.get("total") and not piece["total"]["identical"]:
            yield f"{name}: Kangaroo's tokens differ from plain decoding's."


def label_of(cell: Values) -> str:
    """What was measured, in words."""
    return ", ".join(str(cell[key]) for key in CELL_KEYS if key in cell)


def state_of(piece: Values) -> str:
    """How a part ended, and what it left out."""
    left_out = sum("skipped" in cell for cell in cells_of(piece)) + (piece.get("not_run") or 0)
    return f"{piece['status']}" + (f", {left_out} not reached" if left_out else "")


def kernel_rows(cells: Sequence[Values]) -> Iterator[Values]:
    """A row a kernel and shape: its cells at 1 and 8 rows, and how many times longer every other way takes at 1."""
    groups: dict[tuple[str, str], dict[Any, Values]] = {}
    for cell in cells:
        detail = {"attention": f" {cell['length']}", "linear_residual": f" {cell['role']}"}.get(cell["op"], "")
        way = "kernel" if cell["way"] == "reference" else cell["way"]
        groups.setdefault((cell["model"], cell["op"] + detail), {})[way, cell["rows"]] = cell
    for (model, op), found in groups.items():
        us = {key: cell["us"]["p50"] for key, cell in found.items()}
        one, ways = us.get(("kernel", 1)), ("chained", "eager", "compiled")
        ratios = {way: us[way, 1] / one for way in ways if one and (way, 1) in us}
        named = {"model": model, "op": op, "one": one, "eight": us.get(("kernel", 8))}
        yield {**found.get(("kernel", 1), {}), **named, **ratios}


def decode_cells(parts: Mapping[str, Values]) -> list[Values]:
    """Those of the library and of what a user would pick instead."""
    return [cell for name in ("decode", "baselines", "vllm") for cell in parts.get(name, {}).get("cells", ())]


def beside_plain(cells: Sequence[Values], plain: Sequence[Values], ceiling: float | None) -> Iterator[Values]:
    """The cells beside plain decoding of that model and context: how many times as fast, and how many times as long.

    Of a plain one there is the share of the measured bandwidth ``ceiling``, in GB/s, too.
    """
    known = {(cell["model"], cell["context"]): cell for cell in plain if cell["way"] == "plain"}
    for cell in cells:
        other, added = known.get((cell["model"], cell["context"]), {}), dict[str, Any]()
        for key, name in (("tokens_per_second", "gain"), ("us_per_step", "pays_from")):
            if cell.get(key) and other.get(key):
                added[name] = cell[key] / other[key]
        if ceiling and cell.get("tokens_per_second") and "bytes_per_token" in cell:
            added["share"] = cell["tokens_per_second"] * cell["bytes_per_token"] / 1e9 / ceiling
        if "agreeing_tokens" in cell:
            added["same"] = f"{cell['agreeing_tokens']} of {cell['new_tokens']}"
        yield {**cell, **added}


# ---- the page


def page(report: Values) -> str:
    """The whole report."""
    parts: Mapping[str, Values] = report["parts"]
    text = [f"# {report['gpu'] or 'CPU'}", *([SMOKE_NOTE] if report["smoke"] else [])]
    text.append(f"`{report['command']}`, {report['date']}, commit {report['commit']}.")
    if wrong := list(complaints(parts)):
        text += ["What went wrong:", "\n".join(f"- {sentence}" for sentence in wrong)]
    ran = [{"part": name, "state": state_of(piece), **piece} for name, piece in parts.items()]
    columns = ("part", "part", ""), ("state", "state", ""), ("seconds", "seconds", 0)
    more = ("kernels compiled", "compiled", 0), ("date", "date", ""), ("commit", "commit", "")
    text.append(table(ran, *columns, *more))
    found: dict[str, Values] = {name: parts.get(name, {}) for name in ("environment", "kernels", "pair", "timeline")}
    text += [*environment(found["environment"]), *tests(parts), *kernels(found["kernels"].get("cells", ()))]
    text += [*decoding(parts), *pair(found["pair"]), *timeline(found["timeline"])]
    return "\n\n".join(text) + "\n"


def environment(found: Values) -> Iterator[str]:
    """The machine and the versions."""
    if "versions" in found:
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
        rows = {"CPU": f"{found['cpu_count']} cores", "versions": versions}
        rows["compiled kernels are looked for under"] = f"the key that is {found.get('triton_key')}"
        if gpu := found.get("gpu"):
            rows["GPU"] = f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors, L2 {gpu['l2_bytes'] >> 20} MiB"
            rows["launch configurations"] = ", ".join(found.get("launch_configs", ()))
        if card := found.get("card"):
            sm, memory, power = (shown(card[name], 0) for name in ("sm_mhz_max", "memory_mhz_max", "power_limit_w"))
            rows["driver, highest clocks, power limit"] = f"{card['driver']}, SM {sm}, memory {memory} MHz, {power} W"
        if ceiling := found.get("ceiling"):
            rows["memory, measured"] = f"read {ceiling['read']:,.0f} GB/s; copied, both ways {ceiling['copy']:,.0f}"
        yield "## Environment"
        yield table([{"what": what, "it": it} for what, it in rows.items()], ("what", "what", ""), ("it is", "it", ""))


def tests(parts: Mapping[str, Values]) -> Iterator[str]:
    """How many tests passed, and what they measured."""
    rows = [{"part": name, **piece} for name, piece in parts.items() if "ran" in piece]
    if rows:
        yield "## Tests"
        counts = "passed", "failed", "skipped", "not run", "collected"
        columns = [(count, count.replace(" ", "_"), 0) for count in counts]
        yield table(rows, ("part", "part", ""), *columns, ("command", "ran", ""))
    noted = [each for row in rows for each in row.get("noted", ()) if each.get("us_a_launch")]
    yield from (f"{each['test']}: {each['us_a_launch']:.1f} us a launch." for each in noted)


def kernels(cells: Sequence[Values]) -> Iterator[str]:
    """The microbenchmarks."""
    if cells:
        yield "## Kernels"
        yield "Medians, bfloat16 on a GPU. GB/s are the bytes that must move over the time, for one row."
        columns = ("model", "model", ""), ("operation", "op", ""), ("us, 1 row", "one", 1)
        speeds = ("GB/s", "gigabytes_per_second", 0), ("of the ceiling", "share_of_ceiling", "%")
        others = [(f"{way} / ours", way, 2) for way in ("chained", "eager", "compiled")]
        yield table(kernel_rows(cells), *columns, *speeds, ("us, 8 rows", "eight", 1), *others)


def decoding(parts: Mapping[str, Values]) -> Iterator[str]:
    """Decode speeds, and steps by their number of drafts."""
    cells, steps = decode_cells(parts), parts.get("decode", {}).get("steps")
    where = ("model", "model", ""), ("context", "context", 0)
    if cells or steps:
        yield "## Decoding"
        yield (
            "Tokens a second of the steps at batch 1, prefill left out, random weights, medians. Of the ceiling: the "
            "bytes that a plain step must read over its time, and the card's measured read speed. Kangaroo is at its "
            "worst: random weights draft once a step, and next to nothing is accepted. Of the other programs the first "
            "tokens are left out, too: transformers' compiled way records its graphs anew in every call. All have the "
            "same weights. Same tokens: how many are those of plain decoding before the first other one; another "
            "program's may differ by rounding, ours may not."
        )
    if cells:
        ceiling = parts.get("environment", {}).get("ceiling", {}).get("read")
        columns = ("way", "way", ""), ("tokens/s", "tokens_per_second", 1), ("x plain", "gain", 2)
        more = *(("of the ceiling", "share", "%"), ("tokens a step", "mean_acceptance_length", 2)), SAME
        yield table(beside_plain(cells, cells, ceiling), *where, *columns, *more)
    if "baselines" in parts and "vllm" not in parts:
        yield "vLLM was not measured: it is not installed here. `--vllm PYTHON` names the Python that has it."
    if steps:
        yield (
            "Steps that make so many drafts, whatever their confidence, verification included. A step pays from as "
            "many tokens as there are plain steps in its time."
        )
        made = ("drafts a step", "drafts", 0), ("drafting", "drafting", ""), ("us a step", "us_per_step", 1)
        yield table(beside_plain(steps, cells, None), *where, *made, ("pays from, tokens a step", "pays_from", 2), SAME)


def pair(found: Values) -> Iterator[str]:
    """A trained pair, plain and Kangaroo, then the others."""
    if not found.get("total"):
        return
    yield "## A trained pair"
    yield (
        f"`{found['name']}`: {found['layers']} layers of {found['hidden']}, exit layer {found['exit_layer']}, at most "
        f"{found['num_speculative_tokens']} drafts, threshold {found['draft_confidence_threshold']}, {found['dtype']}, "
        "greedy, on held-out prompts; tokens a second without prefill, medians."
    )
    rows = [{**row, "same": "yes" if row["identical"] else "NO"} for row in [*found["prompts"], found["total"]]]
    speeds = ("plain", "plain_tokens_per_second", 1), ("Kangaroo", "kangaroo_tokens_per_second", 1)
    more = ("mean acceptance length", "mean_acceptance_length", 2), ("drafts accepted", "draft_acceptance_rate", "%")
    yield table(rows, ("prompt", "name", ""), *speeds, ("x plain", "speedup", 2), *more, ("same tokens", "same", ""))
    if cells := [cell for cell in found.get("cells", ()) if cell.get("new_tokens")]:
        yield (
            "The same target and prompts in what a user would pick instead: tokens a second without the prefill and "
            "the first tokens. A text may differ from ours by rounding."
        )
        speeds = ("tokens/s", "tokens_per_second", 1), ("Kangaroo / it", "kangaroo_speedup", 2)
        same = ("same tokens until a difference", "agreeing_tokens", 0), ("of", "new_tokens", 0)
        yield table(cells, ("prompt", "prompt", ""), ("way", "way", ""), *speeds, *same)


def timeline(found: Values) -> Iterator[str]:
    """One iteration, stage by stage."""
    if found.get("stages"):
        yield "## An iteration"
        yield (
            f"{found['model']}, context {found['context']}, {found['drafts']} drafts a step, random weights, "
            f"{'replayed graphs' if found['graphs'] else 'launched one by one'}; means over {found['iterations']} "
            "iterations. The picture is the one of median length."
        )
        yield table(found["stages"], *STAGE_COLUMNS)
    if "picture" in found:
        yield f"![An iteration]({found['picture']})"
