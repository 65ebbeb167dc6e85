"""PML testers with the old system beside the new model."""

from .cross_model_tester import CrossModelTester

__all__ = ["CrossModelTester"]
