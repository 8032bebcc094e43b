# SPDX-License-Identifier: Apache-2.0
"""What a FedML script calls `args`: a configuration and the command line, as attributes.

    args = fedml.init()          # python main.py --cf fedml_config.yaml --rank 0 --role server

Every key of every section is an attribute, whatever it is called: a script's own keys are its own.
"""

from __future__ import annotations

import argparse
import difflib
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedml.errors import ConfigError
from fedml.translation import flatten, read

# Two spellings of one thing: a script may read either.
_ALSO = (("learning_rate", "lr"), ("weight_decay", "wd"))


class Arguments:
    """The keys of all sections, and what the command line says, as attributes.

    Attributes:
        sections: The configuration as it was read.
    """

    def __init__(self, sections: Mapping[str, Mapping[str, Any]], **command_line: Any) -> None:
        self.sections = {name: dict(section) for name, section in sections.items()}
        vars(self).update(flatten(self.sections))
        for one, other in _ALSO:
            for have, lack in ((one, other), (other, one)):
                if have in vars(self) and lack not in vars(self):
                    setattr(self, lack, getattr(self, have))
        vars(self).update(command_line)

    def __getattr__(self, name: str) -> Any:
        """Only what is not there comes here."""
        if name.startswith("__") or name == "sections":
            raise AttributeError(name)
        near = difflib.get_close_matches(name, vars(self), n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise AttributeError(f"the configuration has no key `{name}`{hint}")


# The configuration and command line of a script that runs on a machine (`fedml.script`).
_given: list[Arguments] = []


@contextmanager
def giving(args: Arguments) -> Iterator[None]:
    """Let `load_arguments` return these, whatever the command line says."""
    _given.append(args)
    try:
        yield
    finally:
        _given.pop()


def load_arguments(
    training_type: str | None = None,
    comm_backend: str | None = None,
    *,
    command_line: Sequence[str] | None = None,
) -> Arguments:
    """Read the file that ``--cf`` names, and the rest of FedML's command line.

    Args:
        training_type: Where the file does not say.
        comm_backend: Where the file does not say.
        command_line: ``sys.argv`` unless given. Options that are not FedML's are left alone.

    Raises:
        ConfigError: No file is named, or it is wrong.
    """
    if _given:
        return _given[-1]
    said, _ = _parser().parse_known_args(command_line)
    if said.yaml_config_file is None:
        raise ConfigError("no configuration is named", "--cf fedml_config.yaml")
    file = Path(said.yaml_config_file)
    args = Arguments(read(file), **vars(said))
    for name, value in (("training_type", training_type), ("backend", comm_backend)):
        if value is not None and name not in vars(args):
            setattr(args, name, value)
    return args


def command_line(words: Sequence[str]) -> dict[str, Any]:
    """What FedML's own options among the words of a command line say."""
    return vars(_parser().parse_known_args(words)[0])


def init(args: Any = None, check_env: bool = True, **_: Any) -> Any:
    """Read the configuration unless it is given, and seed what is drawn from.

    Raises:
        ConfigError: No file is named, or it is wrong.
    """
    args = load_arguments() if args is None else args
    seed = int(getattr(args, "random_seed", 0) or 0)
    random.seed(seed)
    import numpy as np

    np.random.seed(seed % 2**32)
    torch = sys.modules.get("torch")  # a script that trains with it has imported it
    if torch is not None:
        torch.manual_seed(seed)
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--yaml_config_file", "--cf")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--node_rank", type=int, default=0)
    parser.add_argument("--role", default="client")
    parser.add_argument("--run_id", default="0")
    parser.add_argument("--run_device_id", default="0")
    return parser
