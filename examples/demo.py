# SPDX-License-Identifier: Apache-2.0
"""`make demo`: a broker, four agents, a job, a federated run on real data; then all ends.

All of its state lies in `.demo/` of the checkout, made anew each time.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".demo"
BIN = Path(sys.executable).parent


def main() -> None:
    """Run the demo."""
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir()
    from fedml import data as datasets

    say("fetching UCI Heart Disease (four hospitals)")
    heart = datasets.load("heart", home=HOME / "data", fetch=True)
    running: list[subprocess.Popen[str]] = []
    try:
        say("a broker comes up")
        with (HOME / "broker.log").open("w") as log:
            broker = start(
                log, HOME, "fedml-broker", "up", "--https-port=0", "--mqtt-port=0", "--json"
            )
        running.append(broker)
        told = json.loads(broker.stdout.readline())
        for name in heart.clients:
            home = HOME / name
            (home / "agent").mkdir(parents=True)
            (home / "agent" / "policy.toml").write_text(f'[data]\nheart = "{HOME / "data"}"\n')
            call(home, "fedml-agent", "login", told["login_key"], "--name", name)
            with (HOME / f"{name}.log").open("w") as log:
                running.append(start(log, home, "fedml-agent", "run"))
        say(f"four agents joined over TLS: {', '.join(heart.clients)}")
        call(HOME, "fedml", "login", Path(told["admin_key_file"]).read_text())
        say("a job on one of them")
        (HOME / "hello.yaml").write_text("job: echo hello from $(uname -n)\n")
        call(HOME, "fedml", "launch", str(HOME / "hello.yaml"))
        say("ten federated rounds across all four")
        shutil.copytree(ROOT / "examples" / "heart", HOME / "heart")
        features = int(heart.train.x.shape[1])
        run = {
            "app": "heart.py",
            "rounds": 10,
            "clients": {"count": 4},
            "config": {"features": features, "lr": 0.3, "steps": 20},
        }
        (HOME / "heart" / "run.yaml").write_text(json.dumps(run))
        call(HOME, "fedml", "federate", str(HOME / "heart" / "run.yaml"))
        compare(heart, run["config"])
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait(20)
    say("everything has been stopped")


def compare(heart, config) -> None:
    """The same training in one place, and in each hospital alone, on everybody's test patients."""
    sys.path.insert(0, str(ROOT / "examples" / "heart"))
    import heart as app

    once = {**config, "steps": config["steps"] * 10}
    parts = {"all data in one place": heart}
    parts |= {f"{name} alone": heart.of_client(name) for name in heart.clients}
    for name, part in parts.items():
        model = app.model(config)
        app.train(model, part, once, None)
        print(f"  {name:<24} accuracy {app.evaluate(model, heart, config)['accuracy']:.3f}")


def say(text: str) -> None:
    """One line of the story."""
    print(f"\n== {text}", flush=True)


def start(log, home: Path, *words: str) -> "subprocess.Popen[str]":
    """A process of the demo, in its own home."""
    return subprocess.Popen(
        [str(BIN / words[0]), *words[1:]],
        env=env(home),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )


def call(home: Path, *words: str) -> None:
    """A command, as a person would type it."""
    subprocess.run([str(BIN / words[0]), *words[1:]], env=env(home), check=True)


def env(home: Path) -> dict[str, str]:
    """The environment, with a home of its own."""
    return {**os.environ, "FEDML_HOME": str(home)}


if __name__ == "__main__":
    main()
