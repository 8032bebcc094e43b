# SPDX-License-Identifier: Apache-2.0
"""`fedml storage`: what is stored comes back, is sent once, and belongs to whoever stored it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedml import session, storage
from fedml.client import Client
from fedml.errors import BrokerRefused
from tests.fedml.cli.conftest import Fedml
from tests.place import Place


def _names(fedml: Fedml, prefix: str) -> list[str]:
    return [o["name"] for o in json.loads(fedml("storage", "list", prefix, "--json").stdout)]


def test_a_file_comes_back_with_its_metadata_until_it_is_deleted(fedml: Fedml) -> None:
    data = os.urandom(100_000)
    (fedml.folder / "a b.bin").write_bytes(data)
    name = "one/päth with space/a%b"
    said = fedml("storage", "upload", "a b.bin", name, "--metadata", "from=ward=3").stderr
    assert said == f"{name}: 100 kB stored\n"
    assert fedml("storage", "metadata", name, "--user").stdout == '{"from": "ward=3"}\n'
    found = json.loads(fedml("storage", "get-metadata", name).stdout)
    assert (found["size"], found["user"], found["folder"]) == (100_000, "admin", False)
    assert "by admin" in fedml("storage", "metadata", name).stdout
    fedml("storage", "download", name)
    assert (fedml.folder / "a%b").read_bytes() == data
    assert "exists already" in fedml("storage", "download", name, code=2).stderr
    fedml("storage", "download", name, "--force")
    assert "100 kB are free" in fedml("storage", "delete", name).stderr
    assert "is not stored" in fedml("storage", "download", name, "x", code=6).stderr
    assert _names(fedml, "one/") == []
    assert not (fedml.folder / "x").exists()


def test_a_folder_comes_back_as_it_was_without_what_is_ignored(fedml: Fedml) -> None:
    fedml.file("d/run.sh", "true\n")
    fedml.file("d/.gitignore", "*.log\n")
    fedml.file("d/x.log", "")
    fedml.file("d/sub/a.txt", "a" * 300_000)
    (fedml.folder / "d" / "run.sh").chmod(0o755)
    (fedml.folder / "d" / "sub" / "link").symlink_to("a.txt")
    fedml("storage", "upload", "d", "two/d", "-um", '{"n": 7}')
    assert "two/d/  300 kB  admin" in fedml("storage", "list", "two").stdout
    fedml("storage", "download", "two/d", "copy")
    copy = fedml.folder / "copy"
    assert sorted(str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file()) == [
        ".gitignore",
        "run.sh",
        "sub/a.txt",
        "sub/link",
    ]
    assert os.access(copy / "run.sh", os.X_OK)
    assert (copy / "sub" / "link").readlink() == Path("a.txt")
    assert sorted(p.name for p in fedml.folder.iterdir()) == ["copy", "d"]
    assert fedml("storage", "get-user-metadata", "two/d").stdout == '{"n": 7}\n'


def test_what_another_name_still_needs_stays(fedml: Fedml, place: Place) -> None:
    file = fedml.folder / "f"
    file.write_bytes(os.urandom(5000))
    first = storage.upload(place.client, file, "three/a")
    storage.upload(place.client, file, "three/b")
    assert storage.delete(place.client, "three/a") == 0
    assert place.client.has(first["sha256"])
    file.write_bytes(b"other")
    storage.upload(place.client, file, "three/b")
    assert not place.client.has(first["sha256"])
    assert storage.upload(place.client, file, "three/b")["size"] == 5


def test_only_its_owner_and_admins_may_replace_or_delete(fedml: Fedml, place: Place) -> None:
    members = {}
    for name in ("ann", "ben"):
        place.client.call("POST", "/v1/users", {"name": name})
        key = place.client.call("POST", f"/v1/users/{name}/tokens", {})["key"]
        members[name] = Client(session.login(fedml.folder / name, key))
    file = fedml.folder / "f"
    file.write_text("ann's")
    storage.upload(members["ann"], file, "four/x")
    for deed in (
        lambda: storage.upload(members["ben"], file, "four/x"),
        lambda: storage.delete(members["ben"], "four/x"),
    ):
        with pytest.raises(BrokerRefused, match=r"another user's object.*stored by ann") as caught:
            deed()
        assert "admin" in caught.value.hint
    storage.download(members["ben"], "four/x", fedml.folder / "g")
    storage.delete(place.client, "four/x")
    entries = place.client.call("GET", "/v1/audit?action=storage.delete&limit=1")["entries"]
    assert (entries[0]["object"], entries[0]["details"]["of"]) == ("four/x", "ann")


@pytest.mark.parametrize("name", ["../x", "a//b", "/a", "a/", "a\nb", "x" * 1025])
def test_a_name_that_is_no_path_is_refused(fedml: Fedml, place: Place, name: str) -> None:
    fedml.file("f", "")
    with pytest.raises(BrokerRefused, match="not the name of an object"):
        storage.upload(place.client, fedml.folder / "f", name)


def test_a_list_of_many_comes_in_pages(
    fedml: Fedml, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_PAGE", 3)
    fedml.file("f", "")
    for n in range(7):
        storage.upload(place.client, fedml.folder / "f", f"five/{n}_")
    assert [o["name"] for o in storage.listed(place.client, "five/")] == [
        f"five/{n}_" for n in range(7)
    ]
    assert list(storage.listed(place.client, "five%")) == []


def test_a_download_that_was_ended_goes_on_where_it_stopped(
    fedml: Fedml, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(6_000_000)
    (fedml.folder / "large").write_bytes(data)
    storage.upload(place.client, fedml.folder / "large", "six/large")

    def cut(done: int, total: int) -> None:
        if done > 2_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.download(place.client, "six/large", fedml.folder / "copy", cut)
    assert not (fedml.folder / "copy").exists()
    begun: list[int] = []
    storage.download(
        place.client, "six/large", fedml.folder / "copy", lambda done, _: begun.append(done)
    )
    assert begun[0] > 2_000_000
    assert (fedml.folder / "copy").read_bytes() == data
    assert sorted(p.name for p in fedml.folder.iterdir()) == ["copy", "large"]


def test_a_job_finds_stored_objects_in_its_workspace_and_nothing_is_sent_for_it(
    fedml: Fedml, place: Place
) -> None:
    fedml.file("d/one", "1\n")
    fedml.file("d/sub/two", "2\n")
    fedml.file("w/run.sh", "cat x/f in/one in/sub/two\n")
    fedml.file("f", "f\n")
    fedml("storage", "upload", "d", "seven/d")
    fedml("storage", "upload", "f", "seven/f")
    lines = "data:\n  x/f: seven/f\n  in: seven/d\n"
    job = fedml.file("job.yaml", f"workspace: w\njob: sh run.sh\n{lines}")
    assert "one" in fedml("launch", job, "--dry-run").stdout
    assert fedml("launch", job).stdout == "f\n1\n2\n"
    bare = fedml.file("bare.yaml", f"job: cat x/f\n{lines}")
    assert fedml("launch", bare).stdout == "f\n"
    fedml.file("w/x/f", "in the way\n")
    assert "'x/f' is there twice" in fedml("launch", job, code=2).stderr
    wrong = fedml.file("wrong.yaml", "job: true\ndata: {../f: seven/f}\n")
    assert "no path inside" in fedml("launch", wrong, code=2).stderr


def test_the_page_does_what_it_says(fedml: Fedml) -> None:
    page = (Path(__file__).parents[3] / "docs" / "storage.md").read_text()
    blocks = [text.partition("\n")[2] for text in page.split("```")[1::2]]
    shell, python = blocks[0], blocks[-1]
    fedml.file("train.csv", "1,2\n")
    fedml.file("results/one.txt", "1\n")
    env = {**fedml.env, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for words in (
        [
            "bash",
            "-ec",
            "mkdir down; cp -r train.csv results down; cd down; rm -f copy;"
            + shell.replace("download data/train.csv", "download data/train.csv new.csv"),
        ],
        [sys.executable, "-c", python],
    ):
        done = subprocess.run(words, cwd=fedml.folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (fedml.folder / "down" / "new.csv").read_text() == "1,2\n"
    assert "['ward-3/notes.txt']\n{'from': 'ward 3'}\n" in done.stdout
