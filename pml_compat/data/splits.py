"""Who learns from which rows of a labelled data set: the old model, the new one, and the test that neither saw."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .._checks import check_integer, check_labels, check_number


@dataclass(frozen=True)
class UpgradeSplit:
    """Rows of a labelled data set for an upgrade; every field is a sorted int64 tensor on the CPU.

    Args:
        old_train: rows that the old model is trained on.
        new_train: rows that the new model is trained on.
        test: rows that are queries and gallery alike, each left out of its own ranking (``ref_includes_query=True``).
        old_classes, new_classes, test_classes: the labels of each of these, each once.
    """

    old_train: torch.Tensor
    new_train: torch.Tensor
    test: torch.Tensor
    old_classes: torch.Tensor
    new_classes: torch.Tensor
    test_classes: torch.Tensor


def extended_data(labels: Any, *, old_share: float = 0.3, test_share: float = 0.2, seed: int = 0) -> UpgradeSplit:
    """Split for more data of the same classes: the old model learns from a share of the new one's rows.

    Shares are of every class, to the nearest row and at least one; a class with one test row is there to be confused
    with others, it has no positive. A larger ``old_share`` with the same seed only adds rows to ``old_train``.

    Args:
        labels: ``(N,)`` integers; a tensor, an array or a list.
        old_share: of the training rows of each class, the old model's; above 0 to 1.
        test_share: of all rows of each class, held out of both trainings; from 0, for a data set with a test part of
            its own, to below 1.
        seed: of a generator of its own.
    Raises:
        ValueError: labels that are empty or no integers; a share out of its range; with test rows to hold out, a class
            of one row, or no class with two test rows; a negative seed.
    Example:
        >>> split = extended_data([0] * 10 + [1] * 10, old_share=0.5, test_share=0.2)
        >>> len(split.old_train), len(split.new_train), len(split.test)
        (8, 16, 4)

    Reference:
        The "extended-data" setting of Zhang et al., "Towards Universal Backward-Compatible Representation Learning",
        IJCAI 2022, and Pan et al., "Boundary-Aware Backward-Compatible Representation via Adversarial Learning in Image
        Retrieval", CVPR 2023 (30 % of the data). Their tests are data sets of their own: ``test_share=0``.
    """
    labels, generator = _labels(labels), np.random.default_rng(check_integer(seed, "seed", minimum=0))
    old_share = _share(old_share, "old_share")
    classes, code = np.unique(labels, return_inverse=True)
    train, test = _held_out(classes, code, test_share, generator)
    return _split(labels, train[_stratified(code[train], old_share, generator)], train, test)


def extended_classes(labels: Any, *, old_classes: Any = 0.5, test_share: float = 0.2, seed: int = 0) -> UpgradeSplit:
    """Split for more classes: the old model learns from the training rows of some classes, the new one from all.

    The test rows are of all classes. With the same seed they do not depend on ``old_classes``, and more classes only
    add to those drawn.

    Args:
        labels: ``(N,)`` integers; a tensor, an array or a list.
        old_classes: a share of the classes (a float above 0 to 1; to the nearest class, at least one) or a count (an
            int), drawn at random; or the labels themselves.
        test_share: as in :func:`extended_data`.
        seed: of a generator of its own.
    Raises:
        ValueError: as :func:`extended_data`; more classes than there are, or labels that no row has.
    Example:
        >>> split = extended_classes([0] * 5 + [1] * 5 + [2] * 5, old_classes=[0, 2], test_share=0.4)
        >>> split.old_classes, split.new_classes, len(split.test)
        (tensor([0, 2]), tensor([0, 1, 2]), 6)

    Reference:
        Shen et al., "Towards Backward-Compatible Representation Learning", CVPR 2020 (half of the classes); the
        "extended-class" setting of the papers that :func:`extended_data` names (30 %).
    """
    labels, generator = _labels(labels), np.random.default_rng(check_integer(seed, "seed", minimum=0))
    classes, code = np.unique(labels, return_inverse=True)
    turn = generator.permutation(classes)
    old = _take(_wanted(old_classes, "old_classes", classes), "old_classes", turn, "classes of labels")
    train, test = _held_out(classes, code, test_share, generator)
    return _split(labels, train[np.isin(labels[train], old)], train, test)


def open_classes(
    labels: Any, *, old_classes: Any = 0.4, new_classes: Any = 0.8, test_classes: Any = None, seed: int = 0
) -> UpgradeSplit:
    """Split for a test on classes that no model was trained on; the old model's classes are among the new one's.

    All rows of a class go the same way. Each argument is a share of all classes (a float above 0 to 1; to the nearest
    class, at least one) or a count (an int), drawn at random; or the labels themselves.

    Args:
        labels: ``(N,)`` integers; a tensor, an array or a list.
        old_classes: that the old model is trained on, out of ``new_classes``.
        new_classes: that the new model is trained on.
        test_classes: that are tested, out of the others; by default all of these.
        seed: of a generator of its own.
    Raises:
        ValueError: labels that are empty or no integers; a share out of its range; more classes than there are, or
            labels that no row has; named classes that overlap, or old ones that are not among the new; none left to
            test on, or none of two rows; a negative seed.
    Example:
        >>> split = open_classes([0, 0, 1, 1, 2, 2, 3, 3], old_classes=1, new_classes=[0, 3])
        >>> split.new_classes, split.test_classes, split.test
        (tensor([0, 3]), tensor([1, 2]), tensor([2, 3, 4, 5]))

    Reference:
        The test of face, landmark and person retrieval: Shen et al., "Towards Backward-Compatible Representation
        Learning", CVPR 2020; Meng et al., "Learning Compatible Embeddings", ICCV 2021. Not the "open-class" setting of
        Zhang et al., IJCAI 2022, where the new model is not trained on the old one's classes.
    """
    labels, generator = _labels(labels), np.random.default_rng(check_integer(seed, "seed", minimum=0))
    classes = np.unique(labels)
    turn = generator.permutation(classes)
    old, new = _wanted(old_classes, "old_classes", classes), _wanted(new_classes, "new_classes", classes)
    test = None if test_classes is None else _wanted(test_classes, "test_classes", classes)

    pool, rule = turn, "classes of labels"
    if isinstance(test, np.ndarray):
        pool, rule = turn[~np.isin(turn, test)], "classes that test_classes leaves"
    if isinstance(old, np.ndarray):  # named: first in turn, so that new classes that are drawn include them
        _take(old, "old_classes", pool, rule)
        pool = pool[np.argsort(~np.isin(pool, old), kind="stable")]
    new = _take(new, "new_classes", pool, rule)
    old = _take(old, "old_classes", turn[np.isin(turn, new)], "classes of new_classes")
    rest = turn[~np.isin(turn, new)]
    if not len(rest):
        raise ValueError(f"new_classes must leave a class to test on, got all {len(classes)} classes of labels")
    test = rest if test is None else _take(test, "test_classes", rest, "classes that new_classes leaves")
    rows = [np.flatnonzero(np.isin(labels, chosen)) for chosen in (old, new, test)]
    return _split(labels, *rows, disjoint_classes=True)


def check_no_leakage(
    split: UpgradeSplit, labels: Any, *, disjoint_classes: bool = False, items: Any = None
) -> UpgradeSplit:
    """Return ``split`` if the test rows are new to both models, and the new one learns from every old class.

    The functions that make splits call this. Call it with ``items`` where the data set may hold copies, and on a split
    of your own.

    Args:
        split: the rows, in any order.
        labels: ``(N,)`` integers, those that the split was made of.
        disjoint_classes: also refuse test rows of classes that a model was trained on (:func:`open_classes`).
        items: what the rows hold, to find the same item under two row numbers: ``(N,)`` integers or strings, such as
            ids, paths or hashes of the files; or ``(N, ...)`` contents, such as images, compared byte by byte: a
            picture that was compressed anew is another one.
    Raises:
        ValueError: row numbers that are out of range or there twice; a row in the test and in a training; classes that
            are not those of the rows; a class in the old training only; with ``disjoint_classes``, one in the test and
            in a training; with ``items``, an item in the test and in a training, or items that are not as above.
    Example:
        >>> split = extended_classes([0, 0, 0, 0, 1, 1, 1, 1], test_share=0.5)
        >>> check_no_leakage(split, [0, 0, 0, 0, 1, 1, 1, 1], items=list("abcdefgh")) is split
        True
        >>> check_no_leakage(split, [0, 0, 0, 0, 1, 1, 1, 1], items=list("aaaaefgh"))
        Traceback (most recent call last):
        ValueError: items must not be in split.test and in a training, got (test, training) rows ...
    """
    labels = _labels(labels)
    classes, code = np.unique(labels, return_inverse=True)
    held, has = {}, {}  # of each part: (N,) how often a row is in it, (C,) whether a class is
    for part, named in (("old_train", "old_classes"), ("new_train", "new_classes"), ("test", "test_classes")):
        rows = check_labels(getattr(split, part), f"split.{part}").cpu().numpy()
        outside = rows[(rows < 0) | (rows >= len(labels))]
        _refuse(outside, f"split.{part} must hold rows of labels, from 0 to {len(labels) - 1}")
        held[part] = np.bincount(rows, minlength=len(labels))
        _refuse(np.flatnonzero(held[part] > 1), f"split.{part} must hold no row twice")
        has[part] = np.bincount(code[rows], minlength=len(classes)) > 0
        wrong = np.setxor1d(classes[has[part]], check_labels(getattr(split, named), f"split.{named}").cpu().numpy())
        _refuse(wrong, f"split.{named} must be what labels has in split.{part}", "a difference in")
    lost = classes[has["old_train"] & ~has["new_train"]]
    _refuse(lost, "split.new_train must have every class of split.old_train", "no rows of")
    for part in ("old_train", "new_train"):
        _refuse(np.flatnonzero(held["test"] & held[part]), f"split.test must have no row of split.{part}")
        if disjoint_classes:
            _refuse(classes[has["test"] & has[part]], f"split.test must have no class of split.{part}", "classes")
    if items is not None:
        item, test = _codes(items, len(labels)), np.flatnonzero(held["test"])
        train = np.flatnonzero(held["old_train"] + held["new_train"])
        trained, first = np.unique(item[train], return_index=True)
        copies = test[np.isin(item[test], trained)]
        pairs = np.stack([copies, train[first[np.searchsorted(trained, item[copies])]]], axis=1)
        _refuse(pairs, "items must not be in split.test and in a training", "(test, training) rows")
    return split


def _split(labels: np.ndarray, *rows: np.ndarray, disjoint_classes: bool = False) -> UpgradeSplit:
    """Return the split of rows to train the old and the new model on and of rows to test on."""
    classes, code = np.unique(labels, return_inverse=True)
    old, new, test = (np.bincount(code[part], minlength=len(classes)) for part in rows)
    if test.max() == 1:
        raise ValueError(
            "labels must leave some class two test rows, each query is left out of its own ranking, got one row of "
            "every class; raise test_share, or choose larger test classes"
        )
    split = UpgradeSplit(*map(torch.from_numpy, [*rows, *(classes[count > 0] for count in (old, new, test))]))
    return check_no_leakage(split, labels, disjoint_classes=disjoint_classes)


def _stratified(code: np.ndarray, share: float, generator: np.random.Generator, leave: int = 0) -> np.ndarray:
    """Return a mask of a share of each class's rows, drawn at random: at least one, at most all but ``leave``."""
    order = generator.permutation(len(code))
    order = order[np.argsort(code[order], kind="stable")]
    counts = np.bincount(code)
    place = np.arange(len(code)) - np.repeat(np.cumsum(counts) - counts, counts)
    wanted = np.clip(np.floor(share * counts + 0.5), 1, counts - leave)
    mask = np.zeros(len(code), dtype=bool)
    mask[order[place < np.repeat(wanted, counts)]] = True
    return mask


def _held_out(
    classes: np.ndarray, code: np.ndarray, share: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and those to test on."""
    share = _share(share, "test_share", zero=True)
    test = np.zeros(len(code), dtype=bool)
    if share:
        rule = "labels must have two rows of every class to hold one out (or give test_share=0)"
        _refuse(classes[np.bincount(code) < 2], rule, "one row of classes")
        test = _stratified(code, share, generator, leave=1)
    return np.flatnonzero(~test), np.flatnonzero(test)


def _wanted(value: Any, name: str, classes: np.ndarray) -> int | np.ndarray:
    """Return how many classes are asked for, or which."""
    if isinstance(value, float | np.floating):
        return max(1, int(_share(value, name) * len(classes) + 0.5))
    if isinstance(value, int | np.integer):
        return check_integer(value, name, minimum=1)
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a share of the classes, a count of them or labels, got {value!r}")
    named = np.unique(_labels(value, name))
    _refuse(np.setdiff1d(named, classes), f"{name} must be classes of labels", "classes")
    return named


def _take(wanted: int | np.ndarray, name: str, pool: np.ndarray, rule: str) -> np.ndarray:
    """Return the first of the pool's classes, where a count is wanted, or those named."""
    rule = f"{name} must be among the {len(pool)} {rule}"
    if isinstance(wanted, np.ndarray):
        _refuse(np.setdiff1d(wanted, pool), rule, "classes")
        return wanted
    if wanted > len(pool):
        raise ValueError(f"{rule}, got a count of {wanted}")
    return pool[:wanted]


def _codes(items: Any, length: int) -> np.ndarray:
    """Return ``(N,)`` integers that are equal where the items are."""
    if isinstance(items, torch.Tensor):
        items = (items.float() if items.dtype == torch.bfloat16 else items).detach().cpu().numpy()
    values = np.asarray(items)
    if values.shape[:1] != (length,):
        raise ValueError(f"items must have one entry a row of labels: expected {length}, got shape {values.shape}")
    if values.dtype.kind not in ("iuSU" if values.ndim == 1 else "biuf") or values.size == 0:
        found = f"got {values.dtype} of shape {values.shape}; convert ids with numpy.asarray(items, dtype=str)"
        raise ValueError(f"items must be (N,) integers or strings, or (N, ...) numbers, {found}")
    if values.ndim > 1:
        rows = np.ascontiguousarray(values).reshape(length, -1)
        values = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))[:, 0]
    return np.unique(values, return_inverse=True)[1]


def _labels(value: Any, name: str = "labels") -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        value = np.asarray(list(value) if isinstance(value, Set) else value)
    if value.shape[:1] == (0,):
        raise ValueError(f"{name} must not be empty")
    return check_labels(value, name).cpu().numpy()


def _share(value: Any, name: str, *, zero: bool = False) -> float:
    """Check a share that is above 0 to 1; with ``zero``, one from 0 to below 1."""
    share = check_number(value, name, minimum=0, exclusive=not zero)
    if share > 1 or (zero and share == 1):
        raise ValueError(f"{name} must be a share {'below' if zero else 'of at most'} 1, got {value!r}")
    return share


def _refuse(found: np.ndarray, rule: str, what: str = "rows") -> None:
    """Raise a ValueError that names the first of what was found, if anything was."""
    if len(found):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(f"{rule}, got {what} {', '.join(map(str, found[:3].tolist()))}{more}")
