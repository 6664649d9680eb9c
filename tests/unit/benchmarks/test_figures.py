"""Ratios within a round, and the tables."""

import pytest

from benchmarks.figures import Figures, Goal, print_medians, report_goals

FIGURES: Figures = {
    ("ours", "speed"): [30.0, 24.0, 40.0],
    ("a", "speed"): [20.0, 24.0, 10.0],
    ("b", "speed"): [10.0, 12.0, 20.0],
    ("ours", "peak"): [900.0],
}


def test_the_best_peer_is_chosen_in_each_round() -> None:
    goal = Goal(("ours", "speed"), [("a", "speed"), ("b", "speed")])
    assert goal.values(FIGURES) == [1.5, 1.0, 2.0]
    assert goal.name == "ours / a or b: speed"


def test_a_figure_is_compared_with_another_of_the_same_engine() -> None:
    assert Goal(("ours", "speed"), [("ours", "slow")]).name == "ours: speed / slow"


def test_a_goal_without_peers_is_about_the_figure_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = report_goals(FIGURES, [Goal(("ours", "peak"), reach="at most 1024")])
    assert rows["ours: peak"]["median"] == 900
    assert "goal: at most 1024" in capsys.readouterr().out


def test_a_goal_with_an_unmeasured_peer_is_left_out() -> None:
    goal = Goal(("ours", "speed"), [("a", "speed"), ("missing", "speed")])
    assert not report_goals(FIGURES, [goal])


def test_the_table_has_a_row_for_each_engine(capsys: pytest.CaptureFixture[str]) -> None:
    print_medians("medians", FIGURES)
    _, headings, ours, a, _ = capsys.readouterr().out.strip().splitlines()
    assert headings.split() == ["speed", "peak"]
    assert ours.split() == ["ours", "30.00", "900"]
    assert a.split() == ["a", "20.00", "–"]
