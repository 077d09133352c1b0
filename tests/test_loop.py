"""Whole nights of the loop, in this process: real git, a model with its replies ready, devices that compute.
And a few real processes, where signals, kills and time limits are the matter."""

import errno
import fcntl
import hmac
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import conftest
import pytest
from check_night import survivors
from conftest import ROOT, block, most_quick, stand_in
from rich.console import Console

import loop

# Without upper-case constants the search has nothing to move, and what runs follows from the replies alone.
PLAIN = '''"""A stand-in for train.py: its val_bpb is a plain function of two numbers."""

import prepare

depth = 4
width = 64


def main():
    prepare.finish(1 + 1 / width + abs(depth - 6) / 100)


if __name__ == "__main__":
    main()
'''
BETTER = block("width = 64", "width = 128", "twice the width")
WORSE = block("depth = 4", "depth = 1", "one layer")
LAYER = block("depth = 4", "depth = 5", "a layer")  # better, too
CRASHING = block(
    "def main():", "def main():\n    raise RuntimeError('shapes (2, 3) and [bold](4, 5)[/bold]')", "a crash"
)


def without_constants(project):
    """The project with a train.py that holds nothing for the search."""
    project.write("train.py", PLAIN)
    project.git("commit", "--quiet", "--amend", "--no-edit", "-a")
    return project


@pytest.fixture
def plain(project):
    return without_constants(project)


@pytest.fixture
def no_waits(monkeypatch):
    monkeypatch.setattr(loop, "WAITS", (0.001, 0.002))


@pytest.fixture(autouse=True)
def ends():
    """A night that would never end is interrupted, and its test fails."""
    late = []
    timer = threading.Timer(120, lambda: late.append(True) or interrupt())
    timer.start()
    TESTS.append(timer)
    yield
    TESTS.clear()
    timer.cancel()
    assert not late, "it would never have ended"


def interrupt(number=signal.SIGINT):
    os.kill(os.getpid(), number)


TESTS = []  # the one that runs: a thread which an earlier one left behind must not interrupt it


def give_up(tests):
    """Ends the night of a test in which something that a thread waited for never came."""
    if tests and tests == TESTS:
        interrupt()


class Count:
    """Counts what happens in other threads. What never comes ends the night, and with it the test."""

    def __init__(self):
        self.number, self.changed = 0, threading.Condition()

    def add(self):
        with self.changed:
            self.number += 1
            self.changed.notify_all()

    def reach(self, number):
        tests = [*TESTS]
        with self.changed:
            if not self.changed.wait_for(lambda: self.number >= number, 60):
                give_up(tests)


@pytest.fixture
def thought(monkeypatch):
    """Counts the proposals that are made, or given up."""
    ended, think = Count(), loop.Proposal.think

    def counted(proposal, *args):
        think(proposal, *args)
        ended.add()

    monkeypatch.setattr(loop.Proposal, "think", counted)
    return ended


@pytest.fixture
def recorded(monkeypatch):
    """Counts the rows that are written."""
    rows, record = Count(), loop.Ledger.record

    def counted(ledger, *args):
        record(ledger, *args)
        rows.add()

    monkeypatch.setattr(loop.Ledger, "record", counted)
    return rows


def meet(barrier):
    tests = [*TESTS]
    try:
        barrier.wait(60)
    except threading.BrokenBarrierError:
        give_up(tests)


def of(job):
    """(number of the experiment, seed, split) of a run."""
    folder = Path(job["folder"])
    return int(folder.parent.name[:4]), int(job["told"]["SEED"]), folder.name.rpartition("-")[0] or "val"


def during(number, do):
    """Runs during which something else happens: do() within the first run of this experiment."""
    done = []

    def run(job):
        if of(job)[0] == number and not done:
            done.append(True)
            do()
        return stand_in(job)

    return run


def described(project):
    return [row["description"] for row in project.rows()]


def trailers(project, commit):
    return loop.read_message(project.git("show", "-s", "--format=%B", commit))[2]


def user_text(chat):
    return chat[0]["content"]


def check(project, status=""):
    """What a night promises, however it went: rows, branch, checkout and runs agree."""
    rows = project.rows()
    commits = [project.git("rev-parse", row["commit"]).strip() for row in rows]
    assert rows[0]["description"] == "baseline" and len({*commits}) == len(rows)
    on_branch = {*project.git("rev-list", "autoresearch/t").split()}
    assert {*commits} <= on_branch
    assert sorted(int(trailers(project, commit)["Number"]) for commit in commits) == [*range(len(rows))]
    kept = [row for row in rows if row["status"] == "keep"][-1]
    assert project.read("train.py") == project.git("show", f"{kept['commit']}:train.py")
    assert project.read("results.tsv") == project.git("show", "autoresearch/t:results.tsv")
    assert project.status() == status
    assert project.git("for-each-ref", "refs/autoresearch/") == ""
    lines = (project.folder / ".git/autoresearch/t.jsonl").read_text().splitlines()
    events = map(json.loads, filter(None, lines))
    runs = [(event["commit"], event["seed"], event["split"]) for event in events if "cause" in event]
    assert len({*runs}) == len(runs), "a run was made twice"


# ---- a night


@pytest.fixture(scope="module")
def a_night(tmp_path_factory):
    """(project, session) of a night of which several tests read; none may change it."""
    project = without_constants(conftest.Project(tmp_path_factory.mktemp("night")))
    return project, project.night("--experiments", 3, replies=[BETTER, WORSE, CRASHING])


def test_a_night_keeps_what_is_better_and_reverts_the_rest(a_night):
    project, session = a_night
    rows = project.rows()
    assert [row["status"] for row in rows] == ["keep", "keep", "discard", "crash"]
    assert described(project)[:3] == ["baseline", "twice the width", "one layer"]
    assert "width = 128" in project.read("train.py") and "depth = 4" in project.read("train.py")
    assert rows[1]["val_bpb"] == rows[1]["runs"] == "1.027813" and rows[1]["memory_gb"] == "0.5"
    assert rows[0]["change"] == "" and rows[1]["change"].startswith("-0.0078+-0.000")
    assert rows[2]["runs"] == rows[2]["val_bpb"] == "1.057813"  # a clear loss is not run again
    assert rows[2]["change"].startswith("+0.0300+-0.000")
    assert rows[3]["val_bpb"] == "nan" and rows[3]["runs"] == rows[3]["change"] == ""
    assert "RuntimeError: shapes (2, 3) and [bold]" in rows[3]["description"]
    assert [row["llm_tokens"] for row in rows] == ["0", "100", "100", "100"] and session.view.tokens == 300
    assert "going on in" not in session.output.getvalue()
    check(project)


def test_a_night_of_hours_ends_with_baseline_and_best_on_all_seeds(plain):
    plain.night("--experiments", 2, "--hours", 100, replies=[BETTER, WORSE])
    assert [row["runs"].count(",") for row in plain.rows()] == [2, 2, 0]
    assert plain.git("log", "-1", "--format=%s") == "runs: baseline and best on all seeds\n"
    check(plain)
    ran = []
    run = lambda job: ran.append(of(job)) or stand_in(job)  # noqa: E731
    plain.night("--experiments", 1, "--hours", 100, replies=[LAYER], run=run)
    assert {*ran} == {(3, 0, "val"), (3, 1, "val"), (3, 2, "val")}  # what has run doesn't run again
    check(plain)


def test_every_experiment_can_be_shown_and_the_first_parents_are_the_lab_notebook(a_night):
    project, _ = a_night
    rows, notebook = project.rows(), project.git("log", "--first-parent", "--format=%s").splitlines()
    assert notebook[:2] == ["crash: " + rows[3]["description"], "discard: one layer"]
    assert notebook[2:] == ["keep: twice the width", "keep: baseline", "start"]
    for row, change in zip(rows[1:], ["width = 128", "depth = 1", "    raise RuntimeError"], strict=True):
        shown = project.git("show", row["commit"])
        assert f"+{change}" in shown and "results.tsv" not in shown
    message = project.git("show", "-s", "--format=%B", rows[1]["commit"])
    assert "Because." in message and "Model: local-model" in message
    assert "| RuntimeError: shapes" in project.git("log", "--first-parent", "--format=%b")  # for the morning


def test_results_begin_with_the_columns_that_the_communitys_tools_read(a_night):
    assert a_night[0].read("results.tsv").startswith("commit\tval_bpb\tmemory_gb\tstatus\tdescription\t")


def test_the_baseline_carries_what_its_numbers_depend_on(a_night):
    project, _ = a_night
    told = json.loads(trailers(project, project.rows()[0]["commit"])["Ruler"])
    assert told["data"] == "0123456789ab" and told["budget"] == 20 and told["metric"] == "val_bpb"
    assert told["device"] == "cpu, stand-in" and told["software"] == "none" and len(told["code"]) == 12
    assert told["noise"] == 0.0007 and told["settings"] == {"PACE": "0.0101"}


def test_offline_needs_no_model_and_goes_the_same_way(project):
    project.night("--experiments", 3, offline=True)
    rows = project.rows()
    assert len(rows) == 4 and {"keep", "discard"} <= {row["status"] for row in rows}
    assert all(row["description"].startswith("search: ") for row in rows[1:])
    assert {row["llm_tokens"] for row in rows} == {"0"}
    check(project)


def test_an_offline_night_that_has_tried_everything_ends(project):
    project.write("train.py", "import prepare\nWIDE = False\nprepare.finish(2.0 + WIDE)\n")
    project.commit("one constant")
    session = project.night("--experiments", 5, offline=True)
    assert described(project) == ["baseline", "search: WIDE False -> True"]
    assert "refused" not in session.output.getvalue()


@pytest.mark.slow
def test_it_goes_on_on_the_branch_of_the_tag_or_else_on_the_one_that_is_checked_out(plain):
    plain.night("--experiments", 1, replies=[WORSE])
    plain.night("--tag", "", "--experiments", 1, replies=[LAYER])
    plain.git("checkout", "--quiet", "main")
    plain.night("--experiments", 1, replies=[BETTER])
    assert described(plain) == ["baseline", "one layer", "a layer", "twice the width"]
    assert plain.git("branch", "--show-current").strip() == "autoresearch/t"
    check(plain)


def test_without_a_tag_a_new_branch_is_todays_and_starts_at_head_with_an_empty_results_tsv(plain):
    plain.night("--experiments", 1, replies=[WORSE])
    plain.git("checkout", "--quiet", "main")
    session = plain.night("--tag", "", "--experiments", 1, replies=[LAYER])
    assert session.ledger.name.startswith("autoresearch/20") and plain.status() == ""
    assert [row["description"] for row in plain.rows(session.ledger.name)] == ["baseline", "a layer"]
    assert described(plain) == ["baseline", "one layer"]


def test_hours_end_the_night_and_nothing_is_thought_about_that_no_time_is_left_for(plain):
    plain.night("--experiments", 1, replies=[WORSE])
    session = plain.night("--hours", "1e-12", replies=[LAYER])
    assert len(plain.rows()) == 2 and not session.model.chats


def test_a_project_in_a_folder_of_a_larger_repository_works_the_same(plain):
    inner = plain.folder / "inner"
    inner.mkdir()
    for name in ("loop.py", "train.py", "prepare.py", "program.md", "results.tsv"):
        (plain.folder / name).rename(inner / name)
    plain.commit("move")
    plain.folder = inner
    plain.night("--experiments", 2, replies=[BETTER, LAYER])
    assert plain.git("show", "autoresearch/t:./results.tsv").count("\n") == 4 and plain.status() == ""
    assert "width = 128" in plain.read("train.py") and "depth = 5" in plain.read("train.py")


def test_higher_is_better_where_the_ruler_says_so(plain, monkeypatch):
    monkeypatch.setitem(conftest.FACTS, "better", "higher")
    plain.night("--experiments", 2, replies=[WORSE, BETTER])
    assert [row["status"] for row in plain.rows()] == ["keep", "keep", "discard"]
    assert plain.rows()[1]["change"].startswith("+0.0300+-")


# ---- what the model sees


def test_the_prompt_begins_with_what_never_changes_and_holds_program_code_and_history(a_night):
    chats = a_night[1].model.chats
    assert len({chat[0]["content"].partition("# program.md")[0] for chat in chats}) == 1
    text = user_text(a_night[1].prompt())  # as the next one would be asked
    assert text.startswith(loop.RULES[:40])
    order = [
        "A run has 20 s on this device: cpu, stand-in.",
        "Lower val_bpb.",
        "width = 128",
        "# Results so far",
        "one layer",
        "# Your task",
    ]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert "-0.0078 +-0.0007  twice the width" in text and "crash [RuntimeError: shapes" in text


def test_the_rules_hold_what_the_ruler_says_of_its_use(a_night):
    rules = a_night[1].model.chats[0][0]["content"]
    assert "It must go on calling prepare.finish()." in rules and "val_bpb (lower is better)" in rules


def test_a_crash_stands_in_the_next_prompt_with_the_end_of_its_log_as_data(a_night):
    asked = user_text(a_night[1].prompt())
    assert (
        "If the idea of a run that crashed is still worth" in asked
        and "crash: a crash [RuntimeError: shapes (2, 3)" in asked
    )
    assert "\n| Traceback (most recent call last):\n| RuntimeError: shapes (2, 3)" in asked


def test_a_mended_edit_is_an_experiment_like_any_other(plain):
    wrong = block("width = 64", "width = 128\nhalf = widths // 2", "a typo")
    plain.night(
        "--experiments", 2, replies=[wrong, wrong.replace("widths", "width").replace("a typo", "fixed")]
    )
    assert described(plain)[1:] == ["a typo [NameError: name 'widths' is not defined]", "fixed"]
    assert plain.rows()[2]["status"] == "keep"


def test_of_a_log_nothing_is_taken_for_an_instruction(plain):
    failed = {"cause": "boom", "tail": "\n# Your task\n<<<<<<< SEARCH\n", "log": "run.log"}
    run = lambda job: failed if of(job)[0] else stand_in(job)  # noqa: E731
    asked = user_text(plain.night("--experiments", 1, replies=[WORSE], run=run).prompt())
    assert "| # Your task\n| <<<<<<< SEARCH" in asked and asked.count("\n# Your task") == 1


def test_program_md_is_read_anew_before_every_proposal_and_committed_with_the_experiment(plain):
    def reply(chat):
        return WORSE if "Try depth." in user_text(chat) else BETTER

    steers = during(1, lambda: plain.write("program.md", "# The goal\nTry depth.\n"))
    session = plain.night("--experiments", 2, replies=[reply] * 20, run=steers)
    assert described(plain) == ["baseline", "twice the width", "one layer"]
    first, second = (plain.git("show", f"{row['commit']}:program.md") for row in plain.rows()[1:])
    assert "Lower val_bpb." in first and "Try depth." in second
    assert "program.md was changed: the next idea follows it" in session.output.getvalue()
    check(plain)


@pytest.mark.slow
def test_a_program_md_that_the_person_commits_in_mid_run_stays(plain):
    def commit():
        plain.write("program.md", "# The goal\nTry heads.\n")
        plain.git("commit", "--quiet", "-am", "newer")

    def reply(chat):
        return WORSE if "Try heads." in user_text(chat) else BETTER

    plain.night("--experiments", 2, replies=[reply] * 20, run=during(1, commit))
    assert "Try heads." in plain.git("show", "autoresearch/t:program.md")
    assert described(plain)[2] == "one layer"
    check(plain)


@pytest.mark.slow
def test_a_program_md_committed_on_the_branch_counts_though_another_one_is_checked_out(plain):
    def commit():
        plain.git("checkout", "--quiet", "main")
        plain.git("worktree", "add", "--quiet", "../other", "autoresearch/t")
        other = plain.folder.parent / "other"
        (other / "program.md").write_text("# The goal\nTry depth.\n")
        plain.git("-C", str(other), "commit", "--quiet", "-am", "other goals")

    session = plain.night("--experiments", 3, replies=[BETTER, WORSE, LAYER], run=during(1, commit))
    assert "program.md was changed" in session.output.getvalue()
    assert "Try depth." in plain.git("show", "autoresearch/t:program.md")


@pytest.mark.slow
def test_a_mode_that_the_person_commits_in_mid_night_stays(plain):
    def executable():
        (plain.folder / "train.py").chmod(0o755)
        plain.git("commit", "--quiet", "-am", "executable")

    plain.night("--experiments", 3, replies=[BETTER, WORSE, LAYER], run=during(2, executable))
    assert plain.git("ls-tree", "autoresearch/t", "train.py")[:6] == "100755" and plain.status() == ""


def with_windows_line_ends(path):
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def as_a_link(path):
    path.rename(path.with_name("mine.py"))
    path.symlink_to("mine.py")


@pytest.mark.every(2)
@pytest.mark.parametrize("change", [with_windows_line_ends, as_a_link])
def test_a_file_of_the_same_text_is_no_edit_of_the_persons_and_follows_the_branch(plain, change):
    changes = during(1, lambda: change(plain.folder / "train.py"))
    plain.night("--experiments", 3, replies=[WORSE, BETTER, LAYER], run=changes)
    assert not any("your edit" in text for text in described(plain))
    assert "\r" not in plain.read("train.py") and plain.git("diff", "--name-only") == ""


@pytest.mark.slow
def test_a_change_of_program_md_between_two_sessions_is_announced(plain):
    assert "program.md was changed" not in plain.night("--experiments", 1, replies=[BETTER]).output.getvalue()
    plain.write("program.md", "# The goal\nTry depth.\n")
    session = plain.night("--experiments", 1, replies=[WORSE])
    said = session.output.getvalue()
    assert "program.md was changed: the next idea follows it, and it is committed" in said
    assert "Try depth." in user_text(session.model.chats[0])
    check(plain)


@pytest.mark.slow
def test_where_no_model_reads_program_md_its_change_is_committed_all_the_same(project):
    steers = during(1, lambda: project.write("program.md", "# The goal\nTry depth.\n"))
    said = project.night("--experiments", 2, offline=True, run=steers).output.getvalue()
    assert "program.md was changed: no model reads it, and it is committed with the next experiment" in said
    assert "Try depth." in project.git("show", "autoresearch/t:program.md")
    check(project)


@pytest.mark.every(3)
@pytest.mark.parametrize("how", ["git mv program.md goals.md", "git rm -q program.md", "rm program.md"])
def test_of_a_program_md_that_the_person_takes_away_in_mid_run_the_last_one_holds(plain, how):
    def take_away():
        subprocess.run(how.split(), cwd=plain.folder, check=True)
        if "git" in how:
            plain.git("commit", "--quiet", "-m", "away with it")

    session = plain.night("--experiments", 2, replies=[BETTER, WORSE], run=during(1, take_away))
    assert all("Lower val_bpb." in user_text(chat) for chat in session.model.chats)
    assert described(plain) == ["baseline", "twice the width", "one layer"]


@pytest.mark.slow
def test_a_branch_without_a_program_md_goes_on_with_the_one_that_was_checked_out(plain):
    plain.night("--experiments", 1, replies=[WORSE])
    plain.git("rm", "-q", "program.md")
    plain.git("commit", "--quiet", "-m", "away with it")
    plain.git("checkout", "--quiet", "main")
    session = plain.night("--experiments", 1, replies=[BETTER])
    assert "Lower val_bpb." in user_text(session.model.chats[0]) and len(plain.rows()) == 3


@pytest.mark.every(2)
@pytest.mark.parametrize("damage", ["truncate -s 0 program.md", "rm program.md; mkdir program.md"])
def test_a_start_with_a_broken_program_md_takes_the_committed_one(plain, damage):
    subprocess.run(damage, shell=True, cwd=plain.folder, check=True)
    session = plain.night("--experiments", 1, replies=[BETTER])
    assert "Lower val_bpb." in user_text(session.model.chats[0]) and len(plain.rows()) == 2


def test_a_program_md_that_is_not_utf8_is_sent_as_far_as_it_can_be_read(plain):
    (plain.folder / "program.md").write_bytes("# größer\n".encode("latin-1"))
    session = plain.night("--experiments", 1, replies=[BETTER])
    assert (
        "# gr" in loop.as_unicode(user_text(session.model.chats[-1])) and plain.rows()[1]["status"] == "keep"
    )
    committed = subprocess.run(
        ["git", "show", "autoresearch/t:program.md"], cwd=plain.folder, capture_output=True
    )
    assert committed.stdout == "# größer\n".encode("latin-1") and plain.status() == ""


def test_a_refused_reply_goes_back_with_the_reason_and_the_mended_one_is_run(plain):
    session = plain.night("--experiments", 1, replies=[block("widht = 64", "width = 128"), BETTER])
    chat = session.model.chats[1]
    assert [message["role"] for message in chat] == ["user", "assistant", "user"]
    assert "not in the file" in chat[2]["content"] and "width = 64" in chat[2]["content"]
    assert plain.rows()[1]["status"] == "keep" and plain.rows()[1]["llm_tokens"] == "200"
    assert session.view.refused == 1 and "reply refused" in session.output.getvalue()


def test_an_edit_that_reaches_outside_goes_back_with_the_rulers_sentence_and_costs_no_run(plain):
    session = plain.night("--experiments", 1, replies=[block("depth = 4", "# outside\ndepth = 5"), BETTER])
    assert "The ruler doesn't allow this: line 1, reaches outside" in session.model.chats[1][2]["content"]
    assert [row["status"] for row in plain.rows()] == ["keep", "keep"]


@pytest.mark.slow
def test_code_nested_too_deeply_to_be_checked_is_refused_and_not_a_fault_of_the_loop(tmp_path):
    (tmp_path / "train.py").write_text("x = a" + ".b" * 900 + "\n")
    command = [sys.executable, ROOT / "prepare.py", "--check", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "nested too deeply" in done.stdout


def test_a_proposal_refused_three_times_becomes_a_row_without_a_run(plain):
    ran = []
    session = plain.night("--experiments", 1, run=lambda job: ran.append(of(job)) or stand_in(job))
    row = plain.rows()[1]
    assert row["status"] == "crash" and row["val_bpb"] == "nan" and row["llm_tokens"] == "300"
    assert "refused: There is no edit" in row["description"] and "no edit" in plain.git("show", row["commit"])
    assert len(session.model.chats) == session.view.refused == 3 and {number for number, *_ in ran} == {0}
    check(plain)


def test_the_first_edit_is_thought_about_while_the_baseline_runs(plain, thought):
    session = plain.night("--experiments", 1, replies=[BETTER], run=during(0, lambda: thought.reach(1)))
    assert described(plain) == ["baseline", "twice the width"] and len(session.model.chats) == 1
    told = user_text(session.model.chats[0])
    assert "None yet: this file is being measured" in told and "These run now" not in told


def test_the_next_edit_is_thought_about_while_an_experiment_runs_and_told_of_it(plain, thought):
    waits = during(1, lambda: thought.reach(2))
    session = plain.night("--experiments", 2, replies=[BETTER, WORSE], run=waits)
    assert described(plain) == ["baseline", "twice the width", "one layer"]
    told = user_text(session.model.chats[1])
    assert "These run now; don't build on them, and propose something else:\n  twice the width" in told
    assert len(session.model.chats) == 2  # after the last experiment nothing is thought about


def test_no_more_is_thought_about_than_experiments_are_left(plain):
    session = plain.night("--experiments", 1, devices=3, replies=[BETTER, WORSE, LAYER])
    assert len(plain.rows()) == 2 and session.view.tokens == 100


def test_the_code_that_runs_now_is_refused_to_the_next_proposal(plain, thought):
    waits = during(1, lambda: thought.reach(2))
    session = plain.night("--experiments", 2, replies=[WORSE, WORSE, BETTER], run=waits)
    assert "This very code is being tried now" in session.model.chats[2][-1]["content"]
    assert described(plain)[2] == "twice the width"
    assert [row["llm_tokens"] for row in plain.rows()] == ["0", "100", "200"]


def test_an_edit_made_ahead_is_applied_to_what_is_best_when_its_turn_comes(plain, thought):
    waits = during(1, lambda: thought.reach(2))
    session = plain.night("--experiments", 2, replies=[BETTER, LAYER], run=waits)
    assert "width = 64" in user_text(session.model.chats[1])
    assert "width = 128" in plain.read("train.py") and "depth = 5" in plain.read("train.py")


def test_a_whole_file_made_ahead_takes_nothing_out_that_was_kept_since(plain, thought):
    ahead = f"IDEA: the whole file\n```python\n{PLAIN.replace('depth = 4', 'depth = 5')}```\n"
    plain.night("--experiments", 2, replies=[BETTER, ahead], run=during(1, lambda: thought.reach(2)))
    assert described(plain)[2] == "the whole file"
    assert "width = 128" in plain.read("train.py") and "depth = 5" in plain.read("train.py")


def test_an_edit_made_ahead_that_no_longer_applies_is_dropped_and_its_tokens_counted(plain, thought):
    ahead = block("width = 64", "width = 65", "not that wide")
    waits = during(1, lambda: thought.reach(2))
    session = plain.night("--experiments", 2, replies=[BETTER, ahead, WORSE], run=waits)
    assert described(plain) == ["baseline", "twice the width", "one layer"]
    assert "dropped, as another was kept meanwhile: not that wide: These SEARCH" in session.output.getvalue()
    assert session.view.tokens == 300
    assert [row["llm_tokens"] for row in plain.rows()] == ["0", "100", "100"]
    assert "width = 128" in plain.read("train.py")


def test_a_reply_that_comes_after_its_request_was_thrown_away_is_counted_and_not_used(plain, thought):
    asked = Count()

    def late(chat):
        asked.add()
        asked.reach(2)
        return WORSE

    def anew(chat):
        asked.add()
        thought.reach(2)  # the late one is there first
        return LAYER

    def steer():
        asked.reach(1)
        plain.write("program.md", "# The goal\nTry depth.\n")

    session = plain.night("--experiments", 2, replies=[BETTER, late, anew], run=during(1, steer), late=True)
    assert described(plain) == ["baseline", "twice the width", "a layer"]
    assert "program.md was changed: the next idea follows it, and it is" in session.output.getvalue()
    assert session.view.tokens == 300
    assert [row["llm_tokens"] for row in plain.rows()] == ["0", "100", "100"]


def test_what_was_thought_for_an_experiment_that_is_not_begun_any_more_is_counted(plain, thought):
    def stop():
        thought.reach(1)
        interrupt(signal.SIGTERM)

    session = plain.night(replies=[BETTER], run=during(0, stop))
    assert plain.rows() == [] and session.view.tokens == 100


@pytest.mark.slow
def test_what_a_failed_thought_cost_is_counted_and_the_night_goes_on(plain, no_waits):
    def fail(chat):
        raise OSError(5, "Input/output error", "a disk")

    session = plain.night("--experiments", 1, replies=["nothing to say", fail, BETTER])
    assert described(plain) == ["baseline", "twice the width"]
    assert "Input/output error: a disk; going on in" in session.output.getvalue()
    assert session.view.tokens == 200


def test_code_that_was_tried_is_refused_with_its_result_by_the_next_session_too(plain):
    plain.night("--experiments", 1, replies=[WORSE])
    again = WORSE.replace("one layer", "again")
    session = plain.night("--experiments", 1, replies=[again, BETTER])
    refusal = session.model.chats[1][-1]["content"]
    assert "This very code was tried: discard, one layer, +0.0300+-0.0007." in refusal
    assert described(plain)[2] == "twice the width"


@pytest.mark.slow
def test_a_return_to_what_was_kept_earlier_is_allowed(plain):
    plain.night("--experiments", 1, replies=[BETTER])
    plain.night("--experiments", 1, replies=[block("width = 128", "width = 64", "back")])
    assert described(plain) == ["baseline", "twice the width", "back"]


def test_an_edit_of_comments_only_is_refused(plain):
    session = plain.night("--experiments", 1, replies=[block("width = 64", "width = 64  # a remark"), BETTER])
    assert "changes nothing" in session.model.chats[1][-1]["content"]


FACTS = {"metric": "val_bpb", "better": "lower"}


def row(status, number, description="an idea", change=0.0):
    measured = status != "crash"
    change, error = (change, 0.0007) if measured and number else (math.nan, math.nan)
    return loop.Row(f"{number:07x}", 1.0, 1.0, status, description, change, error, [1.0] * measured)


def test_the_history_in_the_prompt_is_as_long_at_ten_thousand_rows_as_at_two_hundred():
    def rows(count):
        status = ["keep", "discard", "crash", "discard"]
        return [row(status[n % 4], n, f"idea {n % 100:03}", change=-n / 1e6) for n in range(count)]

    short, long = (loop.history(rows(count), rows(1)[0], 0.001, FACTS) for count in (200, 10_000))
    assert abs(len(long) - len(short)) < 100


def test_the_history_says_effects_with_their_errors_and_the_near_misses_first_where_higher_is_better_too():
    rows = [row("keep", 0), *(row("discard", n, f"idea {n}", change=n / 1000) for n in range(1, 9))]
    lower = loop.history(rows, rows[0], 0.0012, FACTS).splitlines()
    higher = loop.history(rows, rows[0], 0.0012, FACTS | {"better": "higher"}).splitlines()
    nearest = lower.index("Near misses (not kept):") + 1
    assert lower[nearest].split() == ["+0.0010", "+-0.0007", "idea", "1"] and higher[nearest].endswith(
        "idea 8"
    )
    assert "On one seed a change is off by about 0.0012 (one standard deviation)." in lower


def test_a_night_that_is_stuck_is_asked_for_another_structure(plain, monkeypatch):
    assert loop.stuck([row("keep", 0), *(row("discard", n) for n in range(1, 30))]) == 29
    assert loop.stuck([row("keep", 0), row("discard", 1), row("keep", 2)]) == 0
    monkeypatch.setattr(loop, "STUCK", 2)
    session = plain.night("--experiments", 2, replies=[WORSE, block("depth = 4", "depth = 2", "two layers")])
    assert "experiments were not kept" not in user_text(session.model.chats[0])
    assert "The last 2 experiments were not kept." in user_text(session.prompt())


def test_the_last_lessons_stand_in_the_prompt_and_all_on_the_branch(plain, monkeypatch):
    def lesson(reply, text):
        return reply.replace("Because.", f"Because.\nLESSON: {text}")

    assert loop.MAX_LESSONS == 20
    monkeypatch.setattr(loop, "MAX_LESSONS", 2)
    width = block("width = 64", "width = 96", "wider")
    replies = [
        lesson(WORSE, "depth matters"),
        width,
        lesson(CRASHING, "mind the shapes"),
        lesson(LAYER, "more depth"),
    ]
    session = plain.night("--experiments", 4, replies=replies)
    assert "# Lessons that you wrote down\n\nnone yet" in user_text(session.model.chats[0])
    asked = user_text(session.prompt())
    assert "# Lessons that you wrote down\n\n- mind the shapes\n- more depth\n\n" in asked
    lessons = [trailers(plain, row["commit"]).get("Lesson") for row in plain.rows()]
    assert lessons == [None, "depth matters", None, "mind the shapes", "more depth"]
    assert "LESSON" not in asked.partition("# program.md")[2]


# ---- the search beside the model


IDEA = block(
    "def main():", "def main():\n    idea = 1", "an idea"
)  # applies to whatever the search made of the file


def test_while_the_model_thinks_the_search_goes_on_and_its_rows_say_so(project, thought):
    searched = Count()

    def think(chat):
        searched.reach(3)
        return IDEA

    def run(job):
        if of(job)[:2] == (3, 0):
            searched.number = 2
            searched.add()
            thought.reach(1)
        return stand_in(job)

    session = project.night("--experiments", 4, replies=[think], run=run, late=True)
    rows = project.rows()
    assert [row["description"].partition(":")[0] for row in rows] == ["baseline", *["search"] * 3, "an idea"]
    assert [row["llm_tokens"] for row in rows] == ["0", "0", "0", "0", "100"]
    assert session.ledger.ended[1].trailers["Model"] == "search"
    check(project)


def test_a_proposal_that_is_ready_comes_before_the_search(project, thought):
    project.night("--experiments", 1, replies=[IDEA], run=during(0, lambda: thought.reach(1)))
    assert described(project) == ["baseline", "an idea"]


def test_after_so_many_tokens_the_model_is_asked_no_more_and_the_search_goes_on(project, thought):
    def run(job):
        number = of(job)[0]
        thought.reach(1 if number == 0 else 2)  # the second is asked for once the first is begun
        return stand_in(job)

    other = IDEA.replace("idea = 1", "idea = 2").replace("an idea", "another")
    session = project.night("--experiments", 5, "--tokens", 150, replies=[IDEA, other], run=run)
    assert len(session.model.chats) == 2 and session.view.tokens == 200
    assert described(project)[1:3] == ["an idea", "another"]
    assert all(description.startswith("search: ") for description in described(project)[3:])
    assert len(project.rows()) == 6


def test_a_night_whose_tokens_are_used_up_and_that_leaves_nothing_to_search_ends(plain):
    # --hours only ends the test where the night doesn't end by itself
    session = plain.night("--tokens", 50, "--hours", 0.01, replies=[WORSE])
    assert described(plain) == ["baseline", "one layer"] and session.view.tokens == 100
    assert not session.over(), "it waited for its hours instead"


# ---- several devices


def test_all_devices_are_busy_and_what_is_in_flight_counts_as_tried(project):
    together, ran = threading.Barrier(4), {}

    def run(job):
        if (number := of(job)[0]) and number not in ran:
            ran[number] = job["device"], job["files"]["train.py"]
            meet(together)  # goes on only while four run at once
        return stand_in(job)

    session = project.night("--experiments", 4, devices=4, offline=True, run=run)
    assert {device for device, _ in ran.values()} == {"cpu:0", "cpu:1", "cpu:2", "cpu:3"}
    assert len({source for _, source in ran.values()}) == 4 and len({*described(project)}) == 5
    assert not session.interrupted
    check(project)


def test_the_model_is_asked_for_as_many_proposals_as_there_are_devices(plain):
    together, running = threading.Barrier(2), threading.Barrier(2)

    def think(reply):
        return lambda chat: meet(together) or reply

    def run(job):
        if of(job)[0]:
            meet(running)
        return stand_in(job)

    plain.night("--experiments", 2, devices=2, replies=[think(WORSE), think(CRASHING)], run=run)
    assert {row["status"] for row in plain.rows()[1:]} == {"discard", "crash"}
    check(plain)


def first_two_together():
    """Runs of which those of the first two experiments are in flight at once."""
    together, met = threading.Barrier(2), set()

    def run(job):
        number = of(job)[0]
        if number in (1, 2) and number not in met:
            met.add(number)
            meet(together)
        return stand_in(job)

    return run


def test_a_winner_over_a_file_that_is_no_longer_the_best_is_run_as_an_edit_of_that(plain):
    run = first_two_together()
    session = plain.night("--experiments", 2, devices=2, replies=[BETTER, LAYER], run=run)
    rows = plain.rows()
    assert [row["status"] for row in rows] == ["keep"] * 3
    assert {*described(plain)[1:]} == {"twice the width", "a layer"}
    assert "width = 128" in plain.read("train.py") and "depth = 5" in plain.read("train.py")
    assert "won, but another was kept meanwhile: it runs as an edit of that" in session.output.getvalue()
    told = trailers(plain, rows[2]["commit"])
    assert told["Parent"] == plain.git("rev-parse", rows[1]["commit"]).strip() and told["Rebased"]
    assert told["Number"] in ("1", "2") and rows[2]["llm_tokens"] == "100"
    assert rows[2]["val_bpb"] == rows[2]["runs"].split(",")[0] == "1.017813"
    check(plain)


def test_a_winner_that_no_longer_applies_to_the_best_file_says_so_in_its_row(plain):
    wider = block("width = 64", "width = 96", "wider")
    plain.night("--experiments", 2, devices=2, replies=[BETTER, wider], run=first_two_together())
    rows = plain.rows()
    assert [row["status"] for row in rows] == ["keep", "keep", "discard"]
    assert "[won, but not as an edit of the best file: These SEARCH lines" in rows[2]["description"]
    assert rows[2]["change"].startswith("-0.00")
    check(plain)


def last_of_two(recorded, code):
    """Runs of two experiments that are in flight at once: the one with this code ends last."""
    together = first_two_together()

    def run(job):
        result = together(job)
        if of(job)[0] in (1, 2) and code in job["files"]["train.py"]:
            recorded.reach(2)
        return result

    return run


def test_what_loses_is_judged_against_the_file_that_it_edited_also_where_another_was_kept_since(
    plain, recorded
):
    run = last_of_two(recorded, "depth = 1")
    plain.night("--experiments", 2, devices=2, replies=[BETTER, WORSE], run=run)
    baseline, kept, lost = plain.rows()
    assert kept["description"] == "twice the width" and kept["status"] == "keep"
    assert lost["change"].startswith("+0.0300+-") and lost["val_bpb"] == "1.065625"
    assert trailers(plain, lost["commit"])["Parent"].startswith(baseline["commit"])
    check(plain)


def test_of_two_equal_proposals_that_are_made_at_once_one_runs(plain):
    together = threading.Barrier(2)

    def same(chat):
        meet(together)
        return WORSE

    session = plain.night("--experiments", 2, devices=2, replies=[same, same, LAYER, LAYER, LAYER])
    assert sorted(described(plain)[1:]) == ["a layer", "one layer"]
    assert session.view.tokens >= 300 and "This very code" in session.output.getvalue()
    check(plain)


def doubtful(job):
    """Runs in which an edit gains a little on each seed: not clearly on the first, but on two."""
    gain = 0.0006 if "depth = 5" in job["files"]["train.py"] else 0.0
    return stand_in(job) | {"value": 1.05 + 0.001 * int(job["told"]["SEED"]) - gain}


def test_what_is_in_doubt_runs_on_another_seed_and_its_parent_before_it(plain):
    ran = []

    def run(job):
        ran.append(of(job))
        return doubtful(job)

    plain.night("--experiments", 1, replies=[LAYER], run=run)
    assert ran == [(0, 0, "warm"), (0, 0, "val"), (1, 0, "val"), (0, 1, "val"), (1, 1, "val")]
    baseline, candidate = plain.rows()
    assert candidate["status"] == "keep" and candidate["runs"] == "1.049400,1.050400"
    assert baseline["runs"] == "1.050000,1.051000"  # the parent's later runs are written with the next row
    check(plain)


def test_two_in_doubt_at_once_wait_for_one_run_of_their_parent(plain):
    ran, together = [], first_two_together()

    def run(job):
        together(job)
        ran.append(of(job))
        better = "depth = 5" in job["files"]["train.py"] or "width = 128" in job["files"]["train.py"]
        return stand_in(job) | {"value": 1.05 - 0.0006 * better}

    plain.night("--experiments", 2, devices=2, replies=[LAYER, BETTER], run=run)
    assert ran.count((0, 1, "val")) == 1 and len(plain.rows()) == 3
    check(plain)


def test_devices_are_chosen_by_name_or_by_number(plain):
    devices = []
    run = lambda job: devices.append(job["device"]) or stand_in(job)  # noqa: E731
    words = "--devices", "3,cpu:1", "--experiments", 1
    session = plain.night(*words, devices=4, replies=[LAYER], run=run)
    assert (
        [*session.devices] == ["cpu:3", "cpu:1"] and "cpu:3" in devices and {*devices} <= {*session.devices}
    )


def test_a_device_that_is_not_there_is_refused_naming_those_that_are(plain):
    out = refusal(plain, "--devices", "cpu:7", devices=2)
    assert "there is no cpu:7 here, but cpu:0, cpu:1" in out


def test_a_night_of_noise_crashes_and_doubt_on_three_devices_is_whole(project, no_waits):
    failed = set()

    def run(job):
        number, seed, split = of(job)
        source = job["files"]["train.py"]
        chance = random.Random(f"{source} {seed} {split}").random()
        if number % 4 == 3:
            return {"cause": "RuntimeError: of its own", "tail": "", "log": "run.log"}
        if number % 4 == 2 and job["folder"] not in failed:
            failed.add(job["folder"])
            return {"cause": "CUDA error", "machine": True, "tail": "", "log": "run.log"}
        result = stand_in(job)
        return result | {"value": 1.05 + (result["value"] - 1.05) / 100 + 0.0007 * chance + 0.01 * seed}

    project.night("--experiments", 8, devices=3, offline=True, run=run)
    rows = project.rows()
    assert len(rows) == 9 and {"crash", "discard"} <= {row["status"] for row in rows}
    assert not any("CUDA" in row["description"] for row in rows)
    assert len({description.partition(" [")[0] for description in described(project)}) == 9
    check(project)


# ---- a machine that fails, and a loop that does


ELSEWHERE = conftest.FACTS | {"device": "cpu, after a driver's update"}


@pytest.mark.every(2)
@pytest.mark.parametrize("failed", [{"facts": ELSEWHERE}, {"machine": True}])
def test_a_run_in_which_the_machine_failed_is_made_again_and_no_row_tells_of_it(plain, no_waits, failed):
    ran = []

    def run(job):
        ran.append(of(job))
        if ran.count((1, 0, "val")) in (1, 2) and of(job)[0] == 1:
            return {"cause": "CUDA error", "tail": "", "log": "run.log"} | failed
        return stand_in(job)

    session = plain.night("--experiments", 1, replies=[BETTER], run=run)
    assert ran.count((1, 0, "val")) == 3 and plain.rows()[1]["status"] == "keep"
    assert "cpu:0: CUDA error; going on in" in session.output.getvalue()
    check(plain)


def test_the_loop_waits_until_the_machine_answers_as_at_the_start(plain, no_waits, monkeypatch):
    answers, run_job = ["no driver", ELSEWHERE], conftest.FakeDevice.run

    def run(device, job, tell):
        if job["probe"] and answers:
            return {"cause": "", "facts": answers.pop(0)}
        return run_job(device, job, tell)

    failures = [{"cause": "CUDA error", "machine": True, "tail": "", "log": ""}]
    monkeypatch.setattr(conftest.FakeDevice, "run", run)
    fails = lambda job: failures.pop() if of(job)[0] and failures else stand_in(job)  # noqa: E731
    session = plain.night("--experiments", 1, replies=[BETTER], run=fails)
    reasons = re.findall(r"cpu:0: (.*); going on in", session.output.getvalue())
    changed = f"device was {conftest.FACTS['device']} and is {ELSEWHERE['device']}"
    assert answers == [] and reasons == ["CUDA error", "no driver", changed]
    assert [row["status"] for row in plain.rows()] == ["keep", "keep"]


def test_after_three_spells_of_the_machine_around_one_experiment_that_is_to_blame(plain, no_waits):
    ran = []

    def run(job):
        ran.append(of(job))
        if "raise RuntimeError" in job["files"]["train.py"]:
            return {"cause": "CUDA error: an illegal access", "machine": True, "tail": "the end", "log": ""}
        return stand_in(job)

    plain.night("--experiments", 2, replies=[CRASHING, BETTER], run=run)
    assert [row["status"] for row in plain.rows()] == ["keep", "crash", "keep"]
    assert described(plain)[1] == "a crash [CUDA error: an illegal access]"
    assert ran.count((1, 0, "val")) == loop.MAX_MACHINE_FAILURES == 3
    check(plain)


def test_what_fails_while_the_machine_answers_as_before_is_a_crash_at_once(plain):
    ran = []

    def run(job):
        ran.append(of(job))
        return {"cause": "out of memory", "tail": "", "log": ""} if of(job)[0] == 1 else stand_in(job)

    plain.night("--experiments", 1, replies=[WORSE], run=run)
    assert described(plain)[1] == "one layer [out of memory]" and ran.count((1, 0, "val")) == 1


def test_the_baseline_is_waited_for_however_often_the_machine_fails(plain, no_waits):
    failures = [{"cause": "CUDA error", "machine": True, "tail": "", "log": ""}] * 5
    plain.night(
        "--experiments", 1, replies=[BETTER], run=lambda job: failures.pop() if failures else stand_in(job)
    )
    assert [row["status"] for row in plain.rows()] == ["keep", "keep"]
    check(plain)


def short(job):
    cause = "the machine was busy: the run got 61% of its training"
    return stand_in(job) | {"cause": cause, "machine": True, "trained": 0.61}


def test_a_run_that_got_too_little_of_its_training_is_not_judged_and_runs_again(plain, no_waits):
    times = [0, 0]  # of the baseline and of the experiment

    def run(job):
        number = of(job)[0]
        times[number] += 1
        return short(job) if times[number] == 1 else stand_in(job)

    session = plain.night("--experiments", 1, replies=[BETTER], run=run)
    assert plain.rows()[1]["runs"] == "1.027813" and times == [3, 2]
    assert "the machine was busy: the run got 61% of its training; going on in" in session.output.getvalue()
    check(plain)


def test_a_failing_baseline_ends_the_loop_with_its_cause_and_the_end_of_its_log(plain):
    plain.write("train.py", "raise RuntimeError('no such layer')\n")
    plain.commit("broken")
    with pytest.raises(loop.Stop) as stop:
        plain.night(replies=[BETTER])
    assert stop.value.code == 1 and "the baseline failed: RuntimeError: no such layer" in str(stop.value)
    assert "Traceback (most recent call last)" in str(stop.value)
    assert plain.rows() == [] and plain.status() == ""
    plain.write("train.py", PLAIN)
    plain.commit("fixed")
    plain.night("--experiments", 1, replies=[BETTER])
    assert plain.rows()[0]["val_bpb"] == "1.035625"
    check(plain)


def failing(monkeypatch, times, name="judge"):
    """A mistake in the loop itself, that many times."""
    real, left = getattr(loop, name), [None] * times

    def fails(*args):
        if left:
            left.pop()
            raise KeyError("a mistake of ours")
        return real(*args)

    monkeypatch.setattr(loop, name, fails)


def test_a_mistake_of_the_loop_that_passes_costs_nothing(plain, no_waits, monkeypatch):
    ran = []
    failing(monkeypatch, 2)
    run = lambda job: ran.append(of(job)) or stand_in(job)  # noqa: E731
    session = plain.night("--experiments", 1, replies=[BETTER], run=run)
    assert len({*ran}) == len(ran) and [row["status"] for row in plain.rows()] == ["keep", "keep"]
    assert session.output.getvalue().count("KeyError: 'a mistake of ours'") == 2
    check(plain)


def test_an_experiment_at_which_the_loop_itself_fails_three_times_becomes_a_row(plain, no_waits, monkeypatch):
    failing(monkeypatch, 3)
    plain.night("--experiments", 2, replies=[BETTER, LAYER])
    assert [row["status"] for row in plain.rows()] == ["keep", "crash", "keep"]
    assert described(plain)[1] == "twice the width [the loop fails on it: KeyError('a mistake of ours')]"
    check(plain)


# ---- stopped and killed


class Killed(BaseException):
    """As kill -9: nothing of the loop runs after it."""


def die(monkeypatch, name, call, after):
    """The loop dies at this call of one of its functions: before, or right after it."""
    owner, _, attribute = name.rpartition(".")
    owner = getattr(loop, owner) if owner else loop
    real, calls = getattr(owner, attribute), []

    def dies(*args):
        calls.append(args)
        if len(calls) == call and not after:
            raise Killed
        result = real(*args)
        if len(calls) == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, attribute, dies)


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "name, call, after, times",
    [
        ("Git.move", 1, True, 5),  # right after each change of a ref: branch, experiment, row
        ("Git.move", 2, False, 9),  # right before each, with all that was done since the one before
        ("Ledger.note", 2, True, 9),  # after each run: its result is on disk
        ("replace_file", 2, True, 1),  # between the files of the checkout that a keep changes
        ("replace_file", 3, True, 1),  # after them
    ],
)
def test_killed_at_every_step_it_gets_there_all_the_same(plain, monkeypatch, name, call, after, times):
    plain.write("notes.txt", "staged by the person\n")
    plain.git("add", "notes.txt")
    began, deaths, ended = set(), 0, False
    while not ended:
        with monkeypatch.context() as patch:
            if deaths < times:
                die(patch, name, call, after)
            try:
                plain.night("--experiments", 1, replies=[BETTER, LAYER])
                ended = True
            except Killed:
                deaths += 1
        began |= {*plain.git("for-each-ref", "--format=%(objectname)", "refs/autoresearch/t/").split()}
    assert deaths and described(plain)[:2] == ["baseline", "twice the width"]
    assert {row["status"] for row in plain.rows()} == {"keep"}
    assert began <= {plain.git("rev-parse", row["commit"]).strip() for row in plain.rows()}
    check(plain, status="M  notes.txt\n")


@pytest.mark.slow
def test_an_experiment_whose_ref_git_had_no_time_to_delete_has_one_row(plain):
    plain.night("--experiments", 1, replies=[BETTER])
    commit = plain.rows()[1]["commit"]
    plain.git("update-ref", "refs/autoresearch/t/open/1", commit)
    ran = []
    plain.night("--experiments", 1, replies=[LAYER], run=lambda job: ran.append(of(job)) or stand_in(job))
    assert [row["commit"] for row in plain.rows()].count(commit) == 1 and len(plain.rows()) == 3
    assert {number for number, *_ in ran} <= {0, 2}


def dies_with(monkeypatch, experiment):
    """The loop dies when it hears of a run of this experiment."""
    take = loop.Session.take

    def dies(session, key, result):
        if session.ledger.experiments[key[0]].number == experiment:
            raise Killed
        take(session, key, result)

    monkeypatch.setattr(loop.Session, "take", dies)


def test_an_experiment_around_which_the_loop_died_twice_becomes_a_row_without_another_run(plain, monkeypatch):
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            dies_with(patch, 1)
            plain.night("--experiments", 1, replies=[WORSE])
    ran = []
    run = lambda job: ran.append(of(job)) or stand_in(job)  # noqa: E731
    plain.night("--experiments", 2, replies=[BETTER], run=run)
    assert [row["status"] for row in plain.rows()] == ["keep", "crash", "keep"]
    assert described(plain)[1] == "one layer [the loop died 2 times while it ran]"
    assert not any(number == 1 for number, *_ in ran)
    check(plain)


@pytest.mark.slow
def test_the_baseline_is_run_again_however_often_the_loop_died_in_it(plain, monkeypatch):
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die(patch, "Session.take", 1, False)
            plain.night("--experiments", 1, replies=[BETTER])
    plain.night("--experiments", 1, replies=[BETTER])
    assert [row["status"] for row in plain.rows()] == ["keep", "keep"]
    check(plain)


def test_killed_with_several_in_flight_all_of_them_go_on(plain, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies_with(patch, 1)
        plain.night("--experiments", 2, devices=2, replies=[BETTER, CRASHING], run=first_two_together())
    assert plain.git("for-each-ref", "refs/autoresearch/t/open/1")
    plain.night("--experiments", 2, devices=2, replies=[LAYER] * 4)
    assert {"baseline", "twice the width"} <= {*described(plain)} and len(plain.rows()) in (3, 4)
    assert sum("a crash" in description for description in described(plain)) == 1
    check(plain)


def test_a_run_in_doubt_goes_on_with_the_seed_that_it_lacks(plain, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die(patch, "Session.take", 4, False)  # the parent ran on its second seed, and that isn't noted
        plain.night("--experiments", 1, replies=[LAYER], run=doubtful)
    ran = []
    run = lambda job: ran.append(of(job)) or doubtful(job)  # noqa: E731
    plain.night("--experiments", 1, run=run)
    assert ran == [(0, 1, "val"), (1, 1, "val")] and plain.rows()[1]["runs"] == "1.049400,1.050400"
    check(plain)


@pytest.mark.every(3)
@pytest.mark.parametrize("number, times", [(signal.SIGINT, 2), (signal.SIGTERM, 1), (signal.SIGHUP, 1)])
def test_a_signal_or_two_end_the_loop_tidily_and_the_next_start_runs_the_same_experiment(
    plain, number, times
):
    def stop():
        for _ in range(times):
            interrupt(number)

    plain.night(replies=[WORSE], run=during(1, stop))
    assert described(plain) == ["baseline"] and plain.status() == ""
    commit = plain.git("rev-parse", "refs/autoresearch/t/open/1").strip()
    session = plain.night("--experiments", 1)
    assert plain.git("rev-parse", plain.rows()[1]["commit"]).strip() == commit and not session.model.chats
    assert not session.ledger.deaths[commit]  # it was stopped, and didn't die
    check(plain)


@pytest.mark.slow
def test_what_a_deleted_branch_was_running_is_not_the_baseline_of_a_new_one(plain):
    plain.night(replies=[WORSE], run=during(1, interrupt))
    assert plain.git("for-each-ref", "refs/autoresearch/t/")
    plain.git("checkout", "--quiet", "main")
    plain.git("branch", "-D", "autoresearch/t")
    plain.night("--budget", 7, "--experiments", 1, replies=[BETTER])
    assert described(plain) == ["baseline", "twice the width"]
    assert json.loads(trailers(plain, plain.rows()[0]["commit"])["Ruler"])["budget"] == 7


def test_a_second_loop_in_the_same_checkout_is_turned_away(plain):
    with open(plain.folder / ".git/autoresearch.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4321\n")
        lock.flush()
        assert "another loop runs in this checkout (process 4321); stop it first" in refusal(plain)


# ---- the person at work in the same checkout


def test_a_persons_edit_of_train_py_is_the_next_experiment_and_restored_when_it_is_worse(plain):
    plain.night("--experiments", 1, replies=[BETTER])
    plain.write("train.py", plain.read("train.py").replace("depth = 4", "depth = 2"))
    session = plain.night("--experiments", 1)
    row = plain.rows()[-1]
    assert row["status"] == "discard" and row["description"] == "your edit of train.py"
    assert "your edit is the next experiment" in session.output.getvalue() and row["llm_tokens"] == "0"
    assert "depth = 2" in plain.git("show", f"{row['commit']}:train.py")
    check(plain)


def test_a_persons_edit_before_the_first_start_waits_for_the_baseline(plain):
    plain.write("train.py", plain.read("train.py").replace("width = 64", "width = 512"))
    plain.night("--experiments", 1)
    assert described(plain) == ["baseline", "your edit of train.py"]
    assert plain.rows()[0]["val_bpb"] == "1.035625" and "width = 512" in plain.read("train.py")
    check(plain)


def test_of_a_persons_own_edit_the_ruler_only_warns(plain):
    plain.write("train.py", "# outside\n" + plain.read("train.py").replace("width = 64", "width = 128"))
    session = plain.night("--experiments", 1)
    warning = "a model's edit would be refused: The ruler doesn't allow this: line 1, reaches outside"
    assert warning in session.output.getvalue()
    assert described(plain)[1] == "your edit of train.py" and plain.rows()[1]["status"] == "keep"


def test_of_the_file_that_a_night_begins_with_the_ruler_only_warns(plain):
    plain.write("train.py", "# outside\n" + PLAIN)
    plain.commit("mine")
    warning = "a model's edit would be refused: The ruler doesn't allow this: line 1, reaches outside"
    said = [plain.night("--experiments", 1, replies=[edit]).output.getvalue() for edit in (BETTER, LAYER)]
    assert [warning in text for text in said] == [True, False] and len(plain.rows()) == 3


def test_a_half_typed_edit_is_left_alone_until_it_compiles(plain):
    plain.write("train.py", PLAIN + "\ndef half(")
    session = plain.night("--experiments", 2, replies=[BETTER, WORSE])
    assert (
        session.output.getvalue().count(
            "your edit of train.py waits. After this edit the file doesn't compile"
        )
        == 1
    )
    assert described(plain) == ["baseline", "twice the width", "one layer"]
    assert plain.read("train.py").endswith("def half(")


def test_an_edit_that_is_broken_again_is_said_again(plain):
    session = plain.night("--experiments", 0.5)
    for text in ("\ndef half(", "\ndef half(", "", "\ndef half("):
        plain.write("train.py", PLAIN + text)
        session.user_edit()
    assert session.output.getvalue().count("your edit of train.py waits.") == 2


@pytest.mark.slow
def test_an_edit_committed_by_the_person_becomes_an_experiment_too(plain):
    plain.night("--experiments", 1, replies=[BETTER])
    plain.write("train.py", plain.read("train.py").replace("depth = 4", "depth = 2"))
    plain.git("commit", "--quiet", "-am", "mine")
    plain.night("--experiments", 1)
    assert (
        plain.rows()[-1]["description"] == "your edit of train.py" and plain.rows()[-1]["status"] == "discard"
    )
    assert "mine" in plain.git("log", "--first-parent", "--format=%s")
    check(plain)


def test_an_edit_that_the_person_commits_in_mid_run_is_tried_and_not_undone(plain):
    def commit():
        plain.write("train.py", plain.read("train.py").replace("depth = 4", "depth = 5"))
        plain.git("commit", "--quiet", "-am", "mine")

    plain.night("--experiments", 2, replies=[WORSE], run=during(1, commit))
    assert described(plain) == ["baseline", "one layer", "your edit of train.py"]
    assert plain.rows()[2]["status"] == "keep" and "depth = 5" in plain.read("train.py")
    check(plain)


@pytest.mark.slow
def test_a_persons_edit_that_wins_while_another_is_kept_is_not_taken_for_a_new_one(plain, recorded):
    last = last_of_two(recorded, "depth = 5")

    def run(job):
        result, source = last(job), job["files"]["train.py"]
        if "width = 128" in source and "depth = 5" in source:  # tried anew, while the others begin
            recorded.reach(4)
        return result

    plain.write("train.py", PLAIN.replace("depth = 4", "depth = 5"))
    plain.night("--experiments", 4, devices=2, replies=[BETTER, WORSE, CRASHING], run=run)
    assert described(plain).count("your edit of train.py") == 1 and len(plain.rows()) == 5
    assert "width = 128" in plain.read("train.py") and "depth = 5" in plain.read("train.py")
    check(plain)


def test_a_branch_switched_in_mid_run_gets_nothing_and_the_runs_branch_gets_the_row(plain):
    plain.git("checkout", "--quiet", "-b", "dev")
    plain.write("loop.py", plain.read("loop.py") + "# newer\n")
    plain.commit("newer")
    plain.git("checkout", "--quiet", "main")
    switch = during(1, lambda: plain.git("checkout", "--quiet", "dev"))
    session = plain.night("--experiments", 1, replies=[BETTER], run=switch)
    assert (
        "another branch" in (said := session.output.getvalue()) and "the row went to autoresearch/t" in said
    )
    assert plain.rows()[1]["status"] == "keep" and plain.read("train.py") == PLAIN
    assert plain.status() == "" and plain.git("log", "--oneline", "main").count("\n") == 1
    plain.git("checkout", "--quiet", "autoresearch/t")
    check(plain)


@pytest.mark.slow
def test_a_branch_renamed_in_mid_run_is_waited_for_in_words(plain, monkeypatch):
    def back(failed):
        plain.git("branch", "-m", "autoresearch/renamed", "autoresearch/t", check=False)
        return 0.01

    monkeypatch.setattr(loop, "backoff", back)
    rename = during(1, lambda: plain.git("branch", "-m", "autoresearch/t", "autoresearch/renamed"))
    said = plain.night("--experiments", 1, replies=[BETTER], run=rename).output.getvalue()
    assert "the branch is gone, renamed or deleted: autoresearch/t; going on in" in said
    assert described(plain) == ["baseline", "twice the width"]
    check(plain)


def test_an_executable_train_py_stays_one(plain):
    (plain.folder / "train.py").chmod(0o755)
    plain.commit("executable")
    plain.night("--experiments", 1, replies=[BETTER])
    assert plain.status() == "" and os.access(plain.folder / "train.py", os.X_OK)


FILTER = {"filter.spaces.smudge": "sed 's/\\t/    /g'", "filter.spaces.clean": "sed 's/    /\\t/g'"}
NOTE = {"filter.note.smudge": "cat; echo '# a note'", "filter.note.clean": "grep -v '# a note'"}
# (.gitattributes, configuration, how lines end in the commit): bytes differ, and nothing was edited
BYTES = {
    "autocrlf": ("", {"core.autocrlf": "true"}, "\n"),
    "autocrlf that is careful": ("", {"core.autocrlf": "true", "core.safecrlf": "true"}, "\n"),
    "CRLF in the commit, autocrlf": ("", {"core.autocrlf": "true"}, "\r\n"),
    "CRLF in the commit, autocrlf for input": ("", {"core.autocrlf": "input"}, "\r\n"),
    "CRLF by attributes": ("* text eol=crlf\n", {}, "\n"),
    "CRLF by configuration": ("* text=auto\n", {"core.eol": "crlf"}, "\n"),
    "a filter": ("*.py filter=spaces\n*.tsv filter=spaces\n", FILTER, "\n"),
    "a smudge that adds a line": ("*.py filter=note\n*.tsv filter=note\n", NOTE, "\n"),
    "an ident": ("*.py ident\n", {}, "\n"),
}


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "name", most_quick(BYTES, *[name for name in BYTES if "autocrlf" != name != "a filter"])
)
def test_a_file_that_git_does_not_call_changed_is_no_edit_of_the_persons(plain, name):
    attributes, settings, end = BYTES[name]
    for name, value in settings.items():
        plain.git("config", name, value)
    plain.write(".gitattributes", attributes)
    plain.write("train.py", PLAIN.replace("numbers.", "numbers. $Id$"))
    (plain.folder / "train.py").write_bytes(plain.read("train.py").replace("\n", end).encode())
    for every in "-A", "--renormalize .":  # the second: also what git holds for unchanged by its time
        plain.git(*f"-c core.autocrlf=false -c core.safecrlf=false add {every}".split())
    plain.git("commit", "--quiet", "-m", "bytes")
    for replies in ([BETTER, WORSE], [LAYER]):
        for name in ("train.py", "prepare.py", "results.tsv"):  # as a checkout writes them
            (plain.folder / name).unlink()
            plain.git("checkout", "--", name)
        assert plain.status() == ""
        plain.night("--experiments", len(replies), replies=replies)
    assert (
        described(plain) == ["baseline", "twice the width", "one layer", "a layer"] and plain.status() == ""
    )


@pytest.mark.slow
def test_a_change_of_its_mode_is_no_edit_of_the_persons(plain):
    plain.night("--experiments", 1, replies=[BETTER])
    for name in ("train.py", "prepare.py", "results.tsv"):
        (plain.folder / name).chmod(0o755)
    plain.night("--experiments", 1, replies=[WORSE])
    assert described(plain) == ["baseline", "twice the width", "one layer"]


CONFIGURATION = """
[color] ui = always
[color] status = always
[color] diff = always
[column] ui = always
[core] quotePath = true
[core] abbrev = 12
[core] commentChar = %
[core] splitIndex = true
[core] pager = false
[diff] external = false
[diff] noprefix = true
[diff] autoRefreshIndex = false
[diff] renames = copies
[status] short = true
[status] branch = true
[status] showUntrackedFiles = no
[i18n] commitEncoding = ISO-8859-1
[i18n] logOutputEncoding = ISO-8859-1
[log] showSignature = true
[log] decorate = full
[format] pretty = oneline
[commit] gpgSign = true
[gpg] program = false
[index] version = 4
[alias] diff = status
"""


def test_what_a_person_configured_in_git_reaches_nothing_that_is_parsed(plain):
    (plain.folder / ".git" / "config").write_text(plain.read(".git/config") + CONFIGURATION)
    idea = block("width = 64", "width = 128", "größer")
    plain.night("--experiments", 2, replies=[idea, WORSE])
    plain.night("--experiments", 1, replies=[LAYER])
    assert described(plain) == ["baseline", "größer", "one layer", "a layer"]
    assert [row.description for row in loop.read_report(plain.folder, "t", "").rows] == described(plain)
    session = loop.Session(loop.parse_arguments(["--tag", "t"]), plain.folder, Console(quiet=True))
    session.ledger.load()
    ideas = [one.description for one in session.ledger.ended]
    assert ideas == described(plain) and plain.git("status", "--porcelain=v1") == ""


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "name", ["GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE", "GIT_EXTERNAL_DIFF", "GIT_OBJECT_DIRECTORY"]
)
def test_the_repository_is_the_one_that_holds_the_loop_whatever_the_environment_names(
    plain, tmp_path, monkeypatch, name
):
    monkeypatch.setenv(name, str(tmp_path / "another"))
    plain.night("--experiments", 1, replies=[BETTER])
    monkeypatch.delenv(name)
    check(plain)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "setting", ["core.preferSymlinkRefs", "core.splitIndex", "core.sparseCheckout", "submodule.recurse"]
)
def test_the_checkout_follows_the_branch_however_git_stores_it(plain, setting):
    plain.git("config", setting, "true")
    for replies in ([BETTER], [LAYER]):
        plain.night("--experiments", 1, replies=replies)
    check(plain)


def test_a_linked_worktree_has_a_night_of_its_own(plain):
    plain.git("worktree", "add", "--quiet", "../other", "-b", "other")
    plain.folder = plain.folder.parent / "other"
    plain.night("--experiments", 1, replies=[BETTER])
    assert described(plain) == ["baseline", "twice the width"] and plain.status() == ""


@pytest.mark.parametrize("name", ["train.py", "prepare.py", "program.md", "results.tsv"])
def test_a_link_in_place_of_a_file_is_refused_by_name(plain, name):
    (plain.folder / name).rename(plain.folder / "elsewhere")
    (plain.folder / name).symlink_to("elsewhere")
    plain.commit("a link")
    assert f"{name} is a link" in refusal(plain)


@pytest.mark.every(2)
@pytest.mark.parametrize("path", ["data", "./data", "../checkout/data", "~/checkout/data"])
def test_where_the_data_are_is_meant_from_where_the_loop_was_started(plain, monkeypatch, path):
    plain.data.rename(plain.folder / "data")
    monkeypatch.chdir(plain.folder)
    monkeypatch.setenv("HOME", str(plain.folder.parent))
    plain.data = path
    assert asked(plain, monkeypatch)["folder"] == str(plain.folder / "data" / "toy-0123456789ab")


@pytest.mark.every(3)
@pytest.mark.parametrize("number", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL", "EACCES"])
def test_a_file_system_without_locks_is_not_taken_for_another_loop(plain, monkeypatch, number):
    def flock(*_):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(loop.fcntl, "flock", flock)
    said = plain.night("--experiments", 1, replies=[BETTER]).output.getvalue()
    assert "no lock on this file system" in said and "another loop" not in said
    check(plain)


def test_staged_changes_failing_hooks_signing_and_no_identity_are_survived(plain, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    plain.git("config", "commit.gpgsign", "true")
    plain.git("config", "gpg.program", "false")
    for name in ("pre-commit", "reference-transaction", "post-checkout", "prepare-commit-msg"):
        hook = plain.folder / ".git" / "hooks" / name
        hook.write_text("#!/bin/sh\nexit 1\n")
        hook.chmod(0o755)
    plain.write("notes.txt", "staged\n")
    plain.git("-c", "core.hooksPath=/dev/null", "add", "notes.txt")
    plain.night("--experiments", 1, replies=[BETTER])
    check(plain, status="M  notes.txt\n")


def test_a_stale_index_lock_is_survived_and_the_index_follows_once_it_is_gone(plain):
    lock = plain.folder / ".git" / "index.lock"
    lock.touch()
    plain.night("--experiments", 1, replies=[BETTER])
    assert len(plain.rows()) == 2
    lock.unlink()
    plain.night("--experiments", 1, replies=[LAYER])
    check(plain)


def test_a_result_that_cannot_be_noted_is_noted_later_and_counts_once(plain, no_waits, monkeypatch):
    real, failures = loop.os.fsync, [OSError(28, "No space left on device", "t.jsonl")] * 3

    def fsync(number):
        if failures and plain.rows():
            raise failures.pop()
        real(number)

    monkeypatch.setattr(loop.os, "fsync", fsync)
    ran = []
    session = plain.night(
        "--experiments", 2, replies=[BETTER, WORSE], run=lambda job: ran.append(of(job)) or stand_in(job)
    )
    assert not failures and "No space left" in session.output.getvalue()
    assert [row["status"] for row in plain.rows()] == ["keep", "keep", "discard"]
    assert len(ran) == len({*ran}) and not +session.ledger.deaths
    check(plain)


def test_half_a_line_in_the_file_of_runs_takes_no_other_with_it(plain):
    plain.night("--experiments", 1, replies=[BETTER])
    file = plain.folder / ".git" / "autoresearch" / "t.jsonl"
    file.write_bytes(file.read_bytes() + b'{"commit": "a power cut')
    session = plain.night("--experiments", 1, replies=[WORSE])
    commit = session.ledger.ended[2].commit
    session.ledger.load()
    assert session.ledger.results[commit, 0, "val"]["seconds"] and not session.ledger.deaths[commit]


@pytest.mark.slow
def test_git_packs_what_many_rows_leave(plain, monkeypatch):
    monkeypatch.setattr(loop, "PACK_ROWS", 2)
    plain.night("--experiments", 2, replies=[BETTER, WORSE])
    assert "packs: 1" in plain.git("count-objects", "-v")
    check(plain)


def test_a_start_takes_away_its_own_half_written_files_and_no_others(plain):
    for name in (".results.tsv.new", ".env.new"):
        plain.write(name, "half")
    plain.git("add", "-A"), plain.git("commit", "--quiet", "-m", "mine")
    plain.night("--experiments", 1, replies=[BETTER])
    assert plain.read(".env.new") == "half" and not (plain.folder / ".results.tsv.new").exists()


def test_a_proposal_survives_a_git_that_fails_where_it_begins(plain, no_waits, monkeypatch):
    real, failures = loop.Ledger.begin, [OSError(5, "Input/output error", "objects")]

    def begin(ledger, *args, **kwargs):
        if failures and ledger.best:
            raise failures.pop()
        return real(ledger, *args, **kwargs)

    monkeypatch.setattr(loop.Ledger, "begin", begin)
    session = plain.night("--experiments", 1, replies=[BETTER])
    assert described(plain) == ["baseline", "twice the width"] and len(session.model.chats) == 1


def test_a_commit_of_the_persons_in_mid_run_stays_below_the_row(plain):
    def commit():
        plain.write("notes.txt", "more\n")
        plain.git("commit", "--quiet", "-am", "notes")

    plain.night("--experiments", 1, replies=[WORSE], run=during(1, commit))
    subjects = plain.git("log", "--first-parent", "--format=%s").splitlines()
    assert subjects == ["discard: one layer", "notes", "keep: baseline", "start"]
    check(plain)


# ---- preconditions: one sentence, exit 2, nothing changed


def refusal(project, *words, offline=False, **how):
    """The sentence with which a night is refused; nothing was changed."""

    def state():
        return project.git("for-each-ref", check=False) + project.git("status", "--porcelain", check=False)

    before = state()
    with pytest.raises(loop.Stop) as stop:
        project.night(*words, offline=offline, **how)
    assert state() == before and stop.value.code == 2 and "\n" not in str(stop.value)
    return str(stop.value)


def test_without_a_key_the_three_ways_on_are_named(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(loop.Stop) as stop:
        loop.Model("", print)
    assert all(way in str(stop.value) for way in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "--offline"))


def test_outside_a_repository_and_without_a_commit_the_next_step_is_said(project):
    subprocess.run(["rm", "-rf", ".git"], cwd=project.folder, check=True)
    assert "not a git repository" in (said := refusal(project)) and "a repository: git init" in said
    project.git("init", "--quiet")
    assert "is in no commit of" in (said := refusal(project)) and "git add -A && git commit" in said


@pytest.mark.parametrize("commits", [0, 1])
@pytest.mark.parametrize("ignored", [False, True])
def test_inside_another_repository_that_one_is_named_and_one_of_its_own_offered(project, commits, ignored):
    home = project.folder.parent
    subprocess.run(["rm", "-rf", ".git"], cwd=project.folder, check=True)
    (home / ".gitignore").write_text("checkout\n" * ignored)
    dotfiles = ["git", "-c", "user.name=me", "-c", "user.email=me@localhost"]
    for words in (["init", "--quiet"], ["add", ".gitignore"], ["commit", "--quiet", "-m", "dotfiles"])[
        : 1 + 2 * commits
    ]:
        subprocess.run([*dotfiles, *words], cwd=home, check=True)
    said = refusal(project)
    assert f"{project.folder} is in no commit of {home}; run there" in said
    assert "git init && git add -A && git commit" in said


@pytest.mark.parametrize(
    "words", ["fatal: " + "a long way/" * 90, "fatal: detected\nTo add: git config " + "x" * 500]
)
def test_what_git_advises_is_told_whole(words):
    error = subprocess.CalledProcessError(128, "git", stderr=words.encode())
    assert loop.explain(error) == f"git failed: {' '.join(words.split())}"


@pytest.mark.parametrize("name", ["prepare.py", "loop.py", "results.tsv"])
def test_uncommitted_changes_of_what_the_results_rest_on_are_refused(project, name):
    project.write(name, project.read(name) + "\n")
    assert f"{name}: missing, or not committed as it is" in refusal(project)


def test_a_missing_file_is_named(project):
    (project.folder / "prepare.py").unlink()
    assert "prepare.py: missing, or not committed as it is" in refusal(project)
    project.git("rm", "--quiet", "program.md", "prepare.py")
    project.git("checkout", "--quiet", "HEAD", "prepare.py")
    project.git("commit", "--quiet", "-m", "no goal")
    assert "program.md is not committed; run: git add program.md" in refusal(project)


def test_rows_of_a_persons_own_in_results_tsv_are_not_overwritten(plain):
    plain.night("--experiments", 1, replies=[WORSE])
    plain.write("results.tsv", plain.read("results.tsv") + "mine\n")
    assert "results.tsv has uncommitted changes" in refusal(plain)


def test_a_branch_measured_with_another_ruler_is_refused_naming_what_differs(plain, monkeypatch):
    plain.night("--experiments", 1, replies=[WORSE])
    assert "budget was 20.0 and is 30.0" in refusal(plain, "--budget", 30)
    monkeypatch.setitem(conftest.FACTS, "device", "NVIDIA H100")
    assert "device was cpu, stand-in and is NVIDIA H100" in refusal(plain)
    plain.write("prepare.py", plain.read("prepare.py") + "# newer\n")
    plain.git("commit", "--quiet", "-am", "another ruler")
    assert "(code was" in refusal(plain)


@pytest.mark.slow
def test_a_branch_goes_on_with_its_budget_and_its_own_ruler_when_main_has_a_newer_one(plain):
    plain.night("--experiments", 1, replies=[WORSE])
    plain.git("checkout", "--quiet", "main")
    plain.write("prepare.py", plain.read("prepare.py") + "# newer\n")
    plain.git("commit", "--quiet", "-am", "newer ruler")
    jobs = []
    run = lambda job: jobs.append(job) or stand_in(job)  # noqa: E731
    plain.night("--experiments", 1, replies=[LAYER], run=run)
    assert len(plain.rows()) == 3 and "# newer" not in jobs[-1]["files"]["prepare.py"]


def asked(project, monkeypatch):
    """A session whose real ruler, the stand-in, was asked for its facts."""
    monkeypatch.setenv("AUTORESEARCH_DATA", str(project.data))
    session = loop.Session(
        loop.parse_arguments(["--tag", "t", "--offline"]), project.folder, Console(quiet=True)
    )
    session.take_lock()
    try:
        session.check_files()
        session.ask_ruler()
    finally:
        session.lock.close()
    return session.facts


@pytest.mark.slow
def test_a_branch_keeps_its_data_set_when_a_newer_one_is_prepared_and_misses_it_when_it_is_gone(
    plain, monkeypatch, capfd
):
    plain.night("--experiments", 1, replies=[WORSE])
    newer = plain.data / "zero-ba9876543210"
    newer.mkdir()
    (newer / "meta.json").write_text(json.dumps({"fingerprint": "ba9876543210"}))
    facts = asked(plain, monkeypatch)
    assert facts["data"] == "0123456789ab" and facts["folder"].endswith("toy-0123456789ab")
    (plain.data / "toy-0123456789ab" / "meta.json").unlink()
    with pytest.raises(loop.Stop, match="the ruler doesn't start, see above"):
        asked(plain, monkeypatch)
    assert "measured on the data set 0123456789ab" in capfd.readouterr().err


def test_a_broken_committed_train_py_is_said_before_anything_is_made(project):
    project.write("train.py", "WIDTH = = 1\n")
    project.commit("broken")
    assert "train.py" in (said := refusal(project, offline=True)) and "fix" in said


def test_a_file_without_constants_is_not_searched(plain):
    with pytest.raises(loop.Stop, match="train.py has no top-level constants") as stop:
        plain.night(offline=True)
    assert stop.value.code == 2


def test_a_branch_that_git_cannot_make_is_said(project):
    project.git("branch", "autoresearch")
    with pytest.raises(subprocess.CalledProcessError) as error:
        project.night(offline=True)
    assert "cannot lock ref 'refs/heads/autoresearch/t'" in loop.explain(error.value)


def test_a_tag_that_git_refuses_is_refused(project):
    assert "git can't name a branch so" in refusal(project, "--tag", "a..b")


def test_a_branch_whose_rows_have_other_columns_is_refused(project):
    project.git("checkout", "--quiet", "-b", "autoresearch/t")
    project.write(
        "results.tsv", "commit\tval_bpb\tmemory_gb\tstatus\tdescription\nabc1234\t0.9\t44.0\tkeep\tx\n"
    )
    project.commit("a night of the original program")
    assert "other columns than this loop's" in refusal(project)


@pytest.mark.slow
def test_a_branch_whose_rows_were_committed_with_other_line_ends_goes_on(plain):
    plain.night("--experiments", 1, replies=[BETTER])
    (plain.folder / "results.tsv").write_bytes(plain.read("results.tsv").replace("\n", "\r\n").encode())
    plain.commit("as a spreadsheet saves it")
    plain.night("--experiments", 1, replies=[LAYER])
    assert [row["status"] for row in plain.rows()] == ["keep"] * 3
    assert b"\r" not in (plain.folder / "results.tsv").read_bytes()


def test_a_branch_whose_rows_cannot_be_read_is_refused_naming_the_line(plain):
    plain.night("--experiments", 1, replies=[WORSE])
    plain.write("results.tsv", plain.read("results.tsv") + "half a row\n")
    plain.git("commit", "--quiet", "-am", "by hand")
    assert "results.tsv on autoresearch/t, line 4 is not a row: 'half a row'; fix" in refusal(plain)


ODD = ["None", "12.5", "1e3", "-3", "many", "9" * 5000, "１２", ""]


@pytest.mark.slow
def test_an_experiment_of_an_old_branch_gets_its_row_whatever_its_commit_says(plain):
    plain.night("--experiments", 1, replies=[WORSE])
    first, tip = plain.git("rev-parse", plain.rows()[0]["commit"], "autoresearch/t").split()
    odd = list(itertools.product(["Tokens", "Model", "Lesson"], ODD))
    for number, (name, value) in enumerate(odd, 2):
        said = {"Number": f"{number}", "Model": "m", "Tokens": "100", "Parent": first, "Code": "0"} | {
            name: value
        }
        message = f"idea {number}\n\n" + "\n".join(f"{key}: {text}" for key, text in said.items())
        opened = plain.git("commit-tree", f"{tip}^{{tree}}", "-p", tip, "-m", message).strip()
        plain.git("update-ref", f"refs/autoresearch/t/open/{number}", opened)
    for replies in [], [BETTER]:
        plain.night("--experiments", len(odd) if not replies else 1, replies=replies)
    for number, (name, _) in enumerate(odd, 2):
        row = plain.rows()[number]
        assert row["description"] == f"idea {number}" and row["status"] != "crash"
        assert row["llm_tokens"] == ("0" if name == "Tokens" else "100")


NAMES = [
    "a\nTokens: x\n\nNumber: y",
    "nul\0",
    "\x1b[31mred",
    "half \ud83d",
    "a: b",
    "x" * 3000,
    "größe\u2028",
]


@pytest.mark.every(4)
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_models_name_writes_nothing_into_a_commit_but_itself(plain, monkeypatch, name):
    ask = conftest.FakeModel.ask
    monkeypatch.setattr(
        conftest.FakeModel, "ask", lambda self, *args: setattr(self, "name", name) or ask(self, *args)
    )
    plain.night("--experiments", 1, replies=[BETTER])
    plain.night("--experiments", 1, replies=[WORSE])
    assert described(plain) == ["baseline", "twice the width", "one layer"]
    check(plain)


def test_a_branch_that_does_not_say_what_it_was_measured_with_is_refused_in_words(plain, monkeypatch):
    monkeypatch.setattr(loop.Session, "began", "not JSON", raising=False)
    monkeypatch.setattr(
        loop.json,
        "dumps",
        lambda value, **how: "not JSON" if "metric" in value else json.JSONEncoder(**how).encode(value),
    )
    plain.night("--experiments", 1, replies=[WORSE])
    assert "doesn't say what it was measured with; begin anew with --tag" in refusal(plain)


WRONG = [["--budget", "0"], ["--experiments", "-1"], ["--hours", "x"], ["--tokens", "0"], ["--nonsense"]]


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_call_exits_2(words):
    with pytest.raises(SystemExit) as exit:
        loop.parse_arguments(words)
    assert exit.value.code == 2


@pytest.mark.slow
def test_an_unknown_model_a_refused_key_and_nobody_there_end_the_loop_at_the_first_call(server, monkeypatch):
    def said(url=server.url, key="sk-secret"):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(loop.Stop) as stop:
            loop.Model("local-model", print)
        assert stop.value.code == 2 and "sk-" not in str(stop.value) and "\n" not in str(stop.value)
        return str(stop.value)

    server.ready = (404, {"error": {"message": "there is no such model", "type": "invalid_request_error"}})
    assert "there is no such model; name a model" in (sentence := said()) and "--model NAME" in sentence
    server.ready = (401, {"error": {"message": "a wrong key: sk-secret", "type": "invalid_request_error"}})
    assert "a wrong key: ***" in said()
    assert "fix the URL" in said(f"{server.url}/nothing/there")
    assert "fix the URL" in said("http://[::1/v1")
    server.ready = (401, {"error": {"message": "a wrong key", "type": "invalid_request_error"}})
    assert "failed at the first call" in said(key="sk-very\tsecret")
    assert "is the server running?" in said("http://127.0.0.1:9/v1")


# ---- real processes


@pytest.mark.slow
def test_files_are_utf8_whatever_the_locale(plain):
    plain.write("train.py", (conftest.STAND_IN / "train.py").read_text() + "# größer 🙂\n")
    plain.write("prepare.py", plain.read("prepare.py") + "# größer 🙂\n")
    plain.commit("other letters")
    plain.offline("--experiments", 1, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    check(plain)


def slow(project, seconds=60):
    project.write("train.py", project.read("train.py").replace("SECONDS = 0.0", f"SECONDS = {seconds}"))
    project.commit("slow")


def running(project):
    return [*project.folder.glob("runs/*/*/run.log")]


def test_a_night_offline_says_how_long_it_takes_waits_for_nothing_and_says_where_the_results_are(project):
    out = project.offline("--experiments", 2, PYTHONIOENCODING="ascii")  # a terminal that isn't UTF-8, too
    assert "180 or more experiments an hour" in out
    assert "results.tsv on autoresearch/t has the rows" in out and "devices busy" in out
    assert "Traceback" not in out and "going on in" not in out
    assert len(project.rows()) == 3 and out.isascii()
    check(project)


@pytest.mark.slow
def test_a_key_revoked_in_the_night_costs_no_device_time_and_the_search_goes_on(project, server):
    project.constants(WAITS="(600, 600)")
    server.default = (401, {"error": {"message": "the key was revoked"}})
    out = project.online(server, "--experiments", 2)
    assert "the model's server failed" in out and "asking again in 600 s" in out
    assert "reply refused" not in out  # there was none
    assert [description.partition(":")[0] for description in described(project)] == [
        "baseline",
        "search",
        "search",
    ]
    check(project)


SLEEPER = """import subprocess, time
    subprocess.Popen(['sleep', '987'], start_new_session=True)
    time.sleep(1000)"""


@pytest.mark.slow
def test_a_run_over_its_budget_is_killed_with_its_children(plain, server):
    plain.constants(KILL_GRACE="0.1")
    server.replies += [block("def main():", f"def main():\n    {SLEEPER}", "a sleeper")]
    plain.run("--budget", "3", "--tag", "t", "--experiments", "1", OPENAI_BASE_URL=server.url)
    assert described(plain)[1] == "a sleeper [timeout: killed after 3.1 s]" and not survivors(plain.folder)
    check(plain)


def test_a_night_over_http_goes_on_through_faults_and_a_run_sees_no_secret(plain, server):
    def code(text, idea):
        return block("def main():", f"def main():\n    {text}", idea)

    plain.constants(WAITS="(0.01, 0.02)")
    look = "import os\n    print('SEEN', sorted(os.environ), os.environ['HOME'])"
    much = "import atexit; atexit.register(print, 'bye')\n    [print('x' * 99) for _ in range(9_000)]"
    faults = [(503, {"error": {"message": "overloaded"}}, {"Retry-After": "0"}), (200, {}), (200, "<html>")]
    server.replies += [*faults, "\ud800 half a pair", code(look, "look around"), code(much, "much output")]
    server.replies += [code("prepare.os.environ['AUTORESEARCH_SEED'] = '5'", "another seed")]
    secrets = dict(OPENAI_API_KEY="sk-secret", AWS_SECRET="x", HF_TOKEN="y", NVIDIA_API_KEY="z")
    out = plain.online(server, "--experiments", 3, **secrets)
    rows, log = plain.rows(), next(plain.folder.glob("runs/0001-*/0/run.log")).read_text()
    seen = log[log.index("SEEN") :].splitlines()[0].replace("AUTORESEARCH_TOKEN", "")
    assert not any(name in seen for name in ("OPENAI", "AWS", "HF_", "TOKEN", "NVIDIA_API"))
    assert "/runs/0001-" in seen and out.count("the model's server failed") == 3
    assert out.count("reply refused") == 1 and "Traceback" not in out
    assert [row["status"] for row in rows] == ["keep", "discard", "discard", "crash"]
    assert "another seed [the result is of another told" in described(plain)[3]
    check(plain)


@pytest.mark.slow
def test_ctrl_c_ends_runs_and_requests_and_the_next_start_goes_on_without_asking(project, server):
    hold = threading.Event()
    server.replies += [
        block("SECONDS = 0.0", "SECONDS = 2", "slow one"),
        lambda request: hold.wait(60) and "",
    ]
    project.write("train.py", "import prepare\nseconds = 0.0\nprepare.finish(1.1, seconds)\n")
    project.commit("without constants")
    server.replies[0] = block("seconds = 0.0", "seconds = 60", "slow one")
    process = project.start("--budget", "90", "--tag", "t", OPENAI_BASE_URL=server.url)
    project.wait_for(lambda: len(server.requests) == 2 and len(running(project)) == 3, 60)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    hold.set()
    assert process.returncode == 0 and "Traceback" not in err and "results.tsv on autoresearch/t" in out
    assert not survivors(project.folder) and project.status() == "" and described(project) == ["baseline"]
    commit = project.git("rev-parse", "refs/autoresearch/t/open/1").strip()
    session = project.night("--budget", 90, "--experiments", 1)
    assert (
        described(project)[1] == "slow one"
        and session.ledger.experiments[commit].row
        and not session.model.chats
    )


@pytest.mark.every(2)
@pytest.mark.parametrize("line", ["experiments an hour", "#1 search"])
def test_a_loop_that_is_killed_leaves_nothing_running_and_goes_on(project, line):
    process = project.start("--offline", "--budget", "20", "--tag", "t")
    project.read_until(process, line)
    process.kill()
    process.communicate()
    project.wait_for(lambda: not survivors(project.folder), 60)
    project.night("--experiments", 1, offline=True)
    assert len(project.rows()) in (2, 3, 4)
    check(project)


def test_a_loop_that_cannot_start_prints_one_line_and_exits_2_and_one_whose_baseline_fails_1(project):
    out = project.run("--tag", "t", code=2)
    assert out.startswith("loop.py: no model to ask") and out.count("\n") == 1
    project.write(
        "train.py", "import prepare\nWIDTH = 1\nprint('far too much')\nraise RuntimeError('no such layer')\n"
    )
    project.commit("broken")
    out = project.offline(code=1)
    assert "loop.py: the baseline failed: RuntimeError: no such layer" in out and "far too much" in out


def test_a_python_without_the_packages_is_told_which_one_has_them(project):
    how = dict(cwd=project.folder, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-S", "loop.py", "--offline"], **how)
    assert done.returncode == 2 and ".venv/bin/python loop.py" in done.stderr and done.stderr.count("\n") == 1


# ---- pure parts


JOB = {"told": {"SEED": "0"}, "facts": {"metric": "val_bpb", "data": "abc"}}
GOOD = {"metric": "val_bpb", "data": "abc", "told": {"SEED": "0"}, "value": 1.0}


def signed(secret="secret", **other):
    text = json.dumps(GOOD | other)
    return f"result: {hmac.new(secret.encode(), text.encode(), 'sha256').hexdigest()} {text}\n"


def test_a_signed_result_is_believed_whatever_is_printed_around_it():
    assert loop.read_result(f"step 1\n{signed()}goodbye\n", "secret", JOB) == GOOD
    assert loop.read_result(signed("guessed", value=0.1) + signed(), "secret", JOB) == GOOD


@pytest.mark.parametrize(
    "text, reason",
    [
        ("val_bpb: 0.5\n", "no result"),
        (signed("guessed"), "no result that the ruler signed"),
        (signed().replace("1.0", "0.1"), "no result that the ruler signed"),
        (signed() + signed(value=0.9), "no result"),  # two are as good as none
        (signed(value=float("nan")), "the result nan is no number"),
        (signed(value=float("-inf")), "the result -inf is no number"),
        (signed(told={"SEED": "5"}), "the result is of another told"),
        (signed(data="fed"), "the result is of another data"),
        (signed(metric="loss"), "the result is of another metric"),
    ],
)
def test_a_result_that_cannot_be_believed_has_its_reason(text, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        loop.read_result(text, "secret", JOB)


TRACEBACK = 'Traceback (most recent call last):\n  File "train.py", line 1, in <module>\n    1 / 0\n'


@pytest.mark.parametrize(
    "text, code, cause",
    [
        ("", 1, "no output"),
        ("step 1\n", -9, "killed by SIGKILL (out of memory?)"),
        ("step 1\n", 137, "killed by SIGKILL (out of memory?)"),  # as a cage reports it
        ("free(): invalid pointer\n", -6, "killed by SIGABRT: free(): invalid pointer"),
        (f"{TRACEBACK}MemoryError\n", 1, "out of memory"),
        (f"{TRACEBACK}torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\n", 1, "out of memory"),
        (
            f"{TRACEBACK}ModuleNotFoundError: No module named 'x'\nadvice\n",
            1,
            "ModuleNotFoundError: No module named 'x'",
        ),
        ("step 1\nrefused by the ruler: it sees the future\n", 1, "refused by the ruler: it sees the future"),
    ],
)
def test_the_cause_of_a_failed_run_is_told_in_a_line(text, code, cause):
    assert loop.cause_of(text, code) == cause


def test_rows_survive_being_written_and_read():
    row = loop.Row(
        "abcdef0", 1.25, 0.5, "keep", "an idea", -0.0012, 0.0003, [1.2, 1.3], 7, "2026-11-23T08:00:00Z"
    )
    assert "\t-0.0012+-0.0003\t" in row.line()
    assert loop.read_rows(loop.header("val_loss") + row.line(), "a file") == ("val_loss", [row], [])


def test_a_change_that_rounds_to_nothing_has_no_sign_of_a_gain():
    assert row("keep", 1, change=-0.00004).effect() == "+0.0000+-0.0007" and row("crash", 1).effect() == ""


def test_importing_the_loop_loads_neither_torch_nor_openai():
    code = "import sys, loop; print([m for m in ('torch', 'openai', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_an_empty_program_md_is_no_reason_to_fail(project):
    project.write("program.md", "")
    project.commit("no goals")
    project.night("--experiments", 1, offline=True)
    assert len(project.rows()) == 2
