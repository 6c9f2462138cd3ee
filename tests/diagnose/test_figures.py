"""Pictures, pixel by pixel: known rates at known places, in colours that everybody can tell apart."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from instrument.diagnose.figures import (
    BACKGROUND,
    MAX_COLUMNS,
    MAX_ROWS,
    NEVER,
    NO_DATA,
    NOW,
    PALETTE,
    PROFILE_BOX,
    SOFT_TEXT,
    TEXT,
    UNIT_BOX,
    as_value,
    depth_profile,
    unit_map,
)

Rates = list[list[float]]


def cell(image: Image.Image, row: int, column: int, rows: int, columns: int) -> tuple[int, ...]:
    """The colour in the middle of a cell of a unit map."""
    left, top, right, bottom = UNIT_BOX
    x = left + (column + 0.5) * (right - left) / columns
    y = top + (row + 0.5) * (bottom - top) / rows
    pixel = image.getpixel((int(x), int(y)))
    assert isinstance(pixel, tuple)
    return pixel


def color_of(rate: float) -> tuple[int, ...]:
    return tuple(PALETTE[1 + round(254 * rate)].tolist()) if rate else NEVER


def test_each_cell_has_the_colour_of_its_rate() -> None:
    """Rows go from the busiest to the quietest at the end, and each cell shows its own rate."""
    rates = [[0.5, 0.25, 0.0], [0.1, 0.2, 0.9], [1.0, 0.0, 0.4]]
    image = unit_map("relu", [0, 5, 10], rates)
    for row, unit in enumerate((1, 2, 0)):
        for column in range(3):
            assert cell(image, row, column, 3, 3) == color_of(rates[unit][column]), (row, column)


def test_units_that_died_early_lie_below_those_that_died_late() -> None:
    """Among dead units the order is that of the last sign of life, whatever they fired before."""
    rates = [[0.9, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.0], [0.5, 0.5, 0.0, 0.0]]
    image = unit_map("relu", [0, 1, 2, 3], rates)
    first_column = [cell(image, row, 0, 3, 4) for row in range(3)]
    assert first_column == [color_of(0.1), color_of(0.5), color_of(0.9)]


def test_a_rate_of_nearly_zero_is_not_the_colour_of_never() -> None:
    """Only exactly zero is orange; a unit that fires once in a million samples is not."""
    image = unit_map("relu", [0], [[0.0], [1e-6]])
    assert cell(image, 1, 0, 2, 1) == NEVER
    assert cell(image, 0, 0, 2, 1) == color_of(1e-9) != NEVER


def test_unknown_rates_are_neither_never_nor_a_rate() -> None:
    """NaN is grey, in a pooled neighbourhood too, unless something of it is known."""
    assert cell(unit_map("relu", [0, 1], [[np.nan, 0.5]]), 0, 0, 1, 2) == NO_DATA
    image = unit_map("relu", [0, 1], [[0.5, np.nan], [0.5, 0.0]])
    assert [cell(image, row, 1, 2, 2) for row in range(2)] == [NEVER, NO_DATA]
    table = np.full((2, 2 * MAX_COLUMNS), np.nan)
    table[:, 1] = 0.25
    image = unit_map("relu", range(2 * MAX_COLUMNS), table)
    assert cell(image, 0, 0, 2, MAX_COLUMNS) == color_of(0.25)
    assert cell(image, 0, 1, 2, MAX_COLUMNS) == NO_DATA


def test_wide_layers_and_long_runs_are_pooled_by_their_means() -> None:
    """4096 units over 5000 steps give the same size, each cell the mean of its neighbours; no dead block is lost."""
    rates = np.repeat(np.linspace(1, 0.1, 4096)[:, None], 5000, axis=1)
    rates[1024:, 2500:] = 0
    image = unit_map("relu", range(5000), rates)
    assert image.size == unit_map("relu", [0], [[0.5]]).size
    left, top, right, bottom = UNIT_BOX
    pixels = np.asarray(image)[top:bottom, left:right]
    never = (pixels == NEVER).all(axis=-1)
    assert abs(never.mean() - 0.75 * 0.5) < 0.01
    expected = PALETTE[1 + round(254 * rates[:16, 0].mean())]
    assert np.abs(pixels[0, 0].astype(int) - expected).max() <= 1
    assert bottom - top >= MAX_ROWS, "rows of pixels would be lost"
    assert right - left >= MAX_COLUMNS, "columns of pixels would be lost"


@settings(deadline=None)
@given(
    st.integers(1, 40).flatmap(
        lambda steps: st.lists(st.lists(st.floats(0, 1), min_size=steps, max_size=steps), min_size=1, max_size=20)
    ),
    st.randoms(use_true_random=False),
)
def test_the_order_in_which_units_are_numbered_does_not_matter(rates: Rates, random: object) -> None:
    """Shuffling units leaves a map as it was, byte for byte, and its last column sorted."""
    shuffled = sorted(rates, key=lambda _: random.random())  # type: ignore[attr-defined]  # hypothesis hides the type
    steps = range(len(rates[0]))
    image = unit_map("relu", steps, rates)
    if len({tuple(row) for row in rates}) == len({(row[-1], sum(row)) for row in rates}):
        assert as_value("t", image) == as_value("t", unit_map("relu", steps, shuffled))
    last = [cell(image, row, len(steps) - 1, len(rates), len(steps)) for row in range(len(rates))]
    assert last == [color_of(rate) for rate in sorted((row[-1] for row in rates), reverse=True)]


def test_the_same_rates_give_the_same_bytes() -> None:
    """A picture depends on nothing but its arguments, and is a PNG of the size it says."""
    rates = np.random.default_rng(0).random((300, 700))
    first, second = (as_value("Activations.unit_map/relu", unit_map("relu", range(700), rates)) for _ in range(2))
    assert first == second
    png = Image.open(io.BytesIO(first.image.encoded_image_string))
    assert (png.format, png.mode, png.size) == ("PNG", "RGB", (first.image.width, first.image.height))
    assert first.image.colorspace == 3
    assert len(first.image.encoded_image_string) < 500_000


def test_never_is_counted_in_words_only_where_it_is() -> None:
    """The line below the title turns orange when a unit never fires at the last step, and only then."""
    box = (0, 56, 960, 100)
    for rates, is_orange in (([[0.5, 0.0], [0.5, 0.5]], True), ([[0.0, 0.1], [0.5, 0.5]], False)):
        colors = {color for _, color in unit_map("relu", [0, 1], rates).crop(box).getcolors(100_000) or ()}
        assert (NEVER in colors) is is_orange


@pytest.mark.parametrize("name", ["a", "model.encoder.layers.11.feed_forward.activation_function" * 3, "Ω/层"])
def test_no_text_touches_the_edge(name: str) -> None:
    """Names of any length are shortened to fit, and nothing is drawn at the edge."""
    pictures = (
        unit_map(name, [0, 10**9], [[0.0, 0.0]], ("never fires", "always fires")),
        depth_profile(name, [name, name], [1, 1], [1e-30, 1e30], (0, 10**9)),
    )
    for image in pictures:
        pixels = np.asarray(image)
        edge = np.concatenate((pixels[:4].reshape(-1, 3), pixels[-4:].reshape(-1, 3), pixels[:, :8].reshape(-1, 3),
                               pixels[:, -8:].reshape(-1, 3)))  # fmt: skip
        assert (edge == BACKGROUND).all()


@pytest.mark.parametrize(
    ("steps", "rates"), [([], np.zeros((3, 0))), ([0], np.zeros((0, 1))), ([0, 1], [[0.5]]), ([0], [0.5])]
)
def test_a_map_of_nothing_is_refused(steps: list[int], rates: Rates) -> None:
    """No unit, no step, or shapes that do not fit are told with what was given."""
    with pytest.raises(ValueError, match=r"rates have shape \(.*; needed is \(units, \d steps\)"):
        unit_map("relu", steps, rates)


# Truth of its own: CIE L* and luminance by the sRGB standard (IEC 61966-2-1), and what is seen without one kind of cone
# by the matrices of Viénot, Brettel and Mollon (1999).
TO_XYZ_Y = np.array([0.2126, 0.7152, 0.0722])
WITHOUT_CONES = {
    "red": np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, -0.0], [0.00401, -0.00401, 1.0]]),
    "green": np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, -0.0], [-0.02234, 0.02234, 1.0]]),
}


def linear(colors: object) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    encoded = np.asarray(colors, np.float64) / 255
    return np.asarray(np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4))


def lightness(colors: object) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """CIE L*, 0 to 100."""
    luminance = linear(colors) @ TO_XYZ_Y
    return np.asarray(np.where(luminance > 216 / 24389, 116 * np.cbrt(luminance) - 16, luminance * 24389 / 27))


def contrast(first: object, second: object) -> float:
    """Contrast of two colours by WCAG 2.2, 1 to 21."""
    low, high = sorted(float(linear(color) @ TO_XYZ_Y) for color in (first, second))
    return (high + 0.05) / (low + 0.05)


def test_lightness_tells_the_rate() -> None:
    """Lightness rises with every entry, about evenly: the map can be read without any colour."""
    rising = np.diff(lightness(PALETTE[1:]))
    assert PALETTE.shape == (256, 3)
    assert (rising > -0.15).all(), "only the rounding to bytes may lower it"
    steady = np.diff(lightness(PALETTE[1:])[::16])
    assert steady.min() > 0.5 * steady.mean()
    assert steady.max() < 1.6 * steady.mean()


@pytest.mark.parametrize("missing", [None, *WITHOUT_CONES])
def test_never_stands_apart_for_everybody(missing: str | None) -> None:
    """With all cones, without those for red and without those for green, no blue comes near the orange of never."""
    seen = linear(np.concatenate((PALETTE, [NO_DATA, BACKGROUND])))
    if missing is not None:
        seen = np.clip(seen @ WITHOUT_CONES[missing].T, 0, 1)
    encoded = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    distances = np.linalg.norm(encoded[1:] - encoded[0], axis=1)
    assert distances.min() > 0.3, f"entry {1 + distances.argmin()} is {encoded[1 + distances.argmin()]}"


def test_text_can_be_read_on_its_own_background() -> None:
    """Every colour of text has the contrast that WCAG asks of small text, on the background that pictures bring."""
    assert min(contrast(color, BACKGROUND) for color in (TEXT, SOFT_TEXT, NEVER, NOW)) > 4.5


def now_pixels(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    left, top, right, bottom = PROFILE_BOX
    box = np.asarray(image)[top - 10 : bottom + 10, left - 10 : right + 10]
    return np.asarray((box == NOW).all(axis=-1))


def test_profiles_draw_powers_of_ten_at_their_height() -> None:
    """A layer a thousand times smaller than the first lies three quarters of four decades lower."""
    image = depth_profile("rms", ["a", "b", "c"], [1, 1, 1], [1, 10**-1.5, 1e-3], (0, 100))
    left, top, right, bottom = PROFILE_BOX
    for share, height in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        x, y = left + share * (right - left), top + height * (bottom - top)
        assert image.getpixel((int(x), int(y))) == NOW, (share, height)


def test_layers_without_a_value_are_a_gap() -> None:
    """Zero, NaN and Inf have no logarithm: nothing is drawn there, and what stands beside it is."""
    pixels = now_pixels(depth_profile("rms", list("abcde"), [1] * 5, [1, 1, float("nan"), 0.0, 1], (0, 1)))
    columns = np.flatnonzero(pixels.any(axis=0)) / pixels.shape[1]
    assert not ((columns > 0.3) & (columns < 0.9)).any()
    assert columns.min() < 0.05
    assert columns.max() > 0.95
    assert not now_pixels(depth_profile("rms", ["a"], [1], [float("inf")], (0, 1))).any()


def test_profiles_refuse_shapes_that_do_not_fit() -> None:
    """Three names and two values are told with both shapes; so are no names at all."""
    with pytest.raises(ValueError, match=r"shapes \(3,\) and \(2,\); needed is \(3,\)"):
        depth_profile("rms", ["a", "b", "c"], [1, 1, 1], [1, 1], (0, 1))
    with pytest.raises(ValueError, match="with one layer at least"):
        depth_profile("rms", [], [], [], (0, 1))


@settings(deadline=None)
@given(st.lists(st.floats(-320, 300), min_size=1, max_size=9), st.lists(st.floats(-320, 300), min_size=1, max_size=9))
def test_profiles_of_any_values_are_drawn_within_their_frame(then: list[float], now: list[float]) -> None:
    """Values of any size, denormals and ever so close together, are drawn without an error and inside the frame."""
    count = min(len(then), len(now))
    first, last = ([10.0**exponent for exponent in exponents[:count]] for exponents in (then, now))
    image = depth_profile("rms", [str(index) for index in range(count)], first, last, (0, 1))
    left, top, right, bottom = PROFILE_BOX
    outside = np.asarray(image).copy()
    outside[56:100] = outside[top - 10 : bottom + 10, left - 10 : right + 10] = 0
    assert not (outside == NOW).all(axis=-1).any()


def test_one_factor_of_two_is_no_cliff() -> None:
    """The axis spans two decades at least, so that a harmless difference looks harmless."""
    pixels = now_pixels(depth_profile("rms", ["a", "b"], [1, 1], [1, 2], (0, 1)))
    rows = np.flatnonzero(pixels.any(axis=1))
    assert rows.max() - rows.min() < 0.25 * pixels.shape[0]


def test_legends_show_every_colour_once() -> None:
    """The colour bar holds the palette from its first blue to its last, left to right."""
    pixels = np.asarray(unit_map("relu", [0], [[0.5]]))[460]
    shown = [tuple(color) for color, _ in itertools.groupby(pixels.tolist(), tuple)]
    ramp = [color for color in shown if color in {tuple(entry) for entry in PALETTE[1:].tolist()}]
    assert len(ramp) > 200
    assert [lightness(color) for color in (ramp[0], ramp[-1])] == [lightness(PALETTE[1]), lightness(PALETTE[255])]
