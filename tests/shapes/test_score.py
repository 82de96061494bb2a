import numpy as np
import pytest

from attnctrl.shapes import (
    bound,
    extra,
    fitted_iou,
    in_box,
    iou,
    leaked,
    neglected,
    present,
    sample_layout,
    scene_rng,
    score_image,
)
from attnctrl.shapes.detect import Detection, Found
from attnctrl.shapes.layouts import GAP, MARGIN, sample_boxes, split_of
from attnctrl.shapes.score import box_iou, inscribed_box, match
from attnctrl.shapes.world import HELD_OUT


def found(shape, colour, box, score=0.9):
    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    return Found(shape, colour, box, centre, np.zeros((4, 4), dtype=bool), score)


LEFT, RIGHT = (0.1, 0.3, 0.4, 0.6), (0.6, 0.3, 0.9, 0.6)
ASKED = [("circle", "red"), ("square", "blue")]
PERFECT = Detection([found("circle", "red", LEFT), found("square", "blue", RIGHT)], "white")


def test_perfect_image():
    result = score_image(ASKED, PERFECT, [LEFT, RIGHT], "white")
    assert (result.present, result.bound, result.extra, result.neglected, result.background) == (1, True, 0, 0, True)
    assert result.in_box == 1
    assert result.iou == pytest.approx(1)
    assert result.fitted_iou == pytest.approx(1)


def test_swapped_colours_are_present_in_neither_sense():
    swapped = Detection([found("circle", "blue", LEFT), found("square", "red", RIGHT)], "white")
    assert present(ASKED, swapped) == 0
    assert extra(ASKED, swapped) == 2
    assert not bound(ASKED, swapped)
    assert neglected(ASKED, swapped) == 0
    assert iou(ASKED, [LEFT, RIGHT], swapped) == 0


def test_one_missing_one_duplicated():
    image = Detection([found("circle", "red", LEFT), found("circle", "red", RIGHT)], "gray")
    assert present(ASKED, image) == 0.5
    assert extra(ASKED, image) == 1
    assert neglected(ASKED, image) == 0.5
    assert in_box(ASKED, [LEFT, RIGHT], image) == 0.5
    assert score_image(ASKED, image, background="white").background is False


def test_colours_leak_from_one_asked_object_to_another():
    both = [*ASKED, ("star", "green")]

    def image(*things):
        return Detection([found(shape, colour, LEFT) for shape, colour in things], "white")

    assert leaked(ASKED, PERFECT) == 0
    assert leaked(ASKED, image(("circle", "blue"), ("square", "red"))) == 1
    assert leaked(both, image(("circle", "red"), ("square", "red"))) == pytest.approx(1 / 3)
    assert leaked(ASKED, image(("circle", "pink"), ("heart", "red"))) == 0  # strangers, but no leak
    assert leaked([("circle", "red"), ("circle", "blue")], image(("circle", "blue"))) == 0
    assert leaked([], image(("circle", "blue"))) == 0
    assert score_image(ASKED, image(("circle", "blue"))).leaked == 0.5


def test_one_found_object_serves_one_asked_object():
    twice = [("circle", "red"), ("circle", "red")]
    assert present(twice, Detection([found("circle", "red", LEFT)], "white")) == 0.5


def test_boxes_decide_which_duplicate_counts():
    image = Detection([found("circle", "red", RIGHT, 0.99), found("circle", "red", LEFT, 0.6)], "white")
    assert match(ASKED[:1], image, [LEFT]) == [image.objects[1]]
    assert match(ASKED[:1], image) == [image.objects[0]]
    twice = [("circle", "red"), ("circle", "red")]
    assert match(twice, image, [LEFT, RIGHT]) == [image.objects[1], image.objects[0]]


def test_right_objects_in_the_wrong_boxes():
    assert in_box(ASKED, [RIGHT, LEFT], PERFECT) == 0
    assert present(ASKED, PERFECT) == 1


def test_box_iou_by_hand():
    assert box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert box_iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0


def test_inscribed_box_keeps_proportions_and_centre():
    box = inscribed_box("diamond", (0.1, 0.2, 0.5, 0.6))
    assert box[3] - box[1] == pytest.approx(0.4)
    assert (box[2] - box[0]) / (box[3] - box[1]) == pytest.approx(0.78 / 1.04)
    assert (box[0] + box[2]) / 2 == pytest.approx(0.3)


def test_fitted_iou_forgives_what_a_shape_cannot_fill():
    wide = (0.1, 0.3, 0.5, 0.5)
    image = Detection([found("circle", "red", inscribed_box("circle", wide))], "white")
    assert iou(ASKED[:1], [wide], image) == pytest.approx(0.5)
    assert fitted_iou(ASKED[:1], [wide], image) == pytest.approx(1)


def test_boxes_must_match_asked():
    with pytest.raises(ValueError, match="1 boxes for 2"):
        in_box(ASKED, [LEFT], PERFECT)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_layout_boxes_are_apart_and_inside(count):
    for i in range(30):
        boxes = sample_boxes(scene_rng(6, i), count)
        for k, a in enumerate(boxes):
            assert min(a[:2]) >= MARGIN - 1e-9
            assert max(a[2:]) <= 1 - MARGIN + 1e-9
            for b in boxes[:k]:
                gaps = (a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])
                assert max(gaps) >= GAP - 1e-9


def test_layouts_repeat_and_hold_distinct_things():
    a, b = (sample_layout(scene_rng(7, 3), 4) for _ in range(2))
    assert a == b
    assert len({s for s, _ in a.asked}) == len({c for _, c in a.asked}) == len(a.boxes) == 4
    assert all(p in a.prompt for p in a.phrases)
    assert f"on a {a.background} background" in a.prompt


def test_splits_share_no_prompt():
    prompts = {
        split: {sample_layout(scene_rng(8, i), 2, split=split).prompt for i in range(400)} for split in ("tune", "test")
    }
    assert not prompts["tune"] & prompts["test"]
    for split, texts in prompts.items():
        assert {split_of(p) for p in texts} == {split}


def test_held_out_layouts():
    for i in range(20):
        layout = sample_layout(scene_rng(9, i), 2, held_out="one")
        assert sum((c, s) in HELD_OUT for s, c in layout.asked) == 1


def test_layout_errors():
    with pytest.raises(ValueError, match="split must be"):
        sample_layout(scene_rng(0, 0), 2, split="train")
    with pytest.raises(ValueError, match=r"count must be 1\.\.4"):
        sample_boxes(scene_rng(0, 0), 5)
