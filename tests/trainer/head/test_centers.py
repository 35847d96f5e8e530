"""Initial class centres: the same for one process with all classes and several with parts."""

import pytest
import torch

from gkd.trainer.head.centers import ClassCenters


@pytest.mark.parametrize("block", [4, 1 << 16])
def test_parts_are_rows_of_the_centres_of_all_classes(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gkd.trainer.head.centers.INIT_ROWS", block)

    def drawn(rows: range | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        return ClassCenters(11, 3, rows=rows).weight.detach()

    everything = drawn()
    assert everything.shape == (11, 3)
    for rows in (range(0, 4), range(3, 9), range(9, 11), range(11, 11)):
        assert torch.equal(drawn(rows), everything[rows.start : rows.stop])


def test_centres_have_the_documented_deviation() -> None:
    torch.manual_seed(0)
    weight = ClassCenters(2000, 64).weight.detach()
    assert weight.mean().abs() < 1e-4
    assert abs(weight.std().item() - 0.01) < 1e-4
