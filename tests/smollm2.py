"""SmolLM2-135M-Instruct, for tests that need a real model."""

import pytest

from kangaroo_kernels.model.errors import KangarooError
from kangaroo_kernels.model.named import find_smollm2


def missing() -> str:
    """Why SmolLM2 cannot be loaded here, with the command that installs it; empty where it can."""
    try:
        find_smollm2()
    except KangarooError as error:
        return str(error)
    return ""


def real(test):
    """Mark a test that needs SmolLM2, and skip it where that is not installed."""
    reason = missing()
    return pytest.mark.real(pytest.mark.skipif(bool(reason), reason=reason)(test))
