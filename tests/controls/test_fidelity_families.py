"""Where the fidelity methods cannot act as a whole, and what they say; words beside texts of regions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctrl as ac
from tests.methods import busy
from tests.transformers import FAMILIES, draw

SUBJECTS = ("cat", "dog")
WITHOUT_SELF = {
    "init-no": {"self_weight": 0.0},
    "dynamic-prompt": {"background_weight": 0.0},
    "opti-prune": {"self_weight": 0.0, "ratio": 0.0},
}


@pytest.mark.parametrize("name", WITHOUT_SELF)
def test_linear_self_attention_has_no_maps(name: str) -> None:
    """SANA's: the terms that read them are refused, the rest acts."""
    family, given = FAMILIES["sana"], {"ratio": 0.0} if name == "opti-prune" else {}
    pipe = family.make()
    with (
        pytest.raises(ac.ControlError, match=r"reads self-attention on the grid .* switch that part of the loss off"),
        ac.control(pipe, busy(name, SUBJECTS, **given)),
    ):
        draw(pipe, family, steps=1)
    with ac.control(pipe, busy(name, SUBJECTS, **WITHOUT_SELF[name])) as run:
        drawn = draw(pipe, family, steps=1)
    assert torch.isfinite(drawn).all()
    assert not torch.equal(drawn, draw(pipe, family, steps=1))
    assert run.report.rows


def test_tokens_are_pruned_in_self_attention_alone() -> None:
    """FLUX has none, and says so before anything is drawn; SD3 may have some beside its joint layers."""
    control = busy("opti-prune", SUBJECTS, rounds=0)
    family = FAMILIES["flux"]
    pipe = family.make()
    sentence = r"OptiPrune leaves tokens out of self-attention, which this model has not .* set ratio=0"
    with pytest.raises(ac.ControlError, match=sentence), ac.control(pipe, control):
        draw(pipe, family, steps=1)
    family = FAMILIES["sd3"]
    pipe = family.make()
    with ac.control(pipe, control) as run:
        drawn = draw(pipe, family, steps=1)
    assert {"inputs", "output"} <= {row.point for row in run.report.rows.values()}
    assert not torch.allclose(drawn, draw(pipe, family, steps=1), atol=1e-4)


def test_text_that_is_no_one_tensor_is_not_learned() -> None:
    family = FAMILIES["zimage"]
    pipe = family.make()
    with (
        pytest.raises(ac.ControlError, match=r"DynamicPrompt changes text embeddings, which this model does not take"),
        ac.control(pipe, busy("dynamic-prompt", SUBJECTS)),
    ):
        draw(pipe, family, steps=1)


def texts_seen(pipe: Any, name: str, *controls: ac.Control) -> tuple[list[torch.Tensor], ac.Run]:
    """The text embeddings that the denoiser is called with in one step, loss passes apart; and the run."""
    texts: list[torch.Tensor] = []

    def keep(module: Any, args: tuple, kwargs: dict) -> None:
        if not torch.is_grad_enabled():
            texts.append(kwargs["encoder_hidden_states"].clone())

    with ac.control(pipe, *controls, record=False) as run:
        handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
        draw(pipe, FAMILIES[name], steps=1)
        handle.remove()
    return texts, run


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen"])
def test_words_are_learned_beside_texts_of_regions(name: str) -> None:
    """Only the nouns of the prompt move, in the conditional rows; what another control put behind it stays."""
    pipe, regions = FAMILIES[name].make(), busy("region-prompts")
    alone, run = texts_seen(pipe, name, regions)
    both, _ = texts_seen(pipe, name, regions, busy("dynamic-prompt", SUBJECTS))
    assert any(text.shape[1] > run.sampling.text_tokens for text in alone)
    moved = [(new != old).any(dim=-1) for new, old in zip(both, alone, strict=True)]
    rows = [row.nonzero().flatten().tolist() for call in moved for row in call if row.any()]
    assert rows == [sorted({token for phrase in SUBJECTS for token in run.sampling.find(phrase)})]
