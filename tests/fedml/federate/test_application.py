# SPDX-License-Identifier: Apache-2.0
"""What users' functions are given."""

import pytest

from fedml.federate.application import ApplicationError, Client


def test_data_that_the_machine_does_not_list_is_an_error_that_says_where_to_list_it() -> None:
    client = Client(index=0, count=1, paths={"heart": "/data/heart"})
    assert client.paths["heart"] == "/data/heart"
    with pytest.raises(ApplicationError, match=r"no data called 'lungs' \(listed: heart\)"):
        client.paths["lungs"]
    with pytest.raises(ApplicationError, match="listed: none"):
        Client(index=0, count=1).paths["lungs"]
