"""Opens a page in headless Chromium and tells what happened there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
    # The browser's own services must not leave the machine either.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


NOBODY = "not an origin"


def chromium() -> str:
    """The browser; skips the test where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    return found


@dataclass
class Visit:
    """`dom`: after the scripts ran; `console`: its messages; `requests`: http(s) URLs asked for."""

    dom: str
    console: list[str]
    requests: list[str]


def visit(
    page: Path, *, width: int = 1280, height: int = 900, dark: bool = False, shot: Path | None = None
) -> Visit:
    """Open the page; with `shot` make a screenshot instead of reading the DOM."""
    with tempfile.TemporaryDirectory() as profile:
        log = Path(profile) / "net.json"
        command = [chromium(), *FLAGS, f"--user-data-dir={profile}", f"--log-net-log={log}"]
        command += [f"--window-size={width},{height}", "--virtual-time-budget=3000"]
        command += ["--blink-settings=preferredColorScheme=" + ("0" if dark else "1")]
        command += [f"--screenshot={shot}"] if shot else ["--dump-dom"]
        run = subprocess.run(
            [*command, page.as_uri()],
            capture_output=True,
            check=False,
            timeout=120,
            env={**os.environ, "HOME": profile},
        )
        errors = run.stderr.decode(errors="replace")
        assert run.returncode == 0, errors
        requests = page_requests(log)
    console = [line for line in errors.splitlines() if "CONSOLE" in line]
    return Visit(run.stdout.decode(errors="replace"), console, requests)


def page_requests(log: Path) -> list[str]:
    """What pages asked the network for; the browser's own services have no initiator."""
    events = json.loads(log.read_text(errors="replace"))["events"]
    asked = (event.get("params", {}) for event in events)
    return sorted({p["url"] for p in asked if "url" in p and p.get("initiator", NOBODY) != NOBODY})


def inspect(page: Path, script: str, *, width: int = 1280, dark: bool = False) -> tuple[dict, Visit]:
    """Run `script` in a copy of the page, `width` pixels wide; the object it returns, and the visit.

    Chromium's windows have a least width, so the page is put into a frame.
    """
    copy = page.with_name(page.stem + "-inspected.html")
    code = f"<script>parent.postMessage(JSON.stringify((() => {{ {script} }})()), '*');</script>"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", code + "</body>"), encoding="utf-8")
    outer = page.with_name("frame.html")
    listen = "addEventListener('message', (e) => { document.body.dataset.found = e.data; });"
    frame = f'<iframe src="{copy.name}" style="width:{width}px;height:900px;border:0"></iframe>'
    outer.write_text(f"<body><script>{listen}</script>{frame}</body>", encoding="utf-8")
    seen = visit(outer, width=max(width, 500) + 50, dark=dark)
    found = re.search(r'data-found="([^"]*)"', seen.dom)
    assert found, seen.console
    return json.loads(unescape(found[1])), seen
