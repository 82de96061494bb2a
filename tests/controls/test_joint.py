"""Layout and fidelity controls on joint attention: FLUX, SD3, QwenImage and a video family, by one table."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.control import Descent, Loss
from attnctrl.controls import REGISTRY
from tests.methods import busy, idle_forms
from tests.probes import REGIONS, Output, Probs
from tests.transformers import FAMILIES, draw
from tests.videos import VIDEOS

SEPARATE = ("semantic-protection",)
"""Those that need layers of self-attention and others for text, and say so elsewhere."""
NAMES = tuple(n for n, entry in REGISTRY.items() if entry.task in ("layout", "fidelity") and n not in SEPARATE)
MODELS = {**{name: FAMILIES[name] for name in ("flux", "sd3", "qwen")}, "cogvideox": VIDEOS["cogvideox-rotary"]}
LOSSES = tuple(name for name in NAMES if "loss" in REGISTRY[name].make(()).points())
ATTENTION = tuple(name for name in NAMES if name not in LOSSES and name != "opti-prune")
WORDS = ("dynamic-prompt",)
"""Those whose loss moves words."""
JOINT = ac.Where(kinds=("joint",))
PROMPTING = ("eligen", "region-prompts", "regional-flux", "rag")
"""Those that put texts of regions into the sequence."""
# As in test_all: RegionMask's strong boost leaves losses on word shares nothing to do.
# What RAG's regions see of text is their own, so that masks and maps of the prompt's words are nothing to them.
PARTNER = {"region-mask": "loco", **dict.fromkeys(PROMPTING, "region-mask"), "rag": "refocus"}
every_model = pytest.mark.parametrize("model", MODELS)


def at_work(name: str, **params: Any) -> ac.Control:
    """The method for the whole run; of so few words each has its share soon, so that Refocus must not be content.

    RAG without its hard binding, which video models refuse and tests/controls/test_rag.py is about. OptiPrune without
    its pruning, which is of layers of self-attention alone; its search reads joint layers.
    """
    usual = {
        "eligen": {"entity_tokens": 4},
        "refocus": {"enough": 1.0},
        "rag": {"hard_binding": 0.0},
        "opti-prune": {"ratio": 0.0},
    }
    return busy(name, **usual.get(name, {}), **params)


@cache
def pipeline(model: str) -> Any:
    return MODELS[model].make()


@cache
def pictures(model: str, *names: str, steps: int = 2) -> Any:
    """The latents of a short run under these methods, and the run."""
    pipe = pipeline(model)
    with ac.control(pipe, *(at_work(name) for name in names), record=False) as run:
        drawn = draw(pipe, MODELS[model], steps=steps)
    return drawn, run


def outputs(model: str, branch: str, *controls: ac.Control, steps: int = 1) -> list[torch.Tensor]:
    """What each joint layer gives the latents of one guidance branch, step by step."""
    family, seen = MODELS[model], []

    def keep(output: torch.Tensor, call: Any = None) -> torch.Tensor:
        seen.append(output)
        return output

    probe = Output(edit=keep, where=JOINT, branches=(branch,))
    with ac.control(pipeline(model), *controls, probe, record=False):
        draw(pipeline(model), family, steps=steps)
    return [latents_of(model, one) for one in seen]


def latents_of(model: str, tokens: torch.Tensor) -> torch.Tensor:
    frames, height, width = MODELS[model].grid
    count = frames * height * width
    return tokens[:, :, :count] if model == "sd3" else tokens[:, :, -count:]


@every_model
@pytest.mark.parametrize("name", SEPARATE)
def test_it_says_that_it_needs_separate_layers(name: str, model: str) -> None:
    with pytest.raises(ac.ControlError, match="which this model has not: use RegionMask"):
        pictures(model, name)


def test_the_table_holds_what_it_should() -> None:
    assert {name for name in NAMES if "joint" not in REGISTRY[name].where.kinds} == {"opti-prune"}
    assert set(LOSSES) == {
        "layout-guidance",
        "refocus",
        "loco",
        "attend-excite",
        "a-star",
        "conform",
        "divide-bind",
        "init-no",
        "bundled-attention",
        "dynamic-prompt",
    }


@every_model
def test_asked_for_nothing_they_are_stock(model: str) -> None:
    """All at once, each in one of its idle forms: the stock picture, bit for bit."""
    pipe = pipeline(model)
    forms = idle_forms()
    with ac.control(pipe, *forms.values()):
        assert torch.equal(draw(pipe, MODELS[model], steps=2), draw_stock(model))


@cache
def draw_stock(model: str) -> torch.Tensor:
    return draw(pipeline(model), MODELS[model], steps=2)


@every_model
@pytest.mark.parametrize("name", NAMES)
def test_it_acts(model: str, name: str) -> None:
    drawn, run = pictures(model, name)
    assert torch.isfinite(drawn).all()
    assert not torch.allclose(drawn, draw_stock(model), atol=1e-4)
    assert {row.point for row in run.report.rows.values()} <= set(at_work(name).points())


@every_model
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_falls(model: str, name: str) -> None:
    """Several descents in one step: the second evaluation is lower. Steps are short, for these models are random.

    No refinements, which end where maps are good enough; but InitNO's, which has one descent in other steps, here in
    the second of three.
    """
    pipe = pipeline(model)
    steps, at = (3, 1) if name == "init-no" else (1, 0)
    more = {"refinements": 0} if name != "init-no" and "refinements" in REGISTRY[name].params else {}
    with ac.control(pipe, at_work(name, scale=1.0, **more), record=False) as run:
        draw(pipe, MODELS[model], steps=steps)
    values = [loss.values[0] for loss in run.losses if loss.step == at]
    assert len(values) > 1
    assert values[1] < values[0]


@every_model
@pytest.mark.parametrize("name", ATTENTION)
def test_the_unconditional_prediction_is_stock(model: str, name: str) -> None:
    for mine, stock in zip(outputs(model, "uncond", at_work(name)), stock_outputs(model, "uncond"), strict=True):
        torch.testing.assert_close(mine, stock, atol=1e-5, rtol=1e-5)
    changed = zip(outputs(model, "cond", at_work(name)), stock_outputs(model, "cond"), strict=True)
    assert not any(torch.allclose(mine, stock, atol=1e-5) for mine, stock in changed)


@cache
def stock_outputs(model: str, branch: str, steps: int = 1) -> list[torch.Tensor]:
    return outputs(model, branch, steps=steps)


@every_model
@pytest.mark.parametrize("name", NAMES)
def test_it_composes_with_another(model: str, name: str) -> None:
    other = PARTNER.get(name, "region-prompts")
    for names in ((name, other), (other, name)):
        together, run = pictures(model, *names)
        assert torch.isfinite(together).all()
        assert {index: row.control for (index, _), row in run.report.rows.items()} == {
            i: REGISTRY[one].control.__name__ for i, one in enumerate(names)
        }
        assert not any(torch.allclose(together, pictures(model, one)[0], atol=1e-5) for one in names)


@every_model
def test_one_control_puts_texts_into_the_sequence(model: str) -> None:
    pipe = pipeline(model)
    sentence = (
        "two controls put texts of regions beside the prompt .* use one of EliGen, RegionalFlux, RAG and RegionPrompts"
    )
    with pytest.raises(ac.ControlError, match=sentence), ac.control(pipe, *map(at_work, PROMPTING[:2])):
        draw(pipe, MODELS[model], steps=1)


@pytest.mark.parametrize("name", ["hunyuan", "mochi", "cogvideox"])
def test_models_whose_text_keeps_its_length_say_so(name: str) -> None:
    family = VIDEOS[name]
    pipe = family.make()
    with (
        pytest.raises(ac.ControlError, match=r"a control made \d+ text tokens of \d+, but .*: the number must stay"),
        ac.control(pipe, at_work("region-prompts")),
    ):
        draw(pipe, family, steps=2)
    expected = draw(pipe, family, steps=2)
    for one in ("region-mask", "attend-excite", "dense-diffusion"):
        with ac.control(pipe, at_work(one)):
            drawn = draw(pipe, family, steps=2)
        assert torch.isfinite(drawn).all()
        assert not torch.allclose(drawn, expected, atol=1e-5)


@every_model
def test_words_and_latents_outside_their_regions_do_not_see_each_other(model: str) -> None:
    """Cat left, dog right: attention from either side to the other's word and back is 0, and nothing else is."""
    pipe, family, kept = pipeline(model), MODELS[model], []
    probe = Probs(edit=lambda probs: (kept.append(probs), probs)[1], where=JOINT)
    with ac.control(pipe, ac.RegionMask(REGIONS, window=ac.Window(0.0, 1.0)), probe, record=False) as run:
        draw(pipe, family, steps=1)
    tokens, (frames, height, width) = run.sampling.tokens[0], family.grid
    text, total = run.sampling.text_tokens, kept[0].shape[-1]
    first, latent = (total - text, 0) if model == "sd3" else (0, text)
    hidden = torch.zeros(total, total, dtype=torch.bool)
    picture = torch.arange(frames * height * width).view(frames, height, width) + latent
    for phrase, outside in (("cat", picture[..., width // 2 :]), ("dog", picture[..., : width // 2])):
        for encoder in tokens:
            for word in encoder.find(phrase):
                hidden[outside.flatten(), first + word] = True
    hidden = hidden | hidden.T
    assert hidden.any()
    for probs in kept:
        assert (probs[:, :, hidden] == 0).all()
        seen = ~hidden if model != "qwen" else ~hidden[:, : first + text]
        assert (probs[0, 0][..., : seen.shape[1]][seen] > 0).all()


@dataclass(frozen=True)
class Maps(ac.Control):
    """Keeps what a loss is given; the loss itself is 0 for want of a wish."""

    kept: list = field(default_factory=list, compare=False)
    where: ac.Where = field(default=JOINT, kw_only=True)

    def descent(self, step: Any) -> Descent:
        return Descent(1.0)

    def loss(self, maps: Any, step: Any, state: Any) -> Loss:
        self.kept.append(maps)
        return Loss(0 * maps.mean_cross()[0].sum(dim=(1, 2)))


@every_model
def test_losses_read_shares_of_the_prompt_and_the_latents_among_themselves(model: str) -> None:
    """Against the probabilities of the same layer, materialised; with entities in the sequence, which do not count."""
    pipe, family, kept, maps = pipeline(model), MODELS[model], [], Maps()
    probe = Probs(edit=lambda probs: (kept.append(probs), probs)[1], where=JOINT)
    for prompting in ((), (at_work("eligen"),)):
        kept.clear()
        maps.kept.clear()
        with ac.control(pipe, *prompting, maps, probe, record=False) as run:
            draw(pipe, family, steps=1)
        (seen,), text = maps.kept, run.sampling.text_tokens
        assert seen.cross.keys() == seen.self_.keys()
        for (name, cross), probs in zip(seen.cross.items(), kept, strict=False):
            frames, height, width = cross.grid
            count, total = frames * height * width, probs.shape[-1]
            latent = slice(0, count) if model == "sd3" else slice(total - count, total)
            first = count if model == "sd3" else 0
            of_text = probs[:, :, latent, first : first + text].mean(dim=1)
            expected = of_text / of_text.sum(dim=-1, keepdim=True)
            torch.testing.assert_close(cross.probs.detach(), expected, atol=1e-5, rtol=1e-4)
            among = probs[:, :, latent, latent]
            among = (among / among.sum(dim=-1, keepdim=True)).mean(dim=1)
            torch.testing.assert_close(seen.self_[name].dense().detach(), among, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", ["flux2", "klein", "zimage"])
def test_the_other_picture_models(model: str) -> None:
    """Parallel blocks, chat templates, padded latents: each kind of point once."""
    family = FAMILIES[model]
    pipe = family.make()
    expected = draw(pipe, family, steps=1)
    for name in ("region-mask", "region-prompts", "dense-diffusion", "refocus", "loco", "a-star", "init-no", *WORDS):
        if model == "zimage" and name in ("region-prompts", *WORDS):
            continue  # its text must keep its length, and is no one tensor
        with ac.control(pipe, at_work(name), record=False) as run:
            drawn = draw(pipe, family, steps=1)
        assert torch.isfinite(drawn).all(), name
        assert not torch.allclose(drawn, expected, atol=1e-5), name
        assert run.report.rows
