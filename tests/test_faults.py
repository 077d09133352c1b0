"""A loop that is killed before any step it takes: here before those that matter most, before all of them in `bench.py kills`."""

import pytest
from faults import killed_and_started_again, night

AT_FIRST = (
    "write autoresearch.lock 1",
    "git update-ref 1",
    "git update-ref 2",
    "git symbolic-ref 5",
    "git update-ref 3",
    "write run.log 1",
)
LATER = (
    "start facts 1", "git update-ref 1", "mkdir home 1", "start train.py 1", "start rm 1", "git read-tree 2", "remove index-* 2",
    "git update-ref 2", "write .results.tsv.new 1", "rename .results.tsv.new 1", "git update-index 7", "git update-ref 3",
)  # fmt: skip


@pytest.mark.parametrize("began, point", [*((0, point) for point in AT_FIRST), *((1, point) for point in LATER)])
def test_a_loop_killed_before_any_step_goes_on_as_if_nothing_had_happened(tmp_path, began, point):
    project = night(tmp_path)
    if began:
        project.offline("--experiments", 1)
    struck, found = killed_and_started_again(project, before=point, experiments=4)
    assert not found and struck == point.rpartition(" ")[0]
