# SPDX-License-Identifier: Apache-2.0
"""Writes `fedml_protocol/wire_pb2.py` and its stub anew from `fedml_protocol/wire.proto`.

    python protocol/generate.py            after every change of wire.proto
    python protocol/generate.py --check    ends with 1 when the files do not fit wire.proto

Needs `grpcio-tools` (in the extra `dev`), which brings its own protoc.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SCHEMA = "fedml_protocol/wire.proto"
GENERATED = ("fedml_protocol/wire_pb2.py", "fedml_protocol/wire_pb2.pyi")

# Which protoc wrote a file: its comment, and the numbers that it hands to the runtime.
_VERSION = re.compile(r"(?<=Protobuf Python Version: )[\d.]+|(?<=Domain.PUBLIC,\n)(\s*\d+,){3}")


def generate(into: Path) -> None:
    """Run protoc. From the folder above the package: the modules then know their full name.

    Raises:
        subprocess.CalledProcessError: wire.proto does not compile; protoc has said why.
    """
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}"),
            *(f"--python_out={into}", f"--pyi_out={into}", SCHEMA),
        ],
        check=True,
        cwd=ROOT,
    )


def stale(package_root: Path = ROOT) -> list[str]:
    """The generated files below `package_root` that are absent or do not fit wire.proto.

    Another release of protoc that writes the same code for the same schema is no difference.
    """
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        return [
            name for name in GENERATED if _code(package_root / name) != _code(Path(folder) / name)
        ]


def _code(path: Path) -> str | None:
    return _VERSION.sub("", path.read_text()) if path.exists() else None


def main() -> None:
    """The command line."""
    assert __doc__ is not None
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--check", action="store_true", help="write nothing, only compare")
    if not options.parse_args().check:
        generate(ROOT)
    elif names := stale():
        sys.exit(f"stale: {', '.join(names)}; run `python protocol/generate.py`")


if __name__ == "__main__":
    main()
