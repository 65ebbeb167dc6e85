"""Terms added to a user's task loss."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .._checks import check_labels, check_values, count_rows, counted_rows
from .._rows import at_least_float32, shortest_row
from ..frozen import class_weights
from ..frozen.class_weights import unwrap_loss
from ._base import NamedTermsLoss
from ._reduction import reduced
from .class_weight_length import CLASS_WEIGHT_LENGTH, check_class_weight_length, shorten_class_weights
from .gradient_balance import GradientBalance


@dataclass(frozen=True, slots=True)
class Given:
    """What a loss is called with, in the form that it is computed on.

    Args:
        embeddings: ``(N, D)``, float32 or better.
        dtype: of the embeddings before they were cast.
        labels: ``(N,)`` integers; None where there are none and no term needs them.
        ref_emb: of another model, as tensors; None, or a mapping.
        ref_labels: theirs, or None.
        own: the keywords that the loss takes besides, by :attr:`TaskAndTermsLoss.own_arguments`.
    """

    embeddings: torch.Tensor
    dtype: torch.dtype
    labels: Any
    ref_emb: Any
    ref_labels: Any
    own: Mapping[str, Any]


class TaskAndTermsLoss(NamedTermsLoss):
    """Base of our losses that wrap a task loss: the term ``task_loss``, and those of :meth:`compute_terms`.

    Once a loss is made, its class weights are shortened: last, as what is refused leaves a user's loss as it was.

    Args:
        loss: the task loss, any PML loss; it keeps its own reducer, and its parameters are in ``parameters()``.
        balanced: the names of the terms that :class:`GradientBalance` gives their multipliers.
        class_weight_length: see :func:`shorten_class_weights`; None leaves the class weights as they are.
        **kwargs: see PML's ``BaseMetricLossFunction``; ``reducer`` is that of the added terms.
    Raises:
        ValueError: ``loss`` is no module, ``class_weight_length`` not above 0; in a call: embeddings empty, NaN or
            infinite; labels missing where a term needs them, negative or past the task loss's classes.
    """

    own_arguments: tuple[str, ...] = ()  # keywords of a call that are not the task loss's

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _then_shortening(cls.__init__)  # type: ignore[method-assign]

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
        self._taken = arguments_of(loss)
        self.num_classes = _count_classes(loss)
        if class_weight_length is not None:
            check_class_weight_length(class_weight_length)
        self._class_weight_length = class_weight_length
        self.balance = GradientBalance(balanced) if balanced else None

    @property
    def needs_ref_emb(self) -> bool:
        """Whether the task loss reads old embeddings, as that of another loss of ours may."""
        return bool(getattr(self.loss, "needs_ref_emb", False))

    def check_given(
        self, embeddings: torch.Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any, **others: Any
    ) -> None:
        """Check the values of embeddings and labels."""
        if labels is not None or self.num_classes is not None:
            check_label_range(check_labels(labels), self.num_classes)
        super().check_given(embeddings, labels, indices_tuple, ref_emb, ref_labels, **others)
        if takes_directions(self.loss):
            count_rows(self, _has_direction(embeddings, embeddings.dtype), "directions")

    def look_at_labels(self, labels: torch.Tensor, ref_labels: torch.Tensor | None) -> None:
        """Look for the task loss, where it is one of ours."""
        if isinstance(self.loss, NamedTermsLoss):
            self.loss.look_at_labels(labels, ref_labels)

    def compute_loss(
        self, embeddings: torch.Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any, **others: Any
    ) -> dict[str, Any]:
        """Return every term; the task loss has reduced itself."""
        # float32 for all terms: PML's classification losses turn their weights, for good, to the dtype of what they
        # are given, and a weighted sum of float16 losses can overflow.
        precise = at_least_float32(embeddings)
        own = {name: others.pop(name, None) for name in self.own_arguments}
        labels = None if labels is None and not self.needs_labels else check_labels(labels, length=len(embeddings))
        given = Given(precise, embeddings.dtype, labels, ref_emb, ref_labels, own)
        seen, rest = self.parts(given)
        task_loss = self.task(seen, given, indices_tuple, **others)
        return {
            "task_loss": reduced(task_loss),
            **self.balanced_terms(task_loss, self.compute_terms(given, rest), precise),
        }

    def parts(self, given: Given) -> tuple[torch.Tensor, Any]:
        """Return what the task loss sees, and what the terms are computed on: all of the embeddings."""
        return given.embeddings, given.embeddings

    def task_references(self, given: Given) -> tuple[Any, Any]:
        """Return the embeddings of another model that the task loss gets, and their labels."""
        return given.ref_emb, given.ref_labels

    def task(self, seen: torch.Tensor, given: Given, indices_tuple: Any, **task_arguments: Any) -> torch.Tensor:
        """Return the task loss of what it takes."""
        whole = seen is given.embeddings  # whose rows were counted
        if not (whole and counted_rows(self, "directions") == len(seen)):
            seen = steady_for(self.loss, seen, given.dtype)
        ref_emb, ref_labels = self.task_references(given)
        if ref_emb is not None:
            task_arguments["ref_emb"] = at_least_float32(ref_emb) if isinstance(ref_emb, torch.Tensor) else ref_emb
            if ref_labels is not None and "ref_labels" in self._taken:
                task_arguments["ref_labels"] = ref_labels
        if takes_labels(self._taken):
            return self.loss(seen, given.labels, indices_tuple, **task_arguments)
        return self.loss(seen, **task_arguments)

    def balanced_terms(
        self, task_loss: torch.Tensor, terms: Mapping[str, dict[str, Any]], embeddings: torch.Tensor
    ) -> dict[str, Any]:
        """Return terms, those that are balanced multiplied so that they draw as strongly as the task loss does."""
        balance = self.balance
        names = [name for name in terms if balance is not None and name in balance.names and _acts(terms[name])]
        if balance is None or not names:
            return dict(terms)
        if (self.training or balance.is_new) and torch.is_grad_enabled():
            drawn = {name: (terms[name]["losses"], *self.drawn_by(name, embeddings)) for name in names}
            balance.measure(task_loss, drawn)
        found = dict(terms)
        for name, weight in zip(names, balance.weights(names), strict=True):
            losses = terms[name]["losses"]
            found[name] = {**terms[name], "losses": losses * weight.to(losses)}
        return found

    def drawn_by(self, name: str, embeddings: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return the tensor on which a term's gradient is compared with the task loss's, and its dimension of rows."""
        return embeddings, 0

    def at_own_pace(self, module: torch.nn.Module, name: str) -> Callable[..., Any]:
        """Return what calls a module of a term, whose parameters then get the term's gradient without its multiplier.

        The multiplier makes a term as strong as the task loss on what both draw. On a map, which the task loss does not
        draw, it would make steps as many times longer, and nothing else.
        """
        balance = self.balance
        if balance is None or name not in balance.names:
            return module
        own = {key: value for key, value in module.named_parameters() if value.requires_grad}
        if not own:
            return module

        def unmultiplied(parameter: torch.Tensor) -> torch.Tensor:
            shown = parameter.view_as(parameter)  # a view asks for a gradient under no_grad, too
            shown.register_hook(lambda gradient: gradient / balance.weight(name).to(gradient))
            return shown

        def call(*args: Any, **kwargs: Any) -> Any:
            shown = {key: unmultiplied(value) for key, value in own.items()}
            return torch.func.functional_call(module, shown, args, kwargs)

        return call

    def compute_terms(self, given: Given, rest: Any) -> dict[str, Any]:
        """Return the added terms, as PML's ``compute_loss`` does, from what :meth:`parts` left for them."""
        raise NotImplementedError


def _then_shortening(make: Callable[..., None]) -> Callable[..., None]:
    """Return the ``__init__`` of a class that also shortens the class weights, once an object of that class is made."""

    @functools.wraps(make)
    def init(self: TaskAndTermsLoss, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if type(self).__init__ is init and self._class_weight_length is not None:
            shorten_class_weights(self.loss, self._class_weight_length)

    return init


def _acts(term: dict[str, Any]) -> bool:
    """A term that has nothing to learn from is a plain 0."""
    return isinstance(term["losses"], torch.Tensor)


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


def takes_directions(loss: torch.nn.Module) -> bool:
    """Whether a PML loss takes rows to length 1 itself, with a slope of 1e12 at a row of length 0."""
    return bool(getattr(getattr(unwrap_loss(loss), "distance", None), "normalize_embeddings", False))


def steady_for(loss: torch.nn.Module, embeddings: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return embeddings whose rows of length 0 get no gradient of a PML loss that takes directions: they have none.

    ``dtype`` is that of the embeddings before they were cast: it, too, has to hold the slope.
    """
    if not takes_directions(loss):
        return embeddings
    return torch.where(_has_direction(embeddings, dtype)[:, None], embeddings, embeddings.detach())


def _has_direction(embeddings: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.linalg.vector_norm(at_least_float32(embeddings.detach()), dim=1) >= shortest_row(dtype)


def unwrapped(loss: torch.nn.Module) -> torch.nn.Module:
    """Return the loss inside ``torch.compile``."""
    return getattr(loss, "_orig_mod", loss)


def arguments_of(loss: torch.nn.Module) -> frozenset[str]:
    """Return the names of what a loss is called with."""
    return frozenset(inspect.signature(unwrapped(loss).forward).parameters)


def takes_labels(arguments: frozenset[str]) -> bool:
    """Whether a loss with these arguments is called with labels: PML's SelfSupervisedLoss makes its own."""
    return "labels" in arguments or "ref_emb" not in arguments


def _count_classes(loss: torch.nn.Module) -> int | None:
    """The number of classes of a classification loss; None for pair and triplet losses, whose labels are free."""
    try:
        return len(class_weights(loss))
    except ValueError:
        return None


def check_label_range(labels: torch.Tensor, num_classes: int | None) -> None:
    """On a GPU a label past the classes would end the process in a device-side assertion."""

    def judge(low: float, high: float) -> None:
        if low < 0 or (num_classes is not None and high >= num_classes):
            rule = "0 or more" if num_classes is None else f"in [0, {num_classes - 1}], the task loss's classes"
            raise ValueError(f"labels must be {rule}, got {int(labels.min() if low < 0 else labels.max())}")

    check_values(torch.aminmax(labels), judge)
