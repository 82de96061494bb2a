import json

import pytest
import torch

from attnctrl.shapes import load, prompt_for, sample_scene, scene_rng, weights_path
from attnctrl.shapes.models import SCHEDULE
from attnctrl.shapes.train_autoencoder import psnr


@pytest.fixture(scope="module")
def pipeline():
    pipeline = load()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, prompt, steps=4):
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, num_inference_steps=steps, guidance_scale=3.5, generator=generator, output_type="pt").images


def test_stock_pipeline_in_miniature(pipeline):
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert pipeline.safety_checker is None
    assert pipeline.feature_extractor is None
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.float32
    assert {k: pipeline.scheduler.config[k] for k in SCHEDULE} == SCHEDULE
    assert pipeline.tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings == 32
    assert len(pipeline.tokenizer) == pipeline.text_encoder.config.vocab_size


def test_draws_128_pixels(pipeline):
    image = sample(pipeline, prompt_for([("circle", "red")], "white")[0])
    assert image.shape == (1, 3, 128, 128)
    assert torch.isfinite(image).all()


def test_round_trip(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = type(pipeline).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again, "a red circle"), sample(pipeline, "a red circle"))


def test_weights_are_small_and_half_precision():
    folder = weights_path()
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12e6
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".txt"}
    assert "_name_or_path" not in json.loads((folder / "unet" / "config.json").read_text())
    half = load(dtype=torch.float16)
    full = load()
    assert torch.equal(half.unet.conv_in.weight.float(), full.unet.conv_in.weight)


def test_autoencoder_keeps_its_images():
    assert psnr(load().vae, count=16) > 30


def test_follows_a_prompt(pipeline):
    from attnctrl.shapes import detect, present

    asked = [("circle", "red"), ("square", "blue")]
    image = sample(pipeline, prompt_for(asked, "white")[0], steps=15)[0]
    assert present(asked, detect(image)) == 1


def test_autoencoder_latents_are_white(pipeline):
    from attnctrl.shapes import render

    scenes = [sample_scene(scene_rng(12, i)) for i in range(16)]
    with torch.no_grad():
        z = pipeline.vae.encode(render(scenes) * 2 - 1).latents
    assert z.mean((0, 2, 3)).abs().max() < 0.4
    assert (z.std((0, 2, 3)) - 1).abs().max() < 0.4


def test_unknown_model():
    with pytest.raises(ValueError, match=r"unknown shapes model 'sdxl'; known: .*sd"):
        load("sdxl")
