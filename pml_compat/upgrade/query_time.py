"""What two finished models do at query time, with nothing trained or stored anew, as pairs of an evaluation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..accuracy.search import prepare_search
from ..serving.two_stage import two_stage_values
from .prepare import Prepared

if TYPE_CHECKING:
    from ..serving import QueryBlend

Values = dict[str, torch.Tensor]  # metric to (Q,)
_FEWEST = 50  # gallery items by both models that a rotation is fitted to


def blended_queries(ready: Prepared, blend: QueryBlend | None, seed: int) -> dict[str, torch.Tensor]:
    """Return the new queries rotated into the old space, and blended with the old ones; empty where they cannot be.

    A blend that was not given is fitted to the gallery by both models, without its labels. A query that is a gallery
    item itself is blended by what was fitted to the other half of the items.

    Args:
        ready: old queries, and the gallery by both models or a blend.
        blend: fitted elsewhere.
        seed: of the halves.
    Raises:
        ValueError: the blend is of other widths, or the queries of the two models are exchanged.
    """
    from ..serving import QueryBlend  # not at the top: it brings in the transformations

    old, new, galleries = ready.queries["old"], ready.queries["new"], ready.galleries
    if blend is not None:
        return _both(blend, old, new)
    if "new" not in galleries or len(galleries["new"]) < _FEWEST:
        return {}
    if "query_ids" not in ready.codes:
        return _both(QueryBlend().fit(galleries["old"], galleries["new"], seed=seed), old, new)
    half = torch.randperm(_count(ready), generator=torch.Generator().manual_seed(seed)) % 2
    of_query, of_item = (half[ready.codes[name].cpu()].to(old.device) for name in ("query_ids", "reference_ids"))
    found = {name: torch.zeros_like(old) for name in ("rotated", "blended")}
    for part in (0, 1):
        rows, items = of_query == part, of_item != part
        if int(items.sum()) < _FEWEST // 2:
            return {}
        fitted = QueryBlend().fit(galleries["old"][items], galleries["new"][items], seed=seed)
        if rows.any():
            for name, values in _both(fitted, old[rows], new[rows]).items():
                found[name][rows] = values
    return found


def _count(ready: Prepared) -> int:
    """Return one more than the highest code of an id; -1 and -2, of missing ones, then stand for the last two."""
    return 3 + max(int(ready.codes[name].max()) for name in ("query_ids", "reference_ids"))


def _both(blend: QueryBlend, old: torch.Tensor, new: torch.Tensor) -> dict[str, torch.Tensor]:
    rotation = copy.copy(blend)
    rotation.share = 1.0
    return {"rotated": rotation.query_rows(old, new), "blended": blend.query_rows(old, new)}


def two_stages(ready: Prepared, depths: Sequence[int]) -> dict[str, Values]:
    """Return the per-query accuracy of the old index's first finds in the new model's order, for each depth.

    Args:
        ready: queries and gallery, by both models.
        depths: items a query; those that the gallery has are measured.
    """
    old = ready.queries["old"]
    depths = [depth for depth in depths if depth < len(ready.galleries["old"])]
    if not depths:
        return {}
    codes = (ready.codes.get(name) for name in ("query_ids", "reference_ids", "query_cameras", "reference_cameras"))
    search = prepare_search(
        old,
        ready.labels[0],
        ready.galleries["old"],
        ready.labels[1],
        False,
        *codes,
        device=old.device,
        label_comparison_fn=torch.eq,
        knn_func=None,
        gallery_group=None,
        fit_width=False,
    )
    found = two_stage_values(
        search.query,
        ready.queries["new"],
        search.reference,
        ready.galleries["new"],
        (ready.labels[0].to(old.device), ready.labels[1].to(old.device)),
        search.excluded,
        depths,
    )
    return {f"two_stages_{depth}": {name: value.cpu() for name, value in found[depth][0].items()} for depth in depths}
