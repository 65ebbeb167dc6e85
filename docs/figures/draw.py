"""Draw the figures of the method pages: ``python docs/figures/draw.py`` writes the SVG files beside this one.

They go into the page itself, so that they follow its colours, light and dark (docs/_static/site.css): what is old is
drawn in ``--old``, what is new in ``--new``, all else in the text's colour or in ``--soft``.
"""

import math
import random
from pathlib import Path

OLD, NEW, SOFT, INK = "var(--old)", "var(--new)", "var(--soft)", "currentColor"


class Drawing:
    """A figure ``width`` by ``height``; ``title`` is what a screen reader says."""

    def __init__(self, title, width=440, height=200):
        self.start = (
            f'<svg class="figure" role="img" aria-label="{title}" viewBox="0 0 {width} {height}" '
            'xmlns="http://www.w3.org/2000/svg" fill="none" stroke-linecap="round">'
        )
        self.parts = []

    def add(self, tag, text=None, **attributes):
        shown = " ".join(f'{name.replace("_", "-")}="{_short(value)}"' for name, value in attributes.items())
        self.parts.append(f"<{tag} {shown}/>" if text is None else f"<{tag} {shown}>{text}</{tag}>")

    def text(self, x, y, text, color=INK, anchor="middle", size=13, weight="normal"):
        self.add("text", text, x=x, y=y, fill=color, text_anchor=anchor, font_size=size, font_weight=weight)

    def dot(self, x, y, color, radius=4, hollow=False):
        fill = "none" if hollow else color
        self.add("circle", cx=x, cy=y, r=radius, fill=fill, stroke=color, stroke_width=1.5)

    def cloud(self, x, y, color, count=9, spread=16, seed=0):
        draw = random.Random(f"{x} {y} {seed}")
        spots = [(x + draw.gauss(0, spread * 0.7), y + draw.gauss(0, spread * 0.7)) for _ in range(count)]
        for spot in spots:
            self.dot(*spot, color, radius=3)
        return spots

    def ring(self, x, y, radius, color=SOFT, dashed=True):
        self.add(
            "circle", cx=x, cy=y, r=radius, stroke=color, stroke_width=1.5, stroke_dasharray="4 4" if dashed else 0
        )

    def line(self, x1, y1, x2, y2, color=INK, width=1.5, dashed=False):
        self.add(
            "line",
            x1=x1,
            y1=y1,
            x2=x2,
            y2=y2,
            stroke=color,
            stroke_width=width,
            stroke_dasharray="4 4" if dashed else 0,
        )

    def arrow(self, x1, y1, x2, y2, color=INK, width=1.5, dashed=False):
        angle = math.atan2(y2 - y1, x2 - x1)
        self.line(x1, y1, x2 - 4 * math.cos(angle), y2 - 4 * math.sin(angle), color, width, dashed)
        tips = [(x2 - 8 * math.cos(angle + turn), y2 - 8 * math.sin(angle + turn)) for turn in (0.45, -0.45)]
        points = " ".join(f"{_short(x)},{_short(y)}" for x, y in [(x2, y2), *tips])
        self.add("polygon", points=points, fill=color)

    def diamond(self, x, y, color, size=7):
        self.add("polygon", points=f"{x},{y - size} {x + size},{y} {x},{y + size} {x - size},{y}", fill=color)

    def box(self, x, y, width, height, *lines, color=INK, dashed=False):
        dash = "4 4" if dashed else 0
        self.add(
            "rect", x=x, y=y, width=width, height=height, rx=6, stroke=color, stroke_width=1.5, stroke_dasharray=dash
        )
        for row, line in enumerate(lines):
            self.text(x + width / 2, y + height / 2 + 4.5 + 16 * (row - (len(lines) - 1) / 2), line, color)

    def write(self, name):
        path = Path(__file__).parent / f"{name}.svg"
        path.write_text("\n".join([self.start, *self.parts, "</svg>"]) + "\n")


def _short(value):
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def upgrade():
    figure = Drawing("Old queries find the old gallery; a new model alone does not; a compatible one does", height=210)
    figure.box(330, 20, 90, 170, "the old", "gallery,", "untouched", color=OLD)
    rows = [
        ("old model", OLD, "today"),
        ("new model, alone", SOFT, "finds nothing"),
        ("new model, fitted", NEW, "finds it too"),
    ]
    for row, (model, color, result) in enumerate(rows):
        y = 22 + row * 62
        figure.box(10, y, 140, 42, model, color=color)
        figure.arrow(154, y + 21, 326, y + 21, color, dashed=row == 1)
        figure.text(240, y + 14, result, color)
    return figure


def bct():
    figure = Drawing("New embeddings are drawn onto the direction of their class among the old vectors")
    starts = {
        (95, 70): [(150, 120), (40, 125)],
        (330, 60): [(280, 115), (395, 110)],
        (215, 120): [(170, 165), (265, 165)],
    }
    for (x, y), new in starts.items():
        figure.cloud(x, y, OLD, spread=24)
        for spot in new:
            figure.dot(*spot, NEW, hollow=True)
            figure.arrow(*_between(spot, (x, y), 8), *_between((x, y), spot, 12), NEW)
        figure.diamond(x, y, INK)
    _legend(figure, 190, (OLD, "old vectors"), (INK, "class direction"), (NEW, "new embeddings"))
    return figure


def unibct_mixbct():
    figure = Drawing("UniBCT cleans its class prototypes; MixBCT puts old embeddings into the batch", height=190)
    figure.text(105, 20, "UniBCT", weight="bold")
    figure.cloud(80, 80, OLD, count=10, spread=22)
    for spot in [(165, 60), (175, 75)]:
        figure.dot(*spot, OLD, radius=3, hollow=True)
    figure.text(170, 45, "noise", SOFT)
    figure.diamond(115, 92, SOFT)
    figure.arrow(110, 92, 92, 84, INK)
    figure.diamond(80, 80, INK)
    figure.text(105, 140, "the prototype leaves")
    figure.text(105, 157, "what is noise behind")
    figure.text(335, 20, "MixBCT", weight="bold")
    for place in range(10):
        color = OLD if place in (2, 5, 8) else NEW
        figure.add("rect", x=243 + place * 19, y=50, width=14, height=34, rx=3, fill=color)
    figure.text(335, 42, "a batch", SOFT)
    figure.arrow(335, 88, 335, 108)
    figure.box(265, 112, 140, 28, "one classifier")
    figure.text(335, 165, "learns new and old rows")
    return figure


def lce():
    figure = Drawing("Class weights turn onto the old centres; embeddings stay within the old boundary", height=220)
    center, reach = (220, 175), 135
    for angle, turn in ((150, -24), (95, 20), (35, 22)):
        spread = 14
        (x1, y1), (x2, y2) = (_polar(center, reach + 10, angle + side) for side in (spread, -spread))
        corner, radius = f"M{center[0]} {center[1]}", reach + 10
        path = f"{corner} L{x1:.1f} {y1:.1f} A{radius} {radius} 0 0 1 {x2:.1f} {y2:.1f} Z"
        figure.add("path", d=path, fill=OLD, fill_opacity=0.15)
        figure.arrow(*center, *_polar(center, reach, angle), OLD, width=2.5)
        figure.arrow(*center, *_polar(center, reach - 25, angle + turn), NEW, width=2)
        figure.arrow(
            *_polar(center, reach - 22, angle + turn * 0.85), *_polar(center, reach - 20, angle + turn * 0.15), INK
        )
    _legend(figure, 210, (OLD, "old centre, boundary"), (NEW, "class weight"), (INK, "alignment"))
    return figure


def pairs():
    figure = Drawing("A new embedding is pulled to old ones of its class and pushed from old ones of others")
    anchor = (215, 95)
    figure.dot(*anchor, NEW, radius=6)
    figure.text(215, 122, "new query", NEW)
    for spot in ((80, 60), (75, 105), (100, 85)):
        figure.dot(*spot, OLD)
        figure.arrow(*_between(anchor, spot, 10), *_between(spot, anchor, 9), NEW)
    figure.text(70, 145, "old, same class", OLD)
    for spot in ((340, 55), (360, 95), (330, 115)):
        figure.dot(*spot, OLD, hollow=True)
        figure.line(*_between(anchor, spot, 10), *_between(spot, anchor, 9), SOFT, dashed=True)
    figure.text(350, 145, "old, other classes", OLD)
    figure.text(215, 180, "each new embedding is a query of the old gallery", INK)
    return figure


def points():
    figure = Drawing("Every new embedding is pulled onto the old embedding of the same image, or into a ball around it")
    for place, (x, y) in enumerate(((70, 70), (180, 110), (290, 65), (385, 110))):
        figure.ring(x, y, 30)
        figure.dot(x, y, OLD, radius=5)
        turn = place * 1.9
        spot = (x + 46 * math.cos(turn), y + 46 * math.sin(turn))
        figure.dot(*spot, NEW, radius=5)
        figure.arrow(*_between(spot, (x, y), 8), *_between((x, y), spot, 9), NEW)
    _legend(figure, 190, (OLD, "old embedding"), (NEW, "new, of the same image"), (SOFT, "threshold"))
    return figure


def advbct():
    figure = Drawing("A discriminator is to be fooled, and embeddings stay within their class's boundary", height=190)
    figure.cloud(100, 85, OLD, count=12, spread=26)
    figure.cloud(112, 92, NEW, count=12, spread=26, seed=1)
    figure.ring(105, 88, 60)
    figure.text(105, 172, "boundary of a class", SOFT)
    figure.arrow(172, 88, 252, 88)
    figure.box(256, 60, 160, 56, "discriminator:", "old or new?")
    figure.text(336, 140, "the new model learns")
    figure.text(336, 157, "to leave it guessing")
    return figure


def head():
    figure = Drawing("One trunk, two parts: one in the old space, one free", height=190)
    figure.box(10, 75, 70, 40, "image")
    figure.arrow(84, 95, 108, 95)
    figure.box(112, 75, 70, 40, "trunk", color=NEW)
    figure.arrow(186, 88, 222, 58)
    figure.arrow(186, 102, 222, 132)
    figure.box(226, 32, 90, 44, "old part", color=OLD)
    figure.box(226, 114, 90, 44, "free part", color=NEW)
    figure.arrow(320, 54, 346, 54, OLD)
    figure.arrow(320, 136, 346, 136, NEW)
    figure.text(352, 50, "searches the", OLD, "start")
    figure.text(352, 66, "old gallery", OLD, "start")
    figure.text(352, 132, "your loss;", NEW, "start")
    figure.text(352, 148, "new vectors", NEW, "start")
    figure.text(271, 20, "learns old embeddings", SOFT)
    figure.text(271, 178, "learns as before", SOFT)
    return figure


def fct():
    figure = Drawing(
        "Stored old vectors go through a learned map into the new space; new queries search there", height=190
    )
    figure.box(10, 25, 120, 40, "old vectors", color=OLD)
    figure.box(10, 85, 120, 40, "side-information", color=SOFT, dashed=True)
    figure.arrow(134, 45, 178, 68)
    figure.arrow(134, 105, 178, 82, SOFT, dashed=True)
    figure.box(182, 50, 70, 50, "map h")
    figure.arrow(256, 75, 298, 75)
    figure.box(302, 50, 128, 50, "the gallery, in", "the new space", color=NEW)
    figure.arrow(366, 140, 366, 104, NEW)
    figure.text(366, 158, "new queries", NEW)
    figure.text(217, 122, "trained on pairs,", SOFT)
    figure.text(217, 138, "no images read", SOFT)
    return figure


def transformations():
    figure = Drawing("An orthogonal map turns a space, a linear one shears it too, a residual one bends it", height=170)
    maps = (
        ("orthogonal", lambda x, y: (0.87 * x - 0.5 * y, 0.5 * x + 0.87 * y)),
        ("linear", lambda x, y: (1.15 * x + 0.45 * y, 0.2 * x + 0.7 * y)),
        ("network", lambda x, y: (x + 10 * math.sin(y / 18), y + 9 * math.sin(x / 16))),
    )
    for place, (name, mapped) in enumerate(maps):
        middle = 75 + 145 * place
        for step in range(-40, 41, 20):
            for swap in (False, True):
                line = [(step, at) if swap else (at, step) for at in range(-40, 41, 5)]
                spots = [mapped(*spot) for spot in line]
                path = "M" + " L".join(f"{middle + x:.1f} {72 + y:.1f}" for x, y in spots)
                figure.add("path", d=path, stroke=OLD if swap else NEW, stroke_width=1.3)
        figure.text(middle, 155, name)
    return figure


def query_blend():
    figure = Drawing("The blended query lies between the old query and the rotated new one", height=220)
    center, reach = (120, 190), 160
    start, end = _polar(center, reach, 100), _polar(center, reach, 10)
    figure.add(
        "path",
        d=f"M{start[0]:.1f} {start[1]:.1f} A{reach} {reach} 0 0 1 {end[0]:.1f} {end[1]:.1f}",
        stroke=SOFT,
        stroke_dasharray="4 4",
    )
    for angle, color, name in (
        (80, OLD, "old query u"),
        (55, INK, "blend q, at share a"),
        (22, NEW, "new query, rotated: v"),
    ):
        tip = _polar(center, reach, angle)
        figure.arrow(*center, *tip, color, width=2.5)
        figure.text(tip[0] + 8, tip[1] + 2, name, color, "start")
    return figure


def two_stages():
    figure = Drawing("The old index proposes candidates, the new model orders them", height=190)
    figure.box(10, 30, 100, 40, "old query", color=OLD)
    figure.arrow(114, 50, 148, 50, OLD)
    figure.box(152, 30, 110, 40, "old index", color=OLD)
    figure.arrow(266, 50, 300, 50, OLD)
    figure.box(304, 30, 126, 40, "N candidates", color=OLD)
    figure.arrow(367, 74, 367, 118)
    figure.box(304, 122, 126, 40, "in new order", color=NEW)
    figure.box(10, 122, 100, 40, "new query", color=NEW)
    figure.arrow(114, 142, 300, 142, NEW)
    figure.text(207, 132, "new vectors of N items,", SOFT)
    figure.text(207, 162, "kept once made", SOFT)
    return figure


def mixed_gallery():
    figure = Drawing("Cosines of old and new rows are calibrated to one scale", height=190)
    for row in range(7):
        color = NEW if row in (1, 4, 5) else OLD
        figure.add("rect", x=12, y=22 + row * 20, width=90, height=14, rx=3, fill=color)
    figure.text(57, 180, "one index", INK)
    figure.arrow(112, 60, 176, 60, OLD)
    figure.arrow(112, 120, 176, 120, NEW)
    figure.box(180, 38, 110, 44, "cosine to", "log-odds", color=OLD)
    figure.box(180, 98, 110, 44, "cosine to", "log-odds", color=NEW)
    figure.arrow(294, 60, 336, 82, OLD)
    figure.arrow(294, 120, 336, 98, NEW)
    figure.box(340, 66, 90, 48, "one ranking")
    return figure


def cores():
    figure = Drawing("Old and new classes lie at the corners of one fixed simplex, and one corner is free", height=200)
    corners = [_polar((220, 108), 78, degrees) for degrees in (90, 210, 330)]
    for one, other in ((0, 1), (1, 2), (2, 0)):
        figure.line(*corners[one], *corners[other], SOFT, dashed=True)
    for corner in corners[:2]:
        figure.cloud(*corner, OLD, count=7, spread=13)
        figure.cloud(*corner, NEW, count=7, spread=13, seed=1)
    figure.ring(*corners[2], 20)
    figure.text(corners[2][0] + 30, corners[2][1] + 5, "free", SOFT, "start")
    _legend(figure, 190, (OLD, "old model"), (NEW, "new model"))
    return figure


def matryoshka():
    figure = Drawing(
        "The first coordinates of a new embedding search the old gallery, all of them the new one", height=170
    )
    figure.add("rect", x=20, y=70, width=90, height=26, rx=3, fill=OLD)
    figure.add("rect", x=110, y=70, width=190, height=26, rx=3, fill=NEW)
    figure.text(160, 118, "one new embedding of 512 numbers", SOFT)
    figure.arrow(65, 66, 330, 34, OLD)
    figure.text(150, 36, "the first 128", OLD)
    figure.box(334, 12, 96, 44, "old gallery", "128 wide", color=OLD)
    figure.arrow(300, 83, 330, 128, NEW)
    figure.box(334, 108, 96, 44, "new gallery", "512 wide", color=NEW)
    return figure


def chain():
    figure = Drawing("Only the newest embeddings are stored; maps bring them back to each older version", height=170)
    versions = [(18, "version 1", OLD, True), (170, "version 2", OLD, True), (322, "version 3", NEW, False)]
    for x, name, color, dashed in versions:
        figure.box(x, 66, 100, 44, *((name,) if dashed else (name, "stored")), color=color, dashed=dashed)
    for x, name in ((322, "B\u2083"), (170, "B\u2082")):
        figure.arrow(x - 4, 88, x - 48, 88, NEW)
        figure.text(x - 26, 78, name, NEW)
    figure.text(144, 142, "served by maps, no vector kept", SOFT)
    figure.text(372, 142, "new model", SOFT)
    figure.text(220, 34, "who uses an older version gets it by the maps", INK)
    return figure


def _between(start, end, distance):
    """Return the point ``distance`` from ``start`` on the way to ``end``."""
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    return start[0] + distance * math.cos(angle), start[1] + distance * math.sin(angle)


def _polar(center, radius, degrees):
    return center[0] + radius * math.cos(math.radians(degrees)), center[1] - radius * math.sin(math.radians(degrees))


def _legend(figure, y, *entries):
    widths = [22 + 6.6 * len(name) for _, name in entries]
    x = (440 - sum(widths)) / 2
    for width, (color, name) in zip(widths, entries, strict=True):
        figure.dot(x + 5, y - 4.5, color)
        figure.text(x + 14, y, name, color, "start", size=12)
        x += width


FIGURES = (
    upgrade,
    bct,
    unibct_mixbct,
    lce,
    pairs,
    points,
    advbct,
    head,
    fct,
    transformations,
    query_blend,
    two_stages,
    mixed_gallery,
    matryoshka,
    cores,
    chain,
)

if __name__ == "__main__":
    for figure in FIGURES:
        figure().write(figure.__name__)
