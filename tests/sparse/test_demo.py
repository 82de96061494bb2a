"""demos/sparse_video.py on tiny random pipelines of the same classes, saved and loaded as those of the hub are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo

import attnctrl as ac
from demos import sparse_video as demo
from tests.parts import Tiny
from tests.videos import VIDEOS, hunyuan
from tests.wan import wan_experts


def hunyuan_whole() -> Any:
    """With an autoencoder, without which no pipeline is loaded."""
    pipe = hunyuan()
    blocks = 4
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * blocks,
        up_block_types=("HunyuanVideoUpBlock3D",) * blocks,
        block_out_channels=(4,) * blocks,
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    pipe.register_modules(vae=vae.eval())
    return pipe


TINY = {
    "wan2.1": VIDEOS["wan"],
    "wan2.1-i2v": VIDEOS["wan-image"],
    "wan2.2": replace(VIDEOS["wan-experts"], make=lambda: wan_experts(layers=2)),
    "hunyuan": replace(VIDEOS["hunyuan"], make=hunyuan_whole),
}


def call_of(family: Tiny, steps: int = 6) -> dict[str, Any]:
    height, width = family.size
    given = {"prompt": "a cat and a dog", "height": height, "width": width, "num_inference_steps": steps}
    return {**given, **family.more, "output_type": "latent", "generator": torch.Generator().manual_seed(7)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in TINY}
    for name, family in TINY.items():
        family.make().save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("name", TINY)
def test_every_model_loads_and_every_method_acts(name: str, saved: dict[str, str], tmp_path: Path) -> None:
    pipe = demo.MODELS[name].load(saved[name]).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is type(TINY[name].make())
    stock, report = demo.generate(pipe, name, demo.control_for(name, "none"), **call_of(TINY[name]))
    assert str(report) == "no control acted"
    for method in demo.METHODS:
        control = demo.control_for(name, method)
        # Of so few layers none may be dense, and of so few tokens blocks must be small.
        changes: dict[str, Any] = {"where": demo.LATENTS, "window": ac.Window(), "fall_back": False}
        if hasattr(control, "block"):
            changes["block"] = 16
        frames, report = demo.generate(pipe, name, replace(control, **changes), **call_of(TINY[name]))
        assert frames.shape == stock.shape
        assert torch.isfinite(frames).all()
        visits = [visit for visit in report.visits.values() if not visit.why]
        assert visits, method
    plan = tmp_path / "plan.safetensors"
    call = call_of(TINY[name])
    call.pop("num_inference_steps")
    paro = demo.planned(pipe, name, plan, **call)
    frames, report = demo.generate(pipe, name, replace(paro, fall_back=False), **call_of(TINY[name]))
    assert torch.isfinite(frames).all()
    written = plan.stat().st_mtime_ns
    demo.planned(pipe, name, plan, **call)
    assert plan.stat().st_mtime_ns == written


def test_the_whole_script(saved: dict[str, str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(demo, "export_to_video", lambda frames, path, fps: written.append((len(frames), path, fps)))
    call = {"num_inference_steps": 4, "max_sequence_length": 12}
    monkeypatch.setitem(demo.MODELS, "wan2.1", replace(demo.MODELS["wan2.1"], load=in_float32, call=call))
    out = tmp_path / "video.mp4"
    size = ["--height", "16", "--width", "32", "--frames", "9"]
    demo.main(["--path", saved["wan2.1"], "--method", "sliding-tile", "--prompt", "a cat", "--out", str(out), *size])
    assert written == [(9, str(out), 16)]
    assert "no control acted" not in capsys.readouterr().out


def in_float32(path: str) -> Any:
    return demo.load_wan(path).to(torch.float32)


def test_a_picture_is_for_image_to_video_alone(capsys: Any) -> None:
    for arguments in (["--model", "wan2.1", "--image", "cat.png"], ["--model", "wan2.1-i2v"]):
        with pytest.raises(SystemExit):
            demo.main(arguments)
        assert "starts from an --image" in capsys.readouterr().err
