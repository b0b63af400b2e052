"""Draw the demo pair's learning curve from the record its trainer wrote.

python tools/plot_training.py --out docs/img/learning_curve.png
"""

import json
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import typer


def main(
    record: Annotated[Path, typer.Option(help="The target's training.json.")] = Path(
        "model/demo_pair/target/training.json"
    ),
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("docs/img/learning_curve.png"),
) -> None:
    """Held-out bits per character and top-1 accuracy over the minutes of training."""
    curve = json.loads(record.read_text())["curve"]
    minutes = [point["minutes"] for point in curve]
    figure, (bits, accuracy) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    bits.plot(minutes, [point["bits_per_character"] for point in curve], marker="o", markersize=3, color="#2f6f9f")
    bits.set(title="held-out bits per character", xlabel="minutes on two CPU cores", ylim=(0, None))
    accuracy.plot(minutes, [point["top1_accuracy"] for point in curve], marker="o", markersize=3, color="#b5542b")
    accuracy.set(title="held-out top-1 accuracy", xlabel="minutes on two CPU cores", ylim=(0, None))
    for axes in (bits, accuracy):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    typer.run(main)
