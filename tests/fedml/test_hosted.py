# SPDX-License-Identifier: Apache-2.0
"""Scripts that say which of FedML's platforms they mean."""

import pytest

import fedml


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("env_version", "local"),
        ("local_on_premise_platform_host", "192.0.2.7"),
        ("local_on_premise_platform_port", 18080),
    ],
)
def test_what_a_script_sets_comes_back_and_a_warning_says_what_decides(
    name: str, value: object
) -> None:
    with pytest.warns(UserWarning, match=f"{value!r}.*is not used: `fedml login KEY`") as warned:
        getattr(fedml, f"set_{name}")(value)
    assert warned[0].filename == __file__  # the script's own line is shown
    assert getattr(fedml, f"get_{name}")() == value
