import shutil
from pathlib import Path

import pytest
import torch

from examples.open_set.glyphs import CHARACTERS, INSTALL, load_glyphs

FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif-Italic", "cmr10")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four families that matplotlib ships, two faces of one of them."""
    matplotlib = pytest.importorskip("matplotlib", reason="its fonts are drawn")
    folder = tmp_path_factory.mktemp("fonts")
    for face in FACES:
        shutil.copy(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf", folder)
    return folder


@pytest.fixture(scope="module")
def glyphs(folder):
    return load_glyphs([folder], min_fonts=4)


def box(glyphs, character, font="DejaVu Sans Book"):
    """Return the top, bottom, left and right of the ink of one image."""
    chosen = (glyphs.labels == CHARACTERS.index(character)) & (glyphs.font == glyphs.fonts.index(font))
    rows, columns = (glyphs.images[chosen].squeeze() > 64).nonzero().T
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


def test_each_family_gives_one_face_and_each_character_one_class(glyphs):
    assert glyphs.fonts == ["DejaVu Sans Book", "DejaVu Sans Mono Book", "DejaVu Serif Italic", "cmr10 Regular"]
    assert len(set(CHARACTERS)) == len(CHARACTERS) == len(glyphs.characters)
    assert glyphs.images.shape == (len(glyphs), 1, 32, 32) and glyphs.images.dtype == torch.uint8
    assert glyphs.labels.dtype == glyphs.font.dtype == torch.int64
    assert torch.equal(glyphs.labels[glyphs.font == 0], torch.arange(len(CHARACTERS)))


def test_images_are_centred_and_keep_the_size_of_their_character(glyphs):
    for character in "XxgÉ;Щ":
        top, bottom, left, right = box(glyphs, character)
        assert abs(top + bottom - 32) <= 2 and abs(left + right - 32) <= 2
    heights = {character: bottom - top for character in "XxÉ" for top, bottom, *_ in [box(glyphs, character)]}
    assert heights["X"] == 16 and heights["x"] < 14 and heights["É"] > 18


def test_characters_a_font_lacks_are_left_out(glyphs):
    drawn = {CHARACTERS[label] for label in glyphs.labels[glyphs.font == 3].tolist()}
    assert {"A", "z", "!"} <= drawn and not drawn & set("Жщ€‰")


def test_no_image_is_blank_or_there_twice(glyphs, folder, tmp_path):
    flat = glyphs.images.flatten(1)
    assert (flat.max(1).values > 32).all() and len(flat.unique(dim=0)) == len(flat)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    again = load_glyphs([str(folder), tmp_path], min_fonts=1)
    assert torch.equal(again.images, glyphs.images) and torch.equal(again.font, glyphs.font)


def test_too_few_fonts_and_too_small_images_are_refused(folder):
    with pytest.raises(FileNotFoundError, match=r"min_fonts is 1, found 0 in .*nowhere; install more: apt-get update"):
        load_glyphs([folder / "nowhere"], min_fonts=1)
    assert INSTALL.endswith("| xargs apt-get install -y --no-install-recommends") and "dejavu-core" in INSTALL
    with pytest.raises(ValueError, match="size must be 16 or more, got 8"):
        load_glyphs([folder], size=8)
