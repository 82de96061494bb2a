"""What a control block refuses, and the threads it belongs to."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import attnctrl as ac
from tests import tiny
from tests.probes import REGIONS, Attend, Mask, Nudge
from tests.spies import assert_restored, snapshot


def test_two_replacing_controls_refuse_each_other() -> None:
    pipe = tiny.sd()
    before = snapshot(pipe)
    with (
        pytest.raises(ac.ControlError, match=r"Attend and Attend cannot work together: both replace the attention"),
        ac.control(pipe, Attend(), Attend()),
    ):
        pytest.fail("the block was entered")
    with ac.control(pipe, Attend(window=ac.Window(0.2, 0.2)), Attend()):  # an idle one is no rival
        tiny.draw(pipe, steps=2)
    with (
        ac.control(pipe, Attend()),
        pytest.raises(ac.ControlError, match="cannot work together"),
        ac.control(pipe, Attend()),
    ):
        pytest.fail("the inner block was entered")
    assert_restored(before, pipe)


def test_controls_may_refuse_each_other_with_their_own_sentence() -> None:
    class Shy(Nudge):
        def conflict(self, other: ac.Control) -> str | None:
            return "it wants to be alone." if isinstance(other, Mask) else None

    for pair in ((Shy(), Mask()), (Mask(), Shy())):
        with (
            pytest.raises(ac.ControlError, match=r"(Shy and Mask|Mask and Shy) cannot work together: it wants to be"),
            ac.control(tiny.sd(), *pair),
        ):
            pytest.fail("the block was entered")


def test_share_inside_a_block_is_refused() -> None:
    pipe = tiny.sd()
    with ac.control(pipe):
        with pytest.raises(ac.ControlError, match=r"share\(pipe\) was called inside a control block"):
            ac.share(pipe)
        refused: list[BaseException] = []
        thread = threading.Thread(target=lambda: refused.append(_raised(lambda: ac.share(pipe))))
        thread.start()
        thread.join()
    assert isinstance(refused[0], ac.ControlError)
    ac.share(pipe)


def _raised(function: Any) -> BaseException:
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("what", ["enter", "call"])
def test_one_pipeline_object_in_two_threads_is_refused(what: str) -> None:
    """The other thread gets the sentence; the block goes on unharmed."""
    pipe, control = tiny.sd(), ac.RegionMask(REGIONS)
    errors: list[BaseException] = []

    def other() -> None:
        def use() -> None:
            if what == "call":
                tiny.draw(pipe, steps=2)
            else:
                with ac.control(pipe, Nudge()):
                    tiny.draw(pipe, steps=2)

        errors.append(_raised(use))

    before = snapshot(pipe)
    with ac.control(pipe, control):
        expected = tiny.draw(pipe)
        inside = snapshot(pipe)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(timeout=60)
        assert_restored(inside, pipe)
        assert torch.equal(tiny.draw(pipe), expected)
    assert_restored(before, pipe)
    assert isinstance(errors[0], ac.ControlError), errors
    assert "another thread" in str(errors[0])
    assert "share(pipe)" in str(errors[0])


def test_things_that_are_not_controls() -> None:
    with pytest.raises(ac.ControlError, match="is not a control: pass instances"), ac.control(tiny.sd(), ac.RegionMask):
        pytest.fail("the block was entered")
