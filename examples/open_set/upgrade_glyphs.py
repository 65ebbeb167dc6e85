"""Open-set upgrade on a second data set: characters in many fonts, 10 % old classes, 80 % new ones, 20 % searched.

    python examples/open_set/upgrade_glyphs.py --out runs/glyphs --seeds 0 1 2 --methods bct point_alignment head fct

The data set is installed by a package manager: see ``glyphs.py``. Models, methods and settings are those of
``examples/cifar100``; nothing was chosen on this data set. The seed draws the classes, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "cifar100"))

from compare import Comparison
from data import Images, open_upgrade
from glyphs import load_glyphs
from measuring import report
from methods import MAPS, networks_of
from profiles import PROFILES

from pml_compat.data import open_classes


def main() -> None:
    profile = dataclasses.replace(PROFILES["cpu"], flip=False)
    known = [*networks_of(100), *MAPS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts"), help="folder with fonts")
    parser.add_argument("--out", type=Path, required=True, help="folder for models, embeddings, results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=known, default=["bct", "point_alignment", "head", "fct"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    glyphs = load_glyphs((options.fonts,))
    print(f"{len(glyphs)} images of {len(glyphs.characters)} characters in {len(glyphs.fonts)} fonts")
    images = Images(glyphs.images.expand(-1, 3, -1, -1), glyphs.labels)
    # Few old classes: one that learned 40 % of the characters makes hardly any mistakes. A tenth of the fonts trains no
    # model: of the characters that are learned, they calibrate mixed galleries.
    held_out = glyphs.font % 10 == 0
    for seed in options.seeds:
        upgrade = open_upgrade(
            images[~held_out], images[held_out], open_classes(glyphs.labels, old_classes=0.1, seed=seed)
        )
        comparison = Comparison(options.out, seed, upgrade, profile, options.device)
        for method in dict.fromkeys(["old", "independent", *options.methods]):
            comparison.run(method)
        print(report(options.out), flush=True)


if __name__ == "__main__":
    main()
