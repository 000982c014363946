"""What the GPU path launches, moves and waits for: counted without a GPU (counted_pass.py), so that it cannot rot unseen."""

import counted_pass
import pytest
from counted_pass import Cost


@pytest.fixture(scope="module")
def whole() -> Cost:
    """LLaMA-2-7B's shape, sixteen adapters of rank 16 on q and v, batches of 4: 42,534 launches and 1.04 TB before."""
    two, three = (counted_pass.count(layers, adapters=16, batch=4) for layers in (2, 3))
    return two.of_layers(three, 32)


def test_launches_and_bytes(whole: Cost) -> None:
    """Found: 4,695 launches, 0.378 TB. What an older torch cannot add in one call is 2,048 launches more."""
    assert whole.launches <= 5_000
    assert whole.bytes <= 0.4e12
    adds = whole.kinds["addmm"]
    assert whole.launches + adds <= 12_000


def test_nothing_waits_for_the_device(whole: Cost) -> None:
    assert not whole.syncs


def test_masks_are_computed_once_for_all_adapters(whole: Cost) -> None:
    """Per layer with adapters one kernel on the way there, one back; the rest are the rows' hashes."""
    assert whole.kinds["kept"] + whole.kinds["both_kept"] == 4 * 33
    assert whole.kinds["bitwise_xor"] + whole.kinds["bitwise_xor_"] < 10
