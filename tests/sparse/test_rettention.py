"""Re-ttention's statistics by hand, its key invariant, and when a step is dense."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.sparse.rettention import Kept, kept_of, local_blocks, reshaped
from tests.methods import step
from tests.sparse.calls import a_call, dense, sampling
from tests.sparse.table import SMALL

CONTROL = ac.Rettention(density=0.2, block=16, drift=0.0, **SMALL)


def test_three_tokens_by_hand() -> None:
    """Scores 0, 0, 0, of which the first is visited: rho = 1/3, and the rest is (v1 + v2) / 3."""
    values = torch.tensor([[3.0, 0.0], [0.0, 6.0], [9.0, 0.0]])
    shape = 1, 1, 1
    full = values.mean(dim=0).view(1, 1, 1, 2), torch.log(torch.tensor(3.0)).view(shape)
    visited = values[:1].view(1, 1, 1, 2), torch.zeros(shape)
    kept = kept_of(0, full, visited, residual=True)
    torch.testing.assert_close(kept.ratio.flatten(), torch.tensor([1 / 3]))
    assert kept.residual is not None
    torch.testing.assert_close(kept.residual.flatten(), torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(reshaped(visited[0], kept, 1, 0.04), full[0])
    # Two steps after: rho + 0.04; without the residual the output is rho times the visited one.
    torch.testing.assert_close(reshaped(visited[0], kept, 2, 0.04).flatten(), torch.tensor([4.0 + 0.12, 2.0]))
    alone = Kept(0, kept.ratio, None)
    torch.testing.assert_close(reshaped(visited[0], alone, 1, 0.04).flatten(), torch.tensor([1.0, 0.0]))
    # It stops at 1, and never falls.
    torch.testing.assert_close(reshaped(visited[0], alone, 100, 0.04), visited[0])


def test_the_local_mask_is_the_same_in_every_pair_of_frames() -> None:
    frames, tokens, width = 3, 50, 12
    axis, mask = local_blocks(frames, tokens, width, 16)
    place = torch.arange(frames * tokens) % tokens
    assert torch.equal(mask.dense()[0, 0], (place[:, None] - place).abs() <= 6)
    assert axis.segments == (50, 50, 50)


@pytest.mark.parametrize("text", [{}, {"before": 7}, {"after": 9}])
def test_the_step_after_a_dense_one_of_equal_input_is_full_attention(text: dict[str, int]) -> None:
    state, call = CONTROL.begin(sampling()), a_call(**text)
    for index in (40, 41, 44):
        output = CONTROL.attend(replace(call, step=step(index)), state)
        torch.testing.assert_close(output, dense(call), atol=2e-6, rtol=1e-4)
    visits = state.report.visits
    assert [visits["blocks.0.attn", index, "cond"].why for index in (40, 41, 44)] == ["a dense step", "", ""]
    kept = state.made["kept", "blocks.0.attn", "cond"]
    assert (kept.ratio <= 1 + 1e-5).all()
    assert (kept.ratio > 0).all()
    latents = kept.ratio[:, :, call.queries.latent]
    assert latents.mean() < 0.6
    words = kept.ratio[:, :, call.queries.text]
    torch.testing.assert_close(words, torch.ones_like(words))


def test_without_what_was_kept_it_is_rescaled_sparse_attention() -> None:
    control = replace(CONTROL, residual=False)
    state, call = control.begin(sampling()), a_call()
    control.attend(call, state)
    output = control.attend(replace(call, step=step(41)), state)
    _, mask = local_blocks(5, 60, 12, 16)
    expected = state.made["kept", "blocks.0.attn", "cond"].ratio * dense(call, mask.dense())
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=1e-4)


def test_every_site_and_branch_keeps_its_own() -> None:
    state = CONTROL.begin(sampling())
    calls = [a_call(layer=layer, branch=branch, seed=layer) for layer in (0, 1) for branch in ("cond", "uncond")]
    for call in calls:
        CONTROL.attend(call, state)
    for call in calls:
        output = CONTROL.attend(replace(call, step=step(41)), state)
        torch.testing.assert_close(output, dense(call), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("seen", "now", "due"),
    [
        (None, 12, True),  # nothing was kept yet
        (10, 12, False),
        (10, 14, False),
        (10, 15, True),
        (12, 15, True),  # a late start does not move the schedule
        (15, 15, True),  # the same step once more, as under gradient checkpointing
        (10, 17, True),  # a cache skipped step 15
        (17, 19, False),
        (3, 40, True),
    ],
)
def test_when_a_step_is_dense(seen: int | None, now: int, due: bool) -> None:
    kept = None if seen is None else Kept(seen, torch.ones(()), None)
    assert CONTROL.is_due(kept, step(now)) is due


def test_a_drift_raises_what_follows() -> None:
    control = replace(CONTROL, drift=0.1, residual=False)
    state, call = control.begin(sampling()), a_call()
    control.attend(call, state)
    ratio = state.made["kept", "blocks.0.attn", "cond"].ratio
    first, third = (control.attend(replace(call, step=step(index)), state) for index in (41, 43))
    assert first is not None
    assert third is not None
    torch.testing.assert_close(third, first * ((ratio + 0.2).clamp(max=1.0) / ratio), atol=1e-5, rtol=1e-4)
