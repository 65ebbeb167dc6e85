"""Naive float64 references, one sample and one class at a time, written from the formulas."""

import math

import numpy as np


def unit(vector):
    return vector / np.linalg.norm(vector)


def cross_entropy(logits, target):
    top = max(logits)
    return top + math.log(sum(math.exp(z - top) for z in logits)) - logits[target]


def linear_losses(embeddings, weight, bias, targets):
    return [
        cross_entropy([float(e @ w) + float(b) for w, b in zip(weight, bias, strict=True)], t)
        for e, t in zip(embeddings, targets, strict=True)
    ]


def cosine_losses(embeddings, weight, scale, targets):
    return [
        cross_entropy([scale * float(unit(e) @ unit(w)) for w in weight], t)
        for e, t in zip(embeddings, targets, strict=True)
    ]


def fit_width(embedding, width):
    return np.concatenate([embedding, np.zeros(max(0, width - len(embedding)))])[:width]


def bct_loss(task_loss, embeddings, labels, old_labels, old_loss_of, old_width, weight):
    """Task loss plus ``weight`` times the mean old loss over the samples whose label the old classifier knows."""
    old_rows = {label: row for row, label in enumerate(old_labels)}
    terms = [
        old_loss_of(fit_width(e, old_width), old_rows[y])
        for e, y in zip(embeddings, labels, strict=True)
        if y in old_rows
    ]
    return task_loss + (weight * sum(terms) / len(terms) if terms else 0.0)


def angle(a, b):
    return math.acos(min(1.0, max(-1.0, float(unit(a) @ unit(b)))))


def class_centers(embeddings, labels, normalize=True, boundary="max"):
    """Return {label: (centre, boundary, count)}."""
    result = {}
    for label in sorted(set(labels.tolist())):
        own = [e for e, y in zip(embeddings, labels.tolist(), strict=True) if y == label]
        center = unit(sum(unit(e) if normalize else e for e in own) / len(own))
        angles = sorted(angle(e, center) for e in own)
        n = len(angles)
        if boundary == "iqr" and n >= 4:
            q1, q3 = angles[n // 4], angles[3 * n // 4]
            angles = [a for a in angles if a <= q3 + 1.5 * (q3 - q1)]
        result[label] = (center, max(angles), n)
    return result
