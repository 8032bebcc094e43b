# SPDX-License-Identifier: Apache-2.0
"""What people watched and heard: MovieLens-100K and Last.fm. Every user is a natural client.

Of each user's rows a fifth is the test part: the latest ones where the data has times
(MovieLens), else by the digest of the item (Last.fm).
"""

import numpy as np

from fedml.data import parquet
from fedml.data.dataset import Array, Dataset, Ratings, Rows, by_digest
from fedml.data.errors import DamagedData
from fedml.data.packages import PythonFile
from fedml.data.provider import Files, Provider

TEST_SHARE = 0.2


def _numbered(identifiers: Array) -> tuple[Rows, tuple[str, ...]]:
    """Identifiers to 0, 1, …, in their order, and the identifiers as text."""
    names, numbers = np.unique(identifiers, return_inverse=True)
    return numbers.astype(np.int64), tuple(str(name) for name in names.tolist())


def _dataset(name: str, user: Array, item: Array, y: Array, test: Rows) -> Dataset[Ratings]:
    users, user_names = _numbered(user)
    items, item_names = _numbered(item)
    everything = Ratings(
        user=users,
        item=items,
        y=y.astype(np.float32),
        users=len(user_names),
        items=len(item_names),
    )
    return Dataset(
        name=name,
        train=everything.take(np.setdiff1d(np.arange(len(y)), test)),
        test=everything.take(test),
        features=item_names,
        clients=user_names,
    )


def read_movielens(files: Files) -> Dataset[Ratings]:
    """One to five stars; at least 20 ratings a user."""
    header, *lines = files["ratings"].decode("ascii").splitlines()
    if header.split("\t") != [
        *("user_id:token", "item_id:token", "rating:float", "timestamp:float")
    ]:
        raise DamagedData(f"not MovieLens ratings: {header[:60]!r}")
    user, item, stars, time = np.loadtxt(lines, np.int64, delimiter="\t", unpack=True)
    order = np.lexsort((item, time, user))
    # Where each user's rows end in that order, the last fifth before the end is held out.
    ends = np.cumsum(np.unique(user, return_counts=True)[1])
    starts = np.concatenate([[0], ends[:-1]])
    held = [
        order[end - round((end - start) * TEST_SHARE) : end]
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    return _dataset("movielens-100k", user, item, stars, np.sort(np.concatenate(held)))


def read_lastfm(files: Files) -> Dataset[Ratings]:
    """How often each user played each of the (up to 50) artists that they play most."""
    table = parquet.read(files["plays"])
    user, item = table["sourceNodeId"], table["targetNodeId"]
    keys = [f"{who}/{what}" for who, what in zip(user.tolist(), item.tolist(), strict=True)]
    _train, test = by_digest(keys, user.tolist(), TEST_SHARE)
    return _dataset("lastfm", user, item, table["weight"], test)


PROVIDERS = (
    Provider(
        name="movielens-100k",
        title="MovieLens-100K: 943 people rate 1,682 films with one to five stars",
        licence="GroupLens terms: research use, no redistribution, no endorsement claims",
        source="Harper and Konstan 2015, doi 10.1145/2827872; in recbole 1.2.1",
        size="80,000 + 20,000 ratings",
        download_mb=2.1,
        files={
            "ratings": PythonFile(
                package="recbole",
                version="1.2.1",
                member="recbole/dataset_example/ml-100k/ml-100k.inter",
                sha256="4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
            )
        },
        read=read_movielens,
    ),
    Provider(
        name="lastfm",
        title="Last.fm (HetRec 2011): 1,892 people, how often they played which artists",
        licence="Last.fm terms: non-commercial use",
        source="Cantador, Brusilovsky, Kuflik 2011, HetRec; in graphdatascience 2.2",
        size="74,266 + 18,568 plays",
        download_mb=2.1,
        files={
            "plays": PythonFile(
                package="graphdatascience",
                version="2.2",
                member="graphdatascience/resources/lastfm/user_listen_artist_rels.parquet.gzip",
                sha256="19a603a2a4939b9e5bf9c0aac5b9a0d6bcf201eea82c867eadb7a04cbc52f52d",
            )
        },
        read=read_lastfm,
    ),
)
