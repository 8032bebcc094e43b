# SPDX-License-Identifier: Apache-2.0
"""Whether an accelerator is of the model that somebody asks for, each spelling it his own way.

A job file says `RTX-4090`, `RTX4090` or `A100-80G`; NVML says "NVIDIA GeForce RTX 4090" and
"NVIDIA A100-SXM4-80GB". Broker and agent both ask here: what one promises, the other leases.
"""

import re

# Words that tell brand or form, not the model. "HBM3" stands in the name of one H100 of three.
_DROPPED = re.compile(
    r"NVIDIA|AMD|GEFORCE|TESLA|QUADRO|RADEON|INSTINCT|GPU|GRAPHICS|CARD|GENERATION|EDITION"
    r"|SXM\d?|PCIE|NVLINK|HBM\w+"
)
_MEMORY = re.compile(r"(\d+)(?:G|GB|GIB)")
# A slice of a card: "NVIDIA A100-SXM4-40GB MIG 1g.5gb".
_PROFILE = re.compile(r"\b(\d+G)\.(\d+GB)\b", re.IGNORECASE)
# With these words it is another model: an RTX 4070 Ti is none of the RTX 4070.
_ANOTHER = frozenset({"TI", "SUPER", "D", "LAPTOP", "MOBILE", "MAX", "ADA", "BLACKWELL", "MIG"})
# A card of "80 GB" reports between 79 and 85 thousand million bytes, one of "24 GB" 25.8.
_NOMINAL = 0.9e9


def is_model(wanted: str, name: str, memory_bytes: int) -> bool:
    """Whether an accelerator with this name and memory is what `wanted` says; empty: any is.

    A size in the wanted name is the least memory that it must have, unless it stands in its own
    name, where it may be that of a whole card or of other memory, too.
    """
    if not wanted:
        return True
    asked, least = _words(wanted)
    has, named = _words(name)
    if memory_bytes < least * _NOMINAL and least != named:
        return False
    return asked <= has and not (has - asked) & _ANOTHER


def short_name(name: str) -> str:
    """What somebody writes who wants this very model: `RTX-4090`, `A100-80GB`, `A100-1g.5gb`."""
    if (slice_ := _PROFILE.search(name)) is not None:
        card, rest = (
            [word for word in _telling(part) if word != "MIG" and not _MEMORY.fullmatch(word)]
            for part in (name[: slice_.start()], name[slice_.end() :])
        )
        return "-".join(dict.fromkeys([*card, slice_[0].lower(), *rest]))
    return "-".join(dict.fromkeys(_telling(name)))


def _words(name: str) -> tuple[frozenset[str], int]:
    """The words that make the model, and the largest size in GB among the others."""
    words = _telling(name)
    sizes = [int(found[1]) for w in words if (found := _MEMORY.fullmatch(w))]
    return frozenset(w for w in words if not _MEMORY.fullmatch(w)), max(sizes, default=0)


def _telling(name: str) -> list[str]:
    """The words that tell a model or a size."""
    # "RTX4090" and "RTXA6000" are "RTX 4090" and "RTX A6000".
    spaced = re.sub(r"\b([RG]TX)(?=\w)", r"\1 ", name.upper())
    spaced = _PROFILE.sub(r"MIG \1\2", spaced)  # a slice of a card is none
    words = re.split(r"[^A-Z0-9]+", spaced)
    return [w for w in words if w and not _DROPPED.fullmatch(w)]
