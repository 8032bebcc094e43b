# SPDX-License-Identifier: Apache-2.0
"""What a launched job leaves behind for others: files, and values by name.

work/.fedml/values      $FEDML_OUTPUT: lines NAME=VALUE
work/.fedml/files/      $FEDML_OUTPUT_DIR: whatever lies there when the job ends
outputs/                of the shim's directory: the same, out of the reach of what the job started

They become artifacts of the job's result, `values` and `files/PATH`, and are sent before it.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from fedml_agent import belongings
from fedml_agent.https import Https, file_blob
from fedml_agent.journal import Entry
from fedml_agent.outbox import FilesSpoilt, send_file
from fedml_protocol.blob import NamedBlob
from fedml_protocol.launch import OUTPUT_FILES, OUTPUT_VALUES

# With their names they travel in one message.
MOST_FILES = 200
_LONGEST_PATH = 300  # bytes
_MOST_VALUE_BYTES = 16 * 1024
_LEFT = ".fedml"
_KEPT = "outputs"


class TooMuch(Exception):
    """The job has left more than can be taken; the text is for whoever wrote it."""


def prepare(work: Path) -> None:
    """Make the places that the job is told of."""
    (work / _LEFT / OUTPUT_FILES).mkdir(parents=True, exist_ok=True)


def variables(work: Path) -> dict[str, str]:
    """How the job is told of them."""
    return {
        "FEDML_OUTPUT": str(work / _LEFT / OUTPUT_VALUES),
        "FEDML_OUTPUT_DIR": str(work / _LEFT / OUTPUT_FILES),
    }


def take(folder: Path) -> tuple[NamedBlob, ...]:
    """Put aside what a job that has ended has left in its shim's directory; again is harmless.

    Raises:
        TooMuch: It is too much.
        OSError: The disk fails.
    """
    kept = folder / _KEPT
    left = folder / "work" / _LEFT
    if not kept.exists():
        if left.is_symlink() or not left.is_dir():
            return ()
        left.rename(kept)
    names = sorted(_names(kept))
    if len(names) > MOST_FILES:
        raise TooMuch(
            f"it left {len(names)} files in $FEDML_OUTPUT_DIR, at most {MOST_FILES} are taken: "
            "pack them into an archive"
        )
    found = []
    for name in names:
        if len(os.fsencode(name)) > _LONGEST_PATH:
            raise TooMuch(f"it left a file with too long a name: {name[:80]}…")
        with belongings.opened(folder, _KEPT, *name.split("/")) as path:
            if name == OUTPUT_VALUES and path.stat().st_size > _MOST_VALUE_BYTES:
                raise TooMuch(f"$FEDML_OUTPUT has more than {_MOST_VALUE_BYTES} bytes: use a file")
            found.append(NamedBlob(name=name, blob=file_blob(path)))
    return tuple(found)


def _names(kept: Path) -> Iterator[str]:
    """What is taken of it: plain files that have a name for everybody; links lead elsewhere."""
    if _is_file(kept / OUTPUT_VALUES) and (kept / OUTPUT_VALUES).stat().st_size:
        yield OUTPUT_VALUES
    if (kept / OUTPUT_FILES).is_symlink():
        return
    for folder, _, files in os.walk(kept / OUTPUT_FILES):
        for file in files:
            path = Path(folder, file)
            if _is_file(path) and str(path).isprintable():
                yield str(path.relative_to(kept))


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


async def upload(https: Callable[[], Https], folder: Path, entry: Entry, *, again: bool) -> None:
    """Send what a result names; `again`: some may be there already.

    Raises:
        FilesSpoilt: It is not what it was.
        AgentError: It did not arrive.
    """
    for artifact in entry.result.artifacts if entry.result is not None else ():
        try:
            with belongings.opened(folder, _KEPT, *artifact.name.split("/")) as path:
                # Of an empty file the broker would say that it lacks nothing.
                await send_file(https, path, artifact, again=again and artifact.blob.size > 0)
        except (FileNotFoundError, belongings.NotAFile) as error:
            raise FilesSpoilt(f"{artifact.name} is gone from this machine's disk") from error
