"""A headless Chromium, and what is asked of a page in it."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# Every element with text of its own: its colours, over the nearest background that is not transparent.
CONTRASTS = """() => {
    const channels = text => text.match(/[\\d.]+/g).map(Number);
    const light = rgb => rgb.slice(0, 3).map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const found = [];
    for (const element of document.body.querySelectorAll('*')) {
        const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
        if (!own || element.tagName === 'title' || !element.getClientRects().length) continue;
        const style = getComputedStyle(element);
        const text = light(channels(element.ownerSVGElement ? style.fill : style.color));
        let behind = element, colour = [0, 0, 0, 0];
        while (behind && colour[3] === 0) {
            colour = channels(getComputedStyle(behind).backgroundColor);
            if (colour.length === 3) colour.push(1);
            behind = behind.parentElement;
        }
        const ground = light(colour);
        found.push([(Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05), element.outerHTML.slice(0, 90)]);
    }
    return found;
}"""

# What reaches beyond the window, but for what scrolls within itself.
OUTSIDE = """() => [...document.body.querySelectorAll('*')]
    .filter(e => !e.parentElement.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 0.5)
    .map(e => e.outerHTML.slice(0, 90))"""

IMAGES = "() => [...document.images].map(i => [i.complete && i.naturalWidth > 0 && i.naturalHeight > 0, i.alt])"


@contextmanager
def chromium():
    """The browser; the test is skipped where none can be had."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as started:
        own = Path(started.chromium.executable_path)
        file = str(own) if own.exists() else next(filter(None, map(shutil.which, NAMES)), None)
        if file is None:
            pytest.skip("needs Chromium: apt install chromium, or playwright install chromium")
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = started.chromium.launch(executable_path=file, args=["--disable-dev-shm-usage", *sandbox])
        try:
            yield browser
        finally:
            browser.close()
