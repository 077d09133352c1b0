"""Claims about judging in a night: pairs on common seeds, the noise, a busy machine, and the audit."""

import json
import math
import os
import re
import signal
from statistics import fmean

import conftest
import pytest
from conftest import block, stand_in

import loop

SEEDED = """\
import os
import prepare
width = 64
strange = 0
seed = int(os.environ["AUTORESEARCH_SEED"])
prepare.finish(1 + 1 / width + seed % 7 / 1000)
"""


@pytest.fixture
def seeded(project):
    """A project whose train.py has noise of a few thousandths that comes from the seed."""
    return with_train(project, SEEDED)


def with_train(project, source):
    project.write("train.py", source)
    project.commit("another train.py")
    return project


@pytest.fixture
def verdicts(monkeypatch):
    """A judge that says this after one, two and three runs, from now on."""

    def set_judge(*verdicts):
        monkeypatch.setattr(loop, "judge", lambda differences, *_: verdicts[len(differences) - 1])

    return set_judge


class Runs:
    """What runs in a night, in its order; it answers as `instead` does, or else as stand_in()."""

    def __init__(self, instead=lambda number, seed, split: None):
        self.instead, self.made, self.jobs = instead, [], []

    def __call__(self, job):
        number, split = int(os.path.basename(os.path.dirname(job["folder"]))[:4]), job["told"]["SPLIT"]
        if os.path.basename(job["folder"]).startswith("warm"):
            split = "warm"
        made = number, int(job["told"]["SEED"]), split
        self.made.append(made)
        self.jobs.append(job)
        return self.instead(*made) or stand_in(job)


def edit(strange, idea="an idea"):
    return block("strange = 0", f"strange = {strange}", idea)


def wider(after, before=64):
    return block(f"width = {before}", f"width = {after}", f"width {after}")


def one_by_one(project, *replies, **how):
    """A night of one experiment for each reply: so that each is an edit of what the one before left."""
    for reply in replies:
        session = project.night("--experiments", 1, replies=[reply], **how)
    return session


def runs_of(row):
    return [float(run) for run in row["runs"].split(",") if run]


# ---- common seeds


def test_run_k_of_every_experiment_has_seed_k(seeded, verdicts):
    verdicts("again", "again", "discard")
    runs = Runs()
    seeded.night("--experiments", 2, replies=[edit(1), edit(2)], run=runs)
    assert [len(runs_of(row)) for row in seeded.rows()] == [3] * 3
    everything = [(number, seed, "val") for number in range(3) for seed in range(3)]
    assert sorted(runs.made) == sorted([(0, 0, "warm"), *everything])


def test_the_file_that_was_edited_runs_on_a_seed_that_it_lacks_before_the_candidate_does(seeded, verdicts):
    verdicts("again", "again", "discard")
    runs = Runs()
    seeded.night("--experiments", 2, replies=[edit(1, "one"), edit(2, "two")], run=runs)
    assert [(number, seed) for number, seed, _ in runs.made] == [
        (0, 0), (0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 0), (2, 1), (2, 2),
    ]  # fmt: skip
    baseline = seeded.rows()[0]
    assert runs_of(baseline) == [1.015625, 1.016625, 1.017625]
    assert baseline["val_bpb"] == "1.015625" and baseline["change"] == ""
    log = seeded.git("log", "--first-parent", "--reverse", "--format=%s", "autoresearch/t").splitlines()
    assert log[-3:] == ["keep: baseline", "discard: one", "discard: two"] and seeded.status() == ""


def test_with_several_devices_run_k_has_seed_k_too_and_no_run_is_made_twice(seeded, verdicts):
    verdicts("again", "again", "discard")
    runs = Runs()
    replies = [edit(number) for number in range(1, 5)]
    seeded.night("--experiments", 4, replies=replies, run=runs, devices=3)
    assert len({*runs.made}) == len(runs.made)
    assert [len(runs_of(row)) for row in seeded.rows()] == [3] * 5
    assert runs_of(seeded.rows()[0]) == [1.015625, 1.016625, 1.017625]


def test_a_metric_is_the_parents_plus_the_change_whatever_seeds_they_ran_on(seeded, verdicts):
    verdicts("again", "keep")
    one_by_one(seeded, wider(65), wider(80, 65))
    verdicts("discard")
    seeded.night("--experiments", 1, replies=[block("width = 80", "width = 16")])
    rows = seeded.rows()
    assert [len(runs_of(row)) for row in rows] == [2, 2, 2, 1]
    assert [float(row["val_bpb"]) for row in rows] == pytest.approx(
        [1 + 1 / width for width in (64, 65, 80, 16)], abs=2e-4
    )
    # The parent's other runs count a little, too.
    assert [row["change"].partition("+-")[0] for row in rows] == ["", "-0.0002", "-0.0029", "+0.0498"]


def test_an_experiment_is_compared_with_the_last_kept_row_also_where_an_earlier_one_was_lower(
    seeded, verdicts
):
    verdicts("keep")
    one_by_one(seeded, wider(32), wider(40, 32))
    assert seeded.rows()[2]["change"].startswith("-0.006") and "width = 40" in seeded.read("train.py")


@pytest.mark.every(2)
@pytest.mark.parametrize("stopped_in", [(0, 0), (0, 1), (1, 1)])
def test_stopped_within_the_parents_run_or_its_own_nothing_is_lost(seeded, verdicts, stopped_in):
    """The run in which the night is stopped ends as it may, before the night or after it."""

    def stop(number, seed, split):
        if (number, seed) == stopped_in and split == "val":
            os.kill(os.getpid(), signal.SIGTERM)

    verdicts("again", "keep")
    sessions = []
    for run in (Runs(stop), Runs()):
        sessions.append(seeded.night("--experiments", 1, replies=[wider(128)], run=run))
        if len(sessions[-1].ledger.rows) == 2:
            break
    rows = seeded.rows()
    assert [row["runs"] for row in rows] == ["1.015625,1.016625", "1.007812,1.008812"]
    assert rows[1]["status"] == "keep" and rows[1]["description"] == "width 128" and seeded.status() == ""
    assert stopped_in[0] == 0 or sum(len(session.model.chats) for session in sessions) == 1


UNLUCKY = SEEDED.replace("prepare.finish", "assert (seed, strange) != (1, 0), 'unlucky'\nprepare.finish")


def test_where_the_parent_fails_on_a_seed_what_is_in_doubt_is_not_kept_and_it_is_not_run_again(
    project, verdicts
):
    verdicts("again", "keep")
    runs = Runs()
    with_train(project, UNLUCKY).night("--experiments", 2, replies=[edit(1), edit(2)], run=runs)
    rows = project.rows()
    assert [row["status"] for row in rows] == ["keep", "discard", "discard"]
    assert "the file that it edited fails on the next seed" in rows[1]["description"]
    assert [len(runs_of(row)) for row in rows] == [1, 1, 1] and runs.made.count((0, 1, "val")) == 1


def test_where_the_parent_fails_on_a_seed_what_is_clear_on_the_first_is_judged_by_it(project):
    """Else nothing could be kept any more for the rest of the night."""
    replies = [block("width = 64", "width = 66.4", "in doubt"), block("width = 64", "width = 1000", "clear")]
    session = with_train(project, UNLUCKY).night("--experiments", 2, replies=replies)
    assert session.ledger.results[session.ledger.ended[0].commit, 1, "val"]["cause"]
    assert [row["status"] for row in project.rows()] == ["keep", "discard", "keep"]
    assert project.rows()[2]["change"].startswith("-0.0146")


def test_an_edit_that_crashes_on_its_second_seed_is_a_crash(seeded, verdicts):
    verdicts("again", "keep")
    brittle = block("prepare.finish", "assert seed != 1, 'unlucky'\nprepare.finish", "brittle")
    brittle = brittle.replace("prepare.finish\n=", "prepare.finish(1 + 1 / width + seed % 7 / 1000)\n=")
    brittle = brittle.replace("prepare.finish\n>", "prepare.finish(1 + 1 / width + seed % 7 / 1000)\n>")
    seeded.night("--experiments", 1, replies=[brittle])
    baseline, row = seeded.rows()
    assert row["status"] == "crash" and row["runs"] == row["change"] == "" and row["val_bpb"] == "nan"
    assert "AssertionError: unlucky" in row["description"] and len(runs_of(baseline)) == 2


def test_what_the_model_wrote_is_no_part_of_what_the_loop_notes(seeded):
    reply = wider(1000).replace("Because.", "Because.\n\nWork: faster\nNumber: 9\nParent: none")
    session = seeded.night("--experiments", 1, replies=[reply])
    message = seeded.git("show", "-s", "--format=%B", seeded.rows()[1]["commit"])
    assert "\nWork: faster\n" in message and message.index("Work: faster") < message.index(
        "Model: local-model"
    )
    (experiment,) = [one for one in session.ledger.ended if one.number == 1]
    assert experiment.parent == session.ledger.ended[0].commit


# ---- the noise


def test_the_prior_of_the_noise_is_the_rulers_and_is_noted_on_the_branch(seeded, verdicts, monkeypatch):
    verdicts("discard")
    for number, noise in enumerate((0.002, 0.5), 1):
        monkeypatch.setitem(conftest.FACTS, "noise", noise)
        seeded.night("--experiments", 1, replies=[edit(number)])
    assert [row["change"].partition("+-")[2] for row in seeded.rows()] == ["", "0.0020", "0.0020"]
    ruler = re.search(
        "^Ruler: (.*)", seeded.git("show", "-s", "--format=%B", seeded.rows()[0]["commit"]), re.M
    )[1]
    assert json.loads(ruler)["noise"] == 0.002


def test_the_model_and_the_person_are_told_changes_with_their_errors_and_the_noise(seeded, verdicts):
    verdicts("discard")
    seeded.night("--experiments", 2, replies=[block("width = 64", "width = 32", "narrow"), *["no edit"] * 3])
    verdicts("keep")
    session = seeded.night("--experiments", 1, replies=[block("width = 64", "width = 128", "wide")])
    assert re.search(r"keep +1\.0078 +-0\.0078\+-0\.0007  wide", session.output.getvalue())
    assert "noise of a difference 0.0007" in " ".join(session.view.totals())
    session = seeded.night("--experiments", 1, replies=[edit(1)])
    told = session.model.chats[-1][0]["content"]
    for line in (
        "On one seed a change is off by about 0.0007", "  1.015625          baseline\n",
        "  -0.0078 +-0.0007  wide\n", "  +0.0156 +-0.0007  narrow\n", "  crash             no edit",
    ):  # fmt: skip
        assert line in told, line


@pytest.mark.every(2)
@pytest.mark.parametrize("value", ["1" + " + 1" * 400, "[]" + ".copy()" * 190])
def test_an_edit_nested_deeper_than_python_likes_is_judged(seeded, value):
    replies = [block("width = 64", f"width = 128\ndeep = {value}", "deep"), *["no edit"] * 2]
    seeded.night("--experiments", 1, replies=replies)
    row = seeded.rows()[1]  # as Python can stand it or not
    assert (
        row["description"] == "deep"
        or row["status"] == "crash"
        and "the loop fails" not in row["description"]
    )


def test_the_judge_is_told_by_how_much_an_edit_makes_the_file_larger(seeded, monkeypatch):
    sizes = []

    def judge(differences, noise, size, spread):
        sizes.append(size)
        return "discard"

    monkeypatch.setattr(loop, "judge", judge)
    replies = [edit(5), block("strange = 0", "strange = 0\nmore = 1")]
    replies += [block("width = 64\nstrange = 0", left) for left in ("width = 64", "strange = 0")]
    seeded.night("--experiments", 4, replies=replies)
    assert sizes[0] == 0 < sizes[1] < 0.1 and -0.1 < sizes[2] < 0  # the fourth crashes: nothing to judge
    assert len(sizes) == 3


def test_where_higher_is_better_a_rise_is_kept_and_told_as_one(seeded, monkeypatch):
    monkeypatch.setitem(conftest.FACTS, "better", "higher")
    monkeypatch.setitem(conftest.FACTS, "metric", "accuracy")
    session = one_by_one(seeded, wider(32), wider(128, 32))
    header, *lines = seeded.git("show", "autoresearch/t:results.tsv").splitlines()
    assert header.split("\t")[1] == "accuracy"
    assert [line.split("\t")[3] for line in lines] == ["keep", "keep", "discard"]
    assert [line.split("\t")[5].partition("+-")[0] for line in lines] == ["", "+0.0156", "-0.0234"]
    assert "accuracy (higher is better)" in session.model.chats[0][0]["content"]
    assert "gain 0.0156" in session.view.totals()[0]


# ---- a machine that fails, or is too busy, says nothing of the code


@pytest.fixture
def no_waits(monkeypatch):
    monkeypatch.setattr(loop, "WAITS", (0, 0))


BUSY = {"cause": "the machine was busy: the run got 83% of its training", "machine": True}


def busy(key, times):
    """Runs of which the first ones of a (number, seed) get too little of the machine."""
    left = [times]

    def instead(number, seed, split):
        if (number, seed) == key and split != "warm" and left[0]:
            left[0] -= 1
            return dict(BUSY)

    return Runs(instead)


def test_a_run_that_got_less_than_its_training_is_not_judged_and_runs_again(seeded, no_waits):
    runs = busy((1, 0), 1)
    session = seeded.night("--experiments", 1, replies=[wider(128)], run=runs)
    assert runs.made.count((1, 0, "val")) == 2 and len(runs.made) == 4
    assert "the run got 83% of its training; going on in" in session.output.getvalue()
    assert [(row["status"], row["runs"]) for row in seeded.rows()] == [
        ("keep", "1.015625"),
        ("keep", "1.007812"),
    ]


def test_a_short_run_of_the_parents_is_made_again_too(seeded, verdicts, no_waits):
    verdicts("again", "keep")
    runs = busy((0, 1), 1)
    seeded.night("--experiments", 1, replies=[wider(128)], run=runs)
    assert runs.made.count((0, 1, "val")) == 2 and seeded.rows()[0]["runs"] == "1.015625,1.016625"
    assert seeded.rows()[1]["status"] == "keep"


def test_a_short_run_of_the_baseline_is_waited_for_however_often(seeded, no_waits):
    runs = busy((0, 0), 3 * loop.MAX_MACHINE_FAILURES)
    seeded.night("--experiments", 1, replies=[wider(128)], run=runs)
    assert runs.made.count((0, 0, "val")) == 3 * loop.MAX_MACHINE_FAILURES + 1
    assert [row["status"] for row in seeded.rows()] == ["keep", "keep"] and seeded.status() == ""


def test_around_which_the_machine_fails_always_is_to_blame_and_becomes_a_row(seeded, no_waits):
    runs = busy((1, 0), math.inf)
    seeded.night("--experiments", 2, replies=[edit(1, "slow to compile"), wider(128)], run=runs)
    rows = seeded.rows()
    assert runs.made.count((1, 0, "val")) == loop.MAX_MACHINE_FAILURES
    assert [row["status"] for row in rows] == ["keep", "crash", "keep"]
    assert "slow to compile [the machine was busy: the run got 83% of its training]" in rows[1]["description"]


@pytest.mark.slow
@pytest.mark.parametrize("times, measured", [(2, True), (math.inf, False)])
def test_a_short_run_of_the_audit_is_made_again_a_few_times(seeded, no_waits, times, measured):
    seeded.night("--experiments", 1, replies=[wider(1000)])
    runs = busy((1, loop.AUDIT_SEEDS[0]), times)
    report = seeded.night("--audit", run=runs).audited
    assert runs.made.count((1, loop.AUDIT_SEEDS[0], "test")) == 3
    assert f", {5 if measured else 4} " in report[0] and "audited gain 0.0146" in report[2]


# ---- what a run is told


WORKING = SEEDED.replace("1000)", "1000, work=10 * width + seed)")


def work_told(runs):
    return [
        (*made, job["told"]["WORK"])
        for made, job in zip(runs.made, runs.jobs, strict=True)
        if made[2] != "test"
    ]


def test_a_run_is_told_how_much_work_the_file_that_it_edited_did_on_its_seed(project, verdicts):
    with_train(project, WORKING)
    verdicts("again", "keep")
    runs = Runs()
    for replies in ([block("width = 64", "width = 65")], [block("width = 65", "width = 66")]):
        project.night("--experiments", 1, replies=replies, run=runs)  # what was done is on the branch
    # The baseline's is what the clock gave it in a first run, on seed 0.
    assert work_told(runs) == [
        (0, 0, "warm", ""), (0, 0, "val", "640"), (1, 0, "val", "640"), (0, 1, "val", "640"),
        (1, 1, "val", "641"), (2, 0, "val", "650"), (2, 1, "val", "651"),
    ]  # fmt: skip
    project.night("--audit", run=runs)
    assert {job["told"]["WORK"] for job in runs.jobs if job["told"]["SPLIT"] == "test"} == {""}


@pytest.mark.slow
def test_where_its_parent_lacks_the_seed_a_run_is_told_what_the_file_itself_did(project, verdicts):
    with_train(project, WORKING)
    runs = Runs()
    verdicts("keep")
    project.night("--experiments", 1, replies=[block("width = 64", "width = 65")], run=runs)
    verdicts("again", "keep")
    project.night("--experiments", 1, replies=[block("width = 65", "width = 66")], run=runs)
    assert (1, 1, "val", "650") in work_told(runs)


@pytest.mark.slow
def test_a_run_has_the_settings_with_which_the_branch_began(seeded, monkeypatch):
    runs = Runs()
    for number, pace in enumerate(("0.0125", "0.5"), 1):
        monkeypatch.setitem(conftest.FACTS, "settings", {"PACE": pace})
        seeded.night("--experiments", 1, replies=[edit(number)], run=runs)
    assert len(runs.jobs) == 4 and {job["told"]["PACE"] for job in runs.jobs} == {"0.0125"}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", ["metric", "better", "device", "software", "data"])
def test_a_branch_does_not_go_on_with_another_ruler_or_on_another_machine(seeded, monkeypatch, name):
    seeded.night("--hours", 1e-9, replies=[])
    monkeypatch.setitem(conftest.FACTS, name, "higher" if name == "better" else "another one")
    with pytest.raises(loop.Stop, match=f"measured otherwise .{name} was .* and is ") as stop:
        seeded.night("--experiments", 1, replies=[edit(1)])
    assert stop.value.code == 2 and "--tag" in str(stop.value)


# ---- the audit


@pytest.fixture
def improved(seeded):
    seeded.night("--experiments", 1, replies=[block("width = 64", "width = 1000", "very wide")])
    return seeded


def test_the_audit_runs_baseline_and_best_on_fresh_seeds_and_the_test_split(improved):
    before, runs = improved.git("rev-parse", "autoresearch/t"), Runs()
    report = improved.night("--audit", run=runs).audited
    assert runs.made == [(number, seed, "test") for seed in loop.AUDIT_SEEDS for number in (0, 1)]
    assert len(loop.AUDIT_SEEDS) == 5 and min(loop.AUDIT_SEEDS) > loop.MAX_RUNS
    assert "audited gain 0.0146, 95 % interval 0.0146 to 0.0146" in report[2]
    assert "1 kept, 0 crashed), 5 new seeds" in report[0] and "own figures: 0.0146 by its rows" in report[3]
    assert improved.git("rev-parse", "autoresearch/t") == before and improved.status() == ""


@pytest.mark.slow
def test_an_audit_leaves_a_run_that_no_row_has_yet_to_the_next_night(improved):
    """As it is where Ctrl-C came between a kept file's run on another seed and the row that asked for it."""
    best = improved.git("rev-parse", improved.rows()[1]["commit"]).strip()
    event = {"commit": best, "seed": 1, "split": "val", "cause": "", "value": 1.002, "work": 1}
    with open(improved.folder / ".git" / "autoresearch" / "t.jsonl", "a") as file:
        file.write("\n" + json.dumps(event))
    before = improved.git("rev-parse", "autoresearch/t")
    assert improved.night("--audit").audited
    assert improved.git("rev-parse", "autoresearch/t") == before


@pytest.mark.slow
def test_an_audit_that_was_stopped_goes_on(improved):
    def stop(number, seed, split):
        if (number, seed) == (1, loop.AUDIT_SEEDS[3]):
            os.kill(os.getpid(), signal.SIGTERM)

    first, rest, nothing = Runs(stop), Runs(), Runs()
    assert improved.night("--audit", run=first).interrupted
    report = improved.night("--audit", run=rest).audited
    assert "audited gain 0.0146" in report[2]
    assert len(first.made) in (8, 9)  # before the loop heard of it, one more may have begun
    assert not {*first.made[:7]} & {*rest.made} and len({*first.made, *rest.made}) == 10
    assert improved.night("--audit", run=nothing).audited == report and nothing.made == []


def test_an_audit_before_anything_is_kept_says_so(seeded):
    with pytest.raises(loop.Stop, match="holds no kept experiment, so there is nothing to audit"):
        seeded.night("--audit")
    seeded.night("--hours", 1e-9, replies=[])
    with pytest.raises(loop.Stop, match="holds no kept experiment, so there is nothing to audit"):
        seeded.night("--audit")


ONLY = "seed = int(os.environ['AUTORESEARCH_SEED'])\nwidth = 1000\nassert {}, 'unlucky'\n"


def brittle(condition):
    return block('seed = int(os.environ["AUTORESEARCH_SEED"])', ONLY.format(condition), "brittle")


@pytest.mark.slow
def test_an_audit_in_which_most_runs_fail_says_so(seeded):
    seeded.night("--experiments", 1, replies=[brittle("os.environ['AUTORESEARCH_SPLIT'] == 'val'")])
    with pytest.raises(loop.Stop, match="too many runs of the audit failed") as stop:
        seeded.night("--audit")
    assert stop.value.code == 1


@pytest.mark.slow
def test_an_audit_with_a_failed_run_reports_the_other_pairs(seeded):
    seeded.night("--experiments", 1, replies=[brittle(f"seed != {loop.AUDIT_SEEDS[1]}")])
    session = seeded.night("--audit")
    assert "AssertionError: unlucky" in session.output.getvalue()
    assert ", 4 " in session.audited[0] and "audited gain 0.0146" in session.audited[2]


def test_the_interval_of_the_audit_is_students():
    pairs = [(1.0, 0.99), (1.1, 1.07), (1.0, 0.98), (1.2, 1.18), (1.1, 1.08)]  # gains 0.01, 0.03, 0.02, ...
    rows = [
        loop.Row("1", 1.05, 1.0, "keep", "baseline", runs=[1.05]),
        loop.Row("2", 1.02, 1.0, "keep", "better", -0.03, 0.002, [1.02]),
    ]

    def report(pairs, sign=1):
        return " ".join(loop.audit_report(pairs, *rows, rows, sign))

    assert "baseline 1.0800, best 1.0600" in report(pairs)
    assert "audited gain 0.0200, 95 % interval 0.0112 to 0.0288" in report(pairs)  # 2.78 x 0.00707 / sqrt(5)
    assert "0.0300 by its rows, 0.0300 +- 0.0020 with luck taken off" in report(pairs)
    assert "to 0.0288: real, but less than the night's own figure" in report(pairs)
    assert "own figure " not in report([(b, a - 0.005) for b, a in pairs])
    assert "real" not in report(
        [(1, 0.967)] * 5
    )  # equal on all seeds, and 1.5 standard errors of the night's
    assert "1 experiment, 1 kept, 0 crashed" in report(pairs)
    assert "it is worse" in report([(a, b + 0.1) for a, b in pairs])
    assert "no gain at all" in report([(1.0, 1.1), (1.1, 1.0), (1, 1), (1, 1), (1, 1)])
    assert "audited gain 0.0200" in report([(b, a) for a, b in pairs], sign=-1)
    assert fmean(a - b for a, b in pairs) == pytest.approx(0.02)
