from __future__ import annotations

from attnctrl.bench.tasks import make_tasks
from attnctrl.shapes.world import HELD_OUT


def test_tasks_depend_on_their_number_alone() -> None:
    few, many = make_tasks(3, 4), make_tasks(3, 9)
    assert many[:4] == few
    assert len({task.seed for task in many}) == 9
    assert make_tasks(3, 4, seed=1) != few


def test_one_task_in_five_holds_an_untrained_pair() -> None:
    tasks = make_tasks(2, 20)
    unseen = [any((c, s) in HELD_OUT for s, c in t.layout.asked) for t in tasks]
    assert [i for i, u in enumerate(unseen) if u] == [4, 9, 14, 19]
    assert [task.held_out for task in tasks] == unseen


def test_splits_share_no_prompt() -> None:
    tune = {t.prompt for t in make_tasks(2, 60, "tune")}
    assert not tune & {t.prompt for t in make_tasks(2, 60, "test")}


def test_regions_and_nouns_stand_in_the_prompt() -> None:
    (task,) = make_tasks(4, 1)
    assert len(task.regions) == len(task.nouns) == 4
    for region, noun, box in zip(task.regions, task.nouns, task.layout.boxes, strict=True):
        assert region.phrase in task.prompt
        assert region.phrase.endswith(noun)
        assert region.box == box
