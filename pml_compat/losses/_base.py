"""What all our losses share: named terms, one look at what is given, and the terms added to a user's task loss."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.reducers import AvgNonZeroReducer, DoNothingReducer, MeanReducer, MultipleReducers
from pytorch_metric_learning.utils import common_functions as c_f

from ..checks import check_labels, check_matrix, check_number, check_values, one_read, values_are_known, values_known
from ..frozen import class_weights
from ..frozen.class_weights import unwrap_loss
from ..frozen.heads import rescale_class_weights_
from ..old_references import as_rows
from ..unit_rows import shortest_row
from .gradient_balance import GradientBalance
from .old_rows import check_row_values

CLASS_WEIGHT_LENGTH = 1.0


class NamedTermsLoss(BaseMetricLossFunction):
    """Base of our losses, whose terms can be read; after a call ``loss.terms`` holds each term's reduced value.

    ``terms`` maps every sub-loss name (the regularizer's too) to a detached 0-dimensional tensor, as it went into
    the sum; it is empty before the first call and with PML's ``DoNothingReducer``, which reduces nothing. With
    ``collect_stats=True`` the same values, as floats, are stats of the loss under the terms' names, so that PML's
    record-keeping logs them.

    The loss is float32, or float64 for float64 embeddings: float16 has no room for a loss that is scaled. A call reads
    one value back from the device at most, besides what PML's own modules read: :meth:`check_given` checks the values
    of all that is given before :meth:`compute_loss` starts, and inside it values are taken for checked.

    Who owns what: a loss owns what nobody else runs, and it is in its ``parameters()`` and ``state_dict()``: the task
    loss, class weights, a discriminator. What the model runs is the model's, and the loss only refers to it.
    """

    reducer: torch.nn.Module

    # Whether the loss of what is not finite is not finite, and the call leaves nothing behind: then the loss is the one
    # value that is read, and what was given is looked through only where it is not finite.
    tells_by_its_value = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_to_recordable_attributes(list_of_names=self.sub_loss_names(), is_stat=True)

    @property
    def needs_ref_emb(self) -> bool:
        """Whether the loss is called with the other model's embeddings, ``ref_emb``: trainers ask."""
        return False

    @property
    def needs_labels(self) -> bool:
        """Whether the loss cannot be called without labels."""
        return True

    def set_reducer(self, reducer: Any) -> None:
        """Give every term its own copy of ``reducer``, as PML does, and keep the reduced values."""
        if isinstance(reducer, DoNothingReducer):
            self.reducer = reducer
        elif isinstance(reducer, MultipleReducers):
            self.reducer = TermReducers(reducer.reducers, default_reducer=reducer.default_reducer)
        else:
            own = {
                name: self.get_default_reducer() if reducer is None else copy.deepcopy(reducer)
                for name in self.sub_loss_names()
            }
            self.reducer = TermReducers(own)

    def forward(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Any = None,
        ref_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss, as PML's losses do, and keep each term's value."""
        return self.call(embeddings, labels, indices_tuple, ref_emb, ref_labels)

    def call(
        self,
        embeddings: torch.Tensor,
        labels: Any,
        indices_tuple: Any,
        ref_emb: Any,
        ref_labels: Any,
        **others: Any,
    ) -> torch.Tensor:
        """What PML's ``forward`` does, with what else a loss is called with; what was not given stays None."""
        self.reset_stats()
        check_matrix(embeddings)
        if labels is not None:
            labels = c_f.to_device(torch.as_tensor(labels), embeddings)
            if labels.shape != embeddings.shape[:1]:  # an error, which says what is wrong
                check_labels(labels, length=len(embeddings))
        ref_emb = None if ref_emb is embeddings else as_rows(ref_emb, embeddings)
        if ref_labels is not None:
            ref_labels = c_f.to_device(torch.as_tensor(ref_labels), embeddings)
        if torch.compiler.is_compiling():  # values are not read there
            return self._reduce(embeddings, labels, indices_tuple, ref_emb, ref_labels, others)
        given = embeddings, labels, indices_tuple, ref_emb, ref_labels
        late = self.tells_by_its_value and not isinstance(self.reducer, DoNothingReducer)
        if not late and not values_are_known():
            with one_read():
                self.check_given(*given, **others)
        with values_known():
            loss = self._reduce(*given, others)
        if late and not values_are_known() and not math.isfinite(loss.item()):
            with one_read():
                self.check_given(*given, **others)
        if self.collect_stats:
            for name, term in self.terms.items():
                setattr(self, name, term.item())
        return loss

    def _reduce(
        self, embeddings: torch.Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any, others: Any
    ) -> torch.Tensor:
        loss_dict = self.compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels, **others)
        precise = at_least_float32(embeddings)
        self.add_embedding_regularization_to_loss_dict(loss_dict, precise)
        return self.reducer(loss_dict, precise, labels)

    def check_given(
        self, embeddings: torch.Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any, **others: Any
    ) -> None:
        """Check the values of what is given; shapes are checked where they are used."""
        check_row_values(embeddings, ref_emb)
        if labels is not None:
            self.look_at_labels(labels, ref_labels)
        elif self.needs_labels:
            check_labels(labels)

    def look_at_labels(self, labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
        """Check what the terms ask of labels, and count the rows that they are for."""

    @property
    def terms(self) -> dict[str, torch.Tensor]:
        """The reduced, detached value of each term in the last call."""
        return dict(getattr(self.reducer, "terms", {}))


class TermReducers(MultipleReducers):
    """PML's ``MultipleReducers``, summed in float32 or better (PML's float16 overflows at 65504), values kept.

    Terms are named as people name models, ``"v1.0"``, which torch's containers refuse.
    """

    def __init__(self, reducers: Any, **kwargs: Any) -> None:
        super().__init__({escaped(name): reducer for name, reducer in reducers.items()}, **kwargs)
        self.terms: dict[str, torch.Tensor] = {}

    def forward(self, loss_dict: dict[str, Any], embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Reduce each term by its reducer and return their sum."""
        self.reset_stats()
        values = []
        for name, info in loss_dict.items():
            key = escaped(name)
            reducer = self.reducers[key] if key in self.reducers else self.default_reducer  # noqa: SIM401 (no .get)
            values.append(_reduced_by(reducer, name, info, embeddings, labels).to(embeddings.dtype))
        self.terms = {name: value.detach() for name, value in zip(loss_dict, values, strict=True)}
        return values[0] if len(values) == 1 else torch.stack(values).sum()


def _reduced_by(
    reducer: torch.nn.Module, name: str, info: dict[str, Any], embeddings: torch.Tensor, labels: Any
) -> torch.Tensor:
    """Return what PML's reducer gives; of the mean, without the checks and records around it."""
    if type(reducer) is MeanReducer and not reducer.collect_stats and isinstance(info["losses"], torch.Tensor):
        if info["reduction_type"] == "element":
            return info["losses"].mean()
        if info["reduction_type"] == "already_reduced":
            return info["losses"].squeeze()
    return reducer({name: info}, embeddings, labels).squeeze()


class MeanOfPositive(AvgNonZeroReducer):
    """PML's ``AvgNonZeroReducer`` for one loss a row, without asking the device how many are above 0."""

    def element_reduction(
        self, losses: torch.Tensor, loss_indices: Any, embeddings: torch.Tensor, labels: Any
    ) -> torch.Tensor:
        """Return the mean over the losses above 0; where there are none, 0."""
        above = losses > 0
        return torch.where(above, losses, 0).sum() / above.sum().clamp(min=1)


class TaskAndTermsLoss(NamedTermsLoss):
    """Base of our losses that wrap a task loss: the term ``task_loss``, and those of :meth:`compute_terms`.

    Args:
        loss: the task loss, any PML loss; it keeps its own reducer, and its parameters are in ``parameters()``.
        balanced: the names of the terms that :class:`GradientBalance` gives their multipliers.
        class_weight_length: see :func:`shorten_class_weights`; None leaves the class weights as they are.
        **kwargs: see PML's ``BaseMetricLossFunction``; ``reducer`` is that of the added terms.
    Raises:
        ValueError: ``loss`` is no module, ``class_weight_length`` not above 0; in a call: embeddings empty, NaN or
            infinite; labels missing where a term needs them, negative or past the task loss's classes.
    """

    def __init__(
        self,
        loss: torch.nn.Module,
        *,
        balanced: tuple[str, ...] = (),
        class_weight_length: float | None = CLASS_WEIGHT_LENGTH,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(loss, torch.nn.Module):
            raise ValueError(f"loss must be a PML loss object, got {loss!r}")
        self.loss = loss
        self._taken = frozenset(inspect.signature(unwrapped(loss).forward).parameters)
        self.num_classes = _count_classes(loss)
        if class_weight_length is not None:
            check_number(class_weight_length, "class_weight_length", minimum=0, exclusive=True)
        self._class_weight_length = class_weight_length
        self.balance = GradientBalance(balanced) if balanced else None

    def shorten(self) -> None:
        """Shorten the class weights: last in every ``__init__``, as what is refused leaves a user's loss as it was."""
        if self._class_weight_length is not None:
            shorten_class_weights(self.loss, self._class_weight_length)

    @property
    def needs_ref_emb(self) -> bool:
        """Whether the task loss reads old embeddings, as that of another loss of ours may."""
        return bool(getattr(self.loss, "needs_ref_emb", False))

    def forward(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Any = None,
        ref_labels: torch.Tensor | None = None,
        **task_arguments: Any,
    ) -> torch.Tensor:
        """Return the loss; all but embeddings and labels go to the task loss alone."""
        return self.call(embeddings, labels, indices_tuple, ref_emb, ref_labels, **task_arguments)

    def check_given(
        self, embeddings: torch.Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any, **others: Any
    ) -> None:
        """Check the values of embeddings and labels."""
        if labels is not None or self.num_classes is not None:
            _check_range(check_labels(labels), self.num_classes)
        super().check_given(embeddings, labels, indices_tuple, ref_emb, ref_labels, **others)

    def look_at_labels(self, labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
        """Look for the task loss, where it is one of ours."""
        if isinstance(self.loss, NamedTermsLoss):
            self.loss.look_at_labels(labels, ref_labels)

    def compute_loss(
        self,
        embeddings: torch.Tensor,
        labels: Any,
        indices_tuple: Any,
        ref_emb: Any,
        ref_labels: Any,
        **task_arguments: Any,
    ) -> dict[str, Any]:
        """Return every term; the task loss has reduced itself."""
        # float32 for all terms: PML's classification losses turn their weights, for good, to the dtype of what they
        # are given, and a weighted sum of float16 losses can overflow.
        precise = at_least_float32(embeddings)
        labels = self.given_labels(labels, embeddings)
        task_loss = self.task(precise, labels, indices_tuple, ref_emb, ref_labels, embeddings.dtype, **task_arguments)
        terms = self.compute_terms(precise, labels)
        return {"task_loss": reduced(task_loss), **self.balanced_terms(task_loss, terms, precise)}

    def given_labels(self, labels: Any, embeddings: torch.Tensor) -> Any:
        """Return the labels as integers; None where they are not given and not needed."""
        if labels is None and not self.needs_labels:
            return None
        return check_labels(labels, length=len(embeddings))

    def task(
        self,
        embeddings: torch.Tensor,
        labels: Any,
        indices_tuple: Any = None,
        ref_emb: Any = None,
        ref_labels: Any = None,
        dtype: torch.dtype = torch.float32,
        **task_arguments: Any,
    ) -> torch.Tensor:
        """Return the task loss of what it takes; ``dtype`` is that of the embeddings before they were cast."""
        embeddings = steady_for(self.loss, embeddings, dtype)
        taken = self._taken
        given: dict[str, Any] = {}
        if ref_emb is not None:
            given["ref_emb"] = at_least_float32(ref_emb) if isinstance(ref_emb, torch.Tensor) else ref_emb
            if ref_labels is not None and "ref_labels" in taken:
                given["ref_labels"] = ref_labels
        if "labels" in taken or "ref_emb" not in taken:  # not PML's SelfSupervisedLoss, which makes its own
            return self.loss(embeddings, labels, indices_tuple, **given, **task_arguments)
        return self.loss(embeddings, **given, **task_arguments)

    def balanced_terms(
        self, task_loss: torch.Tensor, terms: Mapping[str, dict[str, Any]], embeddings: torch.Tensor
    ) -> dict[str, Any]:
        """Return terms, those that are balanced multiplied so that they draw as strongly as the task loss does."""
        balance = self.balance
        names = [name for name in terms if balance is not None and name in balance.names and _acts(terms[name])]
        if balance is None or not names:
            return dict(terms)
        if (self.training or balance.is_new) and torch.is_grad_enabled():
            compared = {name: (terms[name]["losses"].mean(), *self.drawn_by(name, embeddings)) for name in names}
            balance.measure(task_loss, compared)
        found = dict(terms)
        for name in names:
            losses = terms[name]["losses"]
            found[name] = {**terms[name], "losses": losses * balance.weight(name).to(losses)}
        return found

    def drawn_by(self, name: str, embeddings: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return the tensor on which a term's gradient is compared with the task loss's, and its dimension of rows."""
        return embeddings, 0

    def compute_terms(self, embeddings: torch.Tensor, labels: Any) -> dict[str, Any]:
        """Return the added terms, as PML's ``compute_loss`` does; embeddings are float32 or float64."""
        raise NotImplementedError


def shorten_class_weights(loss: torch.nn.Module, length: float = CLASS_WEIGHT_LENGTH) -> torch.nn.Module:
    """Give the class weights of a PML loss one length, in place, where it reads their directions alone; return it.

    PML draws their entries from N(0, 1), so they are sqrt(d) long, and the longer a class weight is, the slower it
    turns. Much shorter ones overshoot under SGD at the large scale of PML's margin losses. Every loss of this package
    that wraps a task loss shortens its class weights. Train the model that they are compared with, the independent one,
    from short class weights too.

    Args:
        loss: any PML loss, or a loss that wraps one; those without class weights, whose class weights' lengths count
            (``LargeMarginSoftmaxLoss``) or that regularise them are left as they are.
        length: above 0.
    Raises:
        ValueError: ``length`` is not above 0.
    Example:
        >>> from pytorch_metric_learning.losses import ArcFaceLoss
        >>> loss_func = shorten_class_weights(ArcFaceLoss(num_classes=10, embedding_size=16))
        >>> loss_func.W.norm(dim=0).max().round(decimals=4).item()
        1.0
    """
    rescale_class_weights_(loss, check_number(length, "class_weight_length", minimum=0, exclusive=True))
    return loss


def _acts(term: dict[str, Any]) -> bool:
    """A term that has nothing to learn from is a plain 0."""
    return isinstance(term["losses"], torch.Tensor)


def reduced(loss: torch.Tensor) -> dict[str, Any]:
    """Return the entry of a term that is one number already."""
    return {"losses": loss, "indices": None, "reduction_type": "already_reduced"}


def per_sample(losses: torch.Tensor, index: torch.Tensor) -> dict[str, Any]:
    """Return the entry of a term with one loss for each of the samples ``index``."""
    return {"losses": losses, "indices": index, "reduction_type": "element", "divisor": len(index)}


def check_weight(value: Any, name: str) -> float | None:
    """Return a term's multiplier, 0 or more, or None, which stands for one that is measured."""
    return None if value is None else check_number(value, name, minimum=0)


def check_task_width(loss: torch.nn.Module, width: int, name: str) -> None:
    """Raise a ValueError where a classification loss is made for another width than that of a part of the embedding.

    Args:
        loss: the task loss; pair and triplet losses take any width.
        width: of the part that it sees.
        name: what that width is called, for the error.
    """
    try:
        found = class_weights(loss).shape[1]
    except ValueError:
        return
    if found != width:
        raise ValueError(
            f"loss must be made for the free part of the embedding, {width} wide, got one for width {found}; "
            f"make it with embedding_size={name}"
        )


def at_least_float32(embeddings: torch.Tensor) -> torch.Tensor:
    """Return embeddings in the dtype that losses compute in."""
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


def steady_for(loss: torch.nn.Module, embeddings: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return embeddings whose rows of length 0 get no gradient of a PML loss that takes directions.

    They have none, and PML's slope there is 1e12. ``dtype`` is that of the embeddings before they were cast: it, too,
    has to hold the slope.
    """
    if not getattr(getattr(unwrap_loss(loss), "distance", None), "normalize_embeddings", False):
        return embeddings
    lengths = torch.linalg.vector_norm(embeddings.detach(), dim=1, keepdim=True)
    return torch.where(lengths >= shortest_row(dtype), embeddings, embeddings.detach())


def escaped(name: str) -> str:
    """Return the name of a term as torch's containers take it."""
    return name.replace(".", "\u00b7")


def unwrapped(loss: torch.nn.Module) -> torch.nn.Module:
    """Return the loss inside ``torch.compile``."""
    return getattr(loss, "_orig_mod", loss)


def _count_classes(loss: torch.nn.Module) -> int | None:
    """The number of classes of a classification loss; None for pair and triplet losses, whose labels are free."""
    try:
        return len(class_weights(loss))
    except ValueError:
        return None


def _check_range(labels: torch.Tensor, num_classes: int | None) -> None:
    """On a GPU a label past the classes would end the process in a device-side assertion."""

    def judge(low: float, high: float) -> None:
        if low < 0 or (num_classes is not None and high >= num_classes):
            rule = "0 or more" if num_classes is None else f"in [0, {num_classes - 1}], the task loss's classes"
            raise ValueError(f"labels must be {rule}, got {int(labels.min() if low < 0 else labels.max())}")

    check_values(torch.aminmax(labels), judge)
