"""The adapters that ``experiments.py`` compares: trained on the same data, with the same steps and seed.

``exits`` trains one behind each of several layers, in the paper's form; ``forms`` trains each form that the adapter's
format has behind one layer; ``ablation`` trains the paper's forms there (``experiment_ablation.py``).
"""

from pathlib import Path
from typing import Any

import experiment_ablation

from kangaroo_kernels.model.commands.show import training_bars
from kangaroo_kernels.model.evaluation.plan import find_shapes
from kangaroo_kernels.model.training.checkpoint import REPORT_FILE
from kangaroo_kernels.model.training.settings import TrainingSettings
from kangaroo_kernels.model.training.trainer import train_adapters
from kangaroo_kernels.workloads import ModelShape

DEPTHS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8)
"""Where ``exits`` leaves the model, as shares of its layers; the others leave it at the second."""
EXITS, FORMS, ABLATION = "exits", "forms", "ablation"
STEPS = 100


def exit_layers(layers: int) -> list[int]:
    """The exit layers that are tried of so many."""
    return sorted({max(1, round(share * layers)) for share in DEPTHS})


def one_exit_layer(layers: int) -> int:
    """The exit layer of the experiments that compare something else, of so many."""
    tried = exit_layers(layers)
    return tried[min(1, len(tried) - 1)]


def forms(shape: ModelShape) -> dict[str, dict[str, Any]]:
    """Each form by its name, as settings of a training; every one changes one part of the paper's."""
    grouped = shape.kv_heads < shape.heads  # else the target's own heads are that form already
    return {
        "attention alone": {},
        "and an MLP": {"intermediate_size": shape.inner},
        **({"key-value heads of its own": {"num_attention_heads": shape.heads}} if grouped else {}),
        "a deep state": {"deep_state_size": shape.hidden},
        "a quarter of the vocabulary": {"draft_vocabulary": shape.vocab_size // 4},
        "a head of a low rank": {"draft_head_rank": shape.hidden // 4},
        "blocks of four": {"draft_block": 4},
        "a trained confidence": {"trained_confidence": True},
    }


def trainings(
    experiment: str, model: str, data: list[Path], steps: int, out: Path
) -> list[dict[str, TrainingSettings]]:
    """An experiment's trainings by their points' names; those of a group learn from the same passes of the model."""
    shape = find_shapes(model).shape

    def settings(name: str, exit_layer: int, **form: Any) -> TrainingSettings:
        return TrainingSettings(model, tuple(data), exit_layer, out / name.replace(" ", "-"), steps=steps, **form)

    if experiment == EXITS:
        return [{(name := f"exit {layer}"): settings(name, layer) for layer in exit_layers(shape.layers)}]
    exit_layer = one_exit_layer(shape.layers)
    return [{name: settings(name, exit_layer, **form)} for name, form in forms(shape).items()]


def train(experiment: str, model: str, data: list[Path], steps: int, out: Path) -> dict[str, Path]:
    """Train what is not trained yet; gives the folder of each adapter by the name of its point, or the network's file.

    Raises:
        KangarooError: settings that cannot be used.
    """
    if experiment == ABLATION:
        return experiment_ablation.train(model, data, one_exit_layer(find_shapes(model).shape.layers), steps, out)
    found: dict[str, Path] = {}
    for group in trainings(experiment, model, data, steps, out):
        folders = {name: settings.out for name, settings in group.items()}
        if not all((folder / REPORT_FILE).is_file() for folder in folders.values()):
            with training_bars() as report:
                train_adapters(list(group.values()), report)
        found |= folders
    return found
