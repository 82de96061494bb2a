"""What every sparse control does, on one layer's call: full density is full attention, text sees all, masks hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls import REGISTRY
from attnctrl.kernels import TokenGroups
from attnctrl.sites import TokenLayout
from tests.methods import step
from tests.sparse.calls import GRID, SITES, a_call, attended, dense, sampling
from tests.sparse.table import SMALL, full_controls, sparse_controls

SPARSE, FULL = sparse_controls(), full_controls()
TEXT: dict[str, dict[str, int]] = {"alone": {}, "text before": {"before": 7}, "text after": {"after": 21}}
STEPS = (step(40), step(42))
"""For Rettention: a dense step, and one that is not."""


def after_a_dense_step(control: ac.Control, call: Any) -> tuple[Any, Any]:
    """What the control makes of a call, and its state; Rettention has had a dense step of the same query and key."""
    state = control.begin(sampling(call.queries.grid))
    if isinstance(control, ac.Rettention):
        control.attend(replace(call, step=STEPS[0]), state)
    return control.attend(replace(call, step=STEPS[1]), state), state


def test_the_tables_hold_every_method() -> None:
    names = [name for name, entry in REGISTRY.items() if entry.task == "sparse"]
    for table in (SPARSE, FULL):
        assert {name.partition(",")[0] for name in table} | {"agent-attention"} == set(names)


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_at_full_density_it_is_full_attention(name: str, text: str, layer: int) -> None:
    call = a_call(layer=layer, batch=2, **TEXT[text])
    output, _ = after_a_dense_step(FULL[name], call)
    torch.testing.assert_close(output, dense(call), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", FULL)
def test_so_it_is_beside_padded_text(name: str) -> None:
    """Padding of each picture's own, as a bool mask and as an additive one."""
    call = a_call(before=7, batch=2)
    padding = torch.ones(2, 1, 1, call.query.shape[2], dtype=torch.bool)
    padding[0, ..., 3:7] = padding[1, ..., 5:7] = False
    additive = torch.zeros(padding.shape).masked_fill(~padding, -10000.0)
    for seen in (padding, additive):
        output, _ = after_a_dense_step(FULL[name], replace(call, mask=seen, seen=seen))
        torch.testing.assert_close(output, dense(call, padding), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("name", SPARSE)
def test_it_skips_something_and_text_sees_all(name: str, text: str) -> None:
    call = a_call(layer=1, **TEXT[text])
    output, state = after_a_dense_step(SPARSE[name], call)
    full = dense(call)
    latent = call.queries.latent
    assert torch.isfinite(output).all()
    if name != "rettention":  # of equal query and key it gives full attention again
        assert not torch.allclose(output[:, :, latent], full[:, :, latent], atol=1e-3)
    torch.testing.assert_close(output[:, :, call.queries.text], full[:, :, call.queries.text], atol=2e-6, rtol=1e-4)
    visit = state.report.visits[SITES[1].name, STEPS[1].index, "cond"]
    assert 0 < float(visit.share) < 1
    assert visit.why == ""
    assert f"{float(visit.share) * 100:.1f}% of the pairs, by {visit.form}" in str(state.report) or name == "rettention"


@pytest.mark.parametrize("name", SPARSE)
def test_what_is_text_is_seen_by_all(name: str) -> None:
    """A text key that outshines all others is what every query gets."""
    call = a_call(before=2, spread=0.1)
    call.query[..., 0], call.key[..., 0] = 100.0, 0.0
    call.key[:, :, 1, 0] = 100.0
    output, _ = after_a_dense_step(SPARSE[name], call)
    torch.testing.assert_close(output, call.value[:, :, 1:2].expand_as(output), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(set(SPARSE) - {"rettention"}))
def test_gradients_reach_all_three(name: str) -> None:
    call = a_call(after=5, gradient=True)
    output, _ = attended(SPARSE[name], call)
    assert output is not None
    grads = torch.autograd.grad(output.square().sum(), (call.query, call.key, call.value))
    assert all(torch.isfinite(grad).all() and grad.any() for grad in grads)


@pytest.mark.parametrize("name", SPARSE)
def test_small_attention_is_left_full_and_the_report_says_so(name: str) -> None:
    """Blocks of 16 do not pay on a CPU, nor do few blocks; VMoBA knows by its density."""
    if name.startswith("vmoba"):
        pytest.skip("its own test is below")
    control = sparse_controls((2, 4, 4))[name]
    output, report = attended(replace(control, fall_back=True), a_call((2, 4, 4)))
    assert output is None
    (visit,) = report.visits.values()
    assert (visit.share, visit.form, visit.why) == (1.0, "full", "fewer than 8 blocks of keys")
    assert "100.0% of the pairs, skipped nothing: fewer than 8 blocks of keys" in str(report)


def test_dense_chunks_are_left_full() -> None:
    control = ac.VMoBA(threshold=0.9, **SMALL | {"fall_back": True})
    output, report = attended(control, a_call())
    assert output is None
    assert next(iter(report.visits.values())).why == "a density above 0.67"


def test_a_site_and_step_seen_again_counts_once() -> None:
    """As under gradient checkpointing, or in the descents of a loss."""
    control, call = SPARSE["draft"], a_call()
    state = control.begin(sampling())
    first = control.attend(call, state)
    assert torch.equal(first, control.attend(call, state))  # type: ignore[arg-type]
    assert len(state.report.visits) == 1


@pytest.mark.parametrize("name", sorted(set(SPARSE) - {"vmoba", "vmoba, threshold", "rettention"}))
def test_masks_of_other_controls_hold(name: str) -> None:
    """Even latents and odd ones apart: by token groups and by a bool tensor, in whatever order the latents are."""
    call = a_call(before=7)
    tokens = call.query.shape[2]
    kind = torch.arange(tokens) % 2 + 1
    kind[:7] = 3
    groups = TokenGroups(kind[None], kind[None])
    outputs = []
    for seen in (groups, groups.dense()):
        output, _ = attended(SPARSE[name], replace(call, seen=seen))
        outputs.append(output)
    torch.testing.assert_close(*outputs)
    # What odd latents hold does not reach even ones.
    changed = call.change(value=call.value.clone(), seen=groups)
    changed.value[:, :, kind == 1] += 1.0
    output, _ = attended(SPARSE[name], changed)
    torch.testing.assert_close(output[:, :, kind == 2], outputs[0][:, :, kind == 2])  # type: ignore[index]
    assert not torch.allclose(output[:, :, kind == 1], outputs[0][:, :, kind == 1])  # type: ignore[index]


def test_what_cannot_be_said_together() -> None:
    call = a_call(before=7)
    tokens = call.query.shape[2]
    added = replace(call, seen=torch.randn(1, 1, tokens, tokens))
    with pytest.raises(ac.ControlError, match=r"Radial cannot work beside a mask that adds to the scores of blocks\.0"):
        attended(SPARSE["radial"], added)
    hidden = torch.ones(1, 1, 1, tokens, dtype=torch.bool)
    hidden[..., 9] = False
    with pytest.raises(ac.ControlError, match="Paro orders the latents of each head in a way of its own"):
        attended(SPARSE["paro"], replace(call, seen=hidden))
    with pytest.raises(ac.ControlError, match="VMoBA cannot work beside a mask that differs between queries"):
        attended(SPARSE["vmoba"], replace(call, seen=torch.ones(1, 1, tokens, tokens, dtype=torch.bool)))
    other = replace(call, keys=TokenLayout.of_text(7), key=call.key[:, :, :7], value=call.value[:, :, :7])
    for name in SPARSE:
        with pytest.raises(ac.ControlError, match=r"needs queries and keys that are one sequence .* blocks\.0\.attn"):
            attended(SPARSE[name], other)


def test_hidden_latents_stay_hidden_in_any_order() -> None:
    hidden = torch.ones(1, 1, 1, 300, dtype=torch.bool)
    hidden[..., 17] = False
    for name in ("radial", "draft", "sliding-tile", "vmoba"):
        call = a_call(GRID)
        one, _ = attended(SPARSE[name], replace(call, seen=hidden))
        other = replace(call, seen=hidden, value=call.value.clone())
        other.value[:, :, 17] += 5.0
        two, _ = attended(SPARSE[name], other)
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", FULL)
def test_half_precision(name: str) -> None:
    call = a_call(before=7)
    half = call.change(query=call.query.bfloat16(), key=call.key.bfloat16(), value=call.value.bfloat16())
    output, _ = after_a_dense_step(FULL[name], half)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), dense(call), atol=0.03, rtol=0.03)
