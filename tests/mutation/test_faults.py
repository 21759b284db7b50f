"""The faults still fit the sources: python -m tests.mutation can plant each of them."""

from __future__ import annotations

import pytest

from tests.mutation.__main__ import score
from tests.mutation.planting import ROOT, Fault, read_faults

ALL = read_faults()


def test_there_are_enough() -> None:
    assert len({fault.name for fault in ALL}) == len(ALL) >= 74


@pytest.mark.parametrize("fault", ALL, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault: Fault) -> None:
    """Every text that it replaces occurs once in its file, and its tests exist."""
    text = (ROOT / fault.file).read_text()
    assert fault.planted_in(text) != text
    for tests in fault.tests:
        assert (ROOT / tests.split("::")[0].split()[0]).is_file(), tests
    assert (ROOT / fault.family_tests).is_dir()


def test_a_text_that_is_gone_is_refused() -> None:
    with pytest.raises(ValueError, match="expected once, found 0 times"):
        ALL[0].planted_in("")


def test_what_may_survive_does_not_count() -> None:
    rows = [{"result": "noticed", "may_survive": ""}, {"result": "survived", "may_survive": "equivalent"}]
    assert score(rows) == "1 of 1 noticed (100%)"
    assert score([*rows, {"result": "survived", "may_survive": ""}]) == "1 of 2 noticed (50%)"
