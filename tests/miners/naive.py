"""Naive float64 miners, one tuple at a time, written from the rules."""

import math

import numpy as np

from tests.reference import angle, unit


def distance(a, b, kind):
    if kind == "cosine":
        return -float(unit(a) @ unit(b))
    if kind == "unit":
        a, b = unit(a), unit(b)
    return float(np.linalg.norm(a - b))


def hardest(new, labels, old, old_labels, k, kind):
    """The k farthest positives and the k nearest negatives of every anchor, as two sets of pairs."""
    positive, negative = set(), set()
    for i, anchor in enumerate(new):
        own = [j for j in range(len(old)) if old_labels[j] == labels[i]]
        other = [j for j in range(len(old)) if old_labels[j] != labels[i]]
        own.sort(key=lambda j: -distance(anchor, old[j], kind))
        other.sort(key=lambda j: distance(anchor, old[j], kind))
        positive |= {(i, j) for j in own[:k]}
        negative |= {(i, j) for j in other[:k]}
    return positive, negative


def regressions(new, labels, old, most, kind):
    """The triplets of each anchor, its largest violations first."""
    found = []
    for i in range(len(new)):
        own = []
        for p in range(len(old)):
            for n in range(len(old)):
                if labels[p] != labels[i] or labels[n] == labels[i]:
                    continue
                was_right = distance(old[i], old[p], kind) < distance(old[i], old[n], kind)
                violation = distance(new[i], old[p], kind) - distance(new[i], old[n], kind)
                if was_right and violation >= 0:
                    own.append((-violation, p, n))
        found += [(i, p, n) for _, p, n in sorted(own)[:most]]
    return found


def outside(new, labels, centers, boundaries, margin):
    """``centers`` and ``boundaries`` are dictionaries by label."""
    return [
        i
        for i, (row, label) in enumerate(zip(new, labels, strict=True))
        if label in centers and angle(row, centers[label]) > boundaries[label] + margin
    ]


def credible(rows, labels, old, old_labels, *, rule, share=0.9, max_entropy=0.5, normalize=True):
    """Which rows are credible, by means and spreads of all ``old``."""
    old = [unit(e) if normalize else e for e in old]
    members = {y: [e for e, z in zip(old, old_labels, strict=True) if z == y] for y in sorted(set(old_labels))}
    means = {y: sum(own) / len(own) for y, own in members.items()}
    apart = {y: sorted(float(np.linalg.norm(e - means[y])) for e in own) for y, own in members.items()}
    overall = sum(d**2 for found in apart.values() for d in found) / len(old)
    result = []
    for e, label in zip(rows, labels, strict=True):
        e = unit(e) if normalize else e
        if rule == "nearest":
            if label not in means:
                result.append(False)
                continue
            last = math.ceil(round(share * len(apart[label]), 6)) - 1
            result.append(float(np.linalg.norm(e - means[label])) <= apart[label][last] + 1e-9)
            continue
        variances = {y: sum(d**2 for d in found) / len(found) or overall for y, found in apart.items()}
        weights = [math.exp(-(np.linalg.norm(e - means[y]) ** 2) / variances[y]) for y in means]
        shares = [w / sum(weights) for w in weights]
        result.append(-sum(p * math.log(p) for p in shares if p > 0) <= max_entropy * math.log(len(means)))
    return result
