"""Settings of the methods, chosen on training images that no model sees: the test images are not looked at.

50 training images of each class are left out of all training, and are query and gallery. In the open protocol query and
gallery are the images of classes that the comparison never tests. One seed and fewer epochs than the comparison's; the
paper's or the library's default is among a method's settings.

    python examples/cifar100/search.py --data DATA --out runs/settings --epochs 5
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from compare import Comparison
from data import SPLITS, Upgrade, hold_out, load, open_upgrade, search_split
from measuring import report
from profiles import PROFILES, WEIGHTS

SETTINGS: dict[str, list[dict[str, float]]] = {
    "bct": [
        {"bct": 1},
        {"bct": 3},
        {"bct": 3, "pseudo_scale": 8},
        {"bct": 10},
        {"bct": 10, "pseudo_scale": 32},
        {"bct": 30},
    ],
    "bct_fitted": [{"bct": 3}, {"bct": 10}],
    "lce": [{"lce": 100}, {"lce": 1000}, {"lce": 10000}],
    "lce_fitted": [{"lce": 10000}],
    "cross_model": [
        {"cross_model": 1},
        {"cross_model": 3},
        {"cross_model": 3, "supcon_temperature": 0.2},
        {"cross_model": 10},
        {"cross_model": 3, "supcon_temperature": 0.05},
    ],
    "bct_cross_model": [{"bct_beside_cross_model": 3, "cross_model": 3}],
    "lce_cross_model": [{"lce_beside_cross_model": 1000, "cross_model": 3}],
    "nccl": [{"nccl": 3, "nccl_temperature": 0.05}, {"nccl": 3, "nccl_temperature": 0.1}],
    "point_alignment": [{"point_alignment": 3}, {"point_alignment": 10}],
    "ract": [{"ract": 1}, {"ract": 3}],
    "head": [
        {"head_point": 10, "head_contrast": 1},
        {"head_point": 10, "head_contrast": 5},
        {"head_point": 10, "head_contrast": 10},
        {"head_point": 3, "head_contrast": 5},
        {"head_point": 10, "head_contrast": 5, "head_shrinkage": 1},
        {"head_point": 10, "head_contrast": 5, "head_trunk_gradient": 0.3},
        {"head_point": 10, "head_contrast": 5, "head_trunk_gradient": 1},
    ],
}
PROFILE_SETTINGS: dict[str, list[dict[str, float]]] = {
    "fct": [{"fct_squared": True, "fct_lr": 5e-4}, {"fct_lr": 5e-4}, {"fct_lr": 2e-3}],
    "fct_contrast": [
        {"fct_contrast": 0.1, "fct_temperature": 0.1},
        {"fct_contrast": 0.3, "fct_temperature": 0.1},
        {"fct_contrast": 0.1, "fct_temperature": 0.05},
        {"fct_contrast": 0.1, "fct_temperature": 0.02},
        {"fct_contrast": 0.3, "fct_temperature": 0.02},
        {"fct_contrast": 0.1, "fct_temperature": 0.01},
        {"fct_contrast": 0.3, "fct_temperature": 0.01},
    ],
    "fct_instance": [
        {"fct_instance": 0.3, "fct_instance_temperature": 0.05},
        {"fct_instance": 1, "fct_instance_temperature": 0.05},
        {"fct_instance": 3, "fct_instance_temperature": 0.05},
        {"fct_instance": 1, "fct_instance_temperature": 0.1},
        {"fct_instance": 1, "fct_instance_temperature": 0.2},
    ],
    "fct_mixtures": [{"fct_mixtures": 3}],
    "fct_instance_mixtures": [{"fct_mixtures": 3}],
    "fct_side": [{"fct_lr": 2e-3}],
    "fct_contrast_side": [{"fct_contrast": 0.3, "fct_temperature": 0.02}],
}


def main() -> None:
    methods = [*SETTINGS, *PROFILE_SETTINGS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data set's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for models, embeddings, results")
    parser.add_argument("--profile", choices=list(PROFILES), default="cpu")
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--protocol", choices=["closed", "open"], default="closed")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--per-class", type=int, default=50, help="training images a class that are left out")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--float32", action="store_true", help="not bfloat16; for processors that do not have it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    given = {"epochs": options.epochs, "bfloat16": not options.float32}
    profile = dataclasses.replace(PROFILES[options.profile], **given)
    train_set, held_out = hold_out(load(options.data, "train"), options.per_class, seed=0)
    upgrade = Upgrade(train_set, torch.tensor(SPLITS["lexicographic"]), held_out)
    if options.protocol == "open":
        upgrade = open_upgrade(train_set, held_out, search_split(train_set.labels))
    comparison = Comparison(options.out, options.seed, upgrade, profile, options.device)
    comparison.run("old")
    comparison.run("independent")
    for method in options.methods:
        of_profile = method in PROFILE_SETTINGS
        for setting in PROFILE_SETTINGS[method] if of_profile else SETTINGS[method]:
            if of_profile:
                comparison.profile = dataclasses.replace(profile, **setting)
            else:
                comparison.weights = WEIGHTS | setting
            values = ", ".join(f"{name} {value:g}" for name, value in setting.items())
            comparison.run(method, f"{method} ({values})")
            print(report(options.out), flush=True)


if __name__ == "__main__":
    main()
