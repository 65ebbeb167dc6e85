"""Our metrics against those of other packages, where they are installed (the ``peers`` extra; ranx by itself).

On random sets without ties all must agree. Where items tie, ir_measures, pytrec_eval, ranx and torchmetrics put them in
some order, so only scikit-learn and brute force are comparable.
"""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, ndcg_score

from pml_compat.accuracy import CrossModelAccuracyCalculator
from tests.accuracy import naive_metrics

KS = (1, 3, 10)
SETS = 200
N_QUERY, N_GALLERY = 4, 30


def random_set(seed):
    """Return embeddings, and for each query its ``(N,)`` float64 distances and which items are right."""
    rng = np.random.default_rng(seed)
    labels, gallery_labels = np.arange(N_QUERY) % 3, rng.integers(0, 3 + seed % 5, N_GALLERY)
    gallery_labels[:3] = np.arange(3)
    query, gallery = rng.normal(size=(N_QUERY, 6)), rng.normal(size=(N_GALLERY, 6))
    distances = np.linalg.norm(query[:, None] - gallery, axis=2)
    return (query, labels, gallery, gallery_labels), distances, labels[:, None] == gallery_labels


def ours(data, names):
    return CrossModelAccuracyCalculator(include=tuple(names), device="cpu").get_per_query_accuracy(*data)


def check(names, peer, tolerance=1e-7):
    """Compare all sets with ``peer(distances, right)``, which gives ``(Q,)`` values by our names."""
    for seed in range(SETS):
        data, distances, right = random_set(seed)
        expected, got = peer(distances, right), ours(data, names)
        assert set(expected) == set(got)
        for name, values in expected.items():
            np.testing.assert_allclose(got[name].numpy(), values, rtol=0, atol=tolerance, err_msg=f"{name}, set {seed}")


def at_ks(*families):
    return [f"{family}_{k}" for family in families for k in KS]


def test_scikit_learn():
    def peer(distances, right):
        found = {"mean_average_precision": [average_precision_score(*row) for row in zip(right, -distances)]}  # noqa: B905
        for k in KS:
            found[f"ndcg_at_{k}"] = [ndcg_score(r[None], -d[None], k=k) for r, d in zip(right, distances, strict=True)]
        return found

    check(["mean_average_precision", *at_ks("ndcg_at")], peer)


TREC = {
    "mean_average_precision": "map",
    "mean_reciprocal_rank": "recip_rank",
    "r_precision": "Rprec",
    **{f"precision_at_{k}": f"P_{k}" for k in KS},
    **{f"recall_at_{k}": f"recall_{k}" for k in KS},
    **{f"ndcg_at_{k}": f"ndcg_cut_{k}" for k in KS},
    **{f"cmc_top_{k}": f"success_{k}" for k in KS},
}


def as_run(distances, right):
    """Return qrels and run by query and document, with whole numbers as scores: trec_eval's are float32."""
    place = distances.argsort(1).argsort(1)
    qrels = {f"q{i}": {f"d{j}": int(hit) for j, hit in enumerate(row)} for i, row in enumerate(right)}
    run = {f"q{i}": {f"d{j}": float(len(row) - p) for j, p in enumerate(row)} for i, row in enumerate(place)}
    return qrels, run


def test_pytrec_eval():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    cuts = ",".join(map(str, KS))
    measures = {"map", "recip_rank", "Rprec", *(f"{one}.{cuts}" for one in ("P", "recall", "ndcg_cut", "success"))}

    def peer(distances, right):
        qrels, run = as_run(distances, right)
        found = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
        return {name: [found[f"q{i}"][theirs] for i in range(N_QUERY)] for name, theirs in TREC.items()}

    check(TREC, peer)


def test_ir_measures():
    ir_measures = pytest.importorskip("ir_measures")
    names = {
        "mean_average_precision": "AP",
        "mean_reciprocal_rank": "RR",
        "r_precision": "Rprec",
        **{f"precision_at_{k}": f"P@{k}" for k in KS},
        **{f"recall_at_{k}": f"R@{k}" for k in KS},
        **{f"ndcg_at_{k}": f"nDCG@{k}" for k in KS},
        **{f"cmc_top_{k}": f"Success@{k}" for k in KS},
    }
    measures = {ir_measures.parse_measure(theirs): name for name, theirs in names.items()}

    def peer(distances, right):
        found = {name: np.full(N_QUERY, np.nan) for name in names}
        for one in ir_measures.iter_calc(list(measures), *as_run(distances, right)):
            found[measures[one.measure]][int(one.query_id[1:])] = one.value
        return found

    check(names, peer)


@pytest.mark.filterwarnings("ignore")  # numba's, of ranx's code
@pytest.mark.slow
def test_ranx():
    ranx = pytest.importorskip("ranx")
    names = {
        "mean_average_precision": "map",
        "mean_reciprocal_rank": "mrr",
        "r_precision": "r-precision",
        **{f"precision_at_{k}": f"precision@{k}" for k in KS},
        **{f"recall_at_{k}": f"recall@{k}" for k in KS},
        **{f"ndcg_at_{k}": f"ndcg@{k}" for k in KS},
        **{f"cmc_top_{k}": f"hit_rate@{k}" for k in KS},
    }

    def peer(distances, right):
        qrels, run = as_run(distances, right)
        relevant = {query: {doc: 1 for doc, hit in row.items() if hit} for query, row in qrels.items()}
        found = ranx.evaluate(
            ranx.Qrels(relevant), ranx.Run(run), list(names.values()), return_mean=False, make_comparable=False
        )
        return {name: found[theirs] for name, theirs in names.items()}

    check(names, peer)


def test_torchmetrics():
    retrieval = pytest.importorskip("torchmetrics.functional.retrieval")

    def peer(distances, right):
        scores = torch.from_numpy(1 / distances)  # its average precision takes scores of 0 and less for padding
        rows = list(zip(scores, torch.from_numpy(right), strict=True))
        found = {
            "mean_average_precision": [retrieval.retrieval_average_precision(*row) for row in rows],
            "mean_reciprocal_rank": [retrieval.retrieval_reciprocal_rank(*row) for row in rows],
            "r_precision": [retrieval.retrieval_r_precision(*row) for row in rows],
        }
        for k in KS:
            found[f"precision_at_{k}"] = [retrieval.retrieval_precision(*row, top_k=k) for row in rows]
            found[f"recall_at_{k}"] = [retrieval.retrieval_recall(*row, top_k=k) for row in rows]
            found[f"cmc_top_{k}"] = [retrieval.retrieval_hit_rate(*row, top_k=k) for row in rows]
            found[f"ndcg_at_{k}"] = [retrieval.retrieval_normalized_dcg(*row, top_k=k) for row in rows]
        return {name: torch.stack(values).numpy() for name, values in found.items()}

    check(TREC, peer, tolerance=1e-6)  # it computes in float32


@pytest.mark.parametrize("seed", range(20))
def test_scikit_learn_and_brute_force_with_ties(seed):
    rng = np.random.default_rng(seed)
    reference, labels = rng.integers(0, 3, (7, 1)).astype(float), rng.integers(0, 2, 7)
    labels[0] = 0
    distances, right = reference[:, 0], labels == 0
    names = ("mean_average_precision", *at_ks("precision_at", "recall_at", "cmc_top", "ndcg_at"))
    got = ours((np.zeros((1, 1)), np.array([0]), reference, labels), names)
    assert float(got["mean_average_precision"]) == pytest.approx(average_precision_score(right, -distances), abs=1e-9)
    for k in KS:
        expected = ndcg_score(right[None], -distances[None], k=k)
        assert float(got[f"ndcg_at_{k}"]) == pytest.approx(expected, abs=1e-9)
        for family in ("precision_at", "recall_at", "cmc_top"):
            expected = naive_metrics.at_k_with_ties(family, distances, right, k)
            assert float(got[f"{family}_{k}"]) == pytest.approx(expected, abs=1e-9)
