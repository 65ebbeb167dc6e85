"""Upgrade an embedding model without re-embedding what you have stored.

A plugin for pytorch-metric-learning (PML):

- ``pml_compat.frozen``: the old system, held still (model, classifier, class centres);
- ``pml_compat.losses``: PML losses that train a new model to fit it (:class:`~pml_compat.losses.BCTLoss`);
- ``pml_compat.accuracy``, ``pml_compat.verification``: rankings and pairs measured across models;
- ``pml_compat.upgrade``: what the upgrade gained, and whether to do it.

Importing the package is cheap: it loads no optional dependency, and nothing of torch.
"""

__version__ = "0.1.0"
