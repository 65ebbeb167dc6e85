"""PML's trainer with the old system in the loop: the loss gets the old embeddings of each batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pytorch_metric_learning.trainers import MetricLossOnly
from torch.nn.parallel import DistributedDataParallel

from .._host import DistributedLossWrapper
from .._host import common_functions as c_f
from .._rows import precise_dtype
from ..data.nest import moved_to, rows_of
from ..frozen import FrozenEmbeddings, FrozenModel, OldEmbeddingDataset, data_and_label
from ..losses import GatheredLoss
from ..losses._task import unwrapped
from .resumable_sampler import ResumableSampler
from .stored_rows import ONE, called, indices_in_batch, rows_in_batch, stored_rows


class CompatibleMetricLossOnly(MetricLossOnly):
    """PML's ``MetricLossOnly`` for losses that compare with an old model: called with its embeddings as ``ref_emb``.

    Which view of an image the old embedding is of, you choose by what you give:

    - ``old_model``: of the view in the batch. The old model runs on the very data that the new one gets, augmented as
      they are. Costs a forward pass of the old model an iteration.
    - ``old_embeddings``: of the stored view, usually the clean image; the new model's view may be augmented. Costs a
      lookup. The batch must say which samples it holds: let the data set give ``(data, label, index)``, as
      :class:`~pml_compat.trainers.IndexedDataset` does.
    - neither, with an :class:`~pml_compat.frozen.OldEmbeddingDataset` as ``dataset``: the stored view, looked up by
      the DataLoader's workers.

    Everything else is PML's: hooks, testers, ``freeze_these``, schedulers, mining functions. The ``tuple_miner`` mines
    among the new embeddings, for the task loss; a miner across models belongs to the loss. The old system is in none
    of ``models``, ``optimizers`` and what hooks save. A loss that adds terms of its own to a task loss but reads no
    old embeddings (``BCTLoss``, ``LCELoss``), or has no argument ``ref_emb``, is called as PML calls it. Losses of this
    package say so themselves, by ``needs_ref_emb``.

    Args:
        *args: as of PML's ``MetricLossOnly``. Batches may have more parts than data and labels,
            and data may be any nest of tensors that the trunk takes: dicts, tuples, lists.
        old_model: the old network, ``(N, ...) -> (N, D_old)``; put in eval mode, moved to ``data_device`` and run in
            its own dtype without a gradient. Or a mapping of names to networks.
        old_embeddings: ``FrozenEmbeddings``, whose ids are the data set's indices, or an ``(N, D_old)`` tensor, array
            or path, with a row for each index. Or a mapping of names to these.
        index_getter: takes a batch and returns the ``(N,)`` indices of its samples; by default its last part, after
            data and labels.
        **kwargs: as of PML's ``MetricLossOnly``.

    With mappings, the loss gets ``ref_emb`` as a mapping with all their names, as
    :class:`~pml_compat.losses.CompatibleLoss` takes it; some old models may be run and others looked up.

    Raises:
        ValueError: neither or both of ``old_model`` and ``old_embeddings`` for an old model; arguments of another
            type; an old model whose parameters are in ``optimizers``. In training: a batch without indices, an index
            of which nothing is stored, old embeddings that are not one a sample; what the loss raises, as of widths
            that differ.
        RuntimeError: the old model's parameters change.
    Example:
        >>> from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
        >>> from pml_compat.losses import CompatibleLoss, FCTLoss
        >>> new_model, old_model = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> trainer = CompatibleMetricLossOnly(
        ...     models={"trunk": new_model},
        ...     optimizers={"trunk_optimizer": torch.optim.SGD(new_model.parameters(), lr=0.1)},
        ...     batch_size=2,
        ...     loss_funcs={"metric_loss": CompatibleLoss(NormalizedSoftmaxLoss(2, 2), FCTLoss(), weights=0.5)},
        ...     dataset=torch.utils.data.TensorDataset(torch.eye(4), torch.tensor([0, 0, 1, 1])),
        ...     old_model=old_model,
        ...     dataloader_num_workers=0,
        ... )
        >>> trainer.train(num_epochs=2)
    """

    old_models: dict[str, FrozenModel]
    old_embeddings: dict[str, FrozenEmbeddings]
    data_and_label_getter: Any
    dataloader_iter: Any

    def __init__(
        self,
        *args: Any,
        old_model: torch.nn.Module | Mapping[str, torch.nn.Module] | None = None,
        old_embeddings: Any = None,
        index_getter: Callable[[Any], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        models, stored = _by_name(old_model, "old_model"), _by_name(old_embeddings, "old_embeddings")
        self._rows_in_batch = isinstance(self.dataset, OldEmbeddingDataset)
        if self._rows_in_batch and (models or stored):
            raise ValueError(
                "old_model and old_embeddings must be None with an OldEmbeddingDataset, whose batches have the old "
                "embeddings already; give its own dataset instead, or leave them out"
            )
        if not self._rows_in_batch and not models and not stored:
            raise ValueError(
                "old_model or old_embeddings must be given, got neither; or an OldEmbeddingDataset as dataset"
            )
        twice = sorted(models.keys() & stored.keys())
        if twice or (ONE in {*models, *stored} and models and stored):
            raise ValueError(
                "old_model and old_embeddings must not both be given for one old model, got both"
                f"{f' for {twice}' if twice and ONE not in twice else ''}; several old models are given as mappings "
                "with a name each"
            )
        self.old_models = {name: _frozen_model(model) for name, model in models.items()}
        self.old_embeddings = {name: _frozen_embeddings(rows) for name, rows in stored.items()}
        self.index_getter = index_getter
        _check_not_trained(self.old_models, self.optimizers, self.freeze_these)
        for model in self.old_models.values():
            model.to(self.data_device)
            model._check_unchanged()  # from here on, not from its first call on

    def initialize_data_and_label_getter(self) -> None:
        """Take the first two parts of a batch for data and labels, where nothing else is said."""
        if self.data_and_label_getter is None:
            self.data_and_label_getter = data_and_label
        super().initialize_data_and_label_getter()

    def checkpoint_parts(self) -> dict[str, dict[str, Any]]:
        """Return what :func:`~pml_compat.trainers.save_checkpoint` and ``load_checkpoint`` keep of this training."""
        return {
            "modules": {**self.models, **self.loss_funcs, **self.mining_funcs},
            "optimizers": self.optimizers,
            "lr_schedulers": self.lr_schedulers,
            "others": {"sampler": self.sampler} if isinstance(self.sampler, ResumableSampler) else {},
        }

    def get_batch(self) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
        """Return data and labels, as PML does, and the old embeddings that were looked up, by their names."""
        self.dataloader_iter, batch = c_f.try_next_on_generator(self.dataloader_iter, self.dataloader)
        data, labels = self.data_and_label_getter(batch)
        labels = c_f.process_label(labels, self.label_hierarchy_level, self.label_mapper)
        looked_up = self._look_up(batch, len(labels)) if self._loss_reads_old() else {}
        if "subset_batch_miner" in self.mining_funcs:
            self.set_to_eval()
            with torch.no_grad():
                chosen = self.mining_funcs["subset_batch_miner"](self.compute_embeddings(data), labels)
            self.set_to_train()
            data, labels = rows_of(data, chosen), labels[chosen]
            looked_up = {name: rows[torch.as_tensor(chosen, device=rows.device)] for name, rows in looked_up.items()}
        return data, labels, looked_up

    def forward_and_backward(self) -> None:
        """Train one batch, as PML does; a :class:`~pml_compat.trainers.ResumableSampler` is told so."""
        super().forward_and_backward()
        if isinstance(self.sampler, ResumableSampler):
            self.sampler.advance()

    def calculate_loss(self, curr_batch: tuple[Any, torch.Tensor, dict[str, torch.Tensor]]) -> None:
        """Embed, mine and compute the loss as PML does, the loss with the old embeddings."""
        data, labels, looked_up = curr_batch
        data = moved_to(data, self.data_device)  # once, for all models
        embeddings = self.compute_embeddings(data)
        indices_tuple = self.maybe_mine_embeddings(embeddings, labels)
        ref_emb = self._old(data, embeddings, looked_up) if self._loss_reads_old() else None
        self.losses["metric_loss"] = self.maybe_get_metric_loss(embeddings, labels, indices_tuple, ref_emb)

    def get_trunk_output(self, data: Any) -> Any:
        """Return what the trunk gives, of any nest of tensors."""
        return self.models["trunk"](moved_to(data, self.data_device, self.dtype))

    def maybe_get_metric_loss(
        self, embeddings: torch.Tensor, labels: torch.Tensor, indices_tuple: Any, ref_emb: Any = None
    ) -> Any:
        """Return the loss, 0 where its weight is 0."""
        if ref_emb is None:
            return super().maybe_get_metric_loss(embeddings, labels, indices_tuple)
        # Another object than labels: PML's losses take row i for one and the same embedding where they are the same.
        ref_labels = labels.clone()
        return self.loss_funcs["metric_loss"](embeddings, labels, indices_tuple, ref_emb=ref_emb, ref_labels=ref_labels)

    def _loss_reads_old(self) -> bool:
        return self.loss_weights.get("metric_loss", 0) > 0 and _reads_ref_emb(self.loss_funcs["metric_loss"])

    def _look_up(self, batch: Any, length: int) -> dict[str, torch.Tensor]:
        """Return the stored old embeddings of a batch."""
        if self._rows_in_batch:
            return {ONE: rows_in_batch(batch, length)}
        if not self.old_embeddings:
            return {}
        index = indices_in_batch(batch, self.index_getter, length)
        return {name: stored_rows(stored, index, name) for name, stored in self.old_embeddings.items()}

    def _old(
        self, data: Any, embeddings: torch.Tensor, looked_up: Mapping[str, torch.Tensor]
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return what the loss gets as ``ref_emb``: the batch's embeddings by all old models."""
        found = dict(looked_up)
        for name, model in self.old_models.items():
            found[name] = model(_in_its_dtype(data, model))
            if len(found[name]) != len(embeddings):
                raise ValueError(
                    f"{called('old_model', name)} must return one embedding a sample: expected {len(embeddings)} "
                    f"rows, got {len(found[name])}"
                )
        dtype = precise_dtype(embeddings.dtype)
        found = {name: rows.to(embeddings.device, dtype) for name, rows in found.items()}
        return found.get(ONE, found)


def _reads_ref_emb(loss: torch.nn.Module) -> bool:
    """Tell whether a loss takes old embeddings as ``ref_emb``."""
    while True:
        inner = unwrapped(loss)  # of torch.compile
        if isinstance(inner, DistributedDataParallel):
            inner = inner.module
        elif isinstance(inner, DistributedLossWrapper | GatheredLoss):
            inner = inner.loss
        if inner is loss:
            break
        loss = inner
    needs = getattr(loss, "needs_ref_emb", None)
    if needs is not None:
        return bool(needs)
    parameters = inspect.signature(loss.forward).parameters
    return "ref_emb" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _by_name(given: Any, argument: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return {ONE: given}
    if not given or not all(isinstance(name, str) and name for name in given):
        raise ValueError(f"{argument} must name one old model or more, got the names {list(given)}")
    return dict(given)


def _frozen_model(model: Any) -> FrozenModel:
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"old_model must be a torch.nn.Module, got {type(model).__name__}; stored embeddings are given as "
            "old_embeddings"
        )
    return model if isinstance(model, FrozenModel) else FrozenModel(model)


def _frozen_embeddings(rows: Any) -> FrozenEmbeddings:
    if isinstance(rows, torch.nn.Module):
        raise ValueError(
            f"old_embeddings must be stored embeddings, got {type(rows).__name__}; a network is given as old_model"
        )
    return rows if isinstance(rows, FrozenEmbeddings) else FrozenEmbeddings.from_array(rows)


def _check_not_trained(
    old_models: Mapping[str, FrozenModel], optimizers: Mapping[str, Any], freeze_these: Sequence[str]
) -> None:
    """A trunk that both models share is no mistake where it is frozen."""
    for key, optimizer in optimizers.items():
        if key.removesuffix("_optimizer") in freeze_these:
            continue
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, old_model in old_models.items():
            if any(id(parameter) in trained for parameter in old_model.model.parameters()):
                raise ValueError(
                    f"{called('old_model', name)} must not be trained, got its parameters in optimizers[{key!r}]; "
                    "train copy.deepcopy(model)"
                )


def _in_its_dtype(data: Any, model: FrozenModel) -> Any:
    """Return the data for an old model that need not have the dtype of the new one."""
    dtypes = (parameter.dtype for parameter in model.model.parameters() if parameter.is_floating_point())
    return moved_to(data, dtype=next(dtypes, None))
