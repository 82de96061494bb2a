"""What a row adds to the stock pipeline's: differences picture by picture."""

from __future__ import annotations

import pytest

from attnctrl.bench.compare import by_success, paired
from attnctrl.bench.results import Row


def row(method: str, present: str, bound: str) -> Row:
    return Row(method, 4, len(bound.split()), more={"pictures": {"present": present, "bound": bound}})


def test_a_change_is_that_of_each_picture() -> None:
    stock = row("none", "0.5 1 0.75 1", "0 1 0 1")
    found = paired(row("loco", "1 1 0.75 0.75", "1 1 0 0"), stock)
    assert found.metrics["present_change"].value == pytest.approx(0.0625)
    assert found.metrics["bound_change"].value == 0
    always = paired(row("loco", "1 1 1 1", "1 1 1 1"), row("none", "0 0 0 0", "0 0 0 0")).metrics["bound_change"]
    assert (always.low, always.value, always.high) == (1, 1, 1)


def test_there_is_none_without_a_stock_row_that_kept_its_pictures() -> None:
    own, stock = row("loco", "1", "1"), row("none", "1", "1")
    assert paired(own, None) == own
    assert paired(stock, stock) == stock
    assert paired(own, Row("none", 4, 1)) == own


def test_losses_by_success() -> None:
    found = by_success([0.2, 0.4, 0.9], [True, True, False])
    assert {name: estimate.value for name, estimate in found.items()} == pytest.approx(
        {"loss": 0.5, "loss_bound": 0.3, "loss_unbound": 0.9}
    )
    assert set(by_success([0.2], [True])) == {"loss", "loss_bound"}
