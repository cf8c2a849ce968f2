"""Make the demo's pictures again: `python demo/photograph/make_pictures.py astronaut.png` (needs Pillow only).

The photograph comes from outside (demo/README.md); its mask, the hat and the hat's mask are drawn here.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

FOLDER = Path(__file__).parent
SIZE = 512
FINE = 4  # drawn four times as large and reduced, for smooth edges

# The woman's outline in the photograph's 512 x 512 pixels: hair and face, then suit and arms down to the helmet.
HEAD = [
    (190, 186), (187, 160), (182, 140), (178, 122), (166, 117), (156, 104), (153, 84), (156, 62), (166, 46), (184, 34),
    (206, 20), (232, 15), (260, 20), (281, 34), (296, 58), (300, 82), (296, 106), (283, 124), (271, 132), (266, 152),
    (257, 174), (250, 192),
]  # fmt: skip
BODY = [
    (186, 150), (150, 152), (126, 168), (113, 192), (104, 212), (66, 238), (46, 276), (34, 320), (19, 396), (24, 460),
    (34, 490), (50, 511), (282, 511), (278, 484), (283, 446), (298, 408), (324, 376), (350, 358), (361, 348),
    (355, 312), (343, 278), (327, 254), (306, 238), (303, 226), (294, 206), (280, 190), (262, 178), (240, 178),
    (190, 174),
]  # fmt: skip


def woman_mask() -> Image.Image:
    """White where she is."""
    mask = Image.new("L", (SIZE * FINE, SIZE * FINE), 0)
    draw = ImageDraw.Draw(mask)
    for outline in (HEAD, BODY):
        draw.polygon([(x * FINE, y * FINE) for x, y in outline], fill=255)
    smooth = mask.filter(ImageFilter.GaussianBlur(2 * FINE)).point(lambda value: 255 * (value > 127))
    return smooth.resize((SIZE, SIZE), Image.Resampling.LANCZOS).point(lambda value: 255 * (value > 127))


def hat() -> tuple[Image.Image, Image.Image]:
    """A knitted hat with stripes and a bobble on a plain ground, and its mask."""
    side = SIZE * FINE
    shape = Image.new("L", (side, side), 0)
    crown = ImageDraw.Draw(shape)
    crown.pieslice(_scaled(106, 132, 406, 520), 180, 360, fill=255)
    mask = shape.copy()
    cloth = Image.new("RGB", (side, side), (178, 38, 52))
    draw = ImageDraw.Draw(cloth)
    for k, colour in enumerate([(240, 232, 214), (34, 62, 110), (240, 232, 214)]):
        top = 196 + 44 * k
        draw.arc(_scaled(20, top, 492, top + 190), 180, 360, fill=colour, width=20 * FINE)
    for x in range(96, 420, 12):  # the knitting's ribs
        draw.line([(x + (256 - x) * 0.25) * FINE, 128 * FINE, x * FINE, 340 * FINE], fill=(120, 20, 34), width=FINE)

    shade = Image.linear_gradient("L").rotate(90).resize((side, side)).point(lambda value: 150 + value * 105 // 255)
    cloth = Image.composite(cloth, Image.new("RGB", (side, side), (40, 8, 16)), shade)
    picture = Image.new("RGB", (side, side), (206, 214, 220))
    floor = ImageDraw.Draw(picture)
    floor.rectangle(_scaled(0, 400, SIZE, SIZE), fill=(186, 194, 200))
    shadow = Image.new("L", (side, side), 0)
    ImageDraw.Draw(shadow).ellipse(_scaled(86, 380, 440, 430), fill=130)
    picture.paste((96, 100, 108), mask=shadow.filter(ImageFilter.GaussianBlur(10 * FINE)))
    picture.paste(cloth, mask=shape)

    draw, outline = ImageDraw.Draw(picture), ImageDraw.Draw(mask)
    brim, bobble = _scaled(90, 322, 422, 402), _scaled(206, 76, 306, 176)
    draw.rounded_rectangle(brim, 30 * FINE, fill=(34, 62, 110))
    for x in range(108, 412, 13):
        draw.line([x * FINE, 326 * FINE, x * FINE, 398 * FINE], fill=(22, 42, 82), width=3 * FINE)
    draw.ellipse(bobble, fill=(240, 232, 214))
    for k in range(9):
        draw.arc(_scaled(210 + 5 * k, 80 + 4 * k, 302 - 5 * k, 172 - 4 * k), 30 * k, 30 * k + 200,
                 fill=(208, 196, 172), width=2 * FINE)  # fmt: skip
    outline.rounded_rectangle(brim, 30 * FINE, fill=255)
    outline.ellipse(bobble, fill=255)
    small = picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return small, mask.resize((SIZE, SIZE), Image.Resampling.LANCZOS).point(lambda value: 255 * (value > 127))


def _scaled(*box: float) -> list[float]:
    return [value * FINE for value in box]


def main(photograph: str) -> None:
    picture = Image.open(photograph).convert("RGB")
    if picture.size != (SIZE, SIZE):
        raise SystemExit(f"{photograph} is {picture.size}, expected {SIZE} x {SIZE} pixels")
    (FOLDER / "image").mkdir(exist_ok=True)
    (FOLDER / "mask").mkdir(exist_ok=True)
    picture.save(FOLDER / "image" / "woman.jpg", quality=90, optimize=True)
    woman_mask().save(FOLDER / "mask" / "woman.png", optimize=True)
    drawn, mask = hat()
    drawn.save(FOLDER / "image" / "hat.jpg", quality=90, optimize=True)
    mask.save(FOLDER / "mask" / "hat.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
