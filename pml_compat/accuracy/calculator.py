"""PML's AccuracyCalculator, for queries and galleries that come from different models."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial, partialmethod
from typing import Any

import torch

from .._host import AccuracyCalculator, FaissKMeans, get_label_match_counts, get_unique_labels
from .._host import common_functions as c_f
from .named_metrics import RANK_METRICS, is_ranked, split_name, without_lone
from .search import Search, prepare_search


class CrossModelAccuracyCalculator(AccuracyCalculator):
    """Retrieval accuracy of one model's queries on any model's gallery.

    A drop-in for PML's ``AccuracyCalculator``: same constructor, same metrics, and ``cmc_top_1``, ``cmc_top_5``,
    ``cmc_top_10`` besides. Others are computed where ``include`` names them, at any k, here 20: ``precision_at_20``;
    ``recall_at_20``, the share of the positives found (any of them: ``cmc_top_20``, "Recall@20" of metric learning
    papers); ``ndcg_at_20``; ``mean_average_precision_at_20``, over min(R, 20), as landmark retrieval has mAP@100. It
    differs in that

    - an item is kept out of its own ranking by position or by id, whatever model embedded it;
    - ranks are exact and full by default (``k=None``), in memory set by a chunk of queries;
    - metrics do not depend on the order of tied items (see :mod:`pml_compat.accuracy.rank_metrics`);
    - labels are compared by equality, numbers of any size, bools or strings (:mod:`pml_compat.accuracy.items`), and
      ``device`` may be a string;
    - embeddings may be whole numbers, such as int8 codes;
    - faiss is not needed: without it NMI and AMI use scikit-learn's k-means;
    - queries of another width than the gallery are fitted to it, if asked (``fit_width``).

    Distances are Euclidean on the embeddings as given, as with PML's default; normalise them for cosine ranking. A
    subclass's own metrics (``calculate_<name>``, named in ``requires_knn``) get PML's arguments; ``knn_distances`` are
    squared, as PML's are.

    Args:
        include: names of the metrics to compute; all by default.
        exclude: names of metrics not to compute.
        avg_of_avgs: average within each query label first, then over the labels.
        return_per_class: a list with each query label's average, in label order, instead of one number.
        k: cut rankings off after k items, as PML does (not for the metrics that name their own k); None, the full
            ranking; ``"max_bin_count"``, the size of the largest label in the gallery.
        label_comparison_fn: tells which labels match, as in PML.
        device: where to compute, a string or a ``torch.device``; a GPU where there is one by default.
        knn_func: finds neighbours instead of the exact search; called as PML's
            ``knn_func(query, k, reference, ref_includes_query=False)``. It cannot see which items are excluded, so it
            is asked for as many more.
        kmeans_func: as in PML.
        gallery_group: a ``torch.distributed`` process group whose processes hold a part of the gallery each. Every
            process passes all queries and its own part as ``reference`` (labels, ids and cameras too), and gets the
            accuracy on the whole gallery, the parts in the order of the ranks. For the ranking metrics.
        fit_width: compare queries with a gallery of another width by their first coordinates, or with zeros appended
            (:func:`pml_compat.fit_width`): for a new model that was trained so, as BCT's. An error otherwise.
    Example:
        >>> calculator = CrossModelAccuracyCalculator(include=("precision_at_1",))
        >>> old, new, labels = torch.eye(4), torch.eye(4)[:, [1, 0, 3, 2]], torch.tensor([0, 0, 1, 1])
        >>> calculator.get_accuracy(new, labels, old, labels, ref_includes_query=True)
        {'precision_at_1': 1.0}
    """

    def __init__(
        self,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        avg_of_avgs: bool = False,
        return_per_class: bool = False,
        k: int | str | None = None,
        label_comparison_fn: Callable[..., Any] | None = None,
        device: str | torch.device | None = None,
        knn_func: Callable[..., Any] | None = None,
        kmeans_func: Callable[..., Any] | None = None,
        *,
        gallery_group: Any = None,
        fit_width: bool = False,
    ) -> None:
        device = c_f.use_cuda_if_available() if device is None else torch.device(device)
        if kmeans_func is None:
            has_faiss = importlib.util.find_spec("faiss") is not None
            kmeans_func = FaissKMeans(niter=20, gpu=device.type == "cuda") if has_faiss else _sklearn_kmeans
        super().__init__(
            include=include,
            exclude=exclude,
            avg_of_avgs=avg_of_avgs,
            return_per_class=return_per_class,
            k=k,
            label_comparison_fn=label_comparison_fn,
            device=device,
            knn_func=knn_func or _exact_search,  # given none, PML would reach for faiss
            kmeans_func=kmeans_func,
        )
        self.gallery_group, self.fit_width = gallery_group, fit_width
        if gallery_group is not None and knn_func is not None:
            raise ValueError(f"knn_func must be None with gallery_group, got {knn_func!r}; it sees a part alone")

    def requires_knn(self) -> list[str]:
        """Name the metrics that are made from neighbours."""
        return [*RANK_METRICS]

    def check_primary_metrics(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        """Raise a ValueError for metrics that there are not."""
        known = [
            names if isinstance(names, str) else tuple(name for name in names if split_name(name)[1] is None)
            for names in (include, exclude)
        ]
        try:
            super().check_primary_metrics(*known)
        except ValueError as error:
            raise ValueError(f"{error} Or at any k, such as precision_at_20; got {[*include, *exclude]}") from None

    def get_function_dict(
        self, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> dict[str, Callable[..., Any]]:
        """Return the functions of the metrics by name, with those at any k that ``include`` names."""
        found = super().get_function_dict(include, exclude)
        at_k = [name for name in include if split_name(name)[1] is not None and name not in {*found, *exclude}]
        return {**found, **{name: partial(self._mean_of, name) for name in at_k}}

    def _mean_of(
        self, metric: str, query_labels: torch.Tensor, per_query: dict[str, torch.Tensor] | None = None, **kwargs: Any
    ) -> float | list[float]:
        """Average a metric over the queries that have a positive, as the constructor says.

        Without ``per_query``, of neighbours that the caller found: PML's own function, with PML's arguments.
        """
        if per_query is None:
            if not metric.startswith("cmc_top_"):
                return getattr(AccuracyCalculator, f"calculate_{metric}")(self, query_labels=query_labels, **kwargs)
            found = kwargs["knn_labels"][:, : int(metric.removeprefix("cmc_top_"))]
            hits = self.label_comparison_fn(query_labels[:, None], found).any(1)
            per_query = {metric: hits.double(), "relevant": kwargs["not_lone_query_mask"].long()}
        scored = per_query["relevant"] > 0
        values, labels = per_query[metric][scored], query_labels[scored]
        if not len(values):
            c_f.LOGGER.warning("None of the query labels are in the reference set.")
            return [float("nan")] * len(get_unique_labels(query_labels)) if self.return_per_class else float("nan")
        if not (self.avg_of_avgs or self.return_per_class):
            return values.mean().item()
        unique, row = torch.unique(labels, dim=0, return_inverse=True)
        sums = values.new_zeros(len(unique)).index_add_(0, row, values)
        averages = sums / torch.bincount(row, minlength=len(unique))
        return averages.tolist() if self.return_per_class else averages.mean().item()

    calculate_precision_at_1 = partialmethod(_mean_of, "precision_at_1")
    calculate_mean_average_precision = partialmethod(_mean_of, "mean_average_precision")
    calculate_mean_average_precision_at_r = partialmethod(_mean_of, "mean_average_precision_at_r")
    calculate_mean_reciprocal_rank = partialmethod(_mean_of, "mean_reciprocal_rank")
    calculate_r_precision = partialmethod(_mean_of, "r_precision")
    calculate_cmc_top_1 = partialmethod(_mean_of, "cmc_top_1")
    calculate_cmc_top_5 = partialmethod(_mean_of, "cmc_top_5")
    calculate_cmc_top_10 = partialmethod(_mean_of, "cmc_top_10")

    def get_accuracy(
        self,
        query: Any,
        query_labels: Any,
        reference: Any = None,
        reference_labels: Any = None,
        ref_includes_query: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        query_ids: Any = None,
        reference_ids: Any = None,
        query_cameras: Any = None,
        reference_cameras: Any = None,
        junk: Any = None,
    ) -> dict[str, Any]:
        """Return each metric of the queries on the gallery.

        Queries with no positive in the gallery are left out, as PML does; where all are, metrics are NaN.

        Args:
            query: ``(Q, D_query)`` embeddings, a tensor or an array.
            query_labels: ``(Q,)``, numbers of any type, bools or strings; NaN and None are unknown and match nothing.
            reference: ``(N, D_reference)`` gallery embeddings of any model; by default the queries themselves, each
                left out of its own ranking.
            reference_labels: ``(N,)``.
            ref_includes_query: row i of ``query`` and row i of ``reference`` are the same item, whatever models
                embedded them, and i is left out of query i's ranking. The gallery may go on after them.
            include: metrics to compute in this call.
            exclude: metrics not to compute in this call.
            query_ids: ``(Q,)`` item ids, numbers or strings, which say the same for galleries in any order: every
                gallery item with the query's id is left out. A missing one (None, NaN) leaves nothing out.
            reference_ids: ``(N,)``, with ``query_ids``.
            query_cameras: ``(Q,)``; gallery items of the query's own label and camera are left out (the
                re-identification protocol).
            reference_cameras: ``(N,)``, with ``query_cameras``.
            junk: for each query, a list or array of gallery rows that count neither as right nor as wrong, and are left
                out (the landmark protocols). With ``gallery_group``, rows of the whole gallery.
        Raises:
            ValueError: NaN, infinite or empty embeddings; lengths that differ; widths that differ, without
                ``fit_width``; one of a pair of arguments alone; ids beside ``ref_includes_query``; labels or ids of
                kinds that are never equal (text and numbers); an item with two labels, where no id stands for several
                items; with ``ref_includes_query`` a gallery that is shorter than the queries or has other labels in
                their rows.
        """
        who = query_ids, reference_ids, query_cameras, reference_cameras, junk
        search = self._search(query, query_labels, reference, reference_labels, ref_includes_query, *who)
        self.curr_function_dict = self.get_function_dict(include, exclude)
        metrics = set(self.get_curr_metrics())
        own_metrics = self._own(metrics) if metrics & set(self.requires_knn()) else set()
        ranked = [name for name in metrics if is_ranked(name)]
        if self.gallery_group is not None and (others := sorted(metrics.difference(ranked))):
            raise ValueError(f"include must name ranking metrics alone with gallery_group, got {others}")
        kwargs: dict[str, Any] = {
            "query": search.query,
            "reference": search.reference,
            "query_labels": search.query_labels,
            "reference_labels": search.reference_labels,
            "ref_includes_query": search.ref_includes_query,
            "label_comparison_fn": self.label_comparison_fn,
        }
        k = self._cut_off(search)
        c_f.LOGGER.info(f"ranking {len(search.reference_labels)} items for each of {len(search.query)} queries")
        if isinstance(k, int):
            self.determine_k(search.positives.most(), len(search.reference_labels), search.ref_includes_query)  # warns
        if ranked:
            kwargs["per_query"] = search.scores(ranked, k)
        if own_metrics:
            scored = search.count_positives() > 0
            kwargs["knn_distances"], rows = search.neighbors(k)
            kwargs["knn_labels"] = search.reference_labels[rows]
            kwargs["label_counts"] = get_label_match_counts(
                search.query_labels, search.reference_labels, self.label_comparison_fn
            )
            kwargs["not_lone_query_mask"] = scored
            kwargs["lone_query_labels"] = get_unique_labels(search.query_labels[~scored])
        if metrics & set(self.requires_clustering()):
            kwargs["cluster_labels"] = self.get_cluster_labels(**kwargs)
        return self._get_accuracy(self.curr_function_dict, **kwargs)

    def get_per_query_accuracy(
        self,
        query: Any,
        query_labels: Any,
        reference: Any = None,
        reference_labels: Any = None,
        ref_includes_query: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        query_ids: Any = None,
        reference_ids: Any = None,
        query_cameras: Any = None,
        reference_cameras: Any = None,
        junk: Any = None,
    ) -> dict[str, torch.Tensor]:
        """Return the ranking metrics of each query, for flips, intervals and a look at the worst.

        The arguments are those of :meth:`get_accuracy`, whose numbers are the means of these; clustering metrics, which
        no single query has, are left out.

        Shape:
            - output: ``{metric: (Q,)}`` float64, on the CPU; NaN for a query with no positive in the gallery
        Example:
            >>> calculator = CrossModelAccuracyCalculator(include=("precision_at_1",))
            >>> calculator.get_per_query_accuracy(torch.eye(3)[[0, 0, 2]], torch.tensor([1, 1, 2]))
            {'precision_at_1': tensor([1., 1., nan], dtype=torch.float64)}
        """
        who = query_ids, reference_ids, query_cameras, reference_cameras, junk
        search = self._search(query, query_labels, reference, reference_labels, ref_includes_query, *who)
        names = [name for name in self.get_function_dict(include, exclude) if is_ranked(name)]
        return without_lone(search.scores(names, self._cut_off(search)), names)

    def _own(self, metrics: set[str]) -> set[str]:
        """Return the metrics that a subclass computes itself, from neighbours."""
        mro = type(self).__mro__
        classes = mro[: mro.index(CrossModelAccuracyCalculator)]
        return {metric for metric in metrics if any(f"calculate_{metric}" in vars(one) for one in classes)}

    def _search(self, *arguments: Any) -> Search:
        return prepare_search(
            *arguments,
            device=self.device,
            label_comparison_fn=self.label_comparison_fn,
            knn_func=None if self.knn_func is _exact_search else self.knn_func,
            gallery_group=self.gallery_group,
            fit_width=self.fit_width,
        )

    def _cut_off(self, search: Search) -> int | None:
        return (int(search.count_positives().max()) or 1) if self.k == "max_bin_count" else self.k


def _exact_search(*args: Any, **kwargs: Any) -> None:
    """Stand in PML's attribute for the exact search, which needs no neighbour lists."""
    raise NotImplementedError("CrossModelAccuracyCalculator ranks exactly unless it is given a knn_func")


def _sklearn_kmeans(embeddings: torch.Tensor, num_clusters: int) -> torch.Tensor:
    from sklearn.cluster import KMeans  # PML depends on it; slow to import

    clusters = KMeans(num_clusters, n_init=1, max_iter=20, random_state=0).fit_predict(embeddings.float().cpu().numpy())
    return torch.from_numpy(clusters).long()
