"""The browser that tests drive through Playwright, whose own download is not needed."""

import os
import shutil

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
]
SHOTS = os.environ.get("LORATUNE_SCREENSHOTS")  # a folder, for people who want to look
