# SPDX-License-Identifier: Apache-2.0
"""Finding and fetching files, with real archives and the real package clients, no network."""

import hashlib
import io
import os
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fedml.data.errors import DamagedData, FetchFailed
from fedml.data.packages import DebianFile, PythonFile, bring, find, home_folder

CONTENT = b"a,b\n1,2\n"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WHEEL = PythonFile(
    package="paddock", version="1.2", member="paddock/data/horses.csv", sha256=SHA256
)
METADATA = "Metadata-Version: 2.1\nName: paddock\nVersion: 1.2\n"


def wheel(folder: Path, content: bytes = CONTENT, member: str = WHEEL.member) -> Path:
    """A minimal wheel that pip accepts."""
    path = folder / "paddock-1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr("paddock-1.2.dist-info/METADATA", METADATA)
        archive.writestr(
            "paddock-1.2.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("paddock-1.2.dist-info/RECORD", "")
    return path


def deb(path: Path, file: str, content: bytes) -> None:
    """A Debian package as dpkg-deb lays it out, with a member of odd length before the data."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        entry = tarfile.TarInfo(f".{file}")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    out = b"!<arch>\n"
    for name, body in (("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue())):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n"
        out += header.encode() + body + b"\n" * (len(body) % 2)
    path.write_bytes(out)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes as its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_a_fetched_wheel_is_read_and_found_again(index: Path, home: Path) -> None:
    wheel(index)

    assert find(WHEEL, home) is None
    assert bring(WHEEL, home) == CONTENT
    assert find(WHEEL, home) == CONTENT
    assert [path.name for path in (home / "data").iterdir()] == ["paddock-1.2.whl"]


def test_an_installed_package_is_found_without_importing_it(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    (site / "paddock/data").mkdir(parents=True)
    (site / "paddock/__init__.py").write_text("raise SystemExit('imported')")
    (site / WHEEL.member).write_bytes(CONTENT)
    (site / "paddock-1.2.dist-info").mkdir()
    (site / "paddock-1.2.dist-info/METADATA").write_text(METADATA)
    monkeypatch.syspath_prepend(str(site))

    assert find(WHEEL, home) == CONTENT

    (site / WHEEL.member).write_bytes(b"another release")
    assert find(WHEEL, home) is None


def test_wrong_bytes_are_refused_and_leave_nothing(index: Path, home: Path) -> None:
    wheel(index, content=b"changed upstream")

    with pytest.raises(DamagedData, match="other data than expected"):
        bring(WHEEL, home)
    assert list((home / "data").iterdir()) == []


def test_a_wheel_without_the_file_is_refused(index: Path, home: Path) -> None:
    wheel(index, member="paddock/data/cows.csv")

    with pytest.raises(DamagedData, match=r"horses\.csv"):
        bring(WHEEL, home)


@pytest.mark.parametrize("broken", [b"", b"not a zip file", "cut"])
def test_a_broken_kept_archive_says_which_file_to_delete_and_can_be_replaced(
    index: Path, home: Path, broken: bytes | str
) -> None:
    whole = wheel(index).read_bytes()
    kept = home / "data/paddock-1.2.whl"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(whole[: len(whole) // 2] if isinstance(broken, str) else broken)

    with pytest.raises(DamagedData) as caught:
        find(WHEEL, home)
    assert str(kept) in caught.value.hint

    assert bring(WHEEL, home) == CONTENT
    assert find(WHEEL, home) == CONTENT


def test_a_failed_download_gives_the_clients_last_words_and_the_command(
    index: Path, home: Path
) -> None:
    with pytest.raises(FetchFailed, match="paddock") as caught:
        bring(WHEEL, home)

    assert "pip install --no-deps paddock==1.2" in caught.value.hint
    assert "No matching distribution" in str(caught.value)


def test_a_failed_download_keeps_the_archive_that_was_there(index: Path, home: Path) -> None:
    source = wheel(index)
    bring(WHEEL, home)
    source.unlink()

    with pytest.raises(FetchFailed):
        bring(WHEEL, home)
    assert find(WHEEL, home) == CONTENT


def test_a_source_archive_runs_its_setup_only_with_the_pinned_hash(
    index: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a network pip cannot build in isolation; with the setuptools at hand it can.
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")
    marker = index / "ran"
    setup = (
        f"open({str(marker)!r}, 'w').close()\n"
        "from setuptools import setup\nsetup(name='paddock', version='1.2')\n"
    )
    source = index / "paddock-1.2.tar.gz"
    with tarfile.open(source, "w:gz") as archive:
        for name, content in (
            ("setup.py", setup.encode()),
            ("PKG-INFO", METADATA.encode()),
            (WHEEL.member, CONTENT),
        ):
            entry = tarfile.TarInfo(f"paddock-1.2/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    pinned = PythonFile(
        package="paddock",
        version="1.2",
        member=WHEEL.member,
        sha256=SHA256,
        sdist_sha256=hashlib.sha256(source.read_bytes()).hexdigest(),
    )

    with pytest.raises(FetchFailed):
        bring(replace(pinned, sdist_sha256="0" * 64), home)
    assert not marker.exists()
    assert bring(pinned, home) == CONTENT
    assert marker.exists()


def test_a_kept_source_archive_is_read(home: Path) -> None:
    file = PythonFile(
        package="paddock", version="1.2", member="horses.csv", sha256=SHA256, sdist_sha256="0" * 64
    )
    (home / "data").mkdir(parents=True)
    with tarfile.open(home / "data/paddock-1.2.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("paddock-1.2/horses.csv")
        entry.size = len(CONTENT)
        archive.addfile(entry, io.BytesIO(CONTENT))

    assert find(file, home) == CONTENT


def test_a_debian_file_is_found_where_it_is_installed(tmp_path: Path, home: Path) -> None:
    path = tmp_path / "horses.csv"
    path.write_bytes(CONTENT)

    assert find(DebianFile(package="paddock", path=str(path), sha256=SHA256), home) == CONTENT


def test_a_kept_debian_package_is_read_without_dpkg(home: Path) -> None:
    file = DebianFile(package="paddock", path="/nowhere/horses.csv", sha256=SHA256)
    (home / "data").mkdir(parents=True)
    deb(home / "data/paddock.deb", file.path, CONTENT)

    assert find(file, home) == CONTENT

    deb(home / "data/paddock.deb", "/nowhere/cows.csv", CONTENT)
    with pytest.raises(DamagedData, match="cannot read"):
        find(file, home)


def test_our_debian_reader_agrees_with_dpkg(tmp_path: Path, home: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: paddock\nVersion: 1\nArchitecture: all\nMaintainer: T <t@example.org>\n"
        "Description: test\n"
    )
    (tree / "srv").mkdir()
    (tree / "srv/horses.csv").write_bytes(CONTENT)
    (home / "data").mkdir(parents=True)
    built = home / "data/paddock.deb"
    try:
        subprocess.run(
            ["dpkg-deb", "-Zxz", "--root-owner-group", "-b", str(tree), str(built)],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("no dpkg-deb on this machine")

    found = find(DebianFile(package="paddock", path="/srv/horses.csv", sha256=SHA256), home)
    assert found == CONTENT


def test_without_apt_the_error_says_how_to_install(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")

    with pytest.raises(FetchFailed, match="cannot start apt-get") as caught:
        bring(DebianFile(package="paddock", path="/nowhere/x", sha256=SHA256), home)
    assert caught.value.hint == "apt install paddock"


def test_home_is_the_argument_then_the_environment_then_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.delenv("FEDML_HOME", raising=False)
    assert home_folder(None) == tmp_path / "user/.fedml"
    monkeypatch.setenv("FEDML_HOME", str(tmp_path / "set"))
    assert home_folder(None) == tmp_path / "set"
    assert home_folder(tmp_path / "given") == tmp_path / "given"
