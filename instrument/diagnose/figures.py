"""Pictures for cards of TensorBoard: what each unit of a layer did through time, and scale through depth.

Requirements that shaped them:

* TensorBoard keeps ten images a tag and shows one: each picture holds the whole history;
* a card is 300 to 400 pixels wide and scales without smoothing, which drops rows and columns of pixels: pictures are
  drawn more than twice as large as they are seen, and no stroke that matters is one pixel wide;
* cards are white or dark: pictures bring their own background, which glares on neither;
* one man in twelve does not tell red from green: lightness rises with the value, along blues, and the one
  colour that stands apart is an orange.

Arrays go in, pictures come out; nothing is read or kept here.
"""

from __future__ import annotations

import functools
import io
import math
import struct
import zlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import putchunk
from tensorboard.compat.proto.summary_pb2 import Summary

__all__ = ["MAX_COLUMNS", "MAX_ROWS", "PALETTE", "UNIT_BOX", "as_value", "depth_profile", "sheet", "unit_map"]

FloatArray: TypeAlias = "npt.NDArray[np.float64]"
Color: TypeAlias = "tuple[int, int, int]"
Box: TypeAlias = "tuple[int, int, int, int]"

MAX_ROWS = 256
"""Rows of a unit map; more units are pooled."""

MAX_COLUMNS = 512
"""Columns of a unit map; more steps are pooled."""

WIDTH, HEIGHT = 960, 500
"""The shape that fills a card of TIME SERIES, 415 by 215 pixels."""

UNIT_BOX: Box = (70, 108, 936, 364)
"""Left, top, right and bottom of the cells of a unit map, in pixels; right and bottom are just outside."""

PROFILE_BOX: Box = (134, 128, 926, 392)
MARGIN = 24

BACKGROUND: Color = (30, 33, 40)
FRAME: Color = (92, 98, 110)
TEXT: Color = (240, 242, 246)
SOFT_TEXT: Color = (186, 192, 204)
NEVER: Color = (255, 120, 40)
NO_DATA: Color = (66, 70, 79)
THEN: Color = (150, 156, 168)
NOW: Color = (255, 170, 60)

TITLE_SIZE, TEXT_SIZE = 40, 34


def _srgb_of_oklab(lab: FloatArray) -> npt.NDArray[np.uint8]:
    """Bytes of red, green and blue for OKLab, shape (n, 3).

    Source: Ottosson, "A perceptual color space for image processing", 2020.
    """
    to_cone_roots = np.array([[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728],
                              [1, -0.0894841775, -1.2914855480]])  # fmt: skip
    to_linear = np.array([[4.0767416621, -3.3077115913, 0.2309699292], [-1.2684380046, 2.6097574011, -0.3413193965],
                          [-0.0041960863, -0.7034186147, 1.7076147010]])  # fmt: skip
    linear = np.clip((lab @ to_cone_roots.T) ** 3 @ to_linear.T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    bytes_of: npt.NDArray[np.uint8] = np.round(255 * encoded).astype(np.uint8)
    return bytes_of


def _palette() -> npt.NDArray[np.uint8]:
    """Never in orange, then 255 blues of evenly rising lightness, from navy to nearly white."""
    lightness = np.linspace(0.34, 0.97, 255)
    chroma = np.interp(lightness, [0.34, 0.55, 0.97], [0.13, 0.16, 0.02])
    hue = np.deg2rad(np.interp(lightness, [0.34, 0.97], [268.0, 215.0]))
    blues = _srgb_of_oklab(np.stack((lightness, chroma * np.cos(hue), chroma * np.sin(hue)), axis=1))
    return np.concatenate((np.array([NEVER], np.uint8), blues))


PALETTE = _palette()
"""Colours of rates, shape (256, 3): entry 0 is a rate of exactly zero, 1 to 255 are those above."""


def unit_map(
    name: str,
    steps: Sequence[int],
    rates: npt.ArrayLike,
    words: tuple[str, str] = ("never fires", "always fires"),
) -> Image.Image:
    """Draw how often each unit of a layer fired, through time.

    A row is a unit, sorted by the last rate, then by when it fired last, so that units that died late lie above those
    that died early; the quietest lie at the bottom. A column is a step. A rate of exactly zero has a colour of its own.

    Args:
        name: Name of the layer, the title.
        steps: Step of each column, rising.
        rates: Share of samples on which each unit fired, shape (units, steps), 0 to 1; NaN where nothing is known.
        words: What a rate of zero and of one mean.

    Returns:
        The picture, RGB, 960 by 500 pixels.

    Raises:
        ValueError: There is no unit or no step, or the shapes do not fit each other.

    Example:
        >>> unit_map("blocks.0.relu", [0, 10, 20], [[0.4, 0.2, 0.0], [0.5, 0.5, 0.6]]).size
        (960, 500)
    """
    table = np.asarray(rates, np.float64)
    if table.ndim != 2 or 0 in table.shape or table.shape[1] != len(steps):
        raise ValueError(f"rates have shape {table.shape}; needed is (units, {len(steps)} steps), neither of them zero")
    image, draw = _canvas(name)
    never = int((table[:, -1] == 0).sum())
    if never:
        state = f"{words[0]} at step {steps[-1]}: {never} of {len(table)} ({100 * never / len(table):.0f} %)"
    else:
        state = f"{len(table)} unit{'s' if len(table) != 1 else ''}, each a row"
    _write(draw, (MARGIN, 60), _shortened(state, WIDTH - 2 * MARGIN, TEXT_SIZE), NEVER if never else SOFT_TEXT)

    left, top, right, bottom = UNIT_BOX
    colors = _colors(_pooled(_pooled(_sorted(table), MAX_ROWS).T, MAX_COLUMNS).T)
    cells = Image.fromarray(colors).resize((right - left, bottom - top), Image.Resampling.NEAREST)
    draw.rectangle((left - 3, top - 3, right + 2, bottom + 2), outline=FRAME, width=3)
    image.paste(cells, (left, top))
    _write_upwards(image, (20, (top + bottom) // 2), "quiet … busy", SOFT_TEXT)
    _write_steps(draw, UNIT_BOX, f"step {steps[0]}", f"step {steps[-1]}" if len(steps) > 1 else "")
    _draw_legend(image, draw, words)
    return image


def depth_profile(title: str, names: Sequence[str], then: npt.ArrayLike, now: npt.ArrayLike,
                  steps: tuple[int, int]) -> Image.Image:  # fmt: skip
    """Draw the scale of each layer over its depth, now against an earlier step, in powers of ten.

    Args:
        title: What is drawn, such as "rms of activations by depth".
        names: Names of the layers in the order in which they run.
        then: Positive value of each layer at the earlier step, shape (layers,); what is not positive is left out.
        now: The same at the later step.
        steps: The two steps.

    Returns:
        The picture, RGB, 960 by 500 pixels.

    Raises:
        ValueError: There is no layer, or the shapes do not fit each other.

    Example:
        >>> depth_profile("rms", ["a", "b"], [1.0, 1.1], [1.0, 0.01], (0, 500)).size
        (960, 500)
    """
    series = [_log10(then), _log10(now)]
    if not names or any(values.shape != (len(names),) for values in series):
        shapes = " and ".join(str(values.shape) for values in series)
        raise ValueError(f"values have shapes {shapes}; needed is ({len(names)},), with one layer at least")
    image, draw = _canvas(title)
    low, high = _whole_decades(np.concatenate(series))
    left, top, right, bottom = PROFILE_BOX
    for decade in _ticks(low, high):
        y = round(bottom - (bottom - top) * (decade - low) / (high - low))
        draw.line((left, y, right, y), FRAME, 3)
        _write(draw, (left - 18, y), f"1e{decade}" if decade else "1", SOFT_TEXT, "rm")
    for values, color, width in zip(series, (THEN, NOW), (4, 8), strict=True):
        _draw_series(draw, values, (low, high), color, width)
    last = len(names) - 1
    _write_steps(draw, PROFILE_BOX, names[0], names[last] if last else "")
    _write(draw, (MARGIN, 60), f"step {steps[0]}", THEN)
    start = MARGIN + draw.textlength(f"step {steps[0]}", _font(TEXT_SIZE))
    _write(draw, (start + 40, 60), f"now, step {steps[1]}", NOW)
    _write(draw, (WIDTH // 2, HEIGHT - 30), f"from the first to the last of {len(names)}", SOFT_TEXT, "mm")
    return image


def sheet(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size side by side and below each other, about as many columns as rows.

    Args:
        images: One at least.

    Returns:
        The picture.

    Example:
        >>> sheet([Image.new("RGB", (4, 2))] * 3).size
        (8, 4)
    """
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    together = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), BACKGROUND)
    for index, image in enumerate(images):
        together.paste(image, (index % columns * width, index // columns * height))
    return together


def as_value(tag: str, image: Image.Image) -> Summary.Value:
    """A picture as TensorBoard takes it.

    Args:
        tag: Its tag.
        image: An RGB picture.

    Returns:
        The value, a PNG within.

    Example:
        >>> as_value("Activations.unit_map/relu", Image.new("RGB", (4, 2))).image.width
        4
    """
    encoded = _png(image)
    return Summary.Value(
        tag=tag,
        image=Summary.Image(height=image.height, width=image.width, colorspace=3, encoded_image_string=encoded),
    )


def _png(image: Image.Image) -> bytes:
    """An RGB picture as PNG, as specified by W3C, third edition, 2025.

    `Image.save` keeps the interpreter lock, and the training, for the 9 ms that it takes to pack a picture; `zlib`
    gives it up and packs as well.
    """
    rows = np.asarray(image).reshape(image.height, 3 * image.width)
    # Each row begins with the number of its filter: none, since most of a picture is flat.
    packed = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes(), 1)
    file = io.BytesIO()
    file.write(b"\x89PNG\r\n\x1a\n")
    # Eight bits a channel, red, green and blue; the only ways of packing and filtering; rows in their order.
    putchunk(file, b"IHDR", struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 0))
    putchunk(file, b"IDAT", packed)
    putchunk(file, b"IEND")
    return file.getvalue()


def _sorted(table: FloatArray) -> FloatArray:
    """Rows from the busiest to the quietest at the end; what is unknown counts as quietest."""
    known = np.nan_to_num(table, nan=-1.0)
    last_fired = np.where(known > 0, np.arange(known.shape[1]), -1).max(axis=1)
    order: npt.NDArray[np.intp] = np.lexsort((known.mean(axis=1), last_fired, known[:, -1]))
    return table[order[::-1]]


def _pooled(table: FloatArray, limit: int) -> FloatArray:
    """At most so many rows: means of neighbours, of what is known of them."""
    count = len(table)
    if count <= limit:
        return table
    starts = np.arange(limit) * count // limit
    known = ~np.isnan(table)
    totals = np.add.reduceat(np.where(known, table, 0.0), starts)
    counts = np.add.reduceat(known.astype(np.float64), starts)
    return np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)


def _colors(table: FloatArray) -> npt.NDArray[np.uint8]:
    """Red, green and blue of each rate, shape (rows, columns, 3)."""
    unknown = np.isnan(table)
    rates = np.clip(np.where(unknown, 0.0, table), 0, 1)
    entries = np.where(rates > 0, 1 + np.round(254 * rates), 0).astype(np.intp)
    return np.where(unknown[..., None], np.array(NO_DATA, np.uint8), PALETTE[entries])


def _log10(values: npt.ArrayLike) -> FloatArray:
    array = np.asarray(values, np.float64)
    usable = np.isfinite(array) & (array > 0)
    return np.log10(array, out=np.full(array.shape, np.nan), where=usable)


def _whole_decades(values: FloatArray) -> tuple[int, int]:
    """Powers of ten around all values, two decades apart at least: one factor of two is no cliff."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return -1, 1
    low, high = math.floor(finite.min()), math.ceil(finite.max())
    middle = math.floor((low + high) / 2)
    return min(low, middle - 1), max(high, middle + 1)


def _ticks(low: int, high: int) -> range:
    """Five lines at most."""
    return range(low, high + 1, max(1, math.ceil((high - low) / 4)))


def _draw_series(
    draw: ImageDraw.ImageDraw, values: FloatArray, bounds: tuple[int, int], color: Color, width: int
) -> None:
    left, top, right, bottom = PROFILE_BOX
    low, high = bounds
    spacing = (right - left) / max(1, len(values) - 1)
    before: tuple[float, float] | None = None
    for index, value in enumerate(values.tolist()):
        if math.isnan(value):
            before = None
            continue
        point = (left + index * spacing, bottom - (bottom - top) * (value - low) / (high - low))
        if before is not None:
            draw.line((*before, *point), color, width)
        if spacing >= 3 * width:
            draw.ellipse((point[0] - width, point[1] - width, point[0] + width, point[1] + width), color)
        before = point


def _canvas(title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 10), _shortened(title, WIDTH - 2 * MARGIN, TITLE_SIZE), TEXT, _font(TITLE_SIZE))
    return image, draw


def _draw_legend(image: Image.Image, draw: ImageDraw.ImageDraw, words: tuple[str, str]) -> None:
    """The colour bar: a patch for never, then all rates above, with words at both ends."""
    font, top, bottom = _font(TEXT_SIZE), HEIGHT - 62, HEIGHT - 22
    middle = (top + bottom) // 2
    draw.rectangle((MARGIN, top, MARGIN + 40, bottom - 1), NEVER)
    _write(draw, (MARGIN + 54, middle), words[0], TEXT, "lm")
    _write(draw, (WIDTH - MARGIN, middle), words[1], TEXT, "rm")
    left = round(MARGIN + 54 + draw.textlength(words[0], font)) + 36
    right = round(WIDTH - MARGIN - draw.textlength(words[1], font)) - 18
    if right - left >= 32:
        bar = Image.fromarray(PALETTE[None, 1:]).resize((right - left, bottom - top), Image.Resampling.NEAREST)
        image.paste(bar, (left, top))


def _write_steps(draw: ImageDraw.ImageDraw, box: Box, first: str, last: str) -> None:
    """What stands at both ends of the horizontal axis."""
    left, _, right, bottom = box
    half = (right - left) // 2 - 12
    _write(draw, (left, bottom + 10), _shortened(first, half, TEXT_SIZE), SOFT_TEXT)
    _write(draw, (right, bottom + 10), _shortened(last, half, TEXT_SIZE), SOFT_TEXT, "ra")


def _write(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, color: Color, anchor: str = "la") -> None:
    draw.text(place, text, color, _font(TEXT_SIZE), anchor)


def _write_upwards(image: Image.Image, place: tuple[int, int], text: str, color: Color) -> None:
    """Write from bottom to top, with the left edge and the middle at a place."""
    width, height = round(_font(TEXT_SIZE).getlength(text)) + 4, TEXT_SIZE + 6
    label = Image.new("RGB", (width, height), BACKGROUND)
    _write(ImageDraw.Draw(label), (2, height // 2), text, color, "lm")
    image.paste(label.transpose(Image.Transpose.ROTATE_90), (place[0], place[1] - width // 2))


def _shortened(text: str, width: int, size: int) -> str:
    """The end of a text that fits, since the end of a name says most."""
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("…" + text) > width:
        text = text[1:]
    return "…" + text


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that pillow brings along."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "pillow was built without FreeType"
    return font
