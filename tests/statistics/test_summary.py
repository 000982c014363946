"""The row of the published table, by hand."""

import pytest

from loratune.statistics import Summary, summarise


def test_summary_by_hand() -> None:
    # deviations -2, 0, 2: sum of squares 8, over n - 1 = 2
    assert summarise([1.0, 3.0, 5.0]) == Summary(n=3, min=1.0, max=5.0, mean=3.0, sd=2.0)


def test_one_value_has_no_spread_and_none_is_refused() -> None:
    assert summarise([2.5]).sd == 0.0
    with pytest.raises(ValueError, match="at least one number"):
        summarise([])
