"""Attention under token groups: every form that runs on this machine, held to the float32 reference."""

from __future__ import annotations

import types

import pytest
import torch
from torch.autograd import gradcheck

from attnctrl.kernels import TokenGroups, attention, attention_with_lse, chunked, group_attention
from attnctrl.kernels import groups_reference as reference
from attnctrl.kernels.dispatch import FORMS
from attnctrl.kernels.groups_merge import kinds
from attnctrl.kernels.groups_xformers import disjoint

from .masks import random_groups, tensors, zero_where_blind

SCALE = 0.3


def test_the_reference_is_masked_softmax() -> None:
    query, key, value = tensors(2, 3, 5, 7, 4)
    groups = random_groups(5, 7, 4, 0.6)
    assert groups.dense().any(dim=-1).all()
    output, lse = reference.group_attention(query, key, value, groups, SCALE)
    scores = (query @ key.transpose(-1, -2) * SCALE).masked_fill(~groups.dense(), float("-inf"))
    torch.testing.assert_close(output, scores.softmax(dim=-1) @ value)
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1))
    torch.testing.assert_close(output, attention(query, key, value, groups.dense(), SCALE))


@pytest.mark.parametrize("form", [None, "reference", "merge", "flex"])
def test_a_query_that_sees_nothing_gets_nothing(form: str | None) -> None:
    query, key, value = tensors(1, 2, 3, 4, 16)
    groups = TokenGroups(torch.tensor([[1, 0, 2]]), torch.tensor([[1, 1, 0, 0]]))
    output, lse = group_attention(query, key, value, groups, SCALE, return_lse=True, form=form)
    assert (output[:, :, 1:] == 0).all()
    assert (lse[:, :, 1:] == float("-inf")).all()
    assert lse[:, :, 0].isfinite().all()


MASKS = {
    "overlapping": lambda queries, keys: random_groups(queries, keys, 4, 0.3),
    "per sample": lambda queries, keys: random_groups(queries, keys, 3, 0.3, (2, 1)),
    "padded": lambda queries, keys: TokenGroups.everything(queries, keys).hide_keys(
        torch.arange(keys)[None] > keys // 2
    ),
    "everything": TokenGroups.everything,
    "nothing": lambda queries, keys: TokenGroups(*(torch.zeros(1, n, dtype=torch.int64) for n in (queries, keys))),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", [None, "merge"])
def test_forms_and_their_gradients_agree_with_the_reference(form: str | None, mask: str) -> None:
    groups = MASKS[mask](70, 45)
    found = []
    for one in (form, "reference"):
        inputs = [tensor.requires_grad_() for tensor in tensors(2, 2, 70, 45, 8)]
        output, lse = group_attention(*inputs, groups, SCALE, return_lse=True, form=one)
        loss = (output * torch.linspace(-1, 1, 8)).sum() + (zero_where_blind(lse) * torch.linspace(0, 1, 70)).sum()
        found.append([output, lse, *torch.autograd.grad(loss, inputs)])
        torch.testing.assert_close(group_attention(*inputs, groups, SCALE, form=one), output)
    for mine, exact in zip(*found, strict=True):
        torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize("groups", [random_groups(70, 45, 3, 0.3, (2, 1)), random_groups(70, 45, 40)])
def test_without_gradients_few_kinds_and_many_agree_with_the_reference(groups: TokenGroups) -> None:
    inputs = tensors(2, 2, 70, 45, 8)
    output = group_attention(*inputs, groups, SCALE)
    torch.testing.assert_close(output, group_attention(*inputs, groups, SCALE, form="reference"))
    if groups.batch > 1:  # few: the same calls as the form that is chosen for them
        assert torch.equal(output, group_attention(*inputs, groups, SCALE, form="merge"))


@pytest.mark.parametrize("mask", ["overlapping", "padded"])
def test_flex_agrees_with_the_reference(mask: str) -> None:
    # More than one of its blocks, so that full, partial and skipped ones occur; forward only, as on a CPU it must be.
    groups = MASKS[mask](150, 300)
    inputs = tensors(2, 1, 150, 300, 16)
    flex = group_attention(*inputs, groups, SCALE, return_lse=True, form="flex")
    torch.testing.assert_close(flex, group_attention(*inputs, groups, SCALE, return_lse=True, form="reference"))


def test_the_chunked_form_has_exact_gradients() -> None:
    inputs = [tensor.double().requires_grad_() for tensor in tensors(2, 1, 5, 6, 3)]
    groups = random_groups(5, 6, 2, 0.4, (2, 1))
    assert not groups.dense().any(dim=-1).all()
    bias = torch.randn(1, 1, 1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mask in (groups, None, bias, groups.dense()):

        def both(*inputs: torch.Tensor, mask: object = mask) -> tuple[torch.Tensor, torch.Tensor]:
            output, lse = chunked.attention(*inputs, mask, SCALE, chunk=2)  # type: ignore[arg-type]
            return output, zero_where_blind(lse)

        assert gradcheck(both, inputs)


@pytest.mark.parametrize("shape", [(1, 1, 1, 7), (2, 1, 1, 7), (2, 3, 5, 7), (5, 7)])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_attention_with_lse_takes_masks_as_tensors(shape: tuple[int, ...], kind: str) -> None:
    query, key, value = tensors(2, 3, 5, 7, 4)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    mask = mask > -1 if kind == "bool" else mask
    output, lse = attention_with_lse(query, key, value, mask, SCALE)
    torch.testing.assert_close(output, attention(query, key, value, mask, SCALE))
    scores = query @ key.transpose(-1, -2) * SCALE
    scores = scores.masked_fill(~mask, float("-inf")) if kind == "bool" else scores + mask
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1))


def test_half_precision_is_summed_in_single() -> None:
    inputs = tensors(1, 2, 9, 300, 16, torch.bfloat16)
    output, lse = attention_with_lse(*inputs, None, SCALE)
    assert (output.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    exact = attention_with_lse(*(tensor.float() for tensor in inputs), None, SCALE)
    torch.testing.assert_close(lse, exact[1])
    torch.testing.assert_close(output, exact[0].bfloat16())


def test_under_autocast_the_widths_may_differ() -> None:
    query, key, value = tensors(1, 2, 5, 7, 8)
    groups = random_groups(5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        output = group_attention(query, key, value.bfloat16(), groups, SCALE)
    assert output.dtype == torch.bfloat16


def test_masks_made_under_inference_mode_serve_training() -> None:
    with torch.inference_mode():
        groups = random_groups(5, 7)
    inputs = [tensor.requires_grad_() for tensor in tensors(1, 1, 5, 7, 4)]
    for form in (None, "merge"):
        group_attention(*inputs, groups, SCALE, form=form).sum().backward()
    assert all(tensor.grad is not None for tensor in inputs)


def test_kinds_are_the_distinct_rows_of_the_mask() -> None:
    groups = TokenGroups(torch.tensor([[1, 2, 1, 3, 0]]), torch.tensor([[1, 2, 2]]))
    (found,) = kinds(groups)
    assert [kind.queries.tolist() for kind in found] == [[4], [0, 2], [1], [3]]
    assert [kind.keys.tolist() for kind in found] == [[], [0], [1, 2], [0, 1, 2]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"value": torch.zeros(1, 2, 6, 4)}, "key and value alike but for head_dim"),
        ({"query": torch.zeros(1, 3, 5, 4)}, "differ in batch, heads or head_dim"),
        ({"query": torch.zeros(1, 2, 6, 4)}, "for 5 queries x 7 keys, the attention has 6 x 7"),
        ({"value": torch.zeros(1, 2, 7, 4, dtype=torch.float16)}, "one element type"),
        ({"groups": random_groups(5, 7, batch=(2, 1))}, "for a batch of 2"),
        ({"scale": 0.0}, "must be positive"),
        ({"form": "fast"}, "choose one of reference, triton, flex, merge, xformers"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict, sentence: str) -> None:
    query, key, value = tensors(1, 2, 5, 7, 4)
    arguments = {"query": query, "key": key, "value": value, "groups": random_groups(5, 7), "scale": SCALE}
    with pytest.raises(ValueError, match=sentence):
        group_attention(**{**arguments, **change})


def test_a_mask_that_wants_a_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="detach"):
        attention_with_lse(*tensors(1, 1, 2, 3, 4), torch.zeros(1, 1, 2, 3, requires_grad=True), SCALE)


class Blocks(types.SimpleNamespace):
    """Stands in for xformers' BlockDiagonalMask: the two lists of lengths."""

    @classmethod
    def from_seqlens(cls, queries: list[int], keys: list[int]) -> Blocks:
        return cls(queries=queries, keys=keys)


def xformers_stand_in(calls: list[object]) -> types.SimpleNamespace:
    """xformers.ops as its documentation describes what we use: (batch, tokens, heads, head_dim), a mask by blocks."""

    def memory_efficient_attention(q, k, v, attn_bias=None, scale=None):  # type: ignore[no-untyped-def]
        calls.append(attn_bias)
        mask = None
        if attn_bias is not None:
            assert q.shape[0] == 1
            blocks = zip(attn_bias.queries, attn_bias.keys, strict=True)
            mask = torch.block_diag(*(torch.ones(n, m) for n, m in blocks)).bool()
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return attention(q, k, v, mask, scale).transpose(1, 2)

    bias = types.SimpleNamespace(attn_bias=types.SimpleNamespace(BlockDiagonalMask=Blocks))
    return types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention, fmha=bias)


DISJOINT = TokenGroups(torch.tensor([[1, 2, 1, 0, 2]]), torch.tensor([[2, 1, 2, 0, 1, 1, 2]]))
DISJOINT_BUT_FOR_ONE_SAMPLE = TokenGroups(torch.tensor([[1, 2, 1, 0, 2], [3, 1, 2, 1, 1]]), DISJOINT.key_bits)


@pytest.mark.parametrize("groups", [DISJOINT, DISJOINT_BUT_FOR_ONE_SAMPLE, random_groups(5, 7)])
def test_xformers_agrees_with_the_reference(groups: TokenGroups, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr("attnctrl.kernels.groups_xformers._xformers", lambda: xformers_stand_in(calls))
    query, key, value = tensors(2, 3, 5, 7, 4)
    inputs = (query, key, value[..., :3])
    output = group_attention(*inputs, groups, SCALE, form="xformers")
    torch.testing.assert_close(output, group_attention(*inputs, groups, SCALE, form="reference"))
    if all(disjoint(found, 7) for found in kinds(groups)):
        assert len(calls) == 1
        assert isinstance(calls[0], Blocks)
    else:
        assert all(call is None for call in calls)
    with pytest.raises(ValueError, match="no log-sum-exp"):
        group_attention(*inputs, groups, SCALE, return_lse=True, form="xformers")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_xformers_itself_agrees_with_the_reference() -> None:
    pytest.importorskip("xformers")
    inputs = tensors(2, 3, 64, 70, 64, torch.float16, "cuda")
    for groups in (random_groups(64, 70).to("cuda"), TokenGroups.everything(64, 70, "cuda")):
        output = group_attention(*inputs, groups, SCALE, form="xformers")
        exact = group_attention(*inputs, groups, SCALE, form="reference")
        torch.testing.assert_close(output, exact, atol=5e-3, rtol=5e-3)


def test_forms_that_cannot_run_here_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, groups = tensors(1, 1, 2, 3, 4), random_groups(2, 3)
    monkeypatch.setitem(__import__("sys").modules, "xformers", None)
    with pytest.raises(ValueError, match="xformers is not installed"):
        group_attention(*inputs, groups, SCALE, form="xformers")
    monkeypatch.setattr("attnctrl.kernels.dispatch.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Triton is not installed"):
        group_attention(*inputs, groups, SCALE, form="triton")
    assert set(FORMS) == {"reference", "triton", "flex", "merge", "xformers"}
