"""FCT, FastFill and the orthogonal adapter in backfill area: how good a gallery is on its way from old to new.

Two models that were trained apart, of ``defaults.py``. The gallery is mapped towards the new model, and then item by
item embedded anew; the area is P@1 and mAP of new queries, averaged over the way. The published relation is orthogonal
adapter above FastFill above FCT (arXiv:2509.16664: 61.2, 60.5 and 58.7 top-1 on ImageNet).

- ``linear``, ``FCT``: maps of the old gallery into the new space.
- ``FastFill``: the same with a predicted error, by which ``own order`` replaces the worst items first.
- ``orthogonal adapter``: new embeddings are rotated into the old space (closed form), and a linear map of the gallery
  is trained, from the closed form on, by the cosine to the rotated ones and a contrast of classes, with the rotated and
  with the old embeddings alike. ``without contrast`` is the same map without it. ``own order`` replaces first what lies
  farthest from the mean of its class in the mapped gallery.
- ``FCT, with contrast``: what the contrast alone does for FCT.

Everything is trained on training images and measured on test images that are queries and gallery, each left out of its
own ranking.

    python benchmarks/backfill_area.py digits fashion_classes --task NormalizedSoftmax --seeds 0 1 2

What the two models give is kept in ``--folder``, in the form of ``defaults.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import upgrades
from defaults import METRICS, TASKS, Runs
from frozen_classifier import hardware
from pytorch_metric_learning.distances import CosineSimilarity
from torch.nn.functional import normalize

from pml_compat.losses import FastFillLoss, FCTLoss
from pml_compat.transformations import (
    FastFillTransformation,
    FCTTransformation,
    LinearTransformation,
    OrthogonalTransformation,
    Transformation,
    fit_transformation,
)
from pml_compat.upgrade import backfill_curve

EPOCHS, BATCH_SIZE = 60, 256  # of the adapter


def unit(rows: torch.Tensor) -> torch.Tensor:
    return normalize(rows, dim=1)


class Upgrade:
    """Unit rows of both models, and the maps between them."""

    def __init__(self, runs: Runs) -> None:
        self.seed, self.labels, self.test_labels = runs.seed, runs.problem.labels, runs.problem.test_labels
        self.old, self.new = (unit(runs.embeddings(which, "train")) for which in ("old", "independent"))
        self.old_test, self.new_test = (unit(runs.embeddings(which)) for which in ("old", "independent"))
        self.widths = self.old.shape[1], self.new.shape[1]

    def fitted(self, transformation: Transformation, **settings: object) -> torch.Tensor:
        """Return the mapped test gallery, of unit rows."""
        torch.manual_seed(self.seed)
        fit_transformation(
            transformation, self.old, self.new, labels=self.labels, seed=self.seed, progress=False, **settings
        )
        with torch.no_grad():
            return unit(transformation(self.old_test))

    def contrast(self) -> FCTLoss:
        """Return the cosine loss with a contrast of classes."""
        return FCTLoss(contrast_weight=0.3, temperature=0.1, distance=CosineSimilarity())

    def areas(self, mapped: torch.Tensor, new: torch.Tensor, order: object = "random") -> list[float]:
        """Return the area of P@1 and mAP."""
        curve = backfill_curve(
            new, self.test_labels, mapped, new, self.test_labels, order=order, seed=self.seed, ref_includes_query=True
        )
        return [curve.area(metric) for metric in METRICS]

    def both(self, mapped: torch.Tensor, new: torch.Tensor, own: torch.Tensor) -> list[list[float]]:
        """Return the areas in random order, and in the order of a method's own scores."""
        return [self.areas(mapped, new, order) for order in ("random", own)]

    def far_from_class(self, mapped: torch.Tensor) -> torch.Tensor:
        """Return the cosine distance of each mapped item to the mean of its class."""
        classes, place = torch.unique(self.test_labels, return_inverse=True)
        means = unit(torch.zeros(len(classes), mapped.shape[1]).index_add_(0, place, mapped))
        return 1 - (mapped * means[place]).sum(1)

    def measured(self) -> dict[str, list[list[float]]]:
        """Return the areas of each method, in random order and in its own."""
        found = {}
        with torch.no_grad():
            linear = unit(LinearTransformation(*self.widths).fit(self.old, self.new)(self.old_test))
        found["linear"] = [self.areas(linear, self.new_test)]
        found["FCT"] = [self.areas(self.fitted(FCTTransformation(*self.widths)), self.new_test)]
        contrasted = self.fitted(FCTTransformation(*self.widths), loss=self.contrast())
        found["FCT, with contrast"] = self.both(contrasted, self.new_test, self.far_from_class(contrasted))
        fastfill = FastFillTransformation(*self.widths)
        mapped = self.fitted(fastfill, loss=FastFillLoss())
        uncertainty = fastfill.uncertainty(self.old_test, progress=False)
        found["FastFill"] = self.both(mapped, self.new_test, uncertainty)
        for name, loss in (("orthogonal adapter", True), ("orthogonal adapter, without contrast", False)):
            mapped, new = self.adapted(loss)
            found[name] = self.both(mapped, new, self.far_from_class(mapped))
        return found

    def adapted(self, with_contrast: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gallery and the new embeddings of the test images, by the orthogonal adapter."""
        backward = OrthogonalTransformation(self.widths[1], self.widths[0]).fit(self.new, self.old)
        forward = LinearTransformation(self.widths[0], self.widths[0])
        with torch.no_grad():
            target, new = unit(backward(self.new)), unit(backward(self.new_test))
        forward.fit(self.old, target)
        loss_func = self.contrast() if with_contrast else FCTLoss(distance=CosineSimilarity())
        torch.manual_seed(self.seed)
        optimizer = torch.optim.Adam(forward.parameters(), lr=1e-3)
        for _ in range(EPOCHS):
            for index in torch.randperm(len(target)).split(BATCH_SIZE):
                mapped, labels = forward(self.old[index]), self.labels[index]
                loss = loss_func(mapped, labels, ref_emb=target[index])
                if with_contrast:
                    loss = loss + loss_func(mapped, labels, ref_emb=self.old[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            return unit(forward(self.old_test)), new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocols", nargs="+", choices=upgrades.PROTOCOLS)
    parser.add_argument("--task", choices=TASKS, default="NormalizedSoftmax")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--held-out", action="store_true", help="test on held-out training images")
    parser.add_argument("--cifar", type=Path, default=upgrades.DATA["cifar"])
    parser.add_argument("--folder", type=Path, default=Path("runs/defaults"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    upgrades.DATA.update(cifar=options.cifar)
    print(f"{hardware('cpu')}; torch {torch.__version__}; area of P@1 / mAP in percent, mean of {options.seeds}\n")
    for protocol in options.protocols:
        every = [
            Upgrade(Runs(options.folder, protocol, options.task, seed, options.held_out)).measured()
            for seed in options.seeds
        ]
        print(f"| {protocol}, {options.task} | random order | own order |\n| --- | ---: | ---: |")
        for name in every[0]:
            orders = torch.tensor([found[name] for found in every]).mean(0)
            cells = [" / ".join(f"{100 * value:.1f}" for value in order) for order in orders.tolist()]
            print(f"| {name} | {' | '.join([*cells, ''][:2])} |", flush=True)
        print()


if __name__ == "__main__":
    main()
