# SPDX-License-Identifier: Apache-2.0
"""The dashboard in a headless Chromium, with 1,000 machines that beat and 10,000 runs.

    python benchmarks/dashboard.py            # nine cold loads of each page
    python benchmarks/dashboard.py --quick    # three

A cold load: a browser without a cache, signed in already, goes to the page; TLS is the real one.
Two times are taken, both since navigation began: *first paint*, as the browser reports it, and
*shown*, when the page's own data is drawn as far as the screen shows it. The fleet page lets the
machines below the screen follow afterwards. The machines are rows of the store and heartbeats every
ten seconds, put to the broker's fleet without MQTT; each has two GPUs.
"""

import asyncio
import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from deployment import arguments, machine, scratch, table
from playwright.sync_api import Browser, sync_playwright

from fedml_broker.app import Broker, Settings
from fedml_broker.store import Store
from fedml_broker.tables import devices, runs
from fedml_protocol.devices import GpuReading, Heartbeat

LIMIT_S = 1.0
MACHINES, RUNS = 1_000, 10_000
PAGES = ("fleet", "labels", "runs", "queue")
GIB = 1 << 30


def fill(home: Path) -> None:
    """A store with machines and runs, as they would be after a year."""
    store = Store.open(home / "broker.db")
    store.close()
    engine = sa.create_engine(f"sqlite:///{home / 'broker.db'}")
    now = time.time()
    with engine.begin() as tx:
        tx.execute(devices.insert(), [_device(i, now) for i in range(MACHINES)])
        tx.execute(runs.insert(), [_run(i, now) for i in range(RUNS)])
    engine.dispose()


def _gpus(i: int) -> list[dict[str, Any]]:
    return [
        {"uuid": f"GPU-{i}-{g}", "name": "NVIDIA A100-SXM4-80GB", "memory_bytes": 80 * GIB}
        for g in range(2)
    ]


def _device(i: int, now: float) -> dict[str, Any]:
    capacity = {
        "slots": 4,
        "cpus": 32,
        "memory_bytes": 256 * GIB,
        "disk_bytes": 1000 * GIB,
        "gpus": _gpus(i),
        "kinds": ["launch", "federate"],
    }
    hardware = {"memory": 256 * GIB, "machine": {"hostname": f"node-{i}", "os": "Debian 12"}}
    return {
        "id": f"d-{i:010x}",
        "tenant": "default",
        "name": f"node-{i}",
        "machine_id": f"machine-{i}",
        "public_key": secrets.token_bytes(44),
        "labels": {"site": f"site-{i % 12}", "rack": str(i % 40)},
        "inventory": {"capacity": capacity, "hardware": hardware},
        "state": "active",
        "counter": 0,
        "boot_n": 1,
        "agent_version": "0.1.0",
        "enrolled_at": now - 86400,
        "last_seen_at": now,
        "certificate_expires_at": now + 86400,
    }


def _run(i: int, now: float) -> dict[str, Any]:
    created = now - (RUNS - i) * 600
    return {
        "id": f"r-{i:010x}",
        "tenant": "default",
        "user": f"user-{i % 20}",
        "kind": "launch",
        "name": f"experiment-{i % 300}",
        "spec": {"command": "python train.py " + "--option value " * 20},
        "state": ("FINISHED", "FINISHED", "FAILED", "STOPPED")[i % 4],
        "created_at": created,
        "started_at": created + 5,
        "ended_at": created + 500,
    }


async def serve(home: Path) -> None:
    """The broker, and the machines' heartbeats; until stdin ends."""
    async with Broker.running(Settings(home=home, https_port=0, mqtt_port=0)) as broker:
        await broker.accounts.create_user("admin", "admin", by="cli")
        key = await broker.accounts.create_token("admin", by="cli")

        async def beat() -> None:
            n = 0
            while True:
                for _ in range(MACHINES // 100):
                    _heard(broker, n % MACHINES, n)
                    n += 1
                await asyncio.sleep(0.1 if n > MACHINES else 0)

        beating = asyncio.create_task(beat())
        print(json.dumps({"url": broker.url, "key": key}), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        beating.cancel()


def _heard(broker: Broker, i: int, n: int) -> None:
    gpus = tuple(
        GpuReading(
            uuid=gpu["uuid"],
            utilisation_percent=(n + 17 * g) % 101,
            memory_used_bytes=n % 80 * GIB,
            temperature_c=40 + n % 40,
        )
        for g, gpu in enumerate(_gpus(i))
    )
    beat = Heartbeat(free_slots=4, cpu_percent=n % 100, memory_used_bytes=n % 256 * GIB, gpus=gpus)
    broker.fleet.heard(f"d-{i:010x}", 1, beat)


def load(browser: Browser, url: str, page: str, cookies: Path) -> dict[str, float]:
    """Seconds of one cold load."""
    context = browser.new_context(
        ignore_https_errors=True,
        viewport={"width": 1280, "height": 900},
        storage_state=cookies,
    )
    window = context.new_page()
    window.goto(f"{url}/#/{page}")
    window.locator(f'main[data-shown="#/{page}"]').wait_for()
    found = window.evaluate(
        """() => new Promise((done) => requestAnimationFrame(() => setTimeout(() => {
          const paint = performance.getEntriesByName("first-contentful-paint")[0].startTime;
          const shown = performance.getEntriesByName("shown")[0].startTime;
          done({ paint: paint / 1000, shown: shown / 1000 });
        })))"""
    )
    context.close()
    return dict(found)


def measure(url: str, key: str, folder: Path, times: int) -> dict[str, list[dict[str, float]]]:
    """Each page so many times, in turns."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "no Chromium is installed: `sudo apt-get install chromium`"
    args = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    found: dict[str, list[dict[str, float]]] = {page: [] for page in PAGES}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=args)
        context = browser.new_context(ignore_https_errors=True)
        window = context.new_page()
        window.goto(url)
        window.get_by_label("Your key").fill(key)
        window.get_by_role("button", name="Sign in").click()
        window.get_by_role("button", name="Sign out").wait_for()
        cookies = folder / "cookies.json"
        context.storage_state(path=cookies)
        context.close()
        for _ in range(times):
            for page in PAGES:
                found[page].append(load(browser, url, page, cookies))
        browser.close()
    return found


def main() -> None:
    """Measure and print."""
    if "--serve" in sys.argv:
        asyncio.run(serve(Path(sys.argv[-1])))
        return
    chosen = arguments(__doc__, "fewer loads")
    print(machine("aiohttp", "playwright"))
    with scratch() as folder:
        home = folder / "broker"
        home.mkdir(mode=0o700)
        fill(home)
        with subprocess.Popen(
            [sys.executable, __file__, "--serve", str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as broker:
            assert broker.stdin is not None
            assert broker.stdout is not None
            try:
                said = json.loads(broker.stdout.readline())
                found = measure(said["url"], said["key"], folder, 3 if chosen.quick else 9)
            finally:
                broker.stdin.close()
    rows = []
    for page, loads in found.items():
        paint, shown = ([one[name] for one in loads] for name in ("paint", "shown"))
        rows.append(
            (
                page,
                f"{LIMIT_S:g} s",
                f"{statistics.median(paint):.2f} s",
                f"{statistics.median(shown):.2f} s",
                f"{max(shown):.2f} s",
            )
        )
    print(f"{MACHINES:,} machines, {RUNS:,} runs, {len(loads)} cold loads of each page\n")
    table(("page", "target", "first paint", "shown, median", "shown, worst"), rows)


if __name__ == "__main__":
    main()
