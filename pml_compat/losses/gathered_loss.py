"""Any loss on the batches of all processes of distributed training, with the whole batch's gradient."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .._checks import check_labels
from .._host import DistributedLossWrapper
from ..distributed import GatherWithGradient, gathered
from ._task import arguments_of, takes_labels


class GatheredLoss(torch.nn.Module):
    r"""Compute a loss on the rows of every rank, so that many processes train as one does on the whole batch.

    .. math:: L = \ell\big([f_0; f_1; \ldots; f_{R-1}],\ [y_0; y_1; \ldots; y_{R-1}]\big)
        \quad \text{on each of the } R \text{ ranks}

    Every rank gathers embeddings, labels and old embeddings, in the order of the ranks, and computes the same loss,
    whose value is that of one process. The gradient goes back through the gathering: a rank's rows receive the sum
    over the ranks, R times the gradient, which the averaging of ``DistributedDataParallel`` (DDP) turns into the
    gradient of the whole batch. So nothing else changes in a script: no factor, no learning rate.

    - **The model** goes into DDP. Every rank must make every call, with 0 rows where it has none. BatchNorm sees one
      rank's rows unless it is ``SyncBatchNorm``.
    - **The loss's own parameters** have the whole gradient on every rank. ``DDP(GatheredLoss(loss))`` keeps them equal;
      it also sends the frozen buffers with every call, unless told not to (``broadcast_buffers=False``, in newer torch
      ``forward_sync_buffers=False``). Without DDP they must start equal, which the first call checks.
    - **Random losses and miners**: torch's random numbers are the same on every rank inside the loss, from a seed that
      rank 0 draws. Those of NumPy and of Python are left to the user.
    - **Losses with a state** (queues, running means) see the same rows on every rank, and so stay the same.

    PML's ``DistributedLossWrapper`` multiplies the gradient of the loss's own parameters by R, puts a rank's own rows
    first, so that queues and random numbers differ, and wants as many rows on every rank. With ``efficient=True`` it
    drops the pairs of an item's new embedding with its old one, the very positives of compatible training.

    Args:
        loss: any loss of ours or PML's; it is called without ``ref_emb`` where none is given.
        miner: a PML miner, called as ``miner(embeddings, labels)`` on the gathered batch; its tuples go to the loss.
            To mine between new and old embeddings give a miner to ``CrossModelLoss`` instead.
        group: the process group; default all processes. DDP must have the same.
    Shape:
        - embeddings ``(N, D)``, where N may differ between ranks and be 0; labels ``(N,)`` on any device, or None
        - ref_emb ``(M, D_old)``, or a mapping of names to such tensors, each of M rows; ref_labels ``(M,)``
        - what else the call is given goes to the loss: tensors of one entry an embedding, which are gathered too, and
          what is the same on every rank
        - output: what ``loss`` gives for the whole batch. In one process, or without ``torch.distributed``, the loss
          is called with what is given.
    Raises:
        ValueError: ``loss`` no module, or one that gathers by itself; ``miner`` not callable; an ``indices_tuple``,
            whose indices are of one rank's rows (in one process too). With several ranks, on every rank where it is
            found on any: what is no matrix or no labels, no rows at all, ranks called with different things, a loss
            that differs between ranks at the first call, and whatever ``loss`` itself refuses.
    Example:
        >>> from pytorch_metric_learning.losses import NormalizedSoftmaxLoss
        >>> loss_func = GatheredLoss(NormalizedSoftmaxLoss(num_classes=10, embedding_size=16))
        >>> loss_func(torch.randn(4, 16, requires_grad=True), torch.tensor([0, 3, 7, 9])).backward()
    """

    def __init__(self, loss: torch.nn.Module, miner: Callable[..., Any] | None = None, group: Any = None) -> None:
        super().__init__()
        if not isinstance(loss, torch.nn.Module):
            raise ValueError(f"loss must be a loss object, got {loss!r}")
        if isinstance(loss, GatheredLoss | DistributedLossWrapper):
            raise ValueError(f"loss must not gather by itself, got {type(loss).__name__}; give the loss inside it")
        if miner is not None and not callable(miner):
            raise ValueError(f"miner must be a PML miner, got {miner!r}")
        self.loss, self.miner, self.group = loss, miner, group
        self._takes_labels = takes_labels(arguments_of(loss))
        self._compared = False

    def forward(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        ref_labels: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """Return the loss of the whole batch, on every rank."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(self.group) == 1:
            _check_no_indices(indices_tuple)
            return self._call(embeddings, labels, ref_emb, ref_labels, others=others)
        given: dict[str, torch.Tensor] = {}
        problem = ""
        try:  # no rank may raise, and leave the others waiting, before all know
            _check_no_indices(indices_tuple)
            given = _checked(embeddings, labels, ref_emb, ref_labels, others)
        except ValueError as error:
            problem = str(error)
        new_sizes, old_sizes, seed = self._agree(given, problem)

        whole: dict[int, torch.Tensor] = {}  # what is one object here, as labels of new and old rows, stays one
        for name, tensor in given.items():
            if id(tensor) not in whole:
                sizes = old_sizes if name.startswith("ref_") else new_sizes
                whole[id(tensor)] = GatherWithGradient.apply(tensor, sizes, self.group)
        found: dict[str, Any] = {name: whole[id(tensor)] for name, tensor in given.items()}
        if isinstance(ref_emb, Mapping):
            found["ref_emb"] = {key: found[_entry(key)] for key in ref_emb}
        whole_others = {name: found.get(_other(name), value) for name, value in others.items()}
        try:
            with _seeded(seed, embeddings.device):
                named = (found.get(name) for name in ("embeddings", "labels", "ref_emb", "ref_labels"))
                return self._call(*named, others=whole_others)
        except ValueError as error:
            raise ValueError(f"{error}; in the batch of all ranks, {new_sizes} rows in this order") from error

    def _call(self, embeddings: Any, labels: Any, ref_emb: Any, ref_labels: Any, *, others: Any) -> torch.Tensor:
        pairs = None if self.miner is None else self.miner(embeddings, labels)
        # Only what is given: some of PML's losses know no ref_emb.
        given = {"ref_emb": ref_emb, "ref_labels": ref_labels, **others}
        given = {name: value for name, value in given.items() if value is not None}
        return self.loss(embeddings, labels, pairs, **given) if self._takes_labels else self.loss(embeddings, **given)

    def _agree(self, given: dict[str, torch.Tensor], problem: str) -> tuple[list[int], list[int], int]:
        """Return each rank's numbers of new and of old rows, and a seed; raise on all ranks what is wrong on one."""
        described = "; ".join(f"{name} {_describe(tensor, name, given)}" for name, tensor in given.items())
        new_rows, old_rows = (
            next((len(tensor) for name, tensor in given.items() if name.startswith(start)), 0)
            for start in ("embeddings", "ref_")
        )
        seed = int(torch.empty((), dtype=torch.int64).random_())
        # One small tensor a call; texts only where something is wrong.
        header = torch.tensor([bool(problem), zlib.crc32(described.encode()), new_rows, old_rows, self._compared, seed])
        if dist.get_backend(self.group) == "nccl":
            header = header.to(torch.device("cuda", torch.cuda.current_device()))
        headers = [torch.empty_like(header) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(headers, header, group=self.group)
        problems, calls, new_sizes, old_sizes, compared, seeds = torch.stack(headers).t().tolist()
        if any(problems):
            raise ValueError(
                "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(gathered(problem, self.group)) if text)
            )
        if len(set(calls)) > 1:
            raise ValueError(
                "every rank must be called alike, got "
                + " and ".join(f"on rank {rank}: {text}" for rank, text in enumerate(gathered(described, self.group)))
            )
        if sum(new_sizes) == 0:
            raise ValueError("embeddings must have rows on at least one rank, got 0 on each")
        if not all(compared):
            self._compare()
        return new_sizes, old_sizes, seeds[0]

    def _compare(self) -> None:
        """Raise a ValueError where the loss is not the same on every rank: the ranks would train different ones."""
        tensors = dict(self.loss.named_parameters()) | dict(self.loss.named_buffers())
        own = {
            name: (tuple(tensor.shape), tensor.device.type, tensor.detach().sum(dtype=torch.float64).item())
            for name, tensor in tensors.items()
        }
        first, *others = gathered(own, self.group)
        for rank, other in enumerate(others, 1):
            for name in sorted(first.keys() | other.keys()):
                one, two = first.get(name), other.get(name)
                # Sums of other GPUs may round differently; a NaN equals nothing, but is printed alike.
                alike = str(one) == str(two) or (
                    one and two and one[:2] == two[:2] and math.isclose(one[2], two[2], rel_tol=1e-6, abs_tol=1e-6)
                )
                if not alike:
                    raise ValueError(
                        f"the loss must be the same on every rank, {name} on rank {rank} is not that of rank 0: wrap "
                        "it as DistributedDataParallel(GatheredLoss(loss)), which copies rank 0's parameters, or seed "
                        f"every rank alike before it is made; got (shape, device, sum) {one} and {two}"
                    )
        self._compared = True


def _check_no_indices(indices_tuple: Any) -> None:
    if indices_tuple is not None:
        raise ValueError(
            "indices_tuple must be None: its indices are of one rank's rows, the loss is of all; "
            "give the miner to GatheredLoss(loss, miner=...), which mines on the batch of all ranks"
        )


def _checked(embeddings: Any, labels: Any, ref_emb: Any, ref_labels: Any, others: Any) -> dict[str, torch.Tensor]:
    """Return what has to be gathered, by name, in an order that is the same on every rank."""
    given = {"embeddings": _check_rows(embeddings, "embeddings")}
    if labels is not None:
        given["labels"] = check_labels(labels, length=len(embeddings)).to(embeddings.device)
    if isinstance(ref_emb, Mapping):
        given |= {_entry(key): _check_rows(ref_emb[key], _entry(key)) for key in sorted(ref_emb, key=str)}
    elif ref_emb is not None:
        given["ref_emb"] = _check_rows(ref_emb, "ref_emb")
    rows = {name: len(tensor) for name, tensor in given.items() if name.startswith("ref_emb")}
    if len(set(rows.values())) > 1:
        raise ValueError(f"ref_emb must have the same number of rows under every name, got {rows}")
    if ref_labels is not None:
        if not rows:
            raise ValueError("ref_emb must be given with ref_labels, got none")
        length = next(iter(rows.values()))
        same = ref_labels is labels and length == len(embeddings)
        given["ref_labels"] = (
            given["labels"] if same else check_labels(ref_labels, "ref_labels", length).to(embeddings.device)
        )
    for name in sorted(others):
        tensor = others[name]
        if isinstance(tensor, torch.Tensor):
            if tensor.ndim == 0 or len(tensor) != len(embeddings):
                length = len(embeddings)
                raise ValueError(
                    f"{name} must have one entry for each of {length} embeddings, got {tuple(tensor.shape)}"
                )
            given[_other(name)] = tensor.to(embeddings.device)
    return given


def _check_rows(value: Any, name: str) -> torch.Tensor:
    """Unlike ``check_matrix`` it lets 0 rows pass."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.ndim != 2 or not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, (N, D), got {value.dtype} of shape {tuple(value.shape)}")
    return value


def _entry(key: Any) -> str:
    return f"ref_emb[{key!r}]"


def _other(name: str) -> str:
    return f"keyword {name}"


def _describe(tensor: torch.Tensor, name: str, given: dict[str, torch.Tensor]) -> str:
    """All but the number of rows."""
    first = next(other for other, one in given.items() if one is tensor)
    if first != name:
        return f"is {first}"
    shape = "(N,)" if tensor.ndim == 1 else f"(N, {', '.join(map(str, tensor.shape[1:]))})"
    learns = tensor.requires_grad and torch.is_grad_enabled()
    return f"{shape} {tensor.dtype} on {tensor.device.type}{', with gradient' if learns else ''}"


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw torch's random numbers from ``seed`` inside the block, and go on as before after it."""
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        torch.manual_seed(seed)
        yield
