"""Claims about judging in a night: pairs on common seeds, the noise, a machine that is too busy, and the audit in the morning."""

import os
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


def runs_of(row):
    return loop.read_runs(row["runs"])


def edit(width, idea="an idea"):
    return block("STRANGE = 0", f"STRANGE = {width}", idea)


# ---- common seeds


def test_run_k_of_every_experiment_has_seed_k(seeded):
    seeded.verdicts("again", "again", "discard")
    seeded.offline("--experiments", 3)
    assert [len(runs_of(row)) for row in seeded.rows()] == [3] * 4
    ran = sorted((name.split("-")[:2], seed, split) for name, (seed, split) in seeds(seeded).items())
    assert ran == [([f"{number:04}", f"{seed}"], f"{seed}", "val") for number in range(4) for seed in range(3)]


def test_the_file_that_was_edited_runs_on_a_seed_that_it_lacks_before_the_candidate_does(seeded, server):
    seeded.verdicts("again", "again", "discard")
    server.replies += [edit(1, "one"), edit(2, "two")]
    out = seeded.online(server, "--experiments", 2)
    ran = re.findall(r"^\S+  (#\d \w+|run \d of [^:]*: [^:\n]+)", out, re.MULTILINE)
    assert ran == [
        "#0 baseline", "#1 one", "run 2 of what it edited, for comparison: baseline", "run 2 of up to 3: #1 one",
        "run 3 of what it edited, for comparison: baseline", "run 3 of up to 3: #1 one",
        "#2 two", "run 2 of up to 3: #2 two", "run 3 of up to 3: #2 two",
    ]  # fmt: skip
    baseline, log = seeded.rows()[0], seeded.git("log", "--first-parent", "--reverse", "--format=%s").splitlines()
    assert runs_of(baseline) == [1.015625, 1.016625, 1.017625] and baseline["val_bpb"] == "1.015625" and baseline["change"] == ""
    assert log[3:] == ["keep: baseline", "repeat: baseline, 1.016625", "repeat: baseline, 1.017625", "discard: one", "discard: two"]
    assert seeded.status() == ""


def test_a_metric_is_the_parents_plus_the_change_whatever_seeds_they_ran_on(seeded, server):
    seeded.verdicts("again", "keep")
    for before, after in ((64, 65), (65, 80)):
        server.replies += [block(f"WIDTH = {before}", f"WIDTH = {after}", "wider")]
        seeded.online(server, "--experiments", 1)
    seeded.verdicts("discard")
    server.replies += [block("WIDTH = 80", "WIDTH = 16", "narrow")]
    seeded.online(server, "--experiments", 1)
    rows = seeded.rows()
    assert [len(runs_of(row)) for row in rows] == [2, 2, 2, 1]
    true = [1 + 1 / width for width in (64, 65, 80, 16)]
    assert [float(row["val_bpb"]) for row in rows] == pytest.approx(true, abs=2e-6)
    assert [row["change"].partition("+-")[0] for row in rows] == ["", "-0.0002", "-0.0029", "+0.0500"]


def test_an_experiment_is_compared_with_the_last_kept_row_also_where_an_earlier_one_was_lower(seeded, server):
    seeded.verdicts("keep")
    for before, after in ((64, 32), (32, 40)):
        server.replies += [block(f"WIDTH = {before}", f"WIDTH = {after}")]
        seeded.online(server, "--experiments", 1)
    assert seeded.rows()[2]["change"] == "-0.0063+-0.0007" and "WIDTH = 40" in seeded.read("train.py")


GATED = """\
import os
import pathlib
import prepare
import time
STRANGE = 0
if __name__ == "__main__":
    seed = int(os.environ["AUTORESEARCH_SEED"])
    print("SEED", seed, os.environ["AUTORESEARCH_SPLIT"], flush=True)
    while seed == 1 and not pathlib.Path(FOLDER, f"open-{STRANGE}").exists():
        time.sleep(0.01)
    prepare.finish(1.1 - STRANGE / 100 + seed / 1000)
"""


@pytest.mark.parametrize("opened, killed_in", [((), "0000-1-*"), ((0,), "0001-1-*")])
def test_killed_within_the_parents_run_or_between_it_and_its_own_nothing_is_lost(project, server, opened, killed_in):
    folder = project.folder.parent
    project.write("train.py", GATED.replace("FOLDER", repr(str(folder))))
    project.verdicts("again", "keep")
    for strange in opened:
        (folder / f"open-{strange}").touch()
    server.replies += [edit(1, "better")]
    process = project.start("--budget", "20", "--tag", "t", "--experiments", "1", OPENAI_BASE_URL=server.url)
    project.wait_for(lambda: "SEED 1" in next(project.folder.glob(f"runs/{killed_in}/run.log")).read_text())
    process.kill()
    process.communicate()
    assert "Runs: 1.090000" in project.git("show", "-s", "--format=%B", "refs/autoresearch/t/running")
    for strange in (0, 1):
        (folder / f"open-{strange}").touch()
    out = project.online(server, "--experiments", 1)
    baseline, row = project.rows()
    assert baseline["runs"] == "1.100000,1.101000" and row["runs"] == "1.090000,1.091000" and row["status"] == "keep"
    assert len(server.requests) == 1 and "  #1 better" not in out and out.count("for comparison") == 1 - len(opened)
    assert sorted(seed for seed, _ in seeds(project).values()) == ["0", "0", "1", "1"] and project.status() == ""


def test_where_the_parent_fails_on_a_seed_what_is_in_doubt_is_not_kept_and_it_is_not_asked_again(seeded, server):
    unlucky = "STRANGE = 0\nassert os.environ['AUTORESEARCH_SEED'] != '1', 'unlucky'"
    seeded.write("train.py", SEEDED.replace("STRANGE = 0", unlucky))
    seeded.verdicts("again", "keep")
    server.replies += [edit(1), edit(2)]
    out = seeded.online(server, "--experiments", 2)
    assert out.count("the best so far fails on seed 1: AssertionError: unlucky; what is in doubt isn't kept") == 1
    assert out.count("for comparison") == 1 and [row["status"] for row in seeded.rows()] == ["keep", "discard", "discard"]
    assert [len(runs_of(row)) for row in seeded.rows()] == [1, 1, 1]


def test_an_edit_that_crashes_on_its_second_seed_is_a_crash(seeded, server):
    seeded.verdicts("again", "keep")
    server.replies += [block("STRANGE = 0", "STRANGE = 0\nassert os.environ['AUTORESEARCH_SEED'] != '1', 'unlucky'", "brittle")]
    seeded.online(server, "--experiments", 1)
    baseline, row = seeded.rows()
    assert row["status"] == "crash" and row["runs"] == row["change"] == "" and row["val_bpb"] == "nan"
    assert "AssertionError: unlucky" in row["description"] and len(runs_of(baseline)) == 2


def test_what_the_model_wrote_about_runs_is_left_as_it_was(seeded, server):
    seeded.verdicts("again", "keep")
    server.replies += [block("WIDTH = 64", "WIDTH = 1000", "wide").replace("Because.", "Because.\nRuns: faster.")]
    seeded.online(server, "--experiments", 1)
    message = seeded.git("show", "-s", "--format=%B", seeded.rows()[1]["commit"])
    assert "\nRuns: faster.\n" in message and any(line.startswith("Runs: 1.001") for line in message.rstrip().splitlines()[-3:])


# ---- the noise


def test_the_prior_of_the_noise_is_the_rulers_and_is_noted_on_the_branch(seeded):
    facts = seeded.read("prepare.py").replace("0.0007", "float((Path.home() / 'noise').read_text())")
    seeded.write("prepare.py", facts)
    seeded.verdicts("discard")
    for noise in ("0.002", "0.5"):
        (seeded.folder.parent / "noise").write_text(noise)
        seeded.offline("--experiments", 1)
    assert [row["change"].partition("+-")[2] for row in seeded.rows()] == ["", "0.0020", "0.0020"]
    assert "Noise: 0.002\n" in seeded.git("show", "-s", "--format=%B", seeded.rows()[0]["commit"])


def test_the_model_and_the_person_are_told_changes_with_their_errors_and_the_noise(seeded, server):
    seeded.verdicts("discard")
    server.replies += [block("WIDTH = 64", "WIDTH = 32", "narrow"), "no edit", "no edit", "no edit"]
    seeded.online(server, "--experiments", 2)
    seeded.verdicts("keep")
    server.replies += [block("WIDTH = 64", "WIDTH = 128", "wide")]
    out = seeded.online(server, "--experiments", 1)
    assert "keep     1.0078    -0.0078+-0.0007  wide" in out and "noise of a difference 0.0007" in out
    server.replies += [edit(1)]
    seeded.online(server, "--experiments", 1)
    told = server.requests[-1]["messages"][1]["content"]
    for line in (
        "On one seed a change is off by about 0.0007", "  1.015625          baseline\n", "  -0.0078 +-0.0007  wide\n",
        "  +0.0156 +-0.0007  narrow\n", "  crash             no edit [refused: ",
    ):  # fmt: skip
        assert line in told, line


@pytest.mark.parametrize("value", ["1" + " + 1" * 400, "[]" + ".copy()" * 190])
def test_an_edit_nested_deeper_than_python_likes_is_judged(project, server, value):
    server.replies += [block("WIDTH = 64", f"WIDTH = 128\nDEEP = {value}", "deep")]
    project.online(server, "--experiments", 1)
    row = project.rows()[1]  # as Python can stand it or not
    assert row["description"] == "deep" or row["status"] == "crash" and "the loop fails" not in row["description"]


def test_the_judge_is_told_by_how_much_an_edit_makes_the_file_larger(project, server):
    tells = "def judge(differences, noise, size):\n    print('SIZE', size)\n    return 'discard'\n\n\ndef not_asked("
    project.write("loop.py", project.read("loop.py").replace("def judge(", tells))
    project.commit("a judge that tells")
    server.replies += [block("DEPTH = 4", "DEPTH = 5"), block("SECONDS = 0.0", "SECONDS = 0.0\nMORE = 1"), block("WIDTH = 64\n", "")]
    out = project.online(server, "--experiments", 3)
    sizes = [float(size) for size in re.findall(r"^SIZE (\S+)", out, re.MULTILINE)]
    assert sizes[0] == 0 < sizes[1] < 0.1 and len(sizes) == 2  # the third crashes: nothing to judge


# ---- the machine's share: a clock that counts work


def short_once(project, trained=83.0, seed=0, times=1):
    """train.py whose first runs on a seed that edits STRANGE say that they got less than their training."""
    count = project.folder.parent / "short"
    code = f"""\
import os
import pathlib
import prepare
STRANGE = 0
if __name__ == "__main__":
    print("SEED", os.environ["AUTORESEARCH_SEED"], os.environ["AUTORESEARCH_SPLIT"])
    count = pathlib.Path({str(count)!r})
    tried = len(count.read_text()) if count.exists() else 0
    short = WHEN and os.environ["AUTORESEARCH_SEED"] == "{seed}" and tried < {times}
    if short:
        count.write_text("x" * (tried + 1))
    prepare.finish(0.5 if short else 1.1 - STRANGE / 100, trained={trained} if short else 98.0)
"""
    project.write("train.py", code.replace("WHEN", "STRANGE"))
    project.constants(WAITS="(0.01, 0.02)")
    return code


def test_a_run_that_got_less_than_its_training_is_not_judged_and_runs_again(project, server):
    short_once(project)
    server.replies += [edit(1, "better")]
    out = project.online(server, "--experiments", 1)
    assert out.count("the machine was busy: the run got 83 % of its training") == 1 and out.count("  #1 better") == 2
    assert [(row["status"], row["runs"]) for row in project.rows()] == [("keep", "1.100000"), ("keep", "1.090000")]


def test_a_short_run_of_the_parents_is_made_again_too(project, server):
    code = short_once(project, seed=1)
    project.write("train.py", code.replace("WHEN", "not STRANGE"))
    project.verdicts("again", "keep")
    server.replies += [edit(1, "better")]
    out = project.online(server, "--experiments", 1)
    assert out.count("for comparison") == 2 and project.rows()[0]["runs"] == "1.100000,1.100000"
    assert project.rows()[1]["status"] == "keep" and project.rows()[1]["runs"] == "1.090000,1.090000"


def test_a_short_run_of_the_baseline_is_waited_for_and_the_line_says_what_helps(project, server):
    code = short_once(project, times=4)
    project.write("train.py", code.replace("WHEN", "True"))
    project.commit("a baseline that is short")
    server.replies += [edit(1, "better")]
    out = project.online(server, "--experiments", 1)
    assert out.count("the baseline runs again; a quieter machine helps, or a larger --budget") == 4
    assert [row["runs"] for row in project.rows()] == ["1.100000", "1.090000"] and project.status() == ""


def test_what_is_always_short_while_the_best_so_far_is_not_becomes_a_row(project, server):
    short_once(project, times=99)
    server.replies += [edit(1, "slow to compile")]
    project.online(server, "--experiments", 1)
    row = project.rows()[1]
    assert row["status"] == "crash" and "[the machine was busy: the run got 83 % of its training]" in row["description"]


@pytest.mark.parametrize("times, code", [(2, 0), (99, 1)])
def test_a_short_run_of_the_audit_is_made_again_a_few_times(project, server, times, code):
    source = short_once(project, seed=loop.AUDIT_SEED, times=times)
    project.write("train.py", source.replace("WHEN", "STRANGE"))
    server.replies += [edit(1, "better")]
    project.online(server, "--experiments", 1)
    project.constants(**{"AUDIT_PAIRS, AUDIT_SEED": f"2, {loop.AUDIT_SEED}"})
    out = project.run("--audit", code=code)
    assert out.count("audit 1 of 2: better") == 3
    assert ("audited gain 0.0100" in out) == (times == 2) == ("failed: the machine was busy" not in out)


WORDS = "' '.join([name + '=' + os.environ.get(name, 'none') for name in ('AUTORESEARCH_PACE', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS')])"


def told(project):
    """What each run printed of its environment."""
    return [re.search("^TOLD (.*)", log.read_text(), re.MULTILINE)[1] for log in sorted(project.folder.glob("runs/*/run.log"))]


def telling(project, expression):
    tells = f"def main():\n    import os\n    print('TOLD', {expression})"
    project.write("train.py", project.read("train.py").replace("def main():", tells))
    project.commit("telling")


def test_a_run_on_a_cpu_has_one_thread_and_the_pace_that_the_branch_began_with(project):
    telling(project, WORDS)
    project.write("prepare.py", project.read("prepare.py").replace("0.0101", "float((Path.home() / 'pace').read_text())"))
    project.commit("a pace that changes")
    for pace in ("0.0125", "0.5"):
        (project.folder.parent / "pace").write_text(pace)
        project.offline("--experiments", 1)
    assert len(told(project)) == 3
    assert set(told(project)) == {"AUTORESEARCH_PACE=0.0125 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1"}


TOKENED = """\
import os
import prepare
WIDTH = 1000
if __name__ == "__main__":
    seed = int(os.environ["AUTORESEARCH_SEED"])
    print("TOLD", WIDTH, seed, os.environ["AUTORESEARCH_SPLIT"], os.environ.get("AUTORESEARCH_TOKENS"))
    prepare.finish(1 - WIDTH / 10000, tokens=WIDTH + seed)
"""


def test_a_run_is_told_how_many_tokens_the_file_that_it_edited_trained_on_with_its_seed(project, server):
    project.write("train.py", TOKENED)
    project.verdicts("again", "keep")
    for before, after in ((1000, 2000), (2000, 3000)):  # each a session of its own: what was trained on is on the branch
        server.replies += [block(f"WIDTH = {before}", f"WIDTH = {after}", "wider")]
        project.online(server, "--experiments", 1)
    project.constants(**{"AUDIT_PAIRS, AUDIT_SEED": f"2, {loop.AUDIT_SEED}"})
    project.run("--audit")
    # The baseline's are what the clock gave it in a first run, on seed 0.
    assert sorted(line for line in told(project) if " val " in line) == [
        "1000 0 val 1000", "1000 1 val 1000", "2000 0 val 1000", "2000 1 val 1001", "3000 0 val 2000", "3000 1 val 2001",
    ]  # fmt: skip
    assert {line.split()[-1] for line in told(project) if " test " in line} == {"None"}


def test_where_its_parent_lacks_the_seed_a_run_is_told_what_the_file_itself_trained_on(project, server):
    project.write("train.py", TOKENED)
    project.verdicts("keep")
    server.replies += [block("WIDTH = 1000", "WIDTH = 2000", "wider"), block("WIDTH = 2000", "WIDTH = 3000", "wider")]
    project.online(server, "--experiments", 1)
    project.verdicts("again", "keep")
    project.online(server, "--experiments", 1)
    assert "2000 1 val 2000" in {line.strip() for line in told(project)}


def test_a_run_on_a_gpu_has_no_pace_and_all_threads(project):
    telling(project, WORDS)
    project.write("prepare.py", project.read("prepare.py").replace("cpu, stand-in", "NVIDIA H100").replace("0.0101", "None"))
    project.commit("a GPU")
    project.offline("--experiments", 1)
    assert set(told(project)) == {"AUTORESEARCH_PACE=none OMP_NUM_THREADS=none MKL_NUM_THREADS=none"}
    assert "Pace" not in project.git("show", "-s", "--format=%B", project.rows()[0]["commit"])


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_a_run_and_the_rulers_facts_have_the_last_core_and_the_loop_keeps_its_own(project):
    telling(project, "os.sched_getaffinity(0)")
    seen = f"open({str(project.folder.parent / 'core')!r}, 'w').write(repr(os.sched_getaffinity(0)))"
    project.write("prepare.py", project.read("prepare.py").replace("def facts():", f"def facts():\n    {seen}"))
    project.commit("telling facts")
    project.offline("--experiments", 1)
    before = os.sched_getaffinity(0)
    assert set(told(project)) == {repr({max(before)})} == {(project.folder.parent / "core").read_text()}
    with loop.one_core():
        assert os.sched_getaffinity(0) == {max(before)}
    assert os.sched_getaffinity(0) == before


def test_a_summary_is_signed_for_the_pace_too(project, server):
    server.replies += [block("def main():", "def main():\n    prepare.os.environ['AUTORESEARCH_PACE'] = '9'", "a slower machine")]
    project.online(server, "--experiments", 1)
    assert "not signed by the ruler for this seed, budget, data, pace and tokens" in project.rows()[1]["description"]


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
    improved.wait_for(lambda: len(list(improved.folder.glob("runs/*-9*/run.log"))) >= 3)
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
    report = " ".join(loop.audit_report(pairs, 1.05, 1.02, 0.025, 0.002))
    assert "baseline 1.0800, best 1.0600" in report
    assert "audited gain 0.0200, 95 % interval 0.0112 to 0.0288" in report  # 2.78 x 0.00707 / sqrt(5)
    assert "0.0300 by its rows, 0.0250 +- 0.0020 with luck taken off" in report
    assert "it is worse" in " ".join(loop.audit_report([(a, b + 0.1) for a, b in pairs], 1, 1, 0, 0))
    assert "no gain at all" in " ".join(loop.audit_report([(1.0, 1.1), (1.1, 1.0), (1, 1), (1, 1), (1, 1)], 1, 1, 0, 0))
