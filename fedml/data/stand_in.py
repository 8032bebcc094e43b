# SPDX-License-Identifier: Apache-2.0
"""Data sets that FedML configurations name and that no package carries: the nearest one at hand.

A stand-in is never used without a word. Whoever runs a configuration asks `stand_in`, says what
`difference` says, and refuses instead where the user asked for strictness. Scores on a stand-in
are not scores on the named data.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fedml import data
from fedml.data.errors import DatasetMissing


@dataclass(frozen=True, slots=True)
class StandIn:
    """What to use instead of ``named``, and what differs.

    Attributes:
        named: The data set that was asked for.
        use: A name that `fedml.data.load` knows.
        difference: For people: what is lost.
        same_data: True where only the spelling, the size or the source differs.
        whole: False where it is only a part of the named data set.
    """

    named: str
    use: str
    difference: str
    same_data: bool = False
    whole: bool = True

    @property
    def exact(self) -> bool:
        """Whether it is the very data that was named, under another name."""
        return self.same_data and self.whole

    @property
    def note(self) -> str:
        """One line to show before the run."""
        if self.same_data:
            return f"{self.named}: using {self.use}, {self.difference}"
        return (
            f"{self.named} is in no package: using {self.use} instead, {self.difference}; to have "
            f"the named one, load your own files and pass the dataset to the runner"
        )


_DIGITS = "digits of MNIST, 4,000 + 1,000"
_COLOUR = "28x28 grey images of ten classes instead of colour photographs"
_SPEECH = "running text of 66 books, one client each"
_TOPICS = "classification of news texts"

_TABLE = (
    StandIn("mnist", "mnist-5k", "5,000 of its 70,000 real digits", same_data=True, whole=False),
    StandIn("fmnist", "fashion-mnist", "the complete set", same_data=True),
    StandIn("fashionmnist", "fashion-mnist", "the complete set", same_data=True),
    StandIn("femnist", "mnist-5k", f"{_DIGITS}, without writers and letters"),
    StandIn("federatedemnist", "mnist-5k", f"{_DIGITS}, without writers and letters"),
    StandIn("emnist", "mnist-5k", f"{_DIGITS}, without letters"),
    StandIn("cifar10", "fashion-mnist", _COLOUR),
    StandIn("cifar100", "fashion-mnist", _COLOUR),
    StandIn("fed_cifar100", "fashion-mnist", _COLOUR),
    StandIn("cinic10", "fashion-mnist", _COLOUR),
    StandIn("svhn", "mnist-5k", "grey digits instead of photographed ones"),
    StandIn("ilsvrc2012", "fashion-mnist", _COLOUR),
    StandIn("imagenet", "fashion-mnist", _COLOUR),
    StandIn("gld23k", "fashion-mnist", _COLOUR),
    StandIn("gld160k", "fashion-mnist", _COLOUR),
    StandIn("shakespeare", "king-james", _SPEECH),
    StandIn("fed_shakespeare", "king-james", _SPEECH),
    StandIn("stackoverflow_nwp", "king-james", f"{_SPEECH}; characters instead of words"),
    StandIn("stackoverflow_lr", "20news", f"{_TOPICS}, one topic each instead of many tags"),
    StandIn("reddit", "king-james", _SPEECH),
    StandIn("wikitext", "king-james", _SPEECH),
    StandIn("20newsgroups", "20news", "the same postings, letters only", same_data=True),
    StandIn("agnews", "reuters-r8", _TOPICS),
    StandIn("sst_2", "reuters-r8", f"{_TOPICS} instead of sentiment"),
    StandIn("sentiment140", "reuters-r8", f"{_TOPICS} instead of sentiment"),
    StandIn("citeseer", "cora", "another graph of citations"),
    StandIn("pubmed", "cora", "another graph of citations"),
    StandIn("esol", "solubility", "other measurements of the same property"),
    StandIn("lipo", "solubility", "solubility instead of lipophilicity"),
    StandIn("ciao", "movielens-100k", "film ratings instead of product ratings"),
    StandIn("epinions", "movielens-100k", "film ratings instead of product ratings"),
    StandIn("movielens", "movielens-100k", "the 100,000 ratings", same_data=True),
    StandIn("ml-100k", "movielens-100k", "the same ratings", same_data=True),
    StandIn("fed_heart_disease", "heart", "the same hospitals, no row dropped", same_data=True),
    StandIn("heart_disease", "heart", "four hospitals", same_data=True),
    StandIn("fed_tcga_brca", "gbsg2", "another breast cancer study, not divided by region"),
    StandIn("adult", "heart", "patients instead of incomes; a yes-or-no question all the same"),
    StandIn("har", "watch", "seven shoulder exercises, ten subjects instead of thirty"),
    StandIn("ucihar", "watch", "seven shoulder exercises, ten subjects instead of thirty"),
)
_BY_NAME = {entry.named: entry for entry in _TABLE}


def stand_in(name: str) -> StandIn | None:
    """The nearest data set at hand for a name out of a FedML configuration, else None."""
    return _BY_NAME.get(name.lower().replace(" ", "_"))


# What comes next where a data set itself is not on the machine: nearest first, of the same kind.
_NEXT = {
    "mnist-5k": ("fashion-mnist", "digits"),
    "fashion-mnist": ("mnist-5k", "digits"),
    "digits": ("mnist-5k", "fashion-mnist"),
    "20news": ("reuters-r52", "reuters-r8"),
    "reuters-r8": ("reuters-r52", "20news"),
    "reuters-r52": ("reuters-r8", "20news"),
    "heart": ("breast-cancer",),
    "breast-cancer": ("heart",),
}


def is_here(name: str) -> bool:
    """Whether a data set of ours is on this machine."""
    return data.describe(name).present


def nearest(name: str, present: Callable[[str], bool]) -> tuple[str, str, bool]:
    """What to use for a data set's name on a machine that may not have it.

    Args:
        name: From a FedML configuration, or one that `fedml.data.load` knows.
        present: Whether this machine has one of ours.

    Returns:
        Our name of the one to use; what to tell people, empty where nothing differs; whether the
        data differs.

    Raises:
        UnknownDataset: Nothing stands in for this name.
        DatasetMissing: Neither it nor anything near is here; the hint says how to get it.
    """
    entry = stand_in(name)
    wanted = entry.use if entry is not None else name
    about = data.describe(wanted)
    note = "" if entry is None else entry.note
    if present(wanted):
        return wanted, note, entry is not None and not entry.exact
    for other in _NEXT.get(wanted, ()):
        if present(other):
            got = " or ".join(f"`{command}`" for command in about.how_to_get)
            what = data.describe(other).title
            text = f"{name} is not on this machine: using {other} instead ({what}); for "
            text += "the named one" if entry is None or entry.same_data else wanted
            return other, f"{text} run {got}", True
    ways = " or: ".join(about.how_to_get)
    raise DatasetMissing(
        f"{name} is not on this machine, nor anything near it", hint=f"run: {ways}"
    )
