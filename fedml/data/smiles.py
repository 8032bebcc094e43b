# SPDX-License-Identifier: Apache-2.0
"""SMILES to graphs (Weininger 1988), as far as networks on graphs need it, without a chemistry kit.

Read are atoms, bonds, branches, rings, charges and parts without a bond between them. Not kept are
hydrogens, isotopes, the order of bonds and the sense of chirality. A hydrogen outside brackets is
no SMILES, but the solubility data has some, so it is read. Whether the chemistry makes sense is
not checked.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedml.data.dataset import Array
from fedml.data.errors import DamagedData

# The elements with a feature of their own; any other shares the last one.
ELEMENTS = ("C", "N", "O", "S", "F", "Cl", "Br", "I", "P", "other")
FEATURES = (*ELEMENTS, "aromatic", "charge", "bonds")

_TOKEN = re.compile(
    r"\[\d*(?P<bracket>[A-Za-z][a-z]?)(?P<rest>[^\]]*)\]"
    r"|(?P<atom>Cl|Br|[BCNOPSFIHbcnops])"
    r"|(?P<ring>%\d\d|\d)"
    r"|(?P<bond>[-=#$:/\\])"
    r"|(?P<other>[().])"
)
_AROMATIC = frozenset({"b", "c", "n", "o", "p", "s", "se", "as"})
_CHARGE = re.compile(r"(\++|-+)(\d*)")


@dataclass(frozen=True, slots=True)
class Molecule:
    """Atoms in the order of the text, without hydrogens.

    Attributes:
        elements: Element symbols, capitalised.
        aromatic: Whether each atom was written in lower case.
        charges: Formal charge of each atom.
        bonds: Pairs of atom numbers, each bond once.
    """

    elements: tuple[str, ...]
    aromatic: tuple[bool, ...]
    charges: tuple[int, ...]
    bonds: tuple[tuple[int, int], ...]


def molecular_graph(smiles: str) -> Molecule:
    """Parse one molecule.

    Raises:
        DamagedData: The text is not SMILES; the message has the place.
    """
    elements: list[str] = []
    aromatic: list[bool] = []
    charges: list[int] = []
    bonds: list[tuple[int, int]] = []
    open_rings: dict[str, int] = {}
    branches: list[int | None] = []
    last: int | None = None
    at = 0
    while at < len(smiles):
        token = _TOKEN.match(smiles, at)
        if token is None:
            raise _wrong(smiles, at, "no atom, bond, ring or branch starts here")
        symbol = token["atom"] or token["bracket"]
        if symbol:
            if token["bracket"] and symbol[0].islower() and symbol not in _AROMATIC:
                symbol = symbol[0]  # "nH": an aromatic nitrogen and its hydrogen
            elements.append(symbol.capitalize())
            aromatic.append(symbol in _AROMATIC)
            charges.append(_charge(token["rest"] or ""))
            if last is not None:
                bonds.append((last, len(elements) - 1))
            last = len(elements) - 1
        elif token["ring"]:
            if last is None:
                raise _wrong(smiles, at, "a ring needs an atom before it")
            number = token["ring"].lstrip("%")
            if number in open_rings:
                bonds.append((open_rings.pop(number), last))
            else:
                open_rings[number] = last
        elif token["other"] == "(":
            branches.append(last)
        elif token["other"] == ")":
            if not branches:
                raise _wrong(smiles, at, "a branch ends that never began")
            last = branches.pop()
        elif token["other"] == ".":
            last = None
        at = token.end()
    if open_rings or branches or not elements:
        raise _wrong(smiles, at, "the text ends inside a ring or a branch, or has no atom")
    heavy = [atom for atom, element in enumerate(elements) if element != "H"]
    place = {atom: number for number, atom in enumerate(heavy)}
    return Molecule(
        elements=tuple(elements[atom] for atom in heavy),
        aromatic=tuple(aromatic[atom] for atom in heavy),
        charges=tuple(charges[atom] for atom in heavy),
        bonds=tuple((place[a], place[b]) for a, b in bonds if a in place and b in place),
    )


def graphs(texts: Sequence[str]) -> tuple[Array, Array, Array]:
    """Several molecules as one graph without edges between them.

    Returns:
        ``(V, 13)`` float32 atom features in the order of `FEATURES`; ``(2, E)`` int64 bonds, each
        once; ``(V,)`` int64 number of the molecule of each atom.

    Raises:
        DamagedData: One of the texts is not SMILES.
    """
    rows: list[list[float]] = []
    edges: list[tuple[int, int]] = []
    owner: list[int] = []
    for number, text in enumerate(texts):
        molecule = molecular_graph(text)
        first = len(rows)
        degree = np.bincount(
            np.asarray(molecule.bonds, np.int64).reshape(-1), minlength=len(molecule.elements)
        )
        for atom, element in enumerate(molecule.elements):
            known = element if element in ELEMENTS else "other"
            rows.append(
                [
                    *(float(known == name) for name in ELEMENTS),
                    float(molecule.aromatic[atom]),
                    float(molecule.charges[atom]),
                    float(degree[atom]),
                ]
            )
        edges += [(first + one, first + other) for one, other in molecule.bonds]
        owner += [number] * len(molecule.elements)
    return (
        np.asarray(rows, np.float32).reshape(-1, len(FEATURES)),
        np.asarray(edges, np.int64).reshape(-1, 2).T,
        np.asarray(owner, np.int64),
    )


def _charge(rest: str) -> int:
    found = _CHARGE.search(rest)
    if found is None:
        return 0
    size = int(found[2]) if found[2] else len(found[1])
    return size if found[1][0] == "+" else -size


def _wrong(smiles: str, at: int, why: str) -> DamagedData:
    return DamagedData(f"not SMILES at character {at + 1} of {smiles!r}: {why}")
