"""Claims about the judgement: what is kept, how the noise is known, and the audit in the morning."""

import re
import signal

import pytest
from conftest import block

import loop

SEEDED = """\
import os
import prepare
WIDTH = 64
STRANGE = 0
if __name__ == "__main__":
    seed = int(os.environ["AUTORESEARCH_SEED"])
    print("SEED", seed, os.environ["AUTORESEARCH_SPLIT"])
    prepare.finish(1 + 1 / WIDTH + seed % 7 / 1000)
"""


@pytest.fixture
def seeded(project):
    """A project whose train.py has noise of a few thousandths that comes from the seed."""
    project.write("train.py", SEEDED)
    project.commit("seeded")
    return project


def seeds(project):
    """The seed and the split of every run whose log is there, by the name of its folder."""
    logs = sorted(project.folder.glob("runs/*/run.log"))
    return {log.parent.name: re.search(r"SEED (\d+) (\w+)", log.read_text()).groups() for log in logs}


# ---- the rule


def test_what_is_worse_or_equal_is_discarded_after_one_run():
    assert loop.judge([1.0, 1.2], [1.1], noise=0.001, lines=0) == loop.judge([1.0], [1.2], 0.001, 0) == "discard"


def test_nothing_is_kept_after_a_single_run():
    assert loop.judge([1.0], [0.5], noise=0.001, lines=0) == "again" and loop.judge([1.0], [0.5, 0.5], 0.001, 0) == "keep"


def test_a_gain_within_the_noise_needs_a_third_run():
    best, noise = [1.0, 1.0], 0.01
    assert [loop.judge(best, [0.995] * runs, noise, 0) for runs in (1, 2, 3)] == ["again", "again", "keep"]
    assert loop.judge(best, [0.995, 0.995, 1.02], noise, 0) == "discard"


def test_an_equal_result_is_kept_if_the_file_is_shorter_and_not_if_it_is_longer():
    assert loop.judge([1.0, 1.0], [1.0] * 3, noise=0.01, lines=-1) == "keep"
    assert loop.judge([1.0, 1.0], [1.0], 0.01, 0) == loop.judge([1.0, 1.0], [1.0], 0.01, 1) == "discard"


def test_a_tiny_gain_that_adds_many_lines_is_discarded():
    assert loop.judge([1.0, 1.0], [0.999, 0.999], noise=0.0007, lines=0) == "keep"
    assert loop.judge([1.0, 1.0], [0.999, 0.999], noise=0.0007, lines=30) == "discard"
    assert loop.judge([1.0, 1.0], [0.98, 0.98], noise=0.0007, lines=30) == "keep"


def test_simpler_files_cannot_make_the_best_worse_bit_by_bit():
    notebook = loop.Notebook(None, "t")
    for number in range(200):  # each a little worse than the one before, and a line shorter
        bpb = 1 + number * 0.0003
        runs = [bpb] * 3
        if not notebook.rows or loop.judge(notebook.best().runs, runs, 0.001, lines=-1) == "keep":
            notebook.rows.append(loop.Row("", bpb, 0, "keep", "", runs, 0, ""))
    assert notebook.rows[-1].val_bpb < 1.0005


def test_the_noise_is_pooled_within_commits_and_starts_from_a_prior():
    assert loop.noise_of([[1.0], [2.0], []]) == loop.noise_of([]) == loop.PRIOR_NOISE
    # deviations of 0.1 twice and of 0.3 twice, one degree of freedom each, beside the prior's four
    expected = ((4 * loop.PRIOR_NOISE**2 + 2 * 0.01 + 2 * 0.09) / 6) ** 0.5
    assert loop.noise_of([[1.1, 0.9], [5.3, 4.7], [3.0]]) == pytest.approx(expected)


def test_the_reported_gain_is_less_than_the_means_say_and_never_below_nothing():
    gain, error = loop.gain_of([1.0, 1.0], [0.9, 0.9], noise=0.01)
    assert error == pytest.approx(0.01) and gain == pytest.approx(0.1 - loop.LUCK * 0.01)
    assert loop.gain_of([1.0], [0.999], noise=0.01)[0] == 0


def test_code_is_counted_without_comments_and_layout():
    assert loop.statements("'''doc'''\na = 1\n\n# b\nc = f(\n    1,\n    2,\n)\n") == loop.statements("a = 1; c = f(1, 2)") == 2


# ---- in a night


def edit(width, idea="an idea"):
    return block("STRANGE = 0", f"STRANGE = {width}", idea)


def test_the_baseline_runs_again_twice_early_in_the_night(seeded):
    seeded.offline("--experiments", 7)
    row, log = seeded.rows()[0], seeded.git("log", "--first-parent", "--reverse", "--format=%s").splitlines()
    assert row["runs"] == "1.015625,1.016625,1.017625" and row["val_bpb"] == "1.016625"
    assert log[2] == "keep: baseline" and [number for number, line in enumerate(log) if line.startswith("repeat: baseline")] == [4, 7]
    assert seeded.status() == "" and len(seeded.rows()) == 8


def test_every_run_has_a_seed_of_its_own(seeded):
    seeded.offline("--experiments", 6)
    used = list(seeds(seeded).values())
    assert len(used) == len(set(used)) and len(used) == sum(len(row["runs"].split(",")) for row in seeded.rows())
    assert {split for _, split in used} == {"val"}


def test_a_gain_within_the_noise_is_run_again_and_the_row_is_the_mean(seeded, server):
    seeded.online(server, "--experiments", 3)  # the server has nothing to say yet: the baseline, three times, and rows of no edit
    server.replies += [block("WIDTH = 64", "WIDTH = 65", "slightly wider")]
    seeded.online(server, "--experiments", 1)
    row = seeded.rows()[-1]
    runs = [float(run) for run in row["runs"].split(",")]
    assert row["description"] == "slightly wider" and runs == [round(1 + 1 / 65 + (400 + n) % 7 / 1000, 6) for n in range(len(runs))]
    assert float(row["val_bpb"]) == pytest.approx(sum(runs) / len(runs), abs=1e-6)


def test_killed_between_two_runs_of_an_experiment_it_goes_on_with_the_second(project, server):
    slow = SEEDED.replace("STRANGE = 0", "STRANGE = 0\nSECONDS = 0").replace("1 / WIDTH", "1 / WIDTH - STRANGE")
    project.write("train.py", slow.replace("/ 1000)", "/ 1000, SECONDS)"))
    project.commit("seeded")
    server.replies += [block("STRANGE = 0\nSECONDS = 0", "STRANGE = 0.1\nSECONDS = 1.5", "better")]
    process = project.start("--budget", "20", "--tag", "t", "--experiments", "1", OPENAI_BASE_URL=server.url)
    project.wait_for(lambda: any("SEED 101" in log.read_text() for log in project.folder.glob("runs/0001-1-*/run.log")))
    process.kill()
    process.wait()
    project.online(server, "--experiments", 1)
    row = project.rows()[1]
    assert row["runs"] == "0.917625,0.918625" and row["status"] == "keep" and len(server.requests) == 1
    assert "Runs: 0.917625" in project.git("show", "-s", "--format=%B", row["commit"]) and project.status() == ""
    assert list(seeds(project).values()).count(("100", "val")) == 1


def test_what_the_model_wrote_about_runs_is_left_as_it_was(seeded, server):
    server.replies += [block("WIDTH = 64", "WIDTH = 1000", "wide").replace("Because.", "Because.\nRuns: faster.")]
    seeded.online(server, "--experiments", 1)
    message = seeded.git("show", "-s", "--format=%B", seeded.rows()[1]["commit"])
    assert "\nRuns: faster.\n" in message and any(line.startswith("Runs: 1.003") for line in message.rstrip().splitlines()[-2:])


def test_an_edit_that_crashes_on_its_second_seed_is_a_crash(seeded, server):
    fails = block("STRANGE = 0", "STRANGE = 0\nassert os.environ['AUTORESEARCH_SEED'] != '101', 'unlucky'\nWIDTH = 1000", "brittle")
    server.replies += [fails]
    seeded.online(server, "--experiments", 1)
    row = seeded.rows()[1]
    assert row["status"] == "crash" and row["runs"] == "" and row["val_bpb"] == "nan" and "AssertionError: unlucky" in row["description"]


def test_a_baseline_that_fails_when_it_is_repeated_does_not_end_the_night(seeded):
    seeded.write("train.py", SEEDED.replace("STRANGE = 0", "STRANGE = 0\nassert os.environ['AUTORESEARCH_SEED'] != '1', 'unlucky'"))
    seeded.commit("unlucky")
    out = seeded.offline("--experiments", 6)
    assert "the baseline's repeat failed: AssertionError: unlucky" in out and len(seeded.rows()) == 7
    assert seeded.rows()[0]["runs"] == "1.015625"


@pytest.mark.parametrize("value", ["1" + " + 1" * 400, "[]" + ".copy()" * 190])
def test_an_edit_nested_deeper_than_python_likes_is_judged(project, server, value):
    server.replies += [block("WIDTH = 64", f"WIDTH = 128\nDEEP = {value}", "deep")]
    project.online(server, "--experiments", 1)
    assert project.rows()[1]["status"] in ("keep", "crash") and project.status() == ""


def test_a_simpler_file_is_kept_at_an_equal_result_and_a_longer_one_is_not(project, server):
    longer = block("STRANGE = 0", "STRANGE = 0\na = 1\nb = 2\nc = a + b", "longer")
    project.write("train.py", SEEDED.replace("+ seed % 7 / 1000", "+ 0"))
    project.commit("no noise")
    server.replies += [longer, block("STRANGE = 0", "", "shorter")]
    project.online(server, "--experiments", 2)
    assert [(row["status"], row["description"]) for row in project.rows()[1:]] == [("discard", "longer"), ("keep", "shorter")]


def test_the_model_and_the_person_are_told_the_noise(seeded, server):
    server.replies += [edit(1), edit(2), edit(3)]
    out = seeded.online(server, "--experiments", 3)
    assert "Another seed alone moves val_bpb by about 0.0007" in server.requests[1]["messages"][1]["content"]
    assert "noise of a run 0.0007" in out and "the baseline again: 1.016625" in out
    assert re.search(r"baseline 1\.0161\nnoise of a run 0\.\d{4}", out)


# ---- the audit


@pytest.fixture
def improved(seeded, server):
    server.replies += [block("WIDTH = 64", "WIDTH = 1000", "very wide")]
    seeded.online(server, "--experiments", 1)
    return seeded


def test_the_audit_runs_baseline_and_best_on_fresh_seeds_and_the_test_split(improved):
    before = improved.git("rev-parse", "autoresearch/t")
    used = set(seeds(improved).values())
    out = improved.run("--audit")
    audit = {name: seed for name, seed in seeds(improved).items() if seed[1] == "test"}
    assert len(audit) == 2 * loop.AUDIT_PAIRS and len(set(audit.values())) == loop.AUDIT_PAIRS
    assert not {seed for seed, _ in used} & {seed for seed, _ in audit.values()}
    assert "audited gain 0.0146, 95 % interval 0.0146 to 0.0146" in out and "the night's own figures: 0.0" in out
    assert improved.git("rev-parse", "autoresearch/t") == before and improved.status() == ""


def test_an_audit_that_was_stopped_goes_on(improved):
    process = improved.start("--audit")
    improved.wait_for(lambda: len(list(improved.folder.glob("runs/9*/run.log"))) >= 3)
    process.send_signal(signal.SIGTERM)
    first = process.communicate()[0]
    out = improved.run("--audit")
    assert 10 - 3 <= out.count("  audit ") + first.count("  audit ") <= 11 and "audited gain" in out
    assert out.count("  audit ") < 10
    again = improved.run("--audit")
    assert again.count("  audit ") == 0 and "audited gain 0.0146" in again


def test_an_audit_before_anything_is_kept_says_so(seeded):
    assert "holds no kept experiment yet" in seeded.run("--audit", code=2)
    seeded.offline("--hours", "0.00001")
    assert "holds no kept experiment yet" in seeded.run("--audit", code=2)


def test_an_audit_of_a_deleted_branch_of_this_name_is_not_counted(improved, server):
    improved.run("--audit")
    improved.git("checkout", "--quiet", "main")
    improved.git("branch", "-D", "autoresearch/t")
    server.replies += [block("WIDTH = 64", "WIDTH = 500", "wide")]
    improved.online(server, "--experiments", 1)
    out = improved.run("--audit")
    assert out.count("  audit ") == 2 * loop.AUDIT_PAIRS and "audited gain 0.0136" in out


def test_a_run_of_the_audit_that_fails_names_its_log(seeded, server):
    fails = "STRANGE = 0\nassert os.environ['AUTORESEARCH_SPLIT'] == 'val', 'only val'\nWIDTH = 1000"
    server.replies += [block("STRANGE = 0", fails, "brittle")]
    seeded.online(server, "--experiments", 1)
    out = seeded.run("--audit", code=1)
    assert "failed: AssertionError: only val" in out and "run.log" in out and "the same command tries them again" in out


def test_an_audit_with_a_failed_run_reports_the_other_pairs(seeded, server):
    unlucky = f"STRANGE = 0\nassert os.environ['AUTORESEARCH_SEED'] != '{loop.AUDIT_SEED + 1}', 'unlucky'\nWIDTH = 1000"
    server.replies += [block("STRANGE = 0", unlucky, "brittle")]
    seeded.online(server, "--experiments", 1)
    out = seeded.run("--audit")
    assert "failed: AssertionError: unlucky" in out and "the same 4 fresh seeds" in out and "audited gain 0.0146" in out


def test_the_interval_of_the_audit_is_students():
    pairs = [(1.0, 0.99), (1.1, 1.07), (1.0, 0.98), (1.2, 1.18), (1.1, 1.08)]  # gains 0.01, 0.03, 0.02, 0.02, 0.02
    report = " ".join(loop.audit_report(pairs, 1.05, 1.02, 0.025))
    assert "baseline 1.0800, best 1.0600" in report
    assert "audited gain 0.0200, 95 % interval 0.0112 to 0.0288" in report  # 2.78 x 0.00707 / sqrt(5)
    assert "0.0300 between the means of its runs, 0.0250 less luck" in report
    assert "it is worse" in " ".join(loop.audit_report([(a, b + 0.1) for a, b in pairs], 1, 1, 0))
    assert "no gain at all" in " ".join(loop.audit_report([(1.0, 1.1), (1.1, 1.0), (1, 1), (1, 1), (1, 1)], 1, 1, 0))
