"""The paper's questions, asked of any pair: one command, one record and one picture each.

    python tools/experiments.py drafting --out DIR [--model smollm2 --adapter FOLDER]
    python tools/experiments.py exits --out DIR --model smollm2 --data data.jsonl

In every figure, plain decoding and Kangaroo have written the same texts in turns, as in ``kangaroo eval``. The record
grows point by point, and a run that was stopped goes on with the same command. docs/experiments.md sets the results
beside the paper's (arXiv 2404.18911).
"""

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import experiment_ablation
import experiment_adapters
import experiment_pictures
import torch
import typer
from command import INTERRUPTED, refuse

from kangaroo_kernels import Kangaroo, KangarooError, Settings
from kangaroo_kernels.model.commands.facts import environment
from kangaroo_kernels.model.commands.show import training_bars
from kangaroo_kernels.model.demo import DEMO_MODEL, bundled_pair
from kangaroo_kernels.model.evaluation.evaluate import KANGAROO, PLAIN, answer
from kangaroo_kernels.model.evaluation.questions import Question, in_turns, read_questions
from kangaroo_kernels.model.evaluation.race import warm_up
from kangaroo_kernels.model.evaluation.statistics import Row, row
from kangaroo_kernels.model.files import read_object, write_text

NAME = "experiments"
OWN_QUESTIONS = Path(__file__).parent.parent / "bench" / "domains.jsonl"
LENGTHS = (1, 2, 4, 8, 15)
THRESHOLDS = (0.0, 0.001, 0.01, 0.1, 0.3, 0.6, 0.9, 0.99, 0.999)
TEMPERATURES = (0.0, 0.3, 0.7, 1.0, 1.5)
SEEDS = (0, 1)
"""Of sampled texts; a greedy text is always the same."""
PAPER = {"num_speculative_tokens": 6, "draft_confidence_threshold": 0.6}
"""The paper's settings on Vicuna-7B, by its authors' README."""
Adapters = dict[str, Path | None]
"""Folders by the names of their points; None is the model's own adapter."""


class Point(NamedTuple):
    """What is measured at once.

    Attributes:
        name: of the point, in the record and in the picture.
        settings: what its texts are written with, besides the number of tokens.
        seeds: each text is written once with each.
        adapter: what drafts.
        category: of the questions; None takes all.
    """

    name: str
    settings: dict[str, Any]
    seeds: tuple[int, ...] = SEEDS[:1]
    adapter: Path | None = None
    category: str | None = None


def own(folders: Adapters) -> Path | None:
    """The one adapter of an experiment that compares something else."""
    return next(iter(folders.values()))


def drafting(folders: Adapters, _: list[Question]) -> Iterator[Point]:
    """Fixed drafting (threshold 0) and dynamic drafting, over draft lengths and thresholds."""
    for threshold in THRESHOLDS:
        for length in LENGTHS:
            settings = {"num_speculative_tokens": length, "draft_confidence_threshold": threshold}
            yield Point(f"{length} drafts, threshold {threshold:g}", settings, adapter=own(folders))


def positions(folders: Adapters, _: list[Question]) -> Iterator[Point]:
    """How often a draft is accepted at each position, without a threshold and with the paper's."""
    for threshold in (0.0, PAPER["draft_confidence_threshold"]):
        settings = PAPER | {"draft_confidence_threshold": threshold}
        yield Point(f"threshold {threshold:g}", settings, adapter=own(folders))


def temperature(folders: Adapters, _: list[Question]) -> Iterator[Point]:
    """Greedy and sampled text, with both rules of acceptance."""
    for rule in ("coupled", "rejection"):
        for heat in TEMPERATURES:
            settings = {"acceptance": rule, "temperature": heat}
            yield Point(f"{rule}, temperature {heat:g}", settings, SEEDS if heat else SEEDS[:1], own(folders))


def domains(folders: Adapters, questions: list[Question]) -> Iterator[Point]:
    """Each category of the questions."""
    for category in dict.fromkeys(question.category for question in questions):
        yield Point(category, {}, adapter=own(folders), category=category)


def adapters(folders: Adapters, _: list[Question]) -> Iterator[Point]:
    """Adapters of one model beside each other: exit layers, forms, or stages of a training."""
    for name, folder in folders.items():
        yield Point(name, {}, adapter=folder)


EXPERIMENTS: dict[str, Callable[[Adapters, list[Question]], Iterator[Point]]] = {
    **{each.__name__: each for each in (drafting, positions, temperature, domains, adapters)},
    experiment_adapters.EXITS: adapters,
    experiment_adapters.FORMS: adapters,
    experiment_adapters.ABLATION: adapters,
}
TRAINED = (experiment_adapters.EXITS, experiment_adapters.FORMS, experiment_adapters.ABLATION)
"""The experiments that train the adapters that they compare."""


def read(questions: Path | None, model: str, experiment: str, per_category: int | None) -> list[Question]:
    """The given questions; else the bundled pair's held-out prompts, or our own questions of several domains."""
    if questions is None and model == DEMO_MODEL and experiment != domains.__name__:
        prompts = bundled_pair().prompts()
        held_out = [Question(name, "held-out code", (prompt,)) for name, prompt in prompts.items()]
        return in_turns(held_out, per_category)
    return in_turns(read_questions(questions or OWN_QUESTIONS), per_category)


def crc(*contents: bytes) -> str:
    """What tells questions or training data from others in a record."""
    return f"CRC {zlib.crc32(b''.join(contents)):08x}"


def measure(kangaroo: Kangaroo, point: Point, questions: list[Question], max_new_tokens: int) -> Row:
    """The figures of one point."""
    pairs = []
    for seed in point.seeds:
        settings = replace(Settings(max_new_tokens, seed=seed), **point.settings)
        for question in questions:
            if point.category in (None, question.category):
                found = answer(kangaroo, question, settings, {})
                pairs.append((found[PLAIN], found[KANGAROO]))
    return row(point.name, pairs)


@lru_cache(maxsize=1)
def load(model: str, adapter: Path | None, dtype: str | None) -> Kangaroo:
    """A pair, warm; the last one is kept."""
    if adapter is not None and adapter.suffix == experiment_ablation.SUFFIX:
        kangaroo = experiment_ablation.load(model, adapter, dtype)
    else:
        alone: dict[str, Any] = {"draft_tree": 0, "prompt_lookup": False}
        kangaroo = Kangaroo.from_pretrained(model, adapter, dtype=dtype, **alone)
    warm_up(kangaroo)
    return kangaroo


def begin(header: dict[str, Any], file: Path) -> dict[str, Any]:
    """The record of an experiment: a new one, or what is there already.

    Raises:
        KangarooError: the file holds another experiment.
    """
    if not file.exists():
        return header | {"environment": asdict(environment()), "rows": []}
    record = read_object(file)
    if {name: record.get(name) for name in header} != header:
        raise KangarooError(f"{file} holds an experiment with other settings; take a new folder.")
    return record


def run(points: list[Point], questions: list[Question], record: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    """Measure the points that a record lacks, and write it with each; gives the record's rows.

    Raises:
        KangarooError: a model or adapter that cannot be used.
    """
    measured = {each["category"] for each in record["rows"]}
    with training_bars() as report:
        for done, point in enumerate(points, 1):
            if point.name not in measured:
                kangaroo = load(record["model"], point.adapter, record.get("dtype"))
                found = measure(kangaroo, point, questions, record["max_new_tokens"])
                record["rows"].append({"settings": point.settings, **asdict(found)})
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text(file, json.dumps(record, indent=1) + "\n")
            report("measuring", done, len(points), point.name)
    rows: list[dict[str, Any]] = record["rows"]
    return rows


def main(
    experiment: Annotated[str, typer.Argument(help=f"One of {', '.join(EXPERIMENTS)}.")],
    out: Annotated[Path, typer.Option(help="The folder for EXPERIMENT.json and EXPERIMENT.png.")],
    model: Annotated[str, typer.Option(help="As for kangaroo eval.")] = DEMO_MODEL,
    adapter: Annotated[
        list[Path] | None, typer.Option(help="Its adapter; 'adapters' takes several, each with an --adapter.")
    ] = None,
    questions: Annotated[Path | None, typer.Option(help="A file as for kangaroo eval, instead of our own.")] = None,
    per_category: Annotated[int | None, typer.Option(help="Take this many questions of each category.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 128,
    dtype: Annotated[str | None, typer.Option(help="As for kangaroo eval.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="What 'exits', 'forms' and 'ablation' train on, as for kangaroo train.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of each of these trainings.")] = experiment_adapters.STEPS,
) -> None:
    """Ask one of the paper's questions of a pair; a stopped run goes on with the same command."""
    if experiment not in EXPERIMENTS:
        refuse(NAME, f"there is no experiment {experiment!r}; there are {', '.join(EXPERIMENTS)}.")
    if (experiment == adapters.__name__) != (len(adapter or ()) > 1):
        refuse(NAME, "'adapters' takes several --adapter, any other experiment at most one.")
    if len({*(adapter or ())}) < len(adapter or ()):
        refuse(NAME, "an --adapter stands there twice.")
    if (experiment in TRAINED) != bool(data) or (experiment in TRAINED and adapter):
        refuse(NAME, f"{', '.join(TRAINED)} train their adapters on --data, which no other experiment takes.")
    if steps < 1:
        refuse(NAME, f"steps is {steps}; it must be a whole number of at least 1.")
    try:
        Settings(max_new_tokens)
        asked = read(questions, model, experiment, per_category)
        header: dict[str, Any] = {
            "experiment": experiment,
            "model": model,
            "adapter": None if experiment == adapters.__name__ else adapter and str(adapter[0]),
            "questions": len(asked),
            "asked": crc(repr(asked).encode()),
            "max_new_tokens": max_new_tokens,
            "dtype": dtype,
            "steps": steps if experiment in TRAINED else None,
            "data": crc(*(file.read_bytes() for file in data)) if data else None,
            "speed": "speedup" if torch.cuda.is_available() else "processor_speedup",
        }
        record = begin(header, out / f"{experiment}.json")
        folders: Adapters = {str(folder): folder for folder in adapter} if adapter else {"its own": None}
        if data:
            folders = dict(experiment_adapters.train(experiment, model, data, steps, out / experiment))
        points = list(EXPERIMENTS[experiment](folders, asked))
        rows = run(points, asked, record, out / f"{experiment}.json")
    except (KangarooError, OSError) as error:
        refuse(NAME, str(error))
    except KeyboardInterrupt as stopped:
        typer.echo("Stopped. The same command goes on.", err=True)
        raise typer.Exit(INTERRUPTED) from stopped
    experiment_pictures.draw(experiment, rows, header["speed"], out / f"{experiment}.png")
    typer.echo(f"{out / experiment}.json has the figures, {experiment}.png the picture.")


if __name__ == "__main__":
    typer.run(main)
