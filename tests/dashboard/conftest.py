# SPDX-License-Identifier: Apache-2.0
"""A broker with machines, runs of every kind on them, and a headless Chromium that looks at them.

Pictures of what the tests have seen lie below `.screenshots/` afterwards.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, Playwright, expect, sync_playwright

from fedml.workflows import WorkflowRun
from tests.fakes import nvml
from tests.place import Place

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / ".screenshots"
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
GIB = 1 << 30
# For a machine that has a dozen other things to do.
PATIENCE_MS = 25_000

# A job that records what it learns; in a program of Python's own, for agents have none with fedml.
RECORDS = f"""PYTHONPATH={ROOT}:{ROOT / "protocol"} {sys.executable} - <<'EOF'
from pathlib import Path
from fedml import mlops
mlops.log_params({{"learning rate": 0.1, "model": "ridge"}})
for step in range(60):
    mlops.log({{"loss": 1 / (step + 1), "accuracy": 1 - 1 / (step + 2)}}, step=step)
Path("report.txt").write_text("all is well")
mlops.log_artifact("report.txt", "report")
mlops.event("training", started=True, value="")
EOF
"""

# What somebody could call a run, or print in one, to take the page over.
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="package")
def playwright() -> Iterator[Playwright]:
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as found:
        yield found


@pytest.fixture(scope="package")
def browser(playwright: Playwright) -> Iterator[Browser]:
    """Debian's Chromium, or whatever else of the family there is."""
    names = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium is installed: `sudo apt-get install chromium`")
    # Containers have little of /dev/shm, and the browser's own sandbox does not start for root.
    args = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    found = playwright.chromium.launch(executable_path=program, args=args)
    yield found
    found.close()


class Desk:
    """A place to look at, and the windows that are open on it."""

    def __init__(self, place: Place, browser: Browser) -> None:
        self.place = place
        self.url = place.client.url
        self.admin_key = (place.home / "broker" / "admin.key").read_text()
        self.job = self.recorded = self.federated = self.waiting = self.evil = self.flow = ""
        self.broken: list[str] = []
        self._browser = browser
        self._windows: list[BrowserContext] = []
        self._states: dict[str, Path] = {}

    def window(
        self, *, size: dict[str, int] = DESKTOP, scheme: str = "light", as_: str = ""
    ) -> Page:
        """A page in a browser of its own; `as_`: the user who is signed in there."""
        state = self._state(as_) if as_ else None
        context = self._browser.new_context(
            ignore_https_errors=True,  # the CA is the broker's own
            viewport=size,  # type: ignore[arg-type]
            color_scheme=scheme,  # type: ignore[arg-type]
            storage_state=state,
        )
        self._windows.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: self.broken.append(str(error)))
        page.on(
            "console",
            lambda said: self.broken.append(said.text) if _is_trouble(said.text) else None,
        )
        return page

    def see(self, path: str, **how: object) -> Page:
        """A window of the admin on a page that has come to rest."""
        page = self.window(**{"as_": "admin", **how})  # type: ignore[arg-type]
        self.go(page, path)
        return page

    def go(self, page: Page, path: str) -> None:
        """Go to a page of the dashboard, and wait until it is drawn."""
        page.goto(f"{self.url}/#/{path}")
        page.locator(f'main[data-shown="#/{path}"]').wait_for()

    def key_of(self, user: str, role: str) -> str:
        """A new key of a user, who is made if he is not there."""
        call = self.place.client.call
        if user not in {found["name"] for found in call("GET", "/v1/users")["users"]}:
            call("POST", "/v1/users", {"name": user, "role": role})
        return str(call("POST", f"/v1/users/{user}/tokens", {})["key"])

    def _state(self, user: str) -> Path:
        """The cookies of a user who has signed in once; read by all his windows."""
        if user not in self._states:
            key = self.admin_key if user == "admin" else self.key_of(user, user)
            page = self.window()
            page.goto(self.url)
            sign_in(page, key)
            path = self.place.folder / f"{user}.cookies"
            page.context.storage_state(path=path)
            self._states[user] = path
        return self._states[user]

    def close(self) -> None:
        """All windows."""
        for window in self._windows:
            window.close()
        self._windows.clear()


def _is_trouble(text: str) -> bool:
    """What a browser says when something was forbidden or broke; refused requests are meant."""
    return "Content Security Policy" in text or "Uncaught" in text or "Trusted" in text


RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}


def violations(page: Page) -> list[str]:
    """What of WCAG 2 AA a page does not meet, as axe-core sees it: contrast, names, roles."""
    found = Axe().run(page, options=RULES).response["violations"]
    return [
        f"{rule['id']}: {node['target']} {node['failureSummary']}"
        for rule in found
        for node in rule["nodes"]
    ]


def sign_in(page: Page, key: str) -> None:
    """Paste a key and go on."""
    page.get_by_label("Your key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("button", name="Sign out").wait_for()


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Two machines, one of them with two GPUs."""
    folder = tmp_path_factory.mktemp("dashboard")
    gpus = [
        {"uuid": f"GPU-{i}", "name": "NVIDIA A100-SXM4-80GB", "memory": 80 * GIB, "temperature": 61}
        for i in range(2)
    ]
    (folder / "gpus.json").write_text(
        json.dumps({"driver": "550.54.15", "cuda": 12040, "gpus": gpus})
    )
    with Place(folder) as place, pytest.MonkeyPatch.context() as patch:
        for name, value in nvml.environment(folder / "gpus.json").items():
            patch.setenv(name, value)
        place.agent("north-1", label="site=north")
        patch.undo()
        place.agent("south-1", label="site=south")
        yield place


@pytest.fixture(scope="package")
def everything(place: Place, browser: Browser) -> Iterator[Desk]:
    """Runs that have ended, one that waits, and one whose author means ill."""
    desk = Desk(place, browser)
    desk.federated = place.federate(rounds=4, name="ridge")
    desk.job = place.launch(
        "for i in $(seq 40); do echo step $i of 40; done; echo careful >&2;"
        'echo best=0.75 >> "$FEDML_OUTPUT"; echo all > "$FEDML_OUTPUT_DIR/notes.txt"',
        name="counting",
    )
    desk.recorded = place.launch(RECORDS, name="learning", nodes=2)
    desk.evil = place.launch(f"cat <<'E'\n{EVIL}\nE", name=EVIL)
    for run in (desk.federated, desk.job, desk.recorded, desk.evil):
        place.finishes(run)
    call = place.client.call
    steps = [
        {"name": "prepare", "job": {"command": 'echo rows=5 >> "$FEDML_OUTPUT"'}},
        {"name": "train", "needs": ["prepare"], "job": {"command": "exit 3"}},
        {"name": "report", "needs": ["train"], "job": {"command": "true"}},
    ]
    desk.flow = call("POST", "/v1/workflows", {"name": "nightly", "steps": steps})["workflow"]
    WorkflowRun.find(place.client, desk.flow).wait()
    call("POST", f"/v1/devices/{place.agents['north-1'].device}/drain", {"on": True})
    desk.waiting = place.launch("true", name="patient", needs={"gpus": 2})
    place.until(desk.waiting, lambda item: item.get("waiting"))
    yield desk
    desk.close()


@pytest.fixture
def desk(everything: Desk) -> Iterator[Desk]:
    """The same; each test's windows are closed after it, and nothing broke in them."""
    everything.broken.clear()
    yield everything
    everything.close()
    assert not everything.broken
