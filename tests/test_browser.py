"""What a person sees: the real TensorBoard on a run of the demo, looked at in headless Chromium.

Screenshots are kept in the directory named by ``INSTRUMENT_SCREENSHOTS``, where that is set.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import instrument

from .test_cli import free_port
from .test_examples import EXAMPLES

pytestmark = pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None,
    reason="chromium and chromedriver are not installed",
)
SECTIONS = ("Activations", "Gradients", "Parameters")
PATIENCE = 60.0


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a TensorBoard on a short run of the demo."""
    directory = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(EXAMPLES / "char_gpt.py"), "--steps", "40", "--batch", "4", "--interval", "2"]
    subprocess.run(command, cwd=directory, check=True, capture_output=True, timeout=300)
    with instrument.launch_tensorboard(directory / "runs", port=free_port()) as server:
        yield server.url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium that reaches nothing but this machine."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1500,1100",
        f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


# TensorBoard draws into shadow roots: cards, and the shapes in them, are found by walking through all of them. What
# counts as drawn is an area or outline of the chart with an extent on the screen; icons and axes do not.
DRAWN_IN_CARDS = """
function walk(root, wanted, found) {
    for (const element of root.querySelectorAll('*')) {
        if (wanted(element)) found.push(element);
        if (element.shadowRoot) walk(element.shadowRoot, wanted, found);
    }
    return found;
}
const [card, shape] = arguments;
return walk(document, element => element.tagName.toLowerCase() === card, []).map(found => [found.tag || '',
    walk(found.shadowRoot || found, inner => {
        if (!inner.matches(shape)) return false;
        const box = inner.getBoundingClientRect();
        return box.width > 10 && box.height > 1;
    }, []).length]);
"""


def drawn_in_cards(browser: Any, card: str, shape: str) -> list[tuple[str, int]]:
    """The tag of each card of a page, where it tells it, and how many shapes are drawn in it."""
    return [(tag, count) for tag, count in browser.execute_script(DRAWN_IN_CARDS, card, shape)]


def wait_for_drawn_cards(browser: Any, card: str, shape: str, prefix: str) -> dict[str, int]:
    """Shapes in each card whose tag begins so, once all have some or patience is at its end."""
    deadline = time.monotonic() + PATIENCE
    counts: dict[str, int] = {}
    while time.monotonic() < deadline:
        counts = {tag: count for tag, count in drawn_in_cards(browser, card, shape) if tag.startswith(prefix)}
        if counts and all(counts.values()):
            break
        time.sleep(0.5)
    return counts


def keep_screenshot(browser: Any, name: str) -> None:
    directory = os.environ.get("INSTRUMENT_SCREENSHOTS")
    if directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(directory) / f"{name}.png"))


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize(
    ("tab", "card", "shape"),
    [
        ("histograms", "tf-histogram-loader", "path.outline"),
        ("distributions", "tf-distribution-loader", "path.area"),
    ],
)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_cards_of_every_kind_are_drawn(
    section: str, tab: str, card: str, shape: str, dark: bool, browser: Any, address: str
) -> None:
    """HISTOGRAMS and DISTRIBUTIONS show cards for activations, gradients and parameters, none of them empty."""
    browser.get("about:blank")
    browser.get(f"{address}?darkMode={str(dark).lower()}#{tab}&tagFilter=^{section}%2Fblocks.0.sa")
    counts = wait_for_drawn_cards(browser, card, shape, f"{section}/blocks.0.sa")
    keep_screenshot(browser, f"{tab}-{section.lower()}-{'dark' if dark else 'light'}")
    assert len(counts) == 5, f"not the five cards of {section} of the attention on {tab}: {counts}"
    assert all(counts.values()), f"an empty card on {tab} for {section}: {counts}"


def test_time_series_shows_the_loss_and_ours(browser: Any, address: str) -> None:
    """TIME SERIES draws the user's loss and our statistics of the same run."""
    browser.get("about:blank")
    browser.get(f"{address}?tagFilter=loss%7CGradients.rms%2Fblocks.0.sa#timeseries")
    counts: list[int] = []
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and (len(counts) < 4 or not all(counts)):
        counts = [count for _, count in drawn_in_cards(browser, "scalar-card", "canvas, path")]
        time.sleep(0.5)
    keep_screenshot(browser, "timeseries")
    assert len(counts) >= 4
    assert all(counts)
