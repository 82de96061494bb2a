import numpy as np
import pytest

from attnctrl.shapes import Detection, score_clip
from attnctrl.shapes.detect import Found
from attnctrl.shapes.measure_clips import measure, probe_clip, rendered, summary
from attnctrl.shapes.score_clip import colour_kept, follow, jitter, kept, motion


def found(x, y=0.5, shape="circle", colour="red"):
    return Found(shape, colour, (x - 0.1, y - 0.1, x + 0.1, y + 0.1), (x, y), np.zeros((1, 1), dtype=bool), 0.9)


def track(*centres):
    return [None if c is None else found(*c) for c in centres]


def frames(*rows):
    return [Detection(list(row), "white") for row in rows]


@pytest.mark.parametrize(
    ("end", "name"),
    [((0.7, 0.5), "right"), ((0.3, 0.55), "left"), ((0.5, 0.2), "up"), ((0.45, 0.9), "down"), ((0.55, 0.46), "still")],
)
def test_motion_is_the_direction_gone_farther(end, name):
    way = [(0.5 + t * (end[0] - 0.5), 0.5 + t * (end[1] - 0.5)) for t in np.linspace(0, 1, 9)]
    assert motion(track(*way)) == name
    assert jitter(track(*way)) == pytest.approx(0, abs=1e-12)
    # Lost in a few frames it is still followed, in most not.
    assert motion(track(*way[:3], None, None, *way[5:])) == name
    assert motion(track(*way[:4], *[None] * 5)) is None


def test_jitter_is_the_distance_from_the_line():
    """By hand: heights 0, h, 0, h over times -1.5..1.5 have slope 0.2 h a frame; the rest is sqrt(0.2) h."""
    h = 0.1
    shaken = track((0.2, 0.5), (0.3, 0.5 + h), (0.4, 0.5), (0.5, 0.5 + h))
    assert jitter(shaken) == pytest.approx(np.sqrt(0.2) * h)
    assert jitter(track((0.5, 0.5), None, None, None)) is None


def test_kept_counts_frames_with_shape_and_colour():
    seen = [found(0.5), found(0.5, shape="square"), None, found(0.5)]
    assert kept(seen, "circle") == 0.5
    assert colour_kept(seen) == 0.75


def test_follow_prefers_the_shape_and_then_the_place():
    one, other = found(0.2), found(0.8)
    wrong = found(0.21, shape="square")
    asked = [("circle", "red", "still")]
    assert follow(asked, frames([one], [wrong, other], [other, one]))[0] == [one, other, other]
    assert follow(asked, frames([one], [other, one], [found(0.2, colour="blue")]))[0] == [one, one, None]
    assert follow(asked, frames([wrong]))[0] == [wrong]


def test_two_of_one_colour_are_told_apart_and_none_is_used_twice():
    circle, square = found(0.2), found(0.8, shape="square")
    asked = [("square", "red", "still"), ("circle", "red", "still")]
    tracks = follow(asked, frames([circle, square], [circle]))
    assert tracks == [[square, None], [circle, circle]]


def test_the_whole_score_of_a_clip():
    rows = [[found(0.2 + 0.05 * i)] for i in range(9)]
    rows[4] = [found(0.4, shape="square"), found(0.9, colour="blue")]
    rows[8] = []
    score = score_clip([("circle", "red", "right")], frames(*rows), "white")
    assert (score.kept, score.colour_kept) == pytest.approx((7 / 9, 8 / 9))
    assert (score.moving, score.extra, score.background) == (1.0, pytest.approx(1 / 9), 1.0)
    assert score.jitter == pytest.approx(0, abs=1e-9)
    lost = score_clip([("circle", "red", "left"), ("cross", "green", "still")], frames(*rows))
    assert (lost.moving, lost.axis, lost.kept, lost.background) == (0.0, 0.5, pytest.approx(7 / 18), None)
    up = score_clip([("circle", "red", "up")], frames(*rows))
    assert (up.moving, up.axis) == (0.0, 0.0)
    assert score_clip([("cross", "green", "still")], frames(*rows)).jitter is None
    with pytest.raises(ValueError, match="an asked object and two frames, got 0, 9"):
        score_clip([], frames(*rows))


def test_rendered_clips_score_as_they_were_drawn():
    for score in measure(rendered, 6):
        assert (score.kept, score.moving, score.extra, score.background) == (1, 1, 0, 1)
        assert score.jitter < 0.005


def test_frames_out_of_order_jitter():
    shuffled = measure(lambda index, clip: rendered(index, clip)[[0, 4, 2, 6, 1, 8, 3, 7, 5]], 6, 1)
    for index, score in enumerate(shuffled):
        assert (score.jitter > 0.02) == (probe_clip(index, 1).movers[0].motion != "still")
    assert summary(shuffled).startswith("6 clips: kept 1.0000, colour_kept 1.0000, moving ")
