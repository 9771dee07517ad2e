"""Pictures and clips: shapes on plain, noisy or graded ground, written numbers, and one shape that moves or changes.

Everything is drawn with Pillow from a `random.Random`, at any size. Places and sizes are in parts of the picture:
x to the right, y downwards, 0 to 1; a radius in parts of the shorter side.
"""

from __future__ import annotations

import colorsys
import functools
import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFont
from words import COLOURS, SHAPES, Thing

Pixels = NDArray[np.uint8]  # [height, width, 3]
Rgb = tuple[int, int, int]
Action = Literal["left", "right", "up", "down", "grow", "shrink", "change", "still"]
ACTIONS: tuple[Action, ...] = ("left", "right", "up", "down", "grow", "shrink", "change", "still")

# Of each colour: hue (degrees), saturation, value: what people would still call by its name.
RANGES = {
    "red": ((-9, 8), (0.78, 1.0), (0.68, 1.0)),
    "orange": ((22, 38), (0.85, 1.0), (0.9, 1.0)),
    "yellow": ((46, 63), (0.75, 1.0), (0.88, 1.0)),
    "green": ((95, 145), (0.6, 1.0), (0.42, 1.0)),
    "blue": ((210, 244), (0.75, 1.0), (0.55, 1.0)),
    "purple": ((272, 305), (0.6, 1.0), (0.4, 0.85)),
    "black": ((0, 360), (0.0, 0.3), (0.0, 0.12)),
    "white": ((0, 360), (0.0, 0.04), (0.95, 1.0)),
}
PURE: dict[str, tuple[Rgb, ...]] = {
    "red": ((255, 0, 0), (220, 20, 30)),
    "orange": ((255, 165, 0), (255, 140, 0)),
    "yellow": ((255, 255, 0),),
    "green": ((0, 128, 0), (0, 255, 0), (0, 200, 0)),
    "blue": ((0, 0, 255), (30, 80, 220)),
    "purple": ((128, 0, 128), (160, 32, 240)),
    "black": ((0, 0, 0),),
    "white": ((255, 255, 255),),
}
CONTRAST = 120  # sum over channels between an object and its ground
SUPER = 2  # shapes are drawn so much larger, and scaled down


@dataclass(frozen=True, slots=True)
class Placed:
    """An object of a picture."""

    thing: Thing
    x: float
    y: float
    radius: float
    rgb: Rgb
    turn: float = 0.0  # radians


@dataclass(frozen=True, slots=True)
class Picture:
    pixels: Pixels
    objects: tuple[Placed, ...] = ()
    number: str = ""
    digits: tuple[tuple[float, float], ...] = ()  # centres of the number's digits


@dataclass(frozen=True, slots=True)
class Clip:
    frames: NDArray[np.uint8]  # [frames, height, width, 3]
    seconds: float
    first: Thing
    last: Thing
    action: Action
    path: tuple[Placed, ...]  # of every frame


def random_rgb(rng: random.Random, colour: str) -> Rgb:
    if rng.random() < 0.3:
        return rng.choice(PURE[colour])
    (h0, h1), saturation, value = RANGES[colour]
    rgb = colorsys.hsv_to_rgb(rng.uniform(h0, h1) % 360 / 360, rng.uniform(*saturation), rng.uniform(*value))
    return tuple(round(255 * part) for part in rgb)  # type: ignore[return-value]


def contrast(one: Rgb, other: Rgb) -> int:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def random_ground(rng: random.Random, avoid: Sequence[Rgb]) -> Rgb:
    """A colour that stands out from `avoid`: white, black, grey or any tint."""
    for _ in range(100):
        kind = rng.random()
        if kind < 0.3:
            rgb = rng.choice(((255, 255, 255), (0, 0, 0), (240, 240, 240), (128, 128, 128)))
        elif kind < 0.55:
            rgb = (rng.randrange(256),) * 3
        else:
            tint = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.35), rng.uniform(0.15, 1.0))
            rgb = tuple(round(255 * part) for part in tint)
        if all(contrast(rgb, one) >= CONTRAST for one in avoid):
            return rgb
    return (128, 128, 128) if all(contrast((128,) * 3, one) >= CONTRAST for one in avoid) else (200, 220, 210)


def ground(rng: random.Random, height: int, width: int, avoid: Sequence[Rgb], style: str = "") -> Image.Image:
    style = style or rng.choice(("plain", "plain", "noise", "gradient"))
    first = random_ground(rng, avoid)
    if style == "gradient":
        second = random_ground(rng, avoid)
        middle: Rgb = tuple((a + b) // 2 for a, b in zip(first, second, strict=True))  # type: ignore[assignment]
        if any(contrast(middle, one) < CONTRAST for one in avoid):
            second = tuple(min(255, max(0, part + rng.randrange(-30, 31))) for part in first)  # type: ignore[assignment]
        ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((width, height))
        return Image.composite(
            Image.new("RGB", (width, height), first), Image.new("RGB", (width, height), second), ramp
        )
    image = Image.new("RGB", (width, height), first)
    if style == "noise":
        cell = rng.choice((1, 1, 2, 4))
        size = (max(1, width // cell), max(1, height // cell))
        grain = np.random.default_rng(rng.getrandbits(32)).normal(128, rng.uniform(8, 34), size[::-1])
        noise = Image.fromarray(grain.clip(0, 255).astype(np.uint8)).resize((width, height))
        image = ImageChops.add(image, Image.merge("RGB", (noise,) * 3), offset=-128)
    return image


def outline(shape: str, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    """Corners of a polygon about (x, y), in pixels."""
    if shape == "cross":
        arm = radius * 0.32
        corners = [
            (-arm, -radius),
            (arm, -radius),
            (arm, -arm),
            (radius, -arm),
            (radius, arm),
            (arm, arm),
            (arm, radius),
            (-arm, radius),
            (-arm, arm),
            (-radius, arm),
            (-radius, -arm),
            (-arm, -arm),
        ]
    elif shape == "square":
        side = radius * 0.86
        corners = [(-side, -side), (side, -side), (side, side), (-side, side)]
    elif shape == "diamond":
        corners = [(0, -radius), (radius * 0.8, 0), (0, radius), (-radius * 0.8, 0)]
    elif shape == "triangle":
        corners = [(0, -radius), (radius * 0.95, radius * 0.8), (-radius * 0.95, radius * 0.8)]
    else:  # star
        corners = [
            (
                (radius if i % 2 == 0 else radius * 0.42) * math.sin(i * math.pi / 5),
                -(radius if i % 2 == 0 else radius * 0.42) * math.cos(i * math.pi / 5),
            )
            for i in range(10)
        ]
    cos, sin = math.cos(turn), math.sin(turn)
    return [(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in corners]


def paint(image: Image.Image, objects: Sequence[Placed]) -> Image.Image:
    width, height = image.size
    for placed in objects:
        mask = Image.new("L", (width * SUPER, height * SUPER))
        draw = ImageDraw.Draw(mask)
        x, y = placed.x * width * SUPER, placed.y * height * SUPER
        radius = placed.radius * min(width, height) * SUPER
        if placed.thing.shape == "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        else:
            draw.polygon(outline(placed.thing.shape, x, y, radius, placed.turn), fill=255)
        image.paste(placed.rgb, mask=mask.reduce(SUPER))
    return image


def worn(rng: random.Random, image: Image.Image) -> Pixels:
    """As it is, or through JPEG or WebP, which change pixels a little."""
    kind = rng.random()
    if kind < 0.28:
        image = through(image, "JPEG", quality=rng.randrange(55, 96))
    elif kind < 0.35:
        image = through(image, "WEBP", quality=rng.randrange(55, 96), method=0)
    return np.asarray(image)


def through(image: Image.Image, name: str, **options: int) -> Image.Image:
    """What a file of that format keeps of it."""
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return Image.open(buffer).convert("RGB")


def random_size(rng: random.Random, aspect: float | None = None) -> tuple[int, int]:
    """(height, width) of 96 to 420 pixels."""
    if aspect is None:
        aspect = rng.choice((1.0, 1.0, 1.0, 4 / 3, 3 / 4, 16 / 9, 9 / 16))
    area = rng.uniform(110, 260) ** 2
    return max(64, round(math.sqrt(area / aspect))), max(64, round(math.sqrt(area * aspect)))


def random_things(rng: random.Random, count: int, alike: float = 0.06) -> list[Thing]:
    """Mostly different in colour and shape; some alike in one, few in both (`alike` of those after the first)."""
    things: list[Thing] = []
    while len(things) < count:
        thing = Thing(rng.choice(list(COLOURS)), rng.choice(list(SHAPES)))
        if things and rng.random() < 0.2:
            thing = Thing(thing.colour, things[-1].shape)
        elif things and rng.random() < 0.15:
            thing = Thing(things[-1].colour, thing.shape)
        if things and rng.random() < alike:
            thing = things[-1]
        elif thing in things:
            continue
        things.append(thing)
    return things


def place(rng: random.Random, things: Sequence[Thing], aspect: float, *, wide: bool = False) -> list[Placed]:
    """Somewhere, without touching. `aspect`: width by height."""
    unit_x, unit_y = min(1, 1 / aspect), min(1, aspect)  # a radius of 1 in parts of the width and of the height
    low, high = ((0.13, 0.42), (0.12, 0.25), (0.115, 0.19))[min(len(things), 3) - 1]
    low = low * 0.75 if wide else low
    for shrink in range(60):
        out: list[Placed] = []
        for thing in things:
            radius = max(low, rng.uniform(low, high) * 0.985**shrink)
            x = rng.uniform(radius * unit_x, 1 - radius * unit_x)
            y = rng.uniform(radius * unit_y, 1 - radius * unit_y)
            if any(math.hypot((x - o.x) / unit_x, (y - o.y) / unit_y) < 1.12 * (radius + o.radius) for o in out):
                break
            turn = rng.uniform(-0.16, 0.16) if rng.random() < 0.5 else 0.0
            out.append(Placed(thing, x, y, radius, random_rgb(rng, thing.colour), turn))
        if len(out) == len(things):
            return out
    return place(rng, things, aspect, wide=wide)


def draw_picture(
    rng: random.Random,
    *,
    count: int = 0,
    size: tuple[int, int] | None = None,
    things: Sequence[Thing] = (),
    style: str = "",
    wide: bool = False,
) -> Picture:
    """Of `things`, or of `count` random ones (0: one to three). `wide`: smaller ones and more alike than usual."""
    things = things or random_things(rng, count or rng.choice((1, 2, 2, 3, 3)), 0.3 if wide else 0.06)
    height, width = size or random_size(rng)
    objects = place(rng, things, width / height, wide=wide)
    image = ground(rng, height, width, [placed.rgb for placed in objects], style)
    return Picture(worn(rng, paint(image, objects)), tuple(sorted(objects, key=lambda placed: placed.x)))


@functools.cache
def fonts() -> tuple[str, ...]:
    """Upright text fonts of this machine, beside the one that Pillow brings (""), which counts several times."""
    found = sorted(
        str(file)
        for file in Path("/usr/share/fonts").rglob("*.ttf")
        if not any(word in file.name for word in ("Italic", "Oblique", "Mono-Ob", "Math", "Symbol", "Emoji"))
    )
    return ("",) * max(1, len(found) // 2) + tuple(found)


@functools.lru_cache(256)
def font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)


def draw_number(
    rng: random.Random, *, number: str = "", size: tuple[int, int] | None = None, wide: bool = False
) -> Picture:
    """One to three digits in any font, upright but for a few degrees. `wide`: smaller ones too."""
    number = number or str(rng.randrange(10 ** rng.choice((1, 2, 3, 3))))
    height, width = size or random_size(rng, rng.choice((1.0, 1.0, 4 / 3, 16 / 9)))
    ink = random_rgb(rng, rng.choice(list(COLOURS)))
    name = rng.choice(fonts())
    probe = font(name, 100)
    left, top, right, bottom = probe.getbbox(number)
    largest = min(0.86 * width / (right - left), 0.8 * height / (bottom - top))
    scale = largest * rng.uniform(0.35 if wide else 0.6, 1.0)
    face = font(name, max(16, round(100 * scale)))
    left, top, right, bottom = face.getbbox(number)
    x = rng.uniform(0.04 * width, max(0.05 * width, 0.96 * width - (right - left))) - left
    y = rng.uniform(0.04 * height, max(0.05 * height, 0.96 * height - (bottom - top))) - top
    image = ground(rng, height, width, [ink])
    mask = Image.new("L", (width, height))
    bold = rng.choice((0, 0, 0, 1, 2)) if scale > 0.4 else 0
    ImageDraw.Draw(mask).text((x, y), number, fill=255, font=face, stroke_width=bold)
    centres = []
    for index in range(len(number)):
        before, through = face.getlength(number[:index]), face.getlength(number[: index + 1])
        centres.append(((x + (before + through) / 2) / width, (y + (top + bottom) / 2) / height))
    if rng.random() < 0.4:
        mask = mask.rotate(rng.uniform(-7, 7), Image.Resampling.BILINEAR)
    image.paste(ink, mask=mask)
    return Picture(worn(rng, image), number=number, digits=tuple(centres))


def _way(rng: random.Random, edge: float, *, wide: bool) -> tuple[float, float]:
    """From where to where something goes that keeps so far from both edges."""
    if not wide:
        return edge + rng.uniform(0, 0.1), 1 - edge - rng.uniform(0, 0.1)
    length = (1 - 2 * edge) * rng.uniform(0.4, 1.0)
    start = rng.uniform(edge, 1 - edge - length)
    return start, start + length


def draw_clip(
    rng: random.Random,
    *,
    frames: int = 8,
    action: Action | None = None,
    size: tuple[int, int] | None = None,
    seconds: float = 0.0,
    wide: bool = False,
) -> Clip:
    """One object that goes its way evenly from the first frame to the last. `wide`: of any size, on part of the way."""
    action = action or rng.choice(ACTIONS[:-1] * 3 + ACTIONS[-1:])
    height, width = size or tuple(int(side * 0.75) for side in random_size(rng, rng.choice((1.0, 1.0, 4 / 3, 16 / 9))))
    aspect = width / height
    unit_x, unit_y = min(1, 1 / aspect), min(1, aspect)
    (thing,) = random_things(rng, 1)
    rgb = random_rgb(rng, thing.colour)
    last, last_rgb = thing, rgb
    if action == "change":
        colour = rng.choice([other for other in COLOURS if other != thing.colour])
        last, last_rgb = Thing(colour, thing.shape), random_rgb(rng, colour)
    radius = last_radius = rng.uniform(0.1 if wide else 0.16, 0.3)
    if action in ("grow", "shrink"):
        radius, last_radius = rng.uniform(0.12, 0.18), rng.uniform(0.3, 0.44)
        if wide:
            radius = rng.uniform(0.09, 0.22)
            last_radius = radius * rng.uniform(1.5, 2.2)
        if action == "shrink":
            radius, last_radius = last_radius, radius
    edge = max(radius, last_radius)
    edge_x, edge_y = edge * unit_x, edge * unit_y
    x0 = x1 = rng.uniform(edge_x, 1 - edge_x)
    y0 = y1 = rng.uniform(edge_y, 1 - edge_y)
    if action in ("left", "right"):
        x0, x1 = _way(rng, edge_x, wide=wide)
        x0, x1 = (x1, x0) if action == "left" else (x0, x1)
        y1 = min(1 - edge_y, max(edge_y, y0 + rng.uniform(-0.05, 0.05)))
    elif action in ("up", "down"):
        y0, y1 = _way(rng, edge_y, wide=wide)
        y0, y1 = (y1, y0) if action == "up" else (y0, y1)
        x1 = min(1 - edge_x, max(edge_x, x0 + rng.uniform(-0.05, 0.05)))
    turn = rng.uniform(-0.12, 0.12)
    sudden = rng.random() < 0.5
    path = []
    for index in range(frames):
        part = index / (frames - 1)
        mixed = float(part >= 0.5) if action == "change" and sudden else part
        colour_now: Rgb = tuple(round(a + (b - a) * mixed) for a, b in zip(rgb, last_rgb, strict=True))  # type: ignore[assignment]
        path.append(
            Placed(
                thing if mixed < 0.5 else last,
                x0 + (x1 - x0) * part,
                y0 + (y1 - y0) * part,
                radius + (last_radius - radius) * part,
                colour_now,
                turn,
            )
        )
    back = ground(rng, height, width, [rgb, last_rgb])
    worn_too = rng.random() < 0.5
    quality = rng.randrange(45, 95)
    images = []
    for placed in path:
        image = paint(back.copy(), [placed])
        if worn_too:
            image = through(image, "JPEG", quality=quality)
        images.append(np.asarray(image))
    return Clip(np.stack(images), seconds or rng.uniform(1.0, 4.0), thing, last, action, tuple(path))
