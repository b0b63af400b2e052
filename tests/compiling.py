"""Runs Python where Triton compiles, with the modules of ``tools/``; in the tests' own process it interprets."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def printed_by(*command: str, triton: Path | None = None) -> Any:
    """The JSON that ``python COMMAND`` prints, under another Triton if that is given."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(triton) if triton else environment.get("PYTHONPATH", ""), str(ROOT / "tools")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    line = [sys.executable, *command]
    done = subprocess.run(line, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
