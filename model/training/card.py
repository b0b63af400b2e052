"""The model card beside an adapter."""
from typing import Any
from .settings import TrainingSettings


def write_card(settings: TrainingSettings, report: dict[str, Any]) -> None:
    """..."""
