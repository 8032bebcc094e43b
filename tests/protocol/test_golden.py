# SPDX-License-Identifier: Apache-2.0
"""Bytes once released are read, and written, for ever.

`golden/examples.py` says how new ones are made. What lies there is never replaced.
"""

from pathlib import Path

import pytest

from fedml_protocol.envelope import OLDEST_SCHEMA, SCHEMA, Envelope
from fedml_protocol.federate import AggregatorFrame, WorkerFrame
from fedml_protocol.keys import fingerprint, verify
from fedml_protocol.tasks import Offer, Order, SignedOrder
from tests.fakes.messages import members
from tests.protocol.golden import examples

GOLDEN = Path(__file__).parent / "golden"

each = pytest.mark.parametrize("name", examples.EXAMPLES)


def golden(name: str) -> bytes:
    return (examples.FOLDER / f"{name}.bin").read_bytes()


@each
def test_todays_code_reads_the_bytes(name: str) -> None:
    message = examples.EXAMPLES[name]
    assert examples.read(type(message), golden(name)) == message


@each
def test_todays_code_writes_the_same_bytes(name: str) -> None:
    assert examples.write(examples.EXAMPLES[name]) == golden(name)


@each
def test_what_was_read_is_written_as_it_came(name: str) -> None:
    """Without the example: what a relay would do."""
    kind = type(examples.EXAMPLES[name])
    assert examples.write(examples.read(kind, golden(name))) == golden(name)


def test_the_signatures_in_the_files_fit() -> None:
    public = examples.SIGNING_KEY.public_key()
    for name, order in examples.ORDERS.items():
        envelope = examples.read(Envelope, golden(f"envelope-signed_order-{name}"))
        assert isinstance(envelope, Envelope)
        assert isinstance(envelope.body, SignedOrder)
        assert verify(envelope.body, {fingerprint(public): public}, examples.DEVICE) == order


def test_every_file_has_an_example_and_can_be_read_by_people() -> None:
    names = set(examples.EXAMPLES)
    assert {path.stem for path in examples.FOLDER.glob("*.bin")} == names
    assert {path.stem for path in examples.FOLDER.glob("*.txt")} == names
    for path in examples.FOLDER.glob("*.txt"):
        kind = type(examples.EXAMPLES[path.stem])
        assert path.read_text().startswith(f"{kind.__name__}(")


def test_every_schema_that_is_spoken_has_its_files() -> None:
    assert {path.name for path in GOLDEN.glob("schema-*")} == {
        f"schema-{number}" for number in range(OLDEST_SCHEMA, SCHEMA + 1)
    }


@pytest.mark.parametrize(
    ("kind", "union"),
    [
        (Envelope, "body"),
        (Order, "what"),
        (WorkerFrame, "body"),
        (AggregatorFrame, "body"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_member_of_every_union_has_an_example(kind: type, union: str) -> None:
    shown = {
        type(getattr(message, union))
        for message in examples.EXAMPLES.values()
        if type(message) is kind
    }
    assert shown == set(members(kind, union))


def test_every_specification_of_an_offer_has_an_example() -> None:
    offers = [order.what for order in examples.ORDERS.values() if isinstance(order.what, Offer)]
    assert {type(offer.spec) for offer in offers} == set(members(Offer, "spec"))


def test_writing_again_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(examples, "FOLDER", tmp_path)
    examples.main()
    assert {path.stem for path in tmp_path.glob("*.bin")} == set(examples.EXAMPLES)
    assert "wrote envelope-accept.bin" in capsys.readouterr().out

    (tmp_path / "envelope-accept.bin").write_bytes(b"of an older release")
    (tmp_path / "envelope-reject.bin").unlink()
    with pytest.raises(SystemExit, match=r"were left as they are: envelope-accept\.bin"):
        examples.main()
    assert (tmp_path / "envelope-accept.bin").read_bytes() == b"of an older release"
    assert capsys.readouterr().out == "wrote envelope-reject.bin\n"
