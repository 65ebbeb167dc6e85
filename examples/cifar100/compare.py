"""CIFAR-100, 50 classes to 100: every method of the library on one upgrade, by the papers' protocol.

The old model is trained on the images of 50 classes, the new one on all 100. Queries and gallery are the 10,000 test
images of all classes; each query leaves its own image out. Embeddings are compared by cosine, rankings are full.

    python examples/cifar100/compare.py --data DATA --out runs/cifar100                # every method, one seed
    python examples/cifar100/compare.py --data DATA --out runs/cifar100 --seeds 0 1 2 --methods bct lce fct
    python examples/cifar100/compare.py --data DATA --out runs/open --protocol open --seeds 0 1 2

In the open protocol the old model is trained on 40 classes, the new one on 80 with these among them, and queries and
gallery are all images of the 20 others; the seed draws the classes, too.

Every model is trained once, and its embeddings and measurements are kept in the folder: run it again, and it goes on
where it stopped. ``DATA`` is where torchvision keeps, or shall put, CIFAR-100. Every method
runs as it is dropped in, with the library's defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import SPLITS, Images, Upgrade, load, mix, open_split, open_upgrade
from measuring import measure, report
from methods import AT_QUERY_TIME, MAPS, OldSystem, networks_of
from networks import WIDTH, WithBranch
from profiles import PROFILES, Profile
from training import embed, task_loss, train, train_without_labels

from pml_compat.frozen import ClassCenters, FrozenModel
from pml_compat.heads import BasisTransformation, CompatibleHead
from pml_compat.losses import AdvBCTLoss, UniBCTLoss
from pml_compat.serving import QueryBlend
from pml_compat.transformations import (
    FastFillTransformation,
    FCTTransformation,
    LinearTransformation,
    Transformation,
    fit_transformation,
)


class Comparison:
    """One seed: models and embeddings, made where they are not there yet, in one folder."""

    def __init__(self, folder: Path, seed: int, upgrade: Upgrade, profile: Profile, device: str) -> None:
        self.folder, self.seed = folder / f"seed_{seed}", seed
        self.folder.mkdir(parents=True, exist_ok=True)
        self.profile = profile
        self.device = torch.device(device)
        self.train_set = upgrade.train.to(self.device)
        self.old_classes = upgrade.old_classes.to(self.device)
        self.classes = int(upgrade.train.labels.max()) + 1
        # What is embedded, by name; "calibration" is there only where a mixed gallery can be calibrated.
        self.parts = {"train": self.train_set, "test": upgrade.test.to(self.device)}
        if upgrade.calibration is not None:
            self.parts["calibration"] = upgrade.calibration.to(self.device)

    def run(self, method: str, name: str | None = None) -> None:
        """Train, embed and measure one method, unless that was done before; it is kept under ``name``."""
        name = name or method
        out = self.folder / f"{name}.json"
        if out.exists():
            return
        start = time.perf_counter()
        if not self._is_embedded(name):
            self._embed(method, name)
        labels = {part: images.labels.cpu() for part, images in self.parts.items() if part != "train"}
        measured = measure(name, self._arrays, labels, self.seed)
        measured |= {"seconds": time.perf_counter() - start, "seed": self.seed, "device": str(self.device)}
        measured |= {"profile": describe(self.profile), "torch": torch.__version__}
        write(out, lambda path: path.write_text(json.dumps(measured, indent=1)))

    def _embed(self, method: str, name: str) -> None:
        if method in MAPS:
            self._map_gallery(method, name)
        elif method in AT_QUERY_TIME:
            self._search_with_both(method, name)
        elif method == "old":
            self._train_old()
        else:
            self._train_new(method, name)

    def _stored(self, name: str, part: str) -> torch.Tensor:
        """Return what a model of ours embeds, trained first where it is not there."""
        if not self._path(name, part).exists():
            {"old": self._train_old, "side": self._train_side, "independent": self._train_independent}[name]()
        return torch.from_numpy(np.load(self._path(name, part)))

    def _arrays(self, name: str, part: str = "test") -> torch.Tensor | None:
        """Return stored embeddings, unit rows, or None where there are none of that name."""
        path = self._path(name, part)
        found = torch.from_numpy(np.load(path)) if path.exists() else None
        return torch.nn.functional.normalize(found) if found is not None and found.ndim == 2 else found

    def _is_embedded(self, name: str) -> bool:
        """Whether all that a method is measured on was kept; its last file of a part is named here."""
        kinds = name, f"{name}_gallery"
        return all(any(self._path(kind, part).exists() for kind in kinds) for part in self.parts if part != "train")

    def _path(self, name: str, part: str) -> Path:
        return self.folder / f"{name}_{part}.npy"

    def _keep(self, name: str, part: str, embeddings: torch.Tensor) -> None:
        write(self._path(name, part), lambda path: np.save(path, embeddings.numpy()))

    def _keep_embedded(self, name: str, model: torch.nn.Module, parts: Iterable[str], head: Any = None) -> None:
        """Keep what a model gives of every part, and apart from it what it searches old vectors with."""
        for part in parts:
            embeddings = embed(model, self.parts[part].images, self.profile)
            if isinstance(head, CompatibleHead | BasisTransformation):
                with torch.no_grad():
                    head.cpu()
                    self._keep(f"{name}_query", part, head.old_part(embeddings))
                    embeddings = head.whole(embeddings) if isinstance(head, CompatibleHead) else embeddings
                    head.to(self.device)
            elif head is not None:  # a map into the old space
                with torch.no_grad():
                    unit = torch.nn.functional.normalize(embeddings)
                    self._keep(f"{name}_query", part, head.cpu()(unit))
            self._keep(name, part, embeddings)

    def _model(self) -> torch.nn.Module:
        torch.manual_seed(self.seed)
        return self.profile.network().to(self.device)

    def _train_old(self) -> None:
        seen = self.train_set[torch.isin(self.train_set.labels, self.old_classes)]
        numbered = Images(seen.images, torch.searchsorted(self.old_classes, seen.labels))
        model = self._model()
        loss = task_loss(len(self.old_classes), WIDTH).to(self.device)
        train(model, loss, numbered, self.profile, f"seed {self.seed}: old")
        self._keep_model("old", model)
        self._keep_embedded("old", model, self.parts)

    def _keep_model(self, name: str, model: torch.nn.Module) -> None:
        write(self.folder / f"{name}.pt", lambda path: torch.save(model.state_dict(), path))

    def _kept_model(self, name: str) -> FrozenModel:
        path = self.folder / f"{name}.pt"
        if not path.exists():
            {"old": self._train_old, "independent": self._train_independent}[name]()
        model = self.profile.network()
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return FrozenModel(model.to(self.device))

    def _train_side(self) -> None:
        """Side-information, made when the old model was: from its training images alone, without labels."""
        seen = self.train_set[torch.isin(self.train_set.labels, self.old_classes)]
        model = self._model()
        train_without_labels(model, seen, self.profile, f"seed {self.seed}: side-information")
        self._keep_embedded("side", model, self.parts)

    def _train_independent(self) -> None:
        self._train_new("independent", "independent")

    def _old_system(self) -> OldSystem:
        embeddings, labels = self._stored("old", "train").to(self.device), self.train_set.labels
        return OldSystem(embeddings, labels, ClassCenters.from_embeddings(embeddings.cpu(), labels.cpu()))

    def _train_new(self, method: str, name: str) -> None:
        old, model = self._old_system(), self._model()
        loss, reads, head, asks = networks_of(self.classes)[method](old)
        loss.to(self.device)
        if head is not None:
            model = torch.nn.Sequential(WithBranch(model), head).to(self.device)

        def after_epoch(epoch: int) -> None:
            share = epoch / self.profile.epochs
            if isinstance(loss, UniBCTLoss) and epoch in (self.profile.epochs // 3, 2 * self.profile.epochs // 3):
                new = embed(model, self.train_set.images, self.profile)
                loss.update_prototypes(old.embeddings.cpu(), new, old.labels.cpu())
                loss.to(self.device)
            for old_loss in getattr(loss, "old_losses", {}).values():
                if isinstance(old_loss, AdvBCTLoss):
                    old_loss.set_progress(share)

        stored = {which: self._stored(which, "train").to(self.device) for which in reads}
        old_model = self._kept_model("old") if asks else None
        train(model, loss, self.train_set, self.profile, f"seed {self.seed}: {name}", stored, after_epoch, old_model)
        if method == "independent":
            self._keep_model(name, model)
        parts = [part for part in self.parts if part != "train" or method == "independent"]
        self._keep_embedded(name, model, parts, head or getattr(loss, "backward_transformation", None))

    def _map_gallery(self, method: str, name: str) -> None:
        """Map the stored old embeddings, as they are, to the directions of the independent model's."""
        mixtures = self.profile.fct_mixtures if method.endswith("_mixtures") else 0
        source, target = self._views("old", mixtures), self._views("independent", mixtures)
        target = [torch.nn.functional.normalize(view) for view in target]
        side = method.endswith("_side")
        if method == "linear":
            transformation: Transformation = LinearTransformation(WIDTH, WIDTH).fit(source[0], target[0])
        else:
            torch.manual_seed(self.seed)
            kind = FastFillTransformation if method.startswith("fastfill") else FCTTransformation
            transformation = kind(WIDTH, WIDTH, WIDTH if side else None).to(self.device)
            side_info = self._stored("side", "train") if side else None
            fit_transformation(transformation, source, target, side_info, seed=self.seed)
        for part in self.parts.keys() - {"train"}:
            stored = self._stored("old", part), self._stored("side", part) if side else None
            if isinstance(transformation, FastFillTransformation):
                self._keep(f"{name}_uncertainty", part, transformation.uncertainty(*stored, progress=False))
            mapped = transformation.apply_to(*stored, normalize=True, progress=False)
            self._keep(f"{name}_gallery", part, torch.from_numpy(mapped))

    def _search_with_both(self, method: str, name: str) -> None:
        """Keep the independent model's queries; rotated into the old space, or blended with the old ones."""
        labels = self.train_set.labels.cpu()
        blend = QueryBlend().fit(self._stored("old", "train"), self._stored("independent", "train"), labels)
        if method == "rotated":
            blend.share = 1.0
        for part in self.parts.keys() - {"train"}:
            old, new = self._stored("old", part), self._stored("independent", part)
            if method in ("rotated", "blended"):
                self._keep(f"{name}_query", part, blend.query_rows(old, new))
            self._keep(name, part, new)

    def _views(self, name: str, mixtures: int) -> list[torch.Tensor]:
        """Return what a model embeds of each training image, and of each mixed with others, ``mixtures`` times."""
        views = [self._stored(name, "train")]
        for number in range(mixtures):
            part = f"mixture_{number}"
            if not self._path(name, part).exists():
                torch.manual_seed(number)  # the same mixtures for both models
                images = mix(self.train_set.images)
                self._keep(name, part, embed(self._kept_model(name), images, self.profile))
            views.append(self._stored(name, part))
        return views


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
    parser.add_argument("--protocol", choices=["closed", "open"], default="closed", help="test classes are trained on?")
    parser.add_argument("--split", choices=list(SPLITS), default="lexicographic", help="which classes are old; closed")
    for name in ("epochs", "side_epochs"):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=argparse.SUPPRESS, help="in place of the profile's")
    parser.add_argument("--float32", action="store_true", help="even where bfloat16 is faster")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in ("epochs", "side_epochs") if name in options}
    profile = dataclasses.replace(PROFILES[options.profile], bfloat16=False if options.float32 else None, **given)
    known = ["old", *networks_of(100), *MAPS, *AT_QUERY_TIME]
    methods = known if options.methods == ["all"] else ["old", "independent", *options.methods]
    unknown = set(methods) - set(known)
    if unknown:
        parser.error(f"--methods must be all, or some of {' '.join(known)}, got {' '.join(sorted(unknown))}")

    train_set, test_set = load(options.data, "train"), load(options.data, "test")
    for seed in options.seeds:
        if options.protocol == "open":
            upgrade = open_upgrade(train_set, test_set, open_split(train_set.labels, seed))
        else:
            upgrade = Upgrade(train_set, torch.tensor(SPLITS[options.split]), test_set)
        comparison = Comparison(options.out, seed, upgrade, profile, options.device)
        for method in dict.fromkeys(methods):
            comparison.run(method)
        print(report(options.out), flush=True)


if __name__ == "__main__":
    main()
