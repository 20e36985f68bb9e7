"""A real Chromium, as a plugin of pytest; see `run` beside this file."""

import os
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

HERE = Path(__file__).resolve().parent
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
SIZES = {"laptop": (1280, 860), "phone": (390, 844)}
PATIENCE = 120_000  # ms; a round on a busy machine
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium):
    """Open an address; errors in the page's scripts fail the test."""
    contexts, errors = [], []

    def start(url, size="laptop", scheme="light", **options):
        width, height = SIZES[size]
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, **options
        )
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        tab = context.new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("dialog", lambda dialog: errors.append(f"dialog {dialog.message}"))
        tab.goto(url)
        return tab

    yield start
    for context in contexts:
        context.close()
    assert not errors, errors


def picture(tab, name):
    if directory := os.environ.get("SCREENSHOTS"):
        tab.wait_for_timeout(1200)  # bars move for a second
        tab.screenshot(path=Path(directory) / f"{name}.png")


def serious_findings(tab):
    """Return what axe-core finds on a view that keeps people out."""
    tab.evaluate((HERE / "axe.min.js").read_text())  # past the Content-Security-Policy
    found = tab.evaluate("axe.run(document)")["violations"]
    return [
        (finding["id"], [node["html"][:200] for node in finding["nodes"][:3]])
        for finding in found
        if finding["impact"] in ("serious", "critical")
    ]
