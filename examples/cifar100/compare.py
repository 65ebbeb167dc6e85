"""CIFAR-100, 50 classes to 100: every method of the library on one upgrade, by the papers' protocol.

The old model is trained on the images of 50 classes, the new one on all 100. Queries and gallery are the 10,000 test
images of all classes; each query leaves its own image out. Embeddings are compared by cosine, rankings are full.

    python examples/cifar100/compare.py --data DATA --out runs/cifar100                # every method, one seed
    python examples/cifar100/compare.py --data DATA --out runs/cifar100 --seeds 0 1 2 --methods bct lce fct

Every model is trained once, and its embeddings and measurements are kept in the folder: run it again, and it goes on
where it stopped. ``DATA`` is where torchvision keeps, or shall put, CIFAR-100. Settings were chosen by ``search.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import SPLITS, Images, load
from measuring import measure, report
from methods import CLASSES, MAPS, OldSystem, networks_of
from networks import WIDTH
from profiles import PROFILES, WEIGHTS, Profile
from pytorch_metric_learning.distances import CosineSimilarity
from training import embed, task_loss, train, train_without_labels

from pml_compat.frozen import ClassCenters
from pml_compat.losses import AdvBCTLoss, FCTLoss, UniBCTLoss
from pml_compat.transformations import FCTTransformation, LinearTransformation, fit_transformation


class Comparison:
    """One seed: models and embeddings, made where they are not there yet, in one folder."""

    def __init__(self, folder: Path, seed: int, train_set: Images, test_set: Images, options: Any) -> None:
        self.folder, self.seed = folder / f"seed_{seed}", seed
        self.folder.mkdir(parents=True, exist_ok=True)
        self.profile: Profile = options.settings
        self.weights = dict(WEIGHTS)
        self.device = torch.device(options.device)
        self.train_set, self.test_set = train_set.to(self.device), test_set.to(self.device)
        self.old_classes = torch.tensor(SPLITS[options.split], device=self.device)

    def run(self, method: str, name: str | None = None) -> None:
        """Train, embed and measure one method, unless that was done before; it is kept under ``name``."""
        name = name or method
        out = self.folder / f"{name}.json"
        if out.exists():
            return
        start = time.perf_counter()
        if method in MAPS:
            self._map_gallery(method, name)
        elif method != "old":
            self._train_new(method, name)
        else:
            self._stored("old", "test")
        measured = measure(name, self._arrays, self.test_set.labels.cpu(), self.seed)
        measured |= {"seconds": time.perf_counter() - start, "seed": self.seed, "device": str(self.device)}
        measured |= {"profile": describe(self.profile), "torch": torch.__version__}
        write(out, lambda path: path.write_text(json.dumps(measured, indent=1)))

    def _stored(self, name: str, part: str) -> torch.Tensor:
        """Return what a model of ours embeds, trained first where it is not there."""
        if not self._path(name, part).exists():
            {"old": self._train_old, "side": self._train_side, "independent": self._train_independent}[name]()
        return torch.from_numpy(np.load(self._path(name, part)))

    def _arrays(self, name: str) -> torch.Tensor | None:
        """Return unit-length embeddings of the test images, or None where there are none of that name."""
        path = self._path(name, "test")
        return torch.nn.functional.normalize(torch.from_numpy(np.load(path))) if path.exists() else None

    def _path(self, name: str, part: str) -> Path:
        return self.folder / f"{name}_{part}.npy"

    def _keep(self, name: str, part: str, embeddings: torch.Tensor) -> None:
        write(self._path(name, part), lambda path: np.save(path, embeddings.numpy()))

    def _model(self) -> torch.nn.Module:
        torch.manual_seed(self.seed)
        return self.profile.network().to(self.device)

    def _keep_both(self, name: str, model: torch.nn.Module) -> None:
        self._keep(name, "train", embed(model, self.train_set.images, self.profile))
        self._keep(name, "test", embed(model, self.test_set.images, self.profile))

    def _train_old(self) -> None:
        seen = self.train_set[torch.isin(self.train_set.labels, self.old_classes)]
        numbered = Images(seen.images, torch.searchsorted(self.old_classes, seen.labels))
        model = self._model()
        loss = task_loss(len(self.old_classes), WIDTH, self.profile).to(self.device)
        train(model, loss, numbered, self.profile, f"seed {self.seed}: old")
        self._keep_both("old", model)

    def _train_side(self) -> None:
        """Side-information, made when the old model was: from its training images alone, without labels."""
        seen = self.train_set[torch.isin(self.train_set.labels, self.old_classes)]
        model = self._model()
        train_without_labels(model, seen, self.profile, f"seed {self.seed}: side-information")
        self._keep_both("side", model)

    def _train_independent(self) -> None:
        self._train_new("independent", "independent")

    def _old_system(self) -> OldSystem:
        embeddings, labels = self._stored("old", "train").to(self.device), self.train_set.labels
        return OldSystem(embeddings, labels, ClassCenters.from_embeddings(embeddings.cpu(), labels.cpu()))

    def _train_new(self, method: str, name: str) -> None:
        old, model = self._old_system(), self._model()
        loss, reads_old = networks_of(self.profile, self.weights)[method](old)
        loss.to(self.device)

        def after_epoch(epoch: int) -> None:
            share = epoch / self.profile.epochs
            if isinstance(loss, UniBCTLoss) and epoch in (self.profile.epochs // 3, 2 * self.profile.epochs // 3):
                new = embed(model, self.train_set.images, self.profile)
                loss.update_prototypes(old.embeddings.cpu(), new, old.labels.cpu())
                loss.to(self.device)
            for old_loss in getattr(loss, "old_losses", {}).values():
                if isinstance(old_loss, AdvBCTLoss):
                    old_loss.set_progress(share)

        old_embeddings = old.embeddings if reads_old else None
        train(model, loss, self.train_set, self.profile, f"seed {self.seed}: {name}", old_embeddings, after_epoch)
        if method == "independent":
            self._keep_both(name, model)
        else:
            self._keep(name, "test", embed(model, self.test_set.images, self.profile))
        if method == "lce_backward":
            with torch.no_grad():
                query = loss.backward_transformation.cpu()(self._arrays(name))
            self._keep(f"{name}_query", "test", query)

    def _map_gallery(self, method: str, name: str) -> None:
        """Map the stored old embeddings, as they are, to the directions of the independent model's."""
        source, stored = (self._stored("old", part) for part in ("train", "test"))
        target = torch.nn.functional.normalize(self._stored("independent", "train"))
        side_info = stored_side = None
        if method == "linear":
            transformation = LinearTransformation(WIDTH, WIDTH).fit(source, target)
        else:
            if method == "fct_side":
                side_info, stored_side = self._stored("side", "train"), self._stored("side", "test")
            torch.manual_seed(self.seed)
            side_features = None if side_info is None else side_info.shape[1]
            transformation = FCTTransformation(WIDTH, WIDTH, side_features, self.profile.fct_hidden).to(self.device)
            fit_transformation(
                transformation,
                source,
                target,
                side_info,
                loss=FCTLoss() if self.profile.fct_squared else FCTLoss(distance=CosineSimilarity()),
                epochs=self.profile.fct_epochs,
                lr=self.profile.fct_lr,
                seed=self.seed,
                autocast=torch.bfloat16,
            )
        mapped = transformation.apply_to(stored, stored_side, normalize=True, progress=False)
        self._keep(f"{name}_gallery", "test", torch.from_numpy(mapped))


def write(path: Path, save: Any) -> None:
    """Write a file wholly or not at all."""
    beside = path.with_name(f".{path.name}")
    if path.suffix == ".npy":  # NumPy adds the suffix to other names
        beside = path.with_name(f".{path.stem}.npy")
    save(beside)
    beside.replace(path)


def describe(profile: Profile) -> dict[str, Any]:
    values = {field.name: getattr(profile, field.name) for field in dataclasses.fields(profile)}
    return values | {"network": profile.network.__name__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data set's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for models, embeddings, results")
    parser.add_argument("--profile", choices=list(PROFILES), default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=["all"])
    parser.add_argument("--split", choices=list(SPLITS), default="lexicographic", help="which classes are old")
    for name in ("epochs", "side_epochs", "fct_epochs"):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=argparse.SUPPRESS, help="in place of the profile's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in ("epochs", "side_epochs", "fct_epochs") if name in options}
    options.settings = dataclasses.replace(PROFILES[options.profile], **given)
    known = ["old", *networks_of(options.settings, WEIGHTS), *MAPS]
    methods = known if options.methods == ["all"] else ["old", "independent", *options.methods]
    unknown = set(methods) - set(known)
    if unknown:
        parser.error(f"--methods must be all, or some of {' '.join(known)}, got {' '.join(sorted(unknown))}")

    train_set, test_set = load(options.data, "train"), load(options.data, "test")
    assert len(test_set.labels.unique()) == CLASSES
    for seed in options.seeds:
        comparison = Comparison(options.out, seed, train_set, test_set, options)
        for method in dict.fromkeys(methods):
            comparison.run(method)
        print(report(options.out), flush=True)


if __name__ == "__main__":
    main()
