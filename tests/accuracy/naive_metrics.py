"""Every retrieval metric once more, in NumPy float64: one query at a time, on its sorted full ranking."""

import itertools
import math

import numpy as np
from sklearn.metrics import average_precision_score


def precision_at_1(hits, k=None):
    return float(hits[0])


def mean_average_precision(hits, k=None):
    precisions = [hits[: place + 1].mean() for place in np.flatnonzero(hits[:k])]
    return sum(precisions) / hits.sum()


def mean_average_precision_at_r(hits, k=None):
    return mean_average_precision(hits, min(hits.sum(), k or len(hits)))


def mean_reciprocal_rank(hits, k=None):
    return 1 / (1 + np.argmax(hits[:k])) if hits[:k].any() else 0.0


def r_precision(hits, k=None):
    return hits[: min(hits.sum(), k or len(hits))].mean()


def cmc_top_1(hits, k=None):
    return float(hits[:1].any())


def cmc_top_5(hits, k=None):
    return float(hits[:5].any())


def cmc_top_10(hits, k=None):
    return float(hits[:10].any())


def precision_at(hits, k):
    return hits[:k].sum() / k


def recall_at(hits, k):
    return hits[:k].sum() / hits.sum()


def cmc_top(hits, k):
    return float(hits[:k].any())


def ndcg_at(hits, k):
    gains = [1 / math.log2(place + 2) for place in range(len(hits))]
    best = sum(gains[: min(k, hits.sum())])
    return sum(gain for gain, hit in zip(gains[:k], hits, strict=False) if hit) / best


def mean_average_precision_at(hits, k):
    precisions = [hits[: place + 1].mean() for place in np.flatnonzero(hits[:k])]
    return sum(precisions) / min(hits.sum(), k)


AT_K = {
    function.__name__: function for function in (precision_at, recall_at, cmc_top, ndcg_at, mean_average_precision_at)
}
METRICS = {
    function.__name__: function
    for function in (
        precision_at_1,
        mean_average_precision,
        mean_average_precision_at_r,
        mean_reciprocal_rank,
        r_precision,
        cmc_top_1,
        cmc_top_5,
        cmc_top_10,
    )
}


def rankings(
    query,
    query_labels,
    reference,
    reference_labels,
    *,
    same_items=False,
    query_ids=None,
    reference_ids=None,
    query_cameras=None,
    reference_cameras=None,
    junk=None,
    match=lambda one, other: one == other,
):
    """Yield ``(label, distances, hits)`` of each query that has a positive; excluded items are not in them."""
    for i, row in enumerate(query):
        kept = [
            j
            for j in range(len(reference))
            if not (same_items and i == j)
            and not (junk is not None and j in junk[i])
            and not (query_ids is not None and query_ids[i] == reference_ids[j])
            and not (
                query_cameras is not None
                and query_cameras[i] == reference_cameras[j]
                and match(query_labels[i], reference_labels[j])
            )
        ]
        distances = np.array([math.dist(row.tolist(), reference[j].tolist()) for j in kept])
        hits = np.array([bool(match(query_labels[i], reference_labels[j])) for j in kept])
        if hits.any():
            yield query_labels[i], distances, hits


def accuracy(*data, k=None, average="queries", **options):
    """Return every metric of tie-free data; ``average`` is queries, labels (avg_of_avgs) or per_class."""
    scores, labels = {name: [] for name in METRICS}, []
    for label, distances, hits in rankings(*data, **options):
        labels.append(label)
        ranked = hits[np.argsort(distances)]
        for name, metric in METRICS.items():
            scores[name].append(metric(ranked, k))
        if k is None:
            scores["mean_average_precision"][-1] = average_precision_score(hits, -distances)
    return {name: _average(np.array(values), np.array(labels), average) for name, values in scores.items()}


def _average(values, labels, average):
    if average == "queries":
        return float(values.mean())
    per_class = [float(values[labels == label].mean()) for label in np.unique(labels)]
    return per_class if average == "per_class" else float(np.mean(per_class))


def possible_orders(distances):
    """Return every order that the distances allow."""
    return [
        list(order)
        for order in itertools.permutations(range(len(distances)))
        if all(distances[a] <= distances[b] for a, b in itertools.pairwise(order))
    ]


def at_k_with_ties(name, distances, hits, k):
    """Return a metric at k of one query, averaged as in :func:`accuracy_with_ties`."""
    orders = possible_orders(distances)
    if name == "mean_average_precision_at":
        precision = np.array([hits[distances <= d].mean() for d in distances])
        found = [sum(precision[j] for j in order[:k] if hits[j]) for order in orders]
        return float(np.mean(found)) / min(hits.sum(), k)
    return float(np.mean([AT_K[name](hits[order], k) for order in orders]))


def accuracy_with_ties(distances, hits, k=None):
    """Return every metric of one query, averaged over all orders that the distances allow: for tiny cases.

    Precision counts at the end of a tie, as scikit-learn's average precision does. The reciprocal rank is one over
    the average first place.
    """
    orders = possible_orders(distances)
    precision = np.array([hits[distances <= d].mean() for d in distances])

    def average_precision(order, places):
        return sum(precision[j] for j in order[:places] if hits[j]) / hits.sum()

    at_r = min(hits.sum(), k or len(hits))
    out = {name: float(np.mean([metric(hits[order], k) for order in orders])) for name, metric in METRICS.items()}
    out["mean_average_precision"] = float(np.mean([average_precision(order, k) for order in orders]))
    out["mean_average_precision_at_r"] = float(np.mean([average_precision(order, at_r) for order in orders]))
    first = float(np.mean([1 + np.argmax(hits[order]) for order in orders]))
    out["mean_reciprocal_rank"] = 1 / first if k is None or first <= k else 0.0
    return out
