"""Neighbourhood consensus: old embeddings of the same class, in a queue, as positives weighted by their agreement."""

from __future__ import annotations

from typing import Any

import torch

from .._checks import check_embeddings, check_integer, check_labels, check_number, check_same_device
from .._rows import fit_width, no_autocast, precise_dtype, unit_rows
from ..frozen import class_weights
from ..frozen.old_references import check_row_labels
from ._base import check_weight
from ._reduction import per_sample
from ._task import Given, TaskAndTermsLoss
from .old_rows import check_old_rows


class NCCLLoss(TaskAndTermsLoss):
    r"""Pull each new embedding to the old ones of its class, the more the better these agree with its own old one.

    .. math:: L = L_{task}(f_n, y) + \alpha \operatorname{mean}_i \ell(a_i, o) + \beta \operatorname{mean}_i
        \ell(z(a_i), z(o)), \quad
        \ell(a_i, o) = -\frac{1}{|P_i|} \sum_{k \in P_i} w_{ik} \log \frac{e^{\langle a_i, o_k \rangle / \tau}}{\sum_j
        e^{\langle a_i, o_j \rangle / \tau}}, \quad w_{ik} = \frac{1 + \langle o_i, o_k \rangle}{2}

    :math:`a_i` is the new embedding and :math:`o` are the last ``queue_size`` old ones that the loss was called with,
    this batch's among them, all of unit length; :math:`P_i` are those of label :math:`y_i`, sample i's own always one
    of them. :math:`z` are the cosines with the task loss's class weights; the gradient goes into these through
    :math:`z(a_i)` alone. Where widths differ, new embeddings are fitted to the old one
    (:func:`pml_compat.fit_width`), and for :math:`z` old ones to the new one.

    Each call in training mode enqueues ``ref_emb``, also where both weights are 0; in eval mode the queue stays as it
    is. It is in ``state_dict()``. Places not yet filled take no part.

    Args:
        loss: the task loss, any PML loss, which sees the new embeddings alone; with class weights, unless
            ``logit_weight=0``. It keeps its own reducer, and its parameters are in ``parameters()``.
        queue_size: 1 or more. A larger batch takes part whole, and its last rows are kept.
        embedding_size: the width of the old embeddings.
        feature_weight: the multiplier ``alpha``, 0 or more, the paper's is 1; None: the term draws as strongly as the
            task loss (:class:`GradientBalance`).
        logit_weight: the multiplier ``beta``, likewise; the paper's is 0.01.
        temperature: ``tau``, of cosines; above 0. At the paper's 1 the softmax is nearly flat.
        **kwargs: ``reducer`` (for both terms, one loss a sample; default ``MeanReducer``), ``embedding_regularizer``,
            ``embedding_reg_weight``, ``collect_stats``.
    Shape:
        - embeddings ``(N, D_new)``, carries the gradient; labels ``(N,)``; indices_tuple: for the task loss
        - ref_emb ``(N, embedding_size)``: old embeddings, row i of the same item; ref_labels: None, or equal to labels
        - output: scalar, float32 or better; ``terms``: ``task_loss``, ``feature_loss``, ``logit_loss``
    Raises:
        ValueError: an argument out of its range; ``logit_weight`` > 0 without class weights; ``ref_emb`` missing, of
            another width or length; ref_labels other than labels; anything empty, NaN, infinite or on another device;
            labels missing, negative or past the task loss's classes.
    Example:
        >>> from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
        >>> task_loss = NormalizedSoftmaxLoss(num_classes=10, embedding_size=16)
        >>> loss_func = NCCLLoss(task_loss, queue_size=64, embedding_size=8)
        >>> loss_func.fill(torch.randn(40, 8), torch.arange(40) % 10)  # stored ones, so that it starts full
        >>> loss = loss_func(torch.randn(4, 16), torch.tensor([0, 3, 3, 9]), ref_emb=torch.randn(4, 8))
        >>> int(loss_func.old_queue_count)
        44

    Reference:
        Wu et al., "Neighborhood Consensus Contrastive Learning for Backward-Compatible Representation", AAAI 2022.
        Differs from the public implementation in: logits have no margin and unit length; empty places of the queue do
        not count as old embeddings; widths may differ. The paper's filter of unreliable old samples is not here.
    """

    old_queue: torch.Tensor
    old_queue_labels: torch.Tensor
    old_queue_position: torch.Tensor
    old_queue_count: torch.Tensor

    def __init__(
        self,
        loss: torch.nn.Module,
        queue_size: int = 8192,
        *,
        embedding_size: int,
        feature_weight: float | None = None,
        logit_weight: float | None = 0.0,
        temperature: float = 0.1,
        **kwargs: Any,
    ) -> None:
        weights = {"feature_loss": feature_weight, "logit_loss": logit_weight}
        balanced = tuple(name for name, weight in weights.items() if weight is None)
        super().__init__(loss, balanced=balanced, **kwargs)
        queue_size = check_integer(queue_size, "queue_size", minimum=1)
        embedding_size = check_integer(embedding_size, "embedding_size", minimum=1)
        self.feature_weight = check_weight(feature_weight, "feature_weight")
        self.logit_weight = check_weight(logit_weight, "logit_weight")
        self.temperature = check_number(temperature, "temperature", minimum=0, exclusive=True)
        if self.logit_weight != 0 and self.num_classes is None:
            raise ValueError(
                f"logit_weight must be 0 with a task loss without class weights, got {logit_weight!r} and "
                f"{type(loss).__name__}; pass logit_weight=0, or take a classification or proxy loss"
            )
        self.register_buffer("old_queue", torch.zeros(queue_size, embedding_size))
        self.register_buffer("old_queue_labels", torch.full((queue_size,), -1))
        self.register_buffer("old_queue_position", torch.tensor(0))
        self.register_buffer("old_queue_count", torch.tensor(0))
        given = [name for name in ("feature_weight", "logit_weight") if getattr(self, name) is not None]
        self.add_to_recordable_attributes(list_of_names=[*given, "temperature"], is_stat=False)

    def _sub_loss_names(self) -> list[str]:
        return ["task_loss", "feature_loss", "logit_loss"]

    @torch.no_grad()
    def fill(self, embeddings: Any, labels: Any) -> None:
        """Enqueue stored old embeddings, oldest first, in either mode; of more than the queue holds, the last.

        Args:
            embeddings: ``(n, embedding_size)`` tensor or array, finite.
            labels: ``(n,)`` labels of the new training set, 0 or more.
        Raises:
            ValueError: another width or length, NaN or infinity, a negative label.
        """
        embeddings = check_embeddings(embeddings, width=self.old_queue.shape[1])
        labels = check_labels(labels, length=len(embeddings))
        if int(labels.min()) < 0:
            raise ValueError(f"labels must be 0 or more, got {int(labels.min())}")
        embeddings = embeddings.to(self.old_queue.device, precise_dtype(embeddings.dtype))
        self._keep(*self._enqueued(unit_rows(embeddings), labels.to(self.old_queue.device)))

    @property
    def needs_ref_emb(self) -> bool:
        """Always."""
        return True

    def look_at_labels(self, labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
        """Check that both rows are of the same item."""
        super().look_at_labels(labels, ref_labels)
        check_row_labels(check_labels(labels), ref_labels)

    def parts(self, given: Given) -> tuple[torch.Tensor, Any]:
        """Return the embeddings, and both models' in the old width."""
        rows = check_old_rows(given.embeddings, given.ref_emb, width=self.old_queue.shape[1])
        check_same_device(given.embeddings, "embeddings", self.old_queue, "the loss")
        return given.embeddings, rows

    def task_references(self, given: Given) -> tuple[Any, Any]:
        """Return none: the task loss sees the new embeddings alone."""
        return None, None

    def compute_terms(self, given: Given, rest: Any) -> dict[str, Any]:
        """Return one loss a sample for each of the two terms."""
        found: dict[str, Any] = {"feature_loss": self.zero_loss(), "logit_loss": self.zero_loss()}
        (fitted, old), new, labels = rest, given.embeddings, given.labels
        with no_autocast(new):
            old = unit_rows(old)
            queue, queue_labels, filled, position = self._enqueued(old, labels)
            if self.training:
                self._keep(queue, queue_labels, filled, position)
            if len(old) > len(queue):
                queue, queue_labels, filled = old, labels, filled.new_tensor(len(old))
            there = torch.arange(len(queue), device=filled.device) < filled
            shares = _shares(old, labels, queue, queue_labels)
            if self.feature_weight != 0:
                similarities = unit_rows(fitted, given.dtype) @ queue.t()
                losses = self._contrast(similarities, shares, there)
                found["feature_loss"] = per_sample(_times(losses, self.feature_weight))
            if self.logit_weight != 0:
                weights = unit_rows(class_weights(self.loss).to(new.dtype))
                similarities = _logit_cosines(new, fit_width(queue, new.shape[1]), weights)
                losses = self._contrast(similarities, shares, there)
                found["logit_loss"] = per_sample(_times(losses, self.logit_weight))
        return found

    def _contrast(self, similarities: torch.Tensor, shares: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """Return each sample's loss, ``(N,)``, of its ``(N, K)`` similarities with the queue."""
        similarities = similarities / self.temperature
        total = similarities.masked_fill(~there, -torch.inf).logsumexp(1, keepdim=True)
        return (shares * (total - similarities)).sum(1)

    def _enqueued(
        self, old: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queue, labels, count and position as they are with unit rows more, in the dtype of these.

        They are new tensors: a loss that was not yet gone back through needs those before.
        """
        size = len(self.old_queue)
        old, labels = old[-size:], labels[-size:]
        places = (self.old_queue_position + torch.arange(len(old), device=old.device)) % size
        queue = self.old_queue.to(old.dtype).index_copy(0, places, old)
        queue_labels = self.old_queue_labels.index_copy(0, places, labels)
        count = (self.old_queue_count + len(old)).clamp(max=size)
        return queue, queue_labels, count, (self.old_queue_position + len(old)) % size

    def _keep(
        self, queue: torch.Tensor, queue_labels: torch.Tensor, count: torch.Tensor, position: torch.Tensor
    ) -> None:
        self.old_queue = queue.to(self.old_queue.dtype)
        self.old_queue_labels, self.old_queue_count, self.old_queue_position = queue_labels, count, position


def _times(losses: torch.Tensor, weight: float | None) -> torch.Tensor:
    return losses if weight is None else losses * weight


def _shares(old: torch.Tensor, labels: torch.Tensor, queue: torch.Tensor, queue_labels: torch.Tensor) -> torch.Tensor:
    r"""Return :math:`w_{ik} / |P_i|` where k is a positive of i, and 0 elsewhere, ``(N, K)``."""
    positives = labels[:, None] == queue_labels  # no label is -1, that of an empty place
    agreement = (1 + old @ queue.t()) / 2
    return agreement * positives / positives.sum(1, keepdim=True)


def _logit_cosines(new: torch.Tensor, queue: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the ``(N, K)`` cosines of the logits of new and queued embeddings, the latter's without a gradient.

    With frozen weights W, <z, W o> = <W' z, o> and |W o|^2 = <o, W'W o>: no (K, C) logits of the queue are held.
    """
    logits = unit_rows(new @ weights.t())
    frozen = weights.detach()
    squares = (queue @ (frozen.t() @ frozen) * queue).sum(1)
    # Where no class weight has a part in a queued row, its logits are rounding: too short to be taken to length 1.
    lengths = squares.clamp_min(torch.finfo(queue.dtype).eps * len(weights)).sqrt()
    return (logits @ frozen) @ (queue / lengths[:, None]).t()
