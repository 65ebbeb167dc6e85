"""The ``pml-compat`` command."""
