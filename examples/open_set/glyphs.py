r"""Characters in many fonts as labelled images: a many-class data set that a package manager installs.

A class is a character, a sample is a font. On Debian 12, as root, about 60 MB::

    apt-get update &&
    printf 'fonts-%s ' 3270 adf-baskervald adf-berenis adf-irianis adf-libris adf-mekanus adf-romande adf-switzera \
    adf-universalis agave anonymous-pro averia-serif-gwf b612 blankenburg cabin cantarell cardo clear-sans cmu \
    comfortaa comic-neue courier-prime crosextra-caladea dancingscript dejavu-core dosis ebgaramond essays1743 \
    fantasque-sans firacode georgewilliams gfs-artemisia gfs-didot gfs-neohellenic gnutypewriter go goudybookletter \
    hermit inconsolata inter isabella jetbrains-mono jura karla kaushanscript lato league-mono league-spartan \
    leckerli-one liberation linuxlibertine lobstertwo manrope monofur monoid mononoki national-park noto-mono \
    okolaks oldstandard open-sans osifont oxygen paratype play quattrocento quicksand roboto-slab roboto-unhinted \
    sil-andika sil-charis sora triod-postnaja tuffy urw-base35 vlgothic vollkorn yanone-kaffeesatz | xargs \
    apt-get install -y --no-install-recommends
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFont

INSTALL = " ".join((__doc__ or "").partition("::")[2].replace("\\", "").split())
# Left out: what another class looks like once it is centred. Across scripts Alpha and the Cyrillic A are a Latin A,
# the Cyrillic Ze is a 3; within Latin l, | and 0 are an I or an O, and . , ' - _ differ by their place alone.
LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz123456789"
SYMBOLS = '!?#$%&@()[]{}/\\*+=<>~^:;"§©®¶†‡•€£¥¢±÷¿«»¬°¼½¾‰…™∞≠≤≥√∂∫◊≈'
ACCENTED = "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝÞßàáâãäåæçèéêëìíîïðñòóôõöøùúûüýþÿĂăĄąĆćČčĎĐđĘęĚěĞğŁłŃńŇňŐőŒœŘřŚśŞşŠšŤŮůŰűŹźŻżŽž"
GREEK = "ΔΘΞΣΦΨΩαβγδεζηθλμξπστφψω"
CYRILLIC = "БГДЖИЙЛПЦЧШЩЪЫЮЯбвджийклмнптцчшщъыьэюяЏџґ"
CHARACTERS = [*LATIN, *SYMBOLS, *ACCENTED, *GREEK, *CYRILLIC]

SUFFIXES = {".ttf", ".otf", ".ttc", ".pfb"}
# By name: families that draw something else for letters; words that make no family; words of a special face.
OTHER = re.compile(
    r"symbol|dingbat|emoji|icon|keyboard|initials|integral|math|outline|inverted|caps|titl|adf style|last resort", re.I
)
WEIGHTS = re.compile(r"\b((extra|ultra|semi|demi)[ -]?)?(thin|light|medium|demi|bold|black|heavy|text|display)\b", re.I)
STYLES = re.compile(
    r"thin|hair|light|demi|bold|black|heavy|ital|obli|slant|incli|cond|narrow|exten|expan|wide|displ", re.I
)
PLAIN = re.compile(r"regular|book|roman", re.I)
MISSING = "\uffff"  # not a character, so every font answers with the glyph it has for what it lacks
OVERSAMPLING = 4  # drawn larger, then averaged: what is left of a font's hinting is too small to see


@dataclass
class Glyphs:
    """``(N, 1, size, size)`` uint8 images, white on black; ``(N,)`` int64 places in ``characters`` and in ``fonts``."""

    images: torch.Tensor
    labels: torch.Tensor
    font: torch.Tensor
    characters: list[str]
    fonts: list[str]

    def __len__(self) -> int:
        return len(self.labels)


def load_glyphs(folders: Sequence[str | Path] = ("/usr/share/fonts",), size: int = 32, min_fonts: int = 100) -> Glyphs:
    """Draw every one of ``CHARACTERS`` in one upright, medium-weight face of each family under ``folders``.

    Capitals stand ``size / 2`` pixels high, so x and X differ; the ink is centred. Left out are characters a font
    lacks or that do not fit, a repeated image, and an image that stands for several characters (as in a font without
    lower case). Sorted by character, then font. The images depend on every font under ``folders``: compare ``fonts``
    before you compare results with another machine.

    Args:
        folders: Where .ttf, .otf, .ttc and .pfb files are looked for, at any depth.
        size: Height and width of the images in pixels; 16 or more.
        min_fonts: The number of usable fonts below which this raises.
    Raises:
        ValueError: ``size`` < 16.
        FileNotFoundError: fewer than ``min_fonts`` fonts; the text holds the command that installs them.
    """
    if size < 16:
        raise ValueError(f"size must be 16 or more, got {size}")
    found: dict[bytes, tuple[set[int], int]] = {}  # image: the characters it stands for, the first font that draws it
    fonts: list[str] = []
    for name, path in _plain_faces(folders):
        if drawn := _draw_all(path, size):
            for label, image in drawn:
                found.setdefault(image, (set(), len(fonts)))[0].add(label)
            fonts.append(name)
    if len(fonts) < min_fonts:
        where = ", ".join(map(str, folders))
        raise FileNotFoundError(f"min_fonts is {min_fonts}, found {len(fonts)} in {where}; install more: {INSTALL}")
    kept = sorted((labels.pop(), font, image) for image, (labels, font) in found.items() if len(labels) == 1)
    pixels = np.frombuffer(b"".join(image for _, _, image in kept), dtype=np.uint8).copy()
    return Glyphs(
        torch.from_numpy(pixels).view(-1, 1, size, size),
        torch.tensor([label for label, _, _ in kept]),
        torch.tensor([font for _, font, _ in kept]),
        list(CHARACTERS),
        fonts,
    )


def _plain_faces(folders: Sequence[str | Path]) -> list[tuple[str, Path]]:
    """Return the name and file of the plainest face of each family, sorted."""
    plainest: dict[str, tuple[int, bool, int, str, Path]] = {}
    for path in (path for folder in folders for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES):
        try:
            names = ImageFont.truetype(path).getname()
        except OSError:  # a bitmap font, or broken
            continue
        name = " ".join(part for part in names if part)
        family = " ".join(WEIGHTS.sub("", names[0] or path.stem).split())
        described = f"{name} {path.stem}"  # some files are named better than the faces in them
        face = (len(STYLES.findall(described)), PLAIN.search(described) is None, len(name), name, path)
        if not OTHER.search(name):
            plainest[family] = min(face, plainest.get(family, face))
    return [(name, path) for _, (*_, name, path) in sorted(plainest.items())]


def _draw_all(path: Path, size: int) -> list[tuple[int, bytes]]:
    """Return the label and the pixels of each character that a font has: none for a font without all of ``LATIN``."""
    large = size * OVERSAMPLING
    measure = _ink(ImageFont.truetype(path, large, layout_engine=ImageFont.Layout.BASIC), "H")
    if measure is None:
        return []
    font = ImageFont.truetype(path, large * large / 2 / measure.height, layout_engine=ImageFont.Layout.BASIC)
    missing = _ink(font, MISSING)
    drawn = []
    for label, character in enumerate(CHARACTERS):
        ink = _ink(font, character)
        if ink is None or ink == missing:
            if label < len(LATIN):
                return []
        elif max(ink.size) <= large:
            canvas = Image.new("L", (large, large))
            canvas.paste(ink, ((large - ink.width) // 2, (large - ink.height) // 2))
            drawn.append((label, canvas.reduce(OVERSAMPLING).tobytes()))
    return drawn


def _ink(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """Return one character cut out to its ink, or None where that is blank."""
    mask = font.getmask(character, mode="L")
    image = Image.frombytes("L", mask.size, bytes(mask)) if all(mask.size) else None
    box = image and image.getbbox()
    return image.crop(box) if image and box else None
