"""PML's tester with the old system beside the new model: every pair of query model and gallery model at each test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester

from .._host import common_functions as c_f
from ..accuracy import CrossModelAccuracyCalculator
from ..data.nest import moved_to
from ..frozen import FrozenEmbeddings, FrozenModel
from ..transformations import Transformation
from ..upgrade import Evaluation, evaluate
from .every_pair import EveryPair, check_pairs


class CrossModelTester(GlobalEmbeddingSpaceTester):
    """Measure old/old, new/old and new/new retrieval at once, wherever a PML tester goes.

    What PML calls trunk and embedder is the new model; the old system is given here, once. Metrics are named after
    the pair, query model first, and as PML names them: ``new_to_old_precision_at_1_level0``. In PML's hooks,
    ``HookContainer(..., primary_metric="new_to_old_precision_at_1")`` then logs every pair, finds the best epoch by
    the cross-test, saves its models and waits with ``patience``.

    The old model embeds a split once: its embeddings are kept, until the split comes with another data set object or
    other labels. Row i of every model is item i of the split. A query split that is among its own references is left
    out item by item, whatever models are compared; other reference splits are PML's (``splits_to_eval``).

    Args:
        old_model: the old network, from what the data set gives to ``(N, D_old)``; held frozen, on ``data_device``.
        old_embeddings: split name to stored old embeddings, used in the old model's place: ``FrozenEmbeddings``, a
            tensor, an array or a path, one row for each item of the split's data set (ids are positions in it).
        transformation: takes old embeddings into the new space; evaluated as it is at each test, so it may still be
            training. It gets them as the old model or the store gives them: where it was fitted on unit-length ones,
            give ``FrozenModel(old_model, normalize=True)``.
        side_info: split name to the transformation's ``(N, S)`` side-information, in the forms of
            ``old_embeddings``; by default what is stored beside those.
        pairs: what to measure, ``{query}_to_{gallery}`` of "old", "new" and "transformed_old"; by default
            "old_to_old", "new_to_old", "new_to_new" and, with a transformation, "new_to_transformed_old".
        accuracy_calculator: a :class:`~pml_compat.accuracy.CrossModelAccuracyCalculator`; by default of
            ``precision_at_1`` and ``mean_average_precision``. Models of different widths are compared by
            :func:`pml_compat.fit_width`.
        **kwargs: as for PML's ``GlobalEmbeddingSpaceTester``. ``normalize_embeddings`` holds for all models, after
            the transformation; ``use_trunk_output`` for the new one. PML's ``pca`` is refused: it is fitted anew in
            every test, so each model's would be a space of its own.
    Raises:
        ValueError: neither ``old_model`` nor ``old_embeddings``; arguments of another type; unknown pairs; a
            transformation or side-information that is missing or not asked for; ``pca``. In a test: a split without
            old embeddings or side-information, or with others than its items'; widths that do not fit; a data set
            that changes its order.
        RuntimeError: the old model is being trained.
    Example:
        >>> data = torch.utils.data.TensorDataset(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        >>> tester = CrossModelTester(torch.nn.Linear(4, 2), dataloader_num_workers=0, data_device="cpu")
        >>> accuracies = tester.test({"val": data}, epoch=1, trunk_model=torch.nn.Linear(4, 3))
        >>> [name for name in accuracies["val"] if "precision_at_1" in name]
        ['old_to_old_precision_at_1_level0', 'new_to_old_precision_at_1_level0', 'new_to_new_precision_at_1_level0']
    """

    def __init__(
        self,
        old_model: torch.nn.Module | None = None,
        *,
        old_embeddings: Mapping[str, Any] | None = None,
        transformation: Transformation | None = None,
        side_info: Mapping[str, Any] | None = None,
        pairs: Sequence[str] | None = None,
        accuracy_calculator: CrossModelAccuracyCalculator | None = None,
        **kwargs: Any,
    ) -> None:
        if old_model is None and old_embeddings is None:
            raise ValueError("old_model or old_embeddings must be given, got neither")
        if old_model is not None and not isinstance(old_model, torch.nn.Module):
            raise ValueError(
                f"old_model must be a torch.nn.Module, got {type(old_model).__name__}; stored embeddings are given as "
                "old_embeddings={split name: embeddings}"
            )
        if transformation is not None and not isinstance(transformation, Transformation):
            raise ValueError(
                f"transformation must be a pml_compat.transformations.Transformation, got "
                f"{type(transformation).__name__}; a subclass with transform and config holds any module"
            )
        self.old_embeddings = _frozen(old_embeddings, "old_embeddings")
        self.side_info = _frozen(side_info, "side_info")
        if self.side_info and (transformation is None or transformation.side_features is None):
            taker = "the transformation takes none" if transformation else "there is no transformation"
            raise ValueError(f"side_info must be None where {taker}, got that of {list(self.side_info)}")
        calculator = accuracy_calculator
        if calculator is None:
            calculator = CrossModelAccuracyCalculator(include=("precision_at_1", "mean_average_precision"))
        if not isinstance(calculator, CrossModelAccuracyCalculator):
            raise ValueError(
                f"accuracy_calculator must be a CrossModelAccuracyCalculator, got {type(calculator).__name__}: it "
                "could not leave an item out of its own ranking across models; the constructor's arguments are the same"
            )
        super().__init__(accuracy_calculator=EveryPair(calculator, check_pairs(pairs, transformation)), **kwargs)
        if self.pca:
            raise ValueError(f"pca must be None, got {self.pca}: each model's PCA would be a space of its own")
        self.transformation = transformation
        self.old_model: FrozenModel | None = None
        if old_model is not None:
            self.old_model = old_model if isinstance(old_model, FrozenModel) else FrozenModel(old_model)
            self.old_model.to(self.data_device)
            self.old_model._check_unchanged()  # from here on, as the first test comes after an epoch of training
        self._embedded: dict[str, tuple[Any, torch.Tensor, torch.Tensor]] = {}  # split to data set, labels, embeddings
        self._old_width = None if transformation is None else transformation.in_features

    def get_all_embeddings_for_all_splits(
        self,
        dataset_dict: Mapping[str, Any],
        trunk_model: torch.nn.Module,
        embedder_model: torch.nn.Module,
        splits_to_compute_embeddings: Sequence[str],
        collate_fn: Any,
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Embed with the new model, as PML does; the old one follows where a pair needs it."""
        if self.old_model is not None:
            self.old_model._check_unchanged()  # it may not be called again
        self._datasets, self._collate_fn = dataset_dict, collate_fn
        return super().get_all_embeddings_for_all_splits(
            dataset_dict, trunk_model, embedder_model, splits_to_compute_embeddings, collate_fn
        )

    def evaluate(
        self,
        dataset_dict: Mapping[str, Any],
        trunk_model: torch.nn.Module,
        embedder_model: torch.nn.Module | None = None,
        split: str = "val",
        *,
        level: int = 0,
        collate_fn: Any = None,
        **kwargs: Any,
    ) -> Evaluation:
        """Return all that :func:`pml_compat.upgrade.evaluate` says of a split: intervals, flips, backfill and verdict.

        Args:
            dataset_dict: as for PML's ``test``.
            trunk_model: the new model's trunk.
            embedder_model: and its embedder.
            split: whose items are queries and gallery, each left out of its own ranking.
            level: of the labels, where items have several.
            collate_fn: as for PML's ``test``.
            **kwargs: for :func:`pml_compat.upgrade.evaluate`, such as ``fars``.
        """
        embedder_model = torch.nn.Identity() if embedder_model is None else embedder_model
        trunk_model.eval()
        embedder_model.eval()
        found = self.get_all_embeddings_for_all_splits(dataset_dict, trunk_model, embedder_model, [split], collate_fn)
        new, labels = found[split]
        own = labels[:, level] if labels.ndim > 1 else labels
        settings = {"same_items": True, "fit_width": True, "normalize": bool(self.normalize_embeddings), **kwargs}
        old = self._embeddings("old", split, new, labels)
        if self.transformation is not None:
            settings["transformed_gallery"] = self._embeddings("transformed_old", split, new, labels)
        return evaluate(new, old, own, own, old_queries=old, new_gallery=new, **settings)

    def get_embeddings_for_eval(self, trunk_model: Any, embedder_model: Any, input_imgs: Any) -> torch.Tensor:
        """Embed a batch, as PML does, of any nest of tensors that the trunk takes."""
        output = trunk_model(moved_to(input_imgs, self.data_device, self.dtype))
        return output if self.use_trunk_output else embedder_model(output)

    def set_reference_and_query(
        self,
        embeddings_and_labels: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        query_split_name: str,
        reference_split_names: Sequence[str],
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Return what PML's returns, with the embeddings of every model that a pair needs by its name."""
        _, query_labels, _, reference_labels = super().set_reference_and_query(
            embeddings_and_labels, query_split_name, reference_split_names
        )

        def embeddings(model: str, splits: Sequence[str]) -> torch.Tensor:
            return torch.cat([self._embeddings(model, split, *embeddings_and_labels[split]) for split in splits])

        query_models, gallery_models = map(set, zip(*self.accuracy_calculator.pairs.values(), strict=True))
        query = {model: embeddings(model, [query_split_name]) for model in query_models}
        reference = {model: embeddings(model, reference_split_names) for model in gallery_models}
        return query, query_labels, reference, reference_labels

    def _embeddings(self, model: str, split: str, new: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return one model's embeddings of a split, ready to be compared."""
        if model == "new":
            return new
        old = self._old(split, labels)
        if model == "transformed_old":
            assert self.transformation is not None
            if self.transformation.out_features != new.shape[1]:
                raise ValueError(
                    f"transformation must lead into the new space, {new.shape[1]} wide, got out_features "
                    f"{self.transformation.out_features}"
                )
            side_info = self._side_info(split, len(old))
            old = torch.from_numpy(self.transformation.apply_to(old, side_info, progress=False))
        return self.maybe_normalize(old.to(self.data_device))

    def _old(self, split: str, labels: torch.Tensor) -> torch.Tensor:
        """Return the old embeddings of a split as the store or the old model gives them."""
        if split in self.old_embeddings:
            stored = self.old_embeddings[split]
            old = stored[_rows(stored, len(labels), f"old_embeddings[{split!r}]")]
        elif self.old_model is not None:
            old = self._embed(self.old_model, split, labels)
        else:
            raise ValueError(
                f"old_embeddings must have split {split!r}, got {list(self.old_embeddings)}; add it, or old_model, or "
                "leave out the pairs that need it"
            )
        if self._old_width not in (None, old.shape[1]):
            rule = "the transformation's in_features" if self.transformation else "as those seen before"
            raise ValueError(
                f"old embeddings of split {split!r} must be {self._old_width} wide, {rule}, got width {old.shape[1]}"
            )
        self._old_width = old.shape[1]
        return old

    def _side_info(self, split: str, length: int) -> torch.Tensor | None:
        if self.transformation is None or self.transformation.side_features is None:
            return None
        if split in self.side_info:
            given = self.side_info[split]
            return given[_rows(given, length, f"side_info[{split!r}]")]
        stored = self.old_embeddings.get(split)
        if stored is None or stored.side_info is None:
            raise ValueError(
                f"side_info must have split {split!r} for this {type(self.transformation).__name__}, got "
                f"{list(self.side_info)}"
            )
        return stored.side_info[_rows(stored, length, f"old_embeddings[{split!r}]")]

    def _embed(self, old_model: FrozenModel, split: str, labels: torch.Tensor) -> torch.Tensor:
        """Embed a split with the old model, or remember it."""
        dataset = self._datasets[split]
        if split in self._embedded:
            known, known_labels, embeddings = self._embedded[split]
            if known is dataset and torch.equal(known_labels, labels):
                return embeddings
        c_f.LOGGER.info(f"Getting the old model's embeddings for the {split} split")
        loader = c_f.get_eval_dataloader(dataset, self.batch_size, self.dataloader_num_workers, self._collate_fn)
        embeddings, own_labels = self.compute_all_embeddings(loader, old_model, torch.nn.Identity())
        if not torch.equal(own_labels, labels):
            raise ValueError(
                f"the data set of split {split!r} must give its items in the same order each time, got other labels "
                "for the old model than for the new one"
            )
        self._embedded[split] = dataset, labels, embeddings.cpu()
        return embeddings


def _frozen(arrays: Mapping[str, Any] | None, name: str) -> dict[str, FrozenEmbeddings]:
    if arrays is not None and not isinstance(arrays, Mapping):
        raise ValueError(f"{name} must be a dictionary by split name, got {type(arrays).__name__}; give {{'val': ...}}")
    return {
        split: array if isinstance(array, FrozenEmbeddings) else FrozenEmbeddings.from_array(array)
        for split, array in (arrays or {}).items()
    }


def _rows(stored: FrozenEmbeddings, length: int, name: str) -> torch.Tensor:
    """Return the row of each item of a data set, whose id is its position."""
    rows = stored.index_of(torch.arange(length))
    missing = (rows < 0).nonzero()[:, 0]
    if len(stored) != length or len(missing):
        got = f"none for item {int(missing[0])}" if len(missing) else f"{len(stored)} rows"
        raise ValueError(
            f"{name} must have one row for each of the {length} items of the data set, with its position as id, got "
            f"{got}; of a larger store, pick them: store[store.index_of(ids)]"
        )
    return rows
