import numpy as np
import pytest
import torch

from attnctrl.shapes import HELD_OUT, Thing, clip_prompt, detect, render, render_clip, sample_clip, scene_rng
from attnctrl.shapes.captions import P_EMPTY
from attnctrl.shapes.captions_video import MOTION_WORDS, WORDS, clip_caption
from attnctrl.shapes.motion import CLIP_SHAPES, FRAMES, MOTIONS, Clip, Mover
from attnctrl.shapes.tokenizer import encode_captions, load_tokenizer
from attnctrl.shapes.world import MARGIN, SEPARATION

CLIPS = [sample_clip(scene_rng(5, i)) for i in range(200)]
CIRCLE = Mover(Thing("circle", "red", 0.3, 0.4, 0.15), "right", 0.4)


@pytest.mark.parametrize(
    ("motion", "x", "y"),
    [("left", -0.1, 0.4), ("right", 0.7, 0.4), ("up", 0.3, 0.0), ("down", 0.3, 0.8), ("still", 0.3, 0.4)],
)
def test_a_mover_goes_its_way_in_equal_steps(motion, x, y):
    mover = Mover(CIRCLE.thing, motion, 0.4)
    assert (mover.at(0).cx, mover.at(0).cy) == (0.3, 0.4)
    assert (mover.at(1).cx, mover.at(1).cy) == pytest.approx((x, y))
    assert (mover.at(0.5).cx, mover.at(0.5).cy) == pytest.approx(((0.3 + x) / 2, (0.4 + y) / 2))


def test_clips_stay_inside_and_apart():
    assert {len(clip.movers) for clip in CLIPS} == {1, 2}
    assert {mover.motion for clip in CLIPS for mover in clip.movers} == set(MOTIONS)
    assert {mover.thing.shape for clip in CLIPS for mover in clip.movers} == set(CLIP_SHAPES)
    assert not any(mover.thing.pair in HELD_OUT for clip in CLIPS for mover in clip.movers)
    for clip in CLIPS:
        assert len(clip.scenes) == FRAMES
        for scene in clip.scenes:
            for thing in scene.things:
                assert min(thing.cx, thing.cy, 1 - thing.cx, 1 - thing.cy) >= MARGIN * thing.r - 1e-9
            if len(scene.things) == 2:
                a, b = scene.things
                assert np.hypot(a.cx - b.cx, a.cy - b.cy) >= SEPARATION * (a.r + b.r) - 1e-9


def test_clips_repeat_by_seed_and_index():
    assert sample_clip(scene_rng(5, 7)) == CLIPS[7]
    frames = [render_clip(CLIPS[7].scenes, 64, scene_rng(6, 7)) for _ in range(2)]
    assert torch.equal(*frames)


def test_held_out_pairs_and_counts_are_chosen():
    clip = sample_clip(scene_rng(0, 0), count=2, held_out="one")
    assert sum(mover.thing.pair in HELD_OUT for mover in clip.movers) == 1
    with pytest.raises(ValueError, match="count must be 1 or 2, got 3"):
        sample_clip(scene_rng(0, 0), count=3)
    with pytest.raises(ValueError, match="unknown motion 'away'; known: left, right, up, down, still"):
        Mover(CIRCLE.thing, "away", 0.3)


def test_backwards_is_the_clip_from_its_end():
    clip = Clip((CIRCLE, Mover(Thing("cross", "blue", 0.7, 0.8, 0.13), "still", 0.3)), "white")
    back = clip.backwards()
    assert back.asked == [("circle", "red", "left"), ("cross", "blue", "still")]
    for one, other in zip(back.scenes, reversed(clip.scenes), strict=True):
        for a, b in zip(one.things, other.things, strict=True):
            assert (a.cx, a.cy) == pytest.approx((b.cx, b.cy))


def test_a_clip_keeps_its_ground_and_colours():
    """Its frames differ by the motion alone: without motion not at all, although colours are jittered."""
    still = Clip((Mover(CIRCLE.thing, "still", 0.3),), "gray")
    frames = render_clip(still.scenes, 64, scene_rng(0, 0))
    assert frames.shape == (FRAMES, 3, 64, 64)
    assert all(torch.equal(frame, frames[0]) for frame in frames)
    assert not torch.equal(frames[0], render(still.scenes[:1], 64)[0])
    moving = render_clip(Clip((CIRCLE,), "gray").scenes, 64, scene_rng(0, 0))
    assert torch.equal(moving[0], frames[0])
    assert torch.equal(moving[:, :, 0, 0], frames[:, :, 0, 0])
    assert [round(detect(f).objects[0].centre[0], 2) for f in (moving[0], moving[-1])] == pytest.approx(
        [0.3, 0.7], abs=0.02
    )


def test_canonical_clip_prompt():
    text, phrases = clip_prompt([("circle", "red", "left"), ("square", "orange", "still")], "white")
    assert text == "a red circle moving left and an orange square standing still on a white background"
    assert phrases == ["a red circle moving left", "an orange square standing still"]
    with pytest.raises(ValueError, match="at least one thing"):
        clip_prompt([])
    with pytest.raises(ValueError, match="unknown motion 'away'"):
        clip_prompt([("circle", "red", "away")])


def test_clip_captions_vary_and_say_the_motion():
    captions = [clip_caption(clip, scene_rng(6, i)) for i, clip in enumerate(CLIPS * 5)]
    full = [c for c in captions if c]
    assert abs(1 - len(full) / len(captions) - P_EMPTY) < 0.03
    words = {w for c in captions for w in c.replace(",", " ,").split()}
    assert words <= set(WORDS)
    assert set(MOTION_WORDS) < words
    single = [(clip, c) for clip, c in zip(CLIPS * 5, captions, strict=True) if c and len(clip.movers) == 1]
    said = [clip.movers[0].motion in c.split() for clip, c in single]
    assert 0.85 < np.mean(said) < 0.95
    assert not any(m in c.split() for clip, c in single for m in set(MOTIONS) - {clip.movers[0].motion})


def test_the_video_tokenizer_adds_words_and_changes_none(tmp_path):
    still, video = load_tokenizer(), load_tokenizer("video")
    assert set(still.get_vocab().items()) < set(video.get_vocab().items())
    assert (video.bos_token_id, video.eos_token_id) == (still.bos_token_id, still.eos_token_id)
    sentence = "a red circle, an orange square and a large heart next to a cross on a white background"
    assert video(sentence).input_ids == still(sentence).input_ids
    for word in WORDS:
        assert len(video(word, add_special_tokens=False).input_ids) == 1
    video.save_pretrained(tmp_path)
    captions = [clip_caption(clip, scene_rng(6, i)) for i, clip in enumerate(CLIPS)]
    read = type(video).from_pretrained(tmp_path)(captions, padding="max_length", max_length=32, return_tensors="pt")
    assert torch.equal(read.input_ids, encode_captions(captions, "video"))
    with pytest.raises(KeyError):
        encode_captions(captions, "sd")
