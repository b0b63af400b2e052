"""``python -m kangaroo_kernels.model`` is the ``kangaroo`` command, in a checkout that is not installed, too."""

from .commands.cli import main

main()
