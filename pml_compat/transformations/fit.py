"""Training a transformation on stored embeddings; the networks that made them ran once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .._checks import check_integer, check_number
from .base import Transformation, describe
from .paired_rows import PairedRows
from .training_checkpoint import describe_loss, resume_run, save_run
from .training_run import History, TrainingRun

_BATCHES = 8  # of a small data set, at least
_SMALLEST_BATCH, _LARGEST_BATCH = 32, 1024
_STEPS = 500
_FEWEST_EPOCHS = 10


def fit_transformation(
    transformation: Transformation,
    source: Any,
    target: Any,
    side_info: Any = None,
    *,
    labels: Any = None,
    loss: Callable[..., torch.Tensor] | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float = 5e-4,
    weight_decay: float = 2**-15,
    warmup_epochs: int = 5,
    freeze_norm_at: float = 0.5,
    validation: float | None = None,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> History:
    r"""Train ``transformation``, in place, to map stored embeddings onto the embeddings of another model.

    An untrained :class:`FCTTransformation`, :class:`FastFillTransformation` or
    :class:`ResidualBottleneckTransformation` is first made the closed-form linear map of all rows, as
    :meth:`LinearTransformation.fit` gives it (one pass over the data more). What is trained is what it adds to that,
    and it is kept only where it retrieves better on rows that were held out. By the default loss an FCT then keeps two
    thirds of what mapped rows differ by from their mean: a row that says little lies near the mean, so near to all
    queries, and the less rows differ, the less that counts.

    Adam with a learning rate that rises linearly over ``warmup_epochs`` and then falls as half a cosine, by epochs;
    from ``freeze_norm_at`` of the epochs on, batch normalisation uses the statistics gathered so far. Everything random
    comes from ``seed``, what draws inside the transformation and the loss included. The transformation is trained on
    its device and left in eval mode.

    Args:
        transformation: any; FCT trains an :class:`FCTTransformation`. One that has been trained goes on from there.
        source: ``(N, in_features)`` tensor, array, memory map (rows are read by batches) or ``FrozenEmbeddings``; or a
            list of several, each with the embeddings of another augmented view: every sample draws one of them in
            every epoch, the same one in ``source``, ``target`` and ``side_info``.
        target: ``(N, out_features)``, row i of the same item as row i of ``source``; a list of as many views, or one
            for all of them. None where ``loss`` needs none.
        side_info: ``(N, side_features)``, stored with ``source``; as ``target``. None where there is none.
        labels: ``(N,)``, for a ``loss`` that uses them, and to judge held-out classes by.
        loss: a PML loss, called as ``loss(mapped, labels, ref_emb=target)`` with what is there, and with ``log_var``
            where the transformation has ``with_log_variance``; its parameters are trained too. None: for maps that
            start at the closed form the squared error and the cosines to the new rows' neighbourhoods (the paper's is
            ``FCTLoss()``), for FastFill's :class:`pml_compat.losses.FastFillLoss`, for others the mean squared error
            over all entries.
        epochs: passes over the data, 1 or more. None: as many as make 500 steps, and 10 at least.
        batch_size: rows a step, at most: an epoch is split into steps of equal size. None: an eighth of the rows,
            between 32 and 1,024.
        lr: the highest learning rate.
        weight_decay: of Adam.
        warmup_epochs: epochs of rising learning rate, 0 or more.
        freeze_norm_at: fraction of the epochs in [0, 1] after which batch norm's statistics are frozen; 1 for never.
        validation: fraction of the samples in [0, 1) that is held out; if above 0, the state of the epoch with the
            lowest validation loss is kept, or the closed form. None: for maps that start at it a tenth is held out, of
            the classes where ``labels`` has 20 and more and ``loss`` is None, else of the rows; the epoch is kept in
            which new rows retrieve best there, and the closed form where none is better by a standard error, or too
            few rows are there to tell. Best is by labels, where classes are held out, else by the new rows' own
            cosines. 0 for the other maps.
        seed: of the order, the views, the split, and of dropout.
        autocast: ``torch.bfloat16`` or ``torch.float16`` for mixed precision; None for float32.
        checkpoint: a file, written after every epoch; where it exists, training goes on from it and ends with the
            same result as without the interruption.
        progress: show a progress bar.
    Returns:
        ``{"train_loss": [...], "validation_loss": [...], "lr": [...], "best_epoch": int, "steps": int}``, one
        entry an epoch, steps of all epochs;
        ``best_epoch`` is -1 where the closed form was kept. Where retrieval was judged ``validation_score``, too, of
        the start and of each epoch.
    Raises:
        ValueError: lengths that differ, other widths, NaN or infinity (which array and row), views that do not match,
            a fraction out of range, a checkpoint of a run with other data or settings, or a truncated one.

    Example:
        >>> from pml_compat.transformations import LinearTransformation
        >>> old = torch.randn(200, 4)
        >>> history = fit_transformation(LinearTransformation(4, 4), old, 2 * old, epochs=3, progress=False)
        >>> len(history["train_loss"])
        3

    Reference:
        Ramanujan et al., "Forward Compatible Training for Large-Scale Embedding Retrieval Systems", CVPR 2022, CIFAR
        settings. Differs from the public code in: embeddings are stored and not computed again in every epoch; the
        start, the loss, the number of steps, what is kept and the draw to the mean are ours: ``loss=FCTLoss(),
        epochs=80, batch_size=1024, validation=0.0`` are the paper's, but for the start.
    """
    rows = PairedRows(transformation, source, target, side_info, labels, loss)
    batch_size = _batch_size(rows.length) if batch_size is None else check_integer(batch_size, "batch_size", minimum=1)
    epochs = _epochs(rows.length, batch_size) if epochs is None else check_integer(epochs, "epochs", minimum=1)
    settings = {
        "transformation": describe(transformation),
        "loss": None if loss is None else getattr(loss, "__qualname__", type(loss).__name__),
        "loss_settings": describe_loss(loss),
        "rows": rows.length,
        "views": rows.views,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": check_number(lr, "lr", minimum=0, exclusive=True),
        "weight_decay": check_number(weight_decay, "weight_decay", minimum=0),
        "warmup_epochs": check_integer(warmup_epochs, "warmup_epochs", minimum=0),
        "freeze_norm_at": _check_fraction(freeze_norm_at, "freeze_norm_at", "[0, 1]"),
        "validation": None if validation is None else _check_fraction(validation, "validation", "[0, 1)"),
        "seed": check_integer(seed, "seed", minimum=0),
        "autocast": None if autocast is None else str(autocast),
    }
    if checkpoint is not None:
        settings["data"] = rows.fingerprint()
    run = TrainingRun(transformation, loss, rows, settings, autocast)
    if checkpoint is not None and Path(checkpoint).exists():
        resume_run(run, checkpoint)
    else:
        run.start()
    done = len(run.history["train_loss"])
    with tqdm(total=epochs, initial=done, desc="fit", unit="epoch", disable=not progress) as bar:
        for epoch in range(done, epochs):
            run.epoch(epoch)
            if checkpoint is not None:
                save_run(run, checkpoint)
            bar.set_postfix(loss=f"{run.history['train_loss'][-1]:.3g}")
            bar.update()
    return run.finish()


def _batch_size(rows: int) -> int:
    return min(max(rows // _BATCHES, _SMALLEST_BATCH), _LARGEST_BATCH)


def _epochs(rows: int, batch_size: int) -> int:
    return max(_FEWEST_EPOCHS, math.ceil(_STEPS / math.ceil(rows / batch_size)))


def _check_fraction(value: Any, name: str, interval: str) -> float:
    number = check_number(value, name, minimum=0)
    if number > 1 or (number == 1 and interval.endswith(")")):
        raise ValueError(f"{name} must be in {interval}, got {value!r}")
    return number
