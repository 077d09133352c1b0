"""A loop that is killed before any step it takes: here before those that matter, in `bench.py kills` before all."""

import pytest
from conftest import block
from faults import killed_and_started_again, night, session

import loop

AT_FIRST = (
    "write autoresearch.lock 1", "git update-ref 1", "git symbolic-ref 2", "git update-ref 2", "write t.jsonl 1",
    "start sh 1", "write t.jsonl 2", "write t.jsonl 4", "git update-ref 3", "write .results.tsv.new 1",
    "rename .results.tsv.new 1",
)  # fmt: skip
LATER = (
    "start facts 1", "git reset 1", "git fast-import 1", "git update-ref 1", "write t.jsonl 1", "write t.jsonl 2",
    "git ls-tree 2", "git fast-import 2", "git update-ref 2", "write .train.py.new 1",
    "rename .train.py.new 1", "write .results.tsv.new 1", "rename .results.tsv.new 1", "git reset 2", "start rm 1",
    "git update-ref 3",
)  # fmt: skip
THREE = "git update-ref 5", "write t.jsonl 9", "git update-ref 7"
QUICK = {(0, "git update-ref 3")}
POINTS = [
    *((0, point) for point in AT_FIRST),
    *((1, point) for point in LATER),
    *((3, point) for point in THREE),
]


@pytest.mark.parametrize(
    "kind, point", [pytest.param(*p, marks=[pytest.mark.slow] * (p not in QUICK)) for p in POINTS]
)
def test_a_loop_killed_before_any_step_goes_on_as_if_nothing_had_happened(tmp_path, kind, point):
    """kind: 0 in its first session, 1 in a later one, 3 with three devices."""
    project = night(tmp_path)
    if kind == 1:
        project.offline("--experiments", 1)
    struck, found = killed_and_started_again(project, before=point, experiments=6, devices=max(kind, 1))
    assert not found and struck == point.rpartition(" ")[0]


@pytest.mark.slow
def test_an_experiment_around_which_the_loop_dies_twice_has_its_row_instead_of_a_third_run(tmp_path):
    project = night(tmp_path)
    project.offline("--experiments", 1)
    for _ in range(2):
        assert session(project, before="write t.jsonl 2", experiments=4)[1]  # before its run's end is noted
    project.offline("--experiments", 1)
    assert project.rows()[2]["description"].endswith("[the loop died 2 times while it ran]")


def test_a_results_tsv_that_lags_behind_runs_added_to_a_row_is_no_persons_edit(project, monkeypatch):
    """As it is after a kill between the branch's step and the checkout's: a parent's row had got another run."""
    monkeypatch.setattr(loop, "judge", lambda gains, *rest: ("again", "keep")[len(gains) - 1])
    twice = block("WIDTH = 64", "WIDTH = 128", "twice the width")
    project.night("--experiments", 1, replies=[twice])
    rows = project.rows()
    assert rows[0]["runs"].count(",") == 1  # the baseline ran on the second seed for the first experiment
    project.write("results.tsv", project.git("show", "autoresearch/t~1:results.tsv"))
    project.night("--experiments", 1, replies=[block("DEPTH = 4", "DEPTH = 5", "a layer")])
    assert len(project.rows()) == 3 and project.rows()[0]["runs"].startswith(rows[0]["runs"])
    assert project.status() == ""
