import argparse

import pytest
import torch
from diffusers import WanPipeline
from torch.nn import functional

from attnctrl import RegionMask, control
from attnctrl.errors import ControlError
from attnctrl.models import call_arguments
from attnctrl.regions import Region
from attnctrl.shapes import (
    VIDEO_CALL,
    load,
    measure_clips,
    models_video,
    pretrained,
    render_clip,
    sample_clip,
    scene_rng,
)
from attnctrl.shapes.budget import Budget
from attnctrl.shapes.frames import decode_frames, encode_frames
from attnctrl.shapes.motion import FRAMES, MOTIONS
from attnctrl.shapes.pretrained import shipped_text_encoder
from attnctrl.shapes.tokenizer import encode_captions, load_tokenizer
from attnctrl.shapes.train import add_arguments, main
from attnctrl.shapes.train_autoencoder import AutoencoderRecipe
from attnctrl.shapes.train_clips import (
    ClipRecipe,
    ClipVelocity,
    draw_clips,
    encode_world_clips,
    text_states,
    train_clips,
    world_clip,
)
from attnctrl.shapes.train_frames import train_frame_autoencoder
from attnctrl.shapes.train_text import IGNORE
from attnctrl.shapes.train_words import WordsRecipe, motion_labels, train_motion_words, widened
from attnctrl.shapes.world import COLOURS, SHAPES
from tests.interrupted import check_resumed

LATENTS = torch.randn(6, 4, FRAMES, 16, 16, generator=torch.Generator().manual_seed(0)).half()
CLIPS = [world_clip(i) for i in range(6)]
SMALL = ClipRecipe(batch=2, still_batch=2, warmup=1, stills=0.5)


@pytest.fixture(scope="module")
def text():
    generator = torch.Generator().manual_seed(0)
    return widened(shipped_text_encoder(), 0.05 * torch.randn(19, 128, generator=generator))


def frames(out, resume):
    return train_frame_autoencoder(out, Budget(steps=4), AutoencoderRecipe(images=1, full_from=0.5), resume=resume)


def words(out, resume):
    return train_motion_words(shipped_text_encoder(), out, Budget(steps=4), WordsRecipe(batch=4), resume=resume)


def clips(out, resume):
    encoder = widened(shipped_text_encoder(), torch.zeros(19, 128))
    return train_clips(encoder, LATENTS, out, Budget(steps=4), SMALL, resume=resume)


@pytest.mark.parametrize("stage", [frames, words, clips])
def test_resumed_equals_uninterrupted(stage, tmp_path, monkeypatch):
    monkeypatch.setitem(models_video.TRANSFORMER, "num_layers", 1)
    check_resumed(stage, tmp_path, monkeypatch)


def test_the_autoencoder_codes_every_frame_by_itself(tmp_path):
    """Also after training on single frames, and as its two-dimensional form does."""
    vae = frames(tmp_path, False).eval()
    clip = render_clip(sample_clip(scene_rng(0, 0)).scenes) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(clip.transpose(0, 1)[None]).latent_dist
        latents = encode_frames(vae, clip)
        decoded = vae.decode(latents.transpose(0, 1)[None]).sample[0].transpose(0, 1)
        assert latents.shape == (FRAMES, 4, 16, 16)
        assert torch.allclose(posterior.mode()[0].transpose(0, 1), latents, atol=1e-4)
        assert torch.allclose(posterior.std, torch.tensor(models_video.POSTERIOR))
        assert torch.allclose(decoded, decode_frames(vae, latents).clamp(-1, 1), atol=1e-4)


def test_an_unknown_module_has_no_form_for_frames():
    vae = models_video.autoencoder()
    vae.decoder.mid_block = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match="Linear has no form for single frames"):
        decode_frames(vae, torch.zeros(1, 4, 2, 2))


def test_motion_labels_say_what_moves():
    labels = motion_labels(["a red circle moving left and cross standing still on a white background"])[0]
    told = {i: row.tolist() for i, row in enumerate(labels) if row[0] != IGNORE}
    names = list(MOTIONS)
    assert told == {
        5: [SHAPES.index("circle"), COLOURS.index("red"), names.index("left")],
        9: [SHAPES.index("cross"), len(COLOURS), names.index("still")],
    }


def test_words_leave_the_shared_encoder_as_it_is(tmp_path):
    before = shipped_text_encoder()
    encoder = words(tmp_path, False)
    for name, value in before.state_dict().items():
        assert torch.equal(encoder.state_dict()[name][: len(value)], value), name
    assert encoder.config.vocab_size == len(load_tokenizer("video"))
    ids = encode_captions(["a red circle and a blue square on a white background"])
    assert torch.equal(encoder(input_ids=ids).last_hidden_state, before.eval()(input_ids=ids).last_hidden_state)


def test_words_are_learned(tmp_path):
    """A row begins where it tells nothing; a few steps lower the loss of the reading task."""
    losses = []
    original = functional.cross_entropy
    recipe = WordsRecipe(batch=8, warmup=1)

    def noted(*args, **kwargs):
        losses.append(original(*args, **kwargs))
        return losses[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "cross_entropy", noted)
        train_motion_words(shipped_text_encoder(), tmp_path, Budget(steps=30), recipe)
    sums = torch.stack(losses).view(-1, 3).sum(1)
    assert sums[-5:].mean() < 0.7 * sums[:3].mean()


def test_an_untrained_transformer_is_the_identity_with_closed_gates(text):
    velocity = ClipVelocity(models_video.transformer(), text)
    predicted = velocity(torch.randn(1, 4, 2, 16, 16), torch.tensor([0.5]), torch.full((1, 32), 618))
    assert not predicted.any()
    (predicted - 1).square().mean().backward()
    assert velocity.transformer.proj_out.weight.grad.any()


def test_a_batch_is_clips_in_both_directions_or_single_frames():
    recipe = ClipRecipe(batch=64, still_batch=3)
    clean, noise, sigmas, ids = draw_clips(recipe, 0, LATENTS, CLIPS, still=False)
    assert clean.shape == noise.shape == (64, 4, FRAMES, 16, 16)
    assert ids.shape == (64, 32)
    sources = LATENTS.float()
    forward = [any(torch.equal(row, source) for source in sources) for row in clean]
    backward = [any(torch.equal(row.flip(1), source) for source in sources) for row in clean]
    assert all(a != b for a, b in zip(forward, backward, strict=True))
    assert 20 < sum(forward) < 44
    still, _, unshifted, _ = draw_clips(recipe, 0, LATENTS, CLIPS, still=True)
    assert still.shape == (192, 4, 1, 16, 16)
    assert all((row == sources.transpose(1, 2).flatten(0, 1)[:, :, None]).flatten(1).all(1).any() for row in still)
    assert sigmas.mean() > unshifted.mean() + 0.1


def test_latents_are_whitened_by_the_config(tmp_path):
    torch.manual_seed(0)
    vae = models_video.autoencoder().eval()
    latents = encode_world_clips(vae, tmp_path, 5).float()
    assert latents.shape == (5, 4, FRAMES, 16, 16)
    assert latents.mean((0, 2, 3, 4)).abs().max() < 0.02
    assert (latents.std((0, 2, 3, 4)) - 1).abs().max() < 0.02
    saved = type(vae).from_pretrained(tmp_path / "vae")
    drawn = render_clip(world_clip(1).scenes, rng=scene_rng(4, 1)) * 2 - 1
    mean, std = (torch.tensor(saved.config[name]).view(4, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        expected = (encode_frames(saved, drawn) - mean) / std
    assert torch.allclose(latents[1].transpose(0, 1), expected, atol=0.1)


def test_the_model_is_small_and_its_tokens_fill_blocks_of_sixteen(text):
    parts = models_video.transformer(), models_video.autoencoder(), text
    assert 2 * sum(p.numel() for part in parts for p in part.parameters()) < 14.5e6
    assert FRAMES * 8 * 8 % 16 == 0


def test_the_whole_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models_video.TRANSFORMER, "num_layers", 1)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    line = f"video --out {tmp_path} --steps 2 2 3 --scenes 3 --batch 1 --device cpu --processes 1"
    assert main(parser.parse_args(line.split())) == 0
    path = tmp_path / "pipeline"
    pipeline = WanPipeline.from_pretrained(path)
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.float32
    pipeline.set_progress_bar_config(disable=True)
    given = {"guidance_scale": 3.0, "num_inference_steps": 2, **VIDEO_CALL}
    prompt = "a red circle moving left"

    def call(kind="latent"):
        return pipeline(prompt, generator=torch.Generator().manual_seed(0), output_type=kind, **given).frames

    assert call("pt").shape == (1, FRAMES, 3, 128, 128)
    plain = call()
    # Trained on what the pipeline makes of a prompt.
    states, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=32)
    assert torch.allclose(states, text_states(pipeline.text_encoder, encode_captions([prompt], "video")), atol=1e-5)
    assert call_arguments(pipeline, prompt)["max_sequence_length"] == 32
    with control(pipeline, RegionMask([Region("a red circle", box=(0, 0, 0.5, 1))])):
        masked = call()
    assert not torch.equal(masked, plain)
    assert torch.equal(call(), plain)
    capsys.readouterr()
    for what in ("autoencoder", "pipeline"):
        measure_clips.main([what, "--base", str(path), "--clips", "1", "--steps", "1", "--device", "cpu"])
        assert capsys.readouterr().out.startswith("1 clips: kept 0.0000, colour_kept ")
    # Where the package looks for it, it is loaded by name.
    monkeypatch.setattr(pretrained, "_WEIGHTS", tmp_path / "nothing")
    with pytest.raises(ControlError, match="unknown shapes model 'video'; known: none"):
        load("video")
    monkeypatch.setattr(pretrained, "_WEIGHTS", tmp_path)
    path.rename(tmp_path / "video")
    assert type(load("video")).__name__ == "WanPipeline"
