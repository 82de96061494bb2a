"""SoftPAG against its formula, against diffusers' PAG, and beside other controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPAGPipeline, StableDiffusionXLPAGPipeline

import attnctrl as ac
from attnctrl.controls.guidance.soft_pag import choose, softened
from attnctrl.headset import HeadSet
from attnctrl.sites import Site
from tests import tiny
from tests.probes import REGIONS, Guide, Output
from tests.transformers import FAMILIES, draw

MID = "mid_block.attentions.0.transformer_blocks.0.attn1"


def test_the_formula_by_hand() -> None:
    output, value = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1), torch.tensor([3.0, 10.0]).reshape(1, 2, 1, 1)
    assert softened(output, value, 0.25, None).flatten().tolist() == [1.5, 4.0]
    assert softened(output, value, 0.25, [1]).flatten().tolist() == [1.0, 4.0]
    assert torch.equal(softened(output, value, 0.0, None), output)
    assert torch.equal(softened(output, value, 1.0, None), value)


def test_it_is_a_mix_of_the_matrix_with_the_identity() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(1, 2, 5, 5, generator=generator).softmax(dim=-1)
    value = torch.randn(1, 2, 5, 3, generator=generator)
    expected = (0.3 * matrix + 0.7 * torch.eye(5)) @ value
    torch.testing.assert_close(softened(matrix @ value, value, 0.7, None), expected)


def test_heads_are_chosen_by_layer_by_block_and_one_by_one() -> None:
    sites = [Site(n, "self", b, i) for i, (n, b) in enumerate([("a.0", "down"), ("m.0", "mid"), ("m.1", "mid")])]
    assert choose(sites, None) == {"m.0": None, "m.1": None}
    assert choose(sites[:1], None) == {"a.0": None}
    assert choose(sites, ["m"]) == {"m.0": None, "m.1": None}
    assert choose(sites, [("a.0", 3), ("a.0", 1), "m.1", ("m.1", 0)]) == {"a.0": (1, 3), "m.1": None}
    with pytest.raises(ac.ControlError, match=r'"m\.2" is no layer that .*: the layers are a\.0, m\.0, m\.1'):
        choose(sites, ["m.2"])


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize(
    ("make", "kind"), [(tiny.sd, StableDiffusionPAGPipeline), (tiny.sdxl, StableDiffusionXLPAGPipeline)]
)
def test_with_strength_1_on_the_middle_block_it_is_pag(make: Any, kind: Any, guidance: float, scheduler: str) -> None:
    pipe, size = make(scheduler), (32, 48)
    other = kind(**make(scheduler).components, pag_applied_layers=["mid"])
    other.set_progress_bar_config(disable=True)
    expected = tiny.draw(other, size=size, guidance_scale=guidance, pag_scale=2.0)
    stock = tiny.draw(pipe, size=size, guidance_scale=guidance)
    with ac.control(pipe, ac.SoftPAG(scale=2.0)):
        drawn = tiny.draw(pipe, size=size, guidance_scale=guidance)
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(drawn, stock, atol=1e-3)


def test_all_heads_one_by_one_are_the_layer_and_one_head_is_not() -> None:
    pipe = tiny.sd()
    count = pipe.unet.get_submodule(MID).heads
    pictures = []
    for heads in ([MID], [(MID, h) for h in range(count)], [(MID, 0)]):
        with ac.control(pipe, ac.SoftPAG(heads)) as run:
            pictures.append(tiny.draw(pipe))
        assert {s for row in run.report.rows.values() for s in row.sites} == {MID}
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.allclose(pictures[0], pictures[2], atol=1e-5)


def perturbed(pipe: Any, *controls: ac.Control, **kwargs: Any) -> torch.Tensor:
    """What SoftPAG of weight 1 adds in the first step."""
    got: list[Any] = []
    ends = [Guide(make=lambda p: (got.append(p.combined), p.combined)[1]) for _ in range(2)]
    with ac.control(pipe, *controls, ends[0], ac.SoftPAG(scale=1.0, **kwargs), ends[1]):
        tiny.draw(pipe, steps=1)
    return got[1] - got[0]


def test_other_controls_act_in_the_further_prediction_too() -> None:
    """A control that itself makes heads mind themselves leaves SoftPAG nothing to add."""
    pipe = tiny.sd()
    identity: list[torch.Tensor] = []

    class Identity(Output):
        def output(self, output: torch.Tensor, call: Any, state: Any) -> torch.Tensor:
            identity.append(output)
            return call.value

    where = ac.Where(kinds=("self",), blocks=("mid",))
    assert perturbed(pipe).abs().max() > 1e-3
    assert perturbed(pipe, Identity(where=where)).abs().max() < 1e-6
    # Once in the step's own prediction, of which it sees the conditional half, and once more.
    assert [len(o) for o in identity] == [1, 1]
    assert perturbed(pipe, Identity(where=where), heads=["up_blocks.0"]).abs().max() > 1e-4


def test_two_of_them_add_up_in_any_order() -> None:
    pipe, pictures = tiny.sd(), []
    both = ac.SoftPAG(["down_blocks.0"], scale=2.0), ac.SoftPAG(["up_blocks.1"], scale=1.0, strength=0.5)
    for controls in (both, both[::-1]):
        with ac.control(pipe, *controls):
            pictures.append(tiny.draw(pipe))
    torch.testing.assert_close(*pictures, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["refocus", "region-mask"])
def test_with_losses_and_masks(name: str) -> None:
    from tests.methods import busy

    pipe, other = tiny.sd("euler"), busy(name, REGIONS)
    with ac.control(pipe, other):
        alone = tiny.draw(pipe)
    with ac.control(pipe, other, ac.SoftPAG(), record=["cat"]) as run:
        both = tiny.draw(pipe)
    assert torch.isfinite(both).all()
    assert not torch.allclose(both, alone, atol=1e-3)
    assert run.maps["cat"].shape[0] == 3


def test_recorded_maps_are_of_the_steps_own_prediction() -> None:
    maps = []
    for controls in ((), (ac.SoftPAG(["down_blocks", "up_blocks"]),)):
        pipe = tiny.sd()
        with ac.control(pipe, *controls, record=["cat"]) as run:
            tiny.draw(pipe, steps=1)
        maps.append(run.maps["cat"])
    torch.testing.assert_close(*maps)


def test_a_saved_set_is_read(tmp_path: Path) -> None:
    HeadSet([(MID, 1)], [[((MID, 1), 0.5)]], {"model": "tiny"}).save(tmp_path / "heads.json")
    pipe, pictures = tiny.sd(), []
    for heads in (str(tmp_path / "heads.json"), [(MID, 1)]):
        with ac.control(pipe, ac.SoftPAG(heads)):
            pictures.append(tiny.draw(pipe))
    assert torch.equal(*pictures)
    (tmp_path / "heads.json").write_text("{}")
    with pytest.raises(
        ac.ControlError, match=r"heads.json is no set of heads: give a file that attnctrl headhunt wrot"
    ):
        HeadSet.load(tmp_path / "heads.json")


def test_bad_heads_are_refused() -> None:
    pipe = tiny.sd()
    with (
        pytest.raises(ac.ControlError, match=r"attn1 has heads 0 to \d, and no head 99"),
        ac.control(pipe, ac.SoftPAG([(MID, 99)])),
    ):
        tiny.draw(pipe)
    with pytest.raises(ac.ControlError, match='"nowhere" is no layer'), ac.control(pipe, ac.SoftPAG(["nowhere"])):
        tiny.draw(pipe)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "sana"])
@pytest.mark.parametrize("free", [False, True])
def test_every_family(name: str, free: bool) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    stock = draw(pipe, family, steps=2, free=free)
    with ac.control(pipe, ac.SoftPAG()) as run:
        drawn = draw(pipe, family, steps=2, free=free)
    assert torch.isfinite(drawn).all()
    assert not torch.allclose(drawn, stock, atol=1e-5)
    rows = {row.point: row for row in run.report.rows.values()}
    assert rows["output"].calls == rows["guide"].calls == 2


def test_linear_attention_is_refused() -> None:
    pipe = FAMILIES["sana"].make()
    with (
        pytest.raises(ac.ControlError, match="selects no attention layer of this model, which has cross"),
        ac.control(pipe, ac.SoftPAG()),
    ):
        draw(pipe, FAMILIES["sana"])
