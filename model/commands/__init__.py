"""The ``kangaroo`` command and what it shows."""
