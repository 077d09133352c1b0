"""The loop as its user starts it: real processes, real git, a real chat server; stand-ins only for training."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from check_night import survivors
from conftest import ROOT, block
from rich.console import Console

import loop

BETTER = block("WIDTH = 64", "WIDTH = 128", "twice the width")
WORSE = block("DEPTH = 4", "DEPTH = 1", "one layer")
CRASHING = block("def main():", "def main():\n    raise RuntimeError('shapes (2, 3) and [bold](4, 5)[/bold]')", "a crash")


# ---- a night


def test_a_night_keeps_what_is_better_and_reverts_the_rest(project, server):
    server.replies += [BETTER, WORSE, CRASHING]
    project.online(server, "--experiments", 3)
    rows = project.rows()
    assert [row["status"] for row in rows] == ["keep", "keep", "discard", "crash"]
    assert [row["description"] for row in rows[:3]] == ["baseline", "twice the width", "one layer"]
    assert "WIDTH = 128" in project.read("train.py") and "DEPTH = 4" in project.read("train.py")
    assert rows[1]["val_bpb"] == "1.057813" and {*rows[1]["runs"].split(",")} == {"1.057813"} and rows[1]["memory_gb"] == "0.5"
    assert rows[0]["change"] == "" and rows[1]["change"].startswith("-0.0078+-0.000")
    assert rows[2]["runs"] == rows[2]["val_bpb"] == "1.087813"  # a clear loss is not run again
    assert rows[2]["change"].startswith("+0.0300+-0.000")
    assert rows[3]["val_bpb"] == "nan" and rows[3]["runs"] == rows[3]["change"] == "" and "RuntimeError: shapes" in rows[3]["description"]
    assert [row["llm_tokens"] for row in rows] == ["0", "100", "100", "100"]
    assert project.status() == ""


def test_every_experiment_can_be_shown_and_the_first_parents_are_the_lab_notebook(project, server):
    server.replies += [BETTER, WORSE, CRASHING]
    project.online(server, "--experiments", 3)
    log = project.git("log", "--first-parent", "--format=%s", "autoresearch/t").splitlines()
    notebook = [line for line in log if not line.startswith("repeat: ")]
    assert notebook[:2] == ["crash: " + project.rows()[3]["description"], "discard: one layer"]
    assert notebook[2:] == ["keep: twice the width", "keep: baseline", "start"]
    for row, change in zip(project.rows()[1:], ["WIDTH = 128", "DEPTH = 1", "raise RuntimeError"], strict=True):
        shown = project.git("show", row["commit"])
        assert f"+{change}" in shown.replace("+    raise", "+raise") and "results.tsv" not in shown
    message = project.git("show", "-s", "--format=%B", project.rows()[1]["commit"])
    assert "Because." in message and "Model: local-model" in message


def test_results_begin_with_the_columns_that_the_communitys_tools_read(project):
    project.offline("--experiments", 1)
    assert project.read("results.tsv").startswith("commit\tval_bpb\tmemory_gb\tstatus\tdescription\t")
    assert project.read("results.tsv") == project.git("show", "autoresearch/t:results.tsv")


def test_the_baseline_carries_what_its_numbers_depend_on(project):
    project.offline("--experiments", 1)
    trailers = loop.read_trailers(project.git("show", "-s", "--format=%B", project.rows()[0]["commit"]))
    assert trailers["Data"] == "0123456789ab" and trailers["Budget"] == "20"
    assert trailers["Device"] == "cpu, stand-in" and trailers["Torch"] == "0" and len(trailers["Ruler"]) == 12
    assert trailers["Noise"] == "0.0007" and trailers["Pace"] == "0.0101"


def test_offline_needs_no_key_and_goes_the_same_way(project):
    project.offline("--experiments", 8)
    assert len(project.rows()) == 9 and project.status() == ""
    assert {"keep", "discard"} <= {row["status"] for row in project.rows()}


def test_offline_what_was_tried_is_passed_over_without_a_word(project):
    project.write("train.py", "import prepare\nWIDE = False\nprepare.finish(2.0 + WIDE)\n")
    project.commit("one constant")
    out = project.offline("--experiments", 2)
    assert "reply refused" not in out and "[refused: This very code was tried" in project.rows()[2]["description"]


def test_the_first_screen_says_how_long_it_takes_and_the_last_where_the_results_are(project):
    out = project.offline("--experiments", 1)
    assert "first the baseline (two runs of at most 20 s)" in out and "180 or more an hour" in out
    assert "results.tsv on branch autoresearch/t" in out and "git show COMMIT" in out


def test_a_new_tag_starts_at_head_with_an_empty_results_tsv(project):
    project.offline("--experiments", 2)
    project.run("--offline", "--budget", "20", "--tag", "second", "--experiments", "1")
    assert len(project.rows("autoresearch/second")) == 2 and len(project.rows()) == 3
    assert project.status() == ""


def test_the_same_command_goes_on_on_the_branch_that_is_checked_out(project):
    project.offline("--experiments", 2)
    project.run("--offline", "--experiments", "2")
    assert len(project.rows()) == 5
    project.git("checkout", "--quiet", "main")
    project.offline("--experiments", 1)
    assert len(project.rows()) == 6 and project.git("branch", "--show-current").strip() == "autoresearch/t"


def test_hours_stop_the_loop(project):
    project.offline("--hours", "0.00001")
    assert len(project.rows()) == 1


def test_a_project_in_a_folder_of_a_larger_repository_works_the_same(project):
    inner = project.folder / "inner"
    inner.mkdir()
    for name in ("loop.py", "train.py", "prepare.py", "program.md", "results.tsv"):
        (project.folder / name).rename(inner / name)
    project.commit("move")
    project.folder = inner
    project.offline("--experiments", 3)
    assert project.git("show", "autoresearch/t:./results.tsv").count("\n") == 5 and project.status() == ""


# ---- what the model sees


def test_the_prompt_begins_with_what_never_changes_and_holds_program_code_and_history(project, server):
    server.replies += [BETTER, WORSE, CRASHING]
    project.online(server, "--experiments", 3)
    project.online(server, "--experiments", 1)
    first, last = server.requests[0], server.requests[3]
    assert first["messages"][0] == last["messages"][0] and first["messages"][0]["role"] == "system"
    text = last["messages"][1]["content"]
    assert text.startswith("A run has 20 s on this device: cpu, stand-in.")
    assert text.index("Lower val_bpb.") < text.index("WIDTH = 128") < text.index("Results so far") < text.index("one layer")
    assert "twice the width" in text and "RuntimeError: shapes" in text


def test_program_md_is_read_anew_before_every_proposal_and_committed_with_the_experiment(project, server):
    def steer(request):
        project.write("program.md", "# The goal\nTry depth.\n")
        return BETTER

    server.replies += [steer, BETTER, WORSE]
    project.online(server, "--experiments", 2)
    assert "Try depth." in server.requests[1]["messages"][1]["content"]
    assert "Try depth." in project.git("show", f"{project.rows()[2]['commit']}:program.md")
    assert project.status() == ""


def test_a_program_md_that_the_person_commits_in_mid_run_stays(project, server):
    commits = f"""def main():
    import pathlib, subprocess
    pathlib.Path({str(project.folder)!r}, 'program.md').write_text('# The goal' + chr(10) + 'Try heads.' + chr(10))
    who = ['-c', 'user.name=a', '-c', 'user.email=b']
    subprocess.run(['git', *who, 'commit', '-qam', 'newer'], cwd={str(project.folder)!r}, check=True)"""
    server.replies += [block("def main():", commits, "in mid-run"), BETTER, WORSE]
    out = project.online(server, "--experiments", 2)
    assert "Try heads." in project.git("show", "autoresearch/t:program.md") and project.status() == ""
    assert "the one made ahead is dropped" in out and "300 tokens (100 for nothing)" in out
    assert "Try heads." in server.requests[2]["messages"][1]["content"] and project.rows()[2]["description"] == "one layer"


def test_a_change_of_program_md_is_announced_and_the_prompt_says_what_ran_under_an_earlier_one(project, server):
    server.replies += [BETTER, WORSE, block("DEPTH = 4", "DEPTH = 5", "a layer")]
    assert "program.md was changed" not in project.online(server, "--experiments", 2)
    project.write("program.md", "# The goal\nTry depth.\n")
    assert "program.md was changed: the next idea follows it, and is committed with it" in project.online(server, "--experiments", 1)
    assert "the first 3 experiments ran under an earlier one" in server.requests[-1]["messages"][1]["content"]
    commits = [row["commit"] for row in project.rows()]
    under = [project.git("show", "-s", "--format=%(trailers:key=Program,valueonly)", commit).strip() for commit in commits]
    assert under == [project.git("rev-parse", f"{commit}:program.md")[:7] for commit in commits] and len(set(under)) == 2


@pytest.mark.parametrize("command", [["mv", "program.md", "goals.md"], ["rm", "-q", "program.md"]])
def test_of_a_program_md_that_the_person_takes_off_the_branch_the_last_one_holds(project, server, command):
    def take_off(request):
        project.git(*command)
        project.git("commit", "--quiet", "-m", "away with it")
        return BETTER

    server.replies += [take_off, WORSE]
    project.online(server, "--experiments", 2)
    assert "Lower val_bpb." in server.requests[1]["messages"][1]["content"]
    assert [row["description"] for row in project.rows()] == ["baseline", "twice the width", "one layer"]


def test_a_branch_without_a_program_md_goes_on_with_the_one_that_was_checked_out(project, server):
    project.offline("--experiments", 1)
    project.git("rm", "-q", "program.md")
    project.git("commit", "--quiet", "-m", "away with it")
    project.git("checkout", "--quiet", "main")
    server.replies += [BETTER]
    project.online(server, "--experiments", 1)
    assert "Lower val_bpb." in server.requests[0]["messages"][1]["content"] and len(project.rows()) == 3


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_text("  \n"), lambda path: (path.unlink(), path.mkdir())]
)
def test_a_start_with_a_broken_program_md_takes_the_committed_one(project, server, damage):
    damage(project.folder / "program.md")
    server.replies += [BETTER]
    project.online(server, "--experiments", 1)
    assert "Lower val_bpb." in server.requests[0]["messages"][1]["content"] and len(project.rows()) == 2


def test_a_program_md_deleted_in_the_night_stops_nothing(project, server):
    def delete(request):
        (project.folder / "program.md").unlink()
        return BETTER

    server.replies += [delete, WORSE]
    project.online(server, "--experiments", 2)
    assert "Lower val_bpb." in server.requests[1]["messages"][1]["content"] and len(project.rows()) == 3


def test_a_refused_reply_goes_back_with_the_reason_and_the_mended_one_is_run(project, server):
    server.replies += [block("WIDHT = 64", "WIDTH = 128"), BETTER]
    project.online(server, "--experiments", 1)
    chat = server.requests[1]["messages"]
    assert [message["role"] for message in chat] == ["system", "user", "assistant", "user"]
    assert "not in train.py" in chat[3]["content"] and "WIDTH = 64" in chat[3]["content"]
    assert project.rows()[1]["status"] == "keep" and project.rows()[1]["llm_tokens"] == "200"


def test_an_edit_that_reaches_outside_goes_back_with_the_rulers_sentence_and_costs_no_run(project, server):
    server.replies += [block("DEPTH = 4", "# outside\nDEPTH = 5"), BETTER]
    project.online(server, "--experiments", 1)
    assert "The ruler doesn't allow this: line 1, reaches outside" in server.requests[1]["messages"][3]["content"]
    assert [row["status"] for row in project.rows()] == ["keep", "keep"]


def test_code_nested_too_deeply_to_be_checked_is_refused_and_not_a_fault_of_the_loop(tmp_path):
    (tmp_path / "train.py").write_text("x = a" + ".b" * 900 + "\n")
    command = [sys.executable, ROOT / "prepare.py", "--check", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "nested too deeply" in done.stdout


def test_of_a_persons_own_edit_the_ruler_only_warns(project):
    project.offline("--experiments", 1)
    project.write("train.py", "# outside\n" + project.read("train.py").replace("WIDTH = 64", "WIDTH = 128"))
    assert "a model's edit would be refused: The ruler doesn't allow this: line 1, reaches outside" in project.offline("--experiments", 1)
    assert project.rows()[-1]["description"] == "your edit of train.py" and project.rows()[-1]["status"] == "keep"


def test_a_proposal_refused_three_times_becomes_a_row(project, server):
    out = project.online(server, "--experiments", 1)
    row = project.rows()[1]
    assert row["status"] == "crash" and row["val_bpb"] == "nan" and "refused: There is no edit" in row["description"]
    assert len(server.requests) == 3 and "3 replies refused" in out and project.status() == ""
    assert "no edit" in project.git("show", row["commit"])


TYPO = block("WIDTH = 64", "WIDTH = 128\nHALF = WIDTHS // 2", "twice the width")
MENDED = TYPO.replace("WIDTHS", "WIDTH").replace("twice the width", "mended")


def asked_to_mend(server):
    return ["Mend it" in request["messages"][1]["content"] for request in server.requests]


def test_a_crash_goes_back_and_its_repair_is_an_experiment_of_its_own_with_what_was_kept_since(project, server):
    line = next(line for line in project.read("train.py").splitlines() if "abs(DEPTH" in line)
    server.replies += [TYPO, block(line, line.replace("/ 100", "/ 200"), "less for depth"), MENDED]  # the second is kept meanwhile
    project.online(server, "--experiments", 3)
    rows = project.rows()
    assert [(row["status"], row["description"].partition(" [")[0]) for row in rows[1:]] == [
        ("crash", "twice the width"), ("keep", "less for depth"), ("keep", "mended"),
    ]  # fmt: skip
    asked = server.requests[2]["messages"][1]["content"]
    assert "+HALF = WIDTHS // 2" in asked and "NameError: name 'WIDTHS' is not defined" in asked
    assert 'Your edit "twice the width [NameError' in asked and asked_to_mend(server) == [False, False, True]
    mended = project.git("show", f"{rows[3]['commit']}:train.py")
    assert "WIDTH = 128" in mended and "HALF = WIDTH // 2" in mended and "/ 200" in mended
    assert "Repair: 1" in project.git("show", "-s", "--format=%B", rows[3]["commit"])


def test_a_repair_never_takes_out_what_was_kept_since_on_the_same_lines(project, server):
    server.replies += [TYPO, block("WIDTH = 64", "WIDTH = 256", "wider"), MENDED, MENDED.replace("WIDTH = 64", "WIDTH = 256")]
    project.online(server, "--experiments", 3)
    assert [row["description"].partition(" [")[0] for row in project.rows()[1:]] == ["twice the width", "wider", "mended"]
    assert asked_to_mend(server) == [False, False, True, True] and "WIDTH = 256" in project.read("train.py")
    assert "These SEARCH lines are not in train.py:\nWIDTH = 64" in server.requests[3]["messages"][-1]["content"]


def test_the_device_does_not_wait_for_a_repair_while_something_else_is_ready(project, server):
    """The repair comes only once the experiment that was made ahead runs."""
    ran = []

    def repair(request):
        project.wait_for(lambda: any(project.folder.glob("runs/0002-*/run.log")), 10)
        ran.append(True)
        return MENDED

    server.replies += [TYPO, WORSE, repair]
    project.online(server, "--experiments", 3)
    assert ran and [row["description"] for row in project.rows()[2:]] == ["one layer", "mended"]


def test_a_repair_is_not_forgotten_when_the_loop_is_killed_while_it_is_asked_for(project, server):
    hold = threading.Event()
    server.replies += [TYPO, block("SECONDS = 0.0", "SECONDS = 2.0", "slow one"), lambda request: hold.wait(20) and ""]
    process = project.start("--budget", "20", "--tag", "t", OPENAI_BASE_URL=server.url)
    project.wait_for(lambda: len(server.requests) == 3)
    process.kill()
    process.communicate()
    hold.set()
    server.replies += [MENDED]
    project.online(server, "--experiments", 2)
    assert [row["description"].partition(" [")[0] for row in project.rows()[1:]] == ["twice the width", "slow one", "mended"]
    assert asked_to_mend(server) == [False, False, True, True]


def test_a_repair_is_not_forgotten_nor_made_twice_when_the_loop_stops_between_experiments(project, server):
    server.replies += [TYPO, WORSE]
    project.online(server, "--experiments", 2)
    for reply in (MENDED, block("DEPTH = 4", "DEPTH = 5", "a layer")):
        server.replies += [reply]
        project.online(server, "--experiments", 1)
    assert asked_to_mend(server) == [False, False, True, False]


def test_a_crash_goes_back_for_repair_also_when_the_loop_was_stopped_in_between(project, server):
    server.replies += [block("WIDTH = 64", "WIDTH = wrong", "a typo")]
    project.online(server, "--experiments", 1)
    server.replies += [block("WIDTH = 64", "WIDTH = 128", "mended")]
    project.online(server, "--experiments", 1)
    asked = server.requests[1]["messages"][1]["content"]
    assert "Mend it" in asked and "| NameError: name 'wrong' is not defined" in asked
    assert project.rows()[2]["status"] == "keep"
    assert "| NameError" in project.git("log", "--first-parent", "--format=%b", "autoresearch/t")  # for the morning


def test_a_crashed_edit_is_shown_as_data_and_not_without_end(project, server):
    much = "\n".join(f"X{n} = '<<<<<<< SEARCH'" for n in range(1000))
    server.replies += [block("SECONDS = 0.0", f"SECONDS = 0.0\n\n{much}\nBOOM", "much"), WORSE]
    project.online(server, "--experiments", 2)
    server.replies += [MENDED]
    project.online(server, "--experiments", 1)
    request = server.requests[-1]["messages"][1]["content"].partition("each line after a |:\n")[2]
    assert 10_000 < len(request) < 20_000 and all(line.startswith("| ") for line in request.splitlines())


def test_an_edit_goes_back_for_repair_twice_at_most(project, server):
    ideas = [block("DEPTH = 4", f"DEPTH = {depth}") for depth in (1, 2, 3)]  # made while what is to be mended runs
    wrong = [block("WIDTH = 64", f"WIDTH = wrong{n}") for n in range(3)]
    server.replies += [reply for pair in zip(wrong, ideas, strict=True) for reply in pair]
    project.online(server, "--experiments", 6)
    assert [row["status"] for row in project.rows()[1:]] == ["crash", "discard"] * 3
    assert asked_to_mend(server) == [False, False, True, False, True, False]


def test_a_timeout_and_a_refusal_of_the_ruler_do_not_go_back(project, server):
    refused = block("def main():", "def main():\n    raise SystemExit('refused by the ruler: the future')", "a leak")
    server.replies += [refused, block("def main():", "def main():\n    prepare.os.kill(prepare.os.getpid(), 9)", "killed"), WORSE]
    project.online(server, "--experiments", 3)
    assert not any("Mend it" in request["messages"][1]["content"] for request in server.requests)


def test_the_next_edit_is_thought_about_while_an_experiment_runs(project, server):
    """The first run ends only when the second edit has been asked for."""
    asked = project.folder.parent / "asked"

    def second(request):
        asked.touch()
        return WORSE

    server.replies += [block("def main():", waits_for(asked), "waits"), second]
    out = project.online(server, "--experiments", 2)
    assert [row["description"] for row in project.rows()] == ["baseline", "waits", "one layer"]
    told = server.requests[1]["messages"][1]["content"]
    assert "this experiment runs, and its result isn't known yet: waits." in told and "device busy" in out
    assert len(server.requests) == 2  # after the last experiment nothing is thought about


def waits_for(file):
    """The first lines of a main() that goes on only once this file is there."""
    return f"def main():\n    import os, time\n    while not os.path.exists({str(file)!r}):\n        time.sleep(0.01)"


def waiting(project):
    """A train.py that ends only once the file that is returned is there."""
    file = project.folder.parent / "asked"
    project.write("train.py", project.read("train.py").replace("def main():", waits_for(file)))
    project.commit("waits")
    return file


def test_the_first_edit_is_thought_about_while_the_baseline_runs(project, server):
    asked = waiting(project)
    server.replies += [lambda request: asked.touch() or BETTER]
    project.online(server, "--experiments", 1)
    assert [row["description"] for row in project.rows()] == ["baseline", "twice the width"] and len(server.requests) == 1
    told = server.requests[0]["messages"][1]["content"]
    assert "None yet: this train.py is being measured" in told and "this experiment runs" not in told


def test_nothing_is_thought_about_that_no_time_is_left_for(project, server):
    project.online(server, "--hours", "0.0000001")
    assert len(project.rows()) == 1 and not server.requests


def test_a_device_whose_runs_are_longer_than_thoughts_never_waits(project, server):
    """Each request comes while the experiment before runs, which ends only then: nothing is asked for between two runs."""
    rows, folder = [], project.folder.parent

    def think(request):
        rows.append(project.read("results.tsv").count("\n") - 1)
        (folder / f"asked {len(rows)}").touch()
        return block("DEPTH = 4", f"DEPTH = {-len(rows)}", f"idea {len(rows)}")

    waits = f"while DEPTH != -5 and not Path({str(folder)!r}, f'asked {{1 - min(DEPTH, 0)}}').exists():\n        time.sleep(0.01)"
    main = f"def main():\n    import time\n    from pathlib import Path\n    {waits}"
    project.write("train.py", project.read("train.py").replace("def main():", main))
    project.commit("waits")
    server.default = think
    out = project.online(server, "--experiments", 5)
    assert rows == [0, 1, 2, 3, 4] and len(project.rows()) == 6 and "asking" not in out


def test_an_edit_made_for_one_that_is_running_is_refused_once_that_has_its_row(project, server):
    server.replies += [WORSE, WORSE, BETTER]
    project.online(server, "--experiments", 2)
    assert "was tried: discard, one layer" in server.requests[2]["messages"][-1]["content"]
    assert [row["llm_tokens"] for row in project.rows()] == ["0", "100", "200"]


def test_an_edit_made_ahead_is_applied_to_what_is_best_when_its_turn_comes(project, server):
    server.replies += [BETTER, block("DEPTH = 4", "DEPTH = 5", "a layer")]
    project.online(server, "--experiments", 2)
    assert "WIDTH = 64" in server.requests[1]["messages"][1]["content"]
    assert "WIDTH = 128" in project.read("train.py") and "DEPTH = 5" in project.read("train.py")


def whole(source):
    return f"IDEA: the whole file\n```python\n{source}```\n"


@pytest.mark.parametrize(
    "ahead, reason",
    [
        (lambda source: block("WIDTH = 64", "WIDTH = 65", "not that wide"), "not in train.py"),
        (lambda source: whole("# prepare.Run(\n" + source.replace("DEPTH = 4", "DEPTH = 5")), "made from an earlier train.py"),
    ],
)
def test_an_edit_made_ahead_that_no_longer_applies_is_asked_for_anew(project, server, ahead, reason):
    server.replies += [BETTER, ahead(project.read("train.py")), WORSE]
    out = project.online(server, "--experiments", 2)
    chat = server.requests[2]["messages"]
    assert [message["role"] for message in chat] == ["system", "user", "assistant", "user"]
    assert "WIDTH = 128" in chat[1]["content"] and reason in chat[3]["content"] and "reply refused" in out
    assert [row["description"] for row in project.rows()] == ["baseline", "twice the width", "one layer"]
    assert [row["llm_tokens"] for row in project.rows()] == ["0", "100", "200"] and "for nothing" not in out
    assert "WIDTH = 128" in project.read("train.py")


def test_of_a_model_that_thinks_longer_than_a_run_the_loop_says_once_that_it_is_bound_by_it(project, server):
    bound, said = "local-model takes longer to answer than a run takes: the loop is bound by the model", threading.Event()

    def slowly(depth):
        return lambda request: said.wait(30) and block("DEPTH = 4", f"DEPTH = {depth}")

    server.replies += map(slowly, (1, 2, 3))
    process = project.start("--budget", "20", "--tag", "t", "--experiments", "3", OPENAI_BASE_URL=server.url)
    project.read_until(process, bound)
    said.set()
    out, _ = process.communicate(timeout=300)
    assert bound not in out and len(project.rows()) == 4


@pytest.mark.parametrize("seconds", [0, 20])
def test_the_loop_can_be_stopped_while_a_request_is_in_flight(project, server, seconds):
    """While the device waits for the reply, and while it runs."""
    slow(project, seconds)
    hold = threading.Event()
    server.default = lambda request: hold.wait(60) and ""
    process = project.start("--budget", "30", "--tag", "t", OPENAI_BASE_URL=server.url)
    project.wait_for(lambda: server.requests and running(project) and (seconds or project.rows()))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    hold.set()
    assert process.returncode == 0 and "Traceback" not in err and "results.tsv on branch" in out
    assert not survivors(project.folder)


def test_a_reply_that_comes_after_its_request_was_thrown_away_is_counted_and_not_used(project, server):
    def late(request):
        project.write("program.md", "# The goal\nTry depth.\n")
        project.wait_for(lambda: len(server.requests) == 3)
        return WORSE

    def anew(request):
        time.sleep(0.5)  # the late one is there first
        return block("DEPTH = 4", "DEPTH = 5", "a layer")

    server.replies += [BETTER, late, anew]
    out = project.online(server, "--experiments", 2)
    assert [row["description"] for row in project.rows()] == ["baseline", "twice the width", "a layer"]
    assert "program.md was changed" in out and "300 tokens (100 for nothing)" in out
    assert [row["llm_tokens"] for row in project.rows()] == ["0", "100", "100"]


def test_what_was_thought_for_an_experiment_that_is_not_begun_any_more_is_counted(project, server):
    waiting(project)
    server.replies += [BETTER]
    process = project.start("--budget", "60", "--tag", "t", OPENAI_BASE_URL=server.url)
    project.read_until(process, "next: twice the width")
    process.terminate()
    out, _ = process.communicate()
    assert len(project.rows()) == 0 and "100 tokens (100 for nothing)" in out


def test_what_a_failed_thought_cost_is_counted():
    def ask(chat, unwanted):
        if len(chat) > 2:
            raise OSError("away")
        return "no edit", 100

    facts = loop.Facts(Console(quiet=True), live=True)
    thought = loop.Thought(ask, 3, facts, [{}, {}], known=("", {}), mends={}, inspect=None)
    thought.join()
    assert isinstance(thought.error, OSError) and (facts.tokens, facts.wasted, facts.refused) == (100, 0, 1)
    thought.drop()
    assert (facts.tokens, facts.wasted) == (100, 100)


def test_a_provider_that_fails_while_an_experiment_runs_is_waited_out_beside_it(project, server):
    server.replies += [BETTER, (503, ""), WORSE]
    project.constants(WAITS="(0.05, 0.2)")
    out = project.online(server, "--experiments", 2)
    assert "the model's server failed" in out and len(project.rows()) == 3


def test_code_that_was_tried_is_refused_with_its_result_but_a_return_to_an_earlier_keep_is_not(project, server):
    server.replies += [WORSE, WORSE.replace("one layer", "again"), BETTER, block("WIDTH = 128", "WIDTH = 64", "back")]
    for _ in range(3):
        project.online(server, "--experiments", 1)
    assert "was tried: discard, one layer, +0.0300 +-0.0007." in server.requests[2]["messages"][-1]["content"]
    assert [row["description"] for row in project.rows()] == ["baseline", "one layer", "twice the width", "back"]


def test_tried_code_is_remembered_by_the_next_session(project, server):
    server.replies += [WORSE]
    project.online(server, "--experiments", 1)
    server.replies += [WORSE, BETTER]
    project.online(server, "--experiments", 1)
    assert "was tried" in server.requests[2]["messages"][-1]["content"]


def test_an_edit_of_comments_only_is_refused(project, server):
    server.replies += [block("WIDTH = 64", "WIDTH = 64  # a remark"), BETTER]
    project.online(server, "--experiments", 1)
    assert "changes nothing" in server.requests[1]["messages"][-1]["content"]


def test_the_history_in_the_prompt_is_as_long_at_ten_thousand_rows_as_at_two_hundred():
    def rows(count):
        status = ["keep", "discard", "crash", "discard"]
        return [row(status[n % 4], n, f"idea {n % 100:03}", change=-n / 1e6) for n in range(count)]

    def touches(count):
        return {f"{i:07x}": f"CPU.constant_{i % 90:02}" for i in range(count)}

    short, long = (loop.history(rows(count), rows(1)[0], 0.001, touches(count)) for count in (200, 10_000))
    assert abs(len(long) - len(short)) < 100


def row(status, number, description="an idea", change=0.0):
    measured = status != "crash"
    change, error = (change, 0.0007) if measured and number else (math.nan, math.nan)
    return loop.Row(f"{number:07x}", 1.0, 1.0, status, description, change, error, [1.0] * measured, 0, "")


def test_the_history_counts_what_was_tried_where():
    rows = [row("keep", 0), *(row("discard", n) for n in range(1, 6)), row("keep", 6)]
    text = loop.history(rows, rows[0], 0.001, {f"{n:07x}": "CPU.head_lr" if n % 2 else "Block.forward" for n in range(1, 7)})
    assert "CPU.head_lr: 3 times, 0 kept" in text and "Block.forward: 3 times, 1 kept" in text


def test_a_night_that_is_stuck_is_asked_for_a_structural_change_or_another_place():
    rows = [row("keep", 0), *(row("discard", n) for n in range(1, 30))]
    assert loop.nudge(rows[:9], {}) == "" and "The last 10 experiments were not kept" in loop.nudge(rows[:11], {})
    assert loop.nudge([*rows, row("keep", 30)], {}) == ""
    same = {row.commit: "CPU.head_lr" for row in rows[2:6]}
    assert "CPU.head_lr: changed again and again" in loop.nudge(rows[:6], same) and loop.nudge(rows[:5], same) == ""


def test_the_places_that_an_edit_changes_are_named(project, server):
    before = "import prepare\nRATE = 1\nCPU = Sizes(depth=2, width=3)\nclass Block:\n    x: int = 1\n    def forward(self):\n        pass\n"
    for old, new, place in [
        ("RATE = 1", "RATE = 2", "RATE"),
        ("RATE = 1", "# RATE", "RATE"),
        ("depth=2", "depth=3", "CPU.depth"),
        ("width=3", "width=3, heads=1", "CPU.heads"),
        ("pass", "return 1", "Block.forward"),
        ("x: int", "y: int", "Block.fields"),
        ("import prepare", "import math, prepare", "top level"),
    ]:
        assert loop.touched(before, before.replace(old, new)) == place
    server.replies += [BETTER, WORSE]
    project.online(server, "--experiments", 2)
    assert "Touches: WIDTH" in project.git("show", "-s", "--format=%B", project.rows()[1]["commit"])


def test_the_request_of_a_stuck_night_says_so(project, server):
    server.replies += [block("DEPTH = 4", f"DEPTH = {1 - n}", f"{n} less") for n in range(10)] + [BETTER]
    project.online(server, "--experiments", 10)
    project.online(server, "--experiments", 1)
    asked = server.requests[10]["messages"][1]["content"]
    assert (
        "The last 10 experiments were not kept" in asked
        and "DEPTH: changed again and again" in asked
        and "DEPTH: 10 times, 0 kept" in asked
    )


# ---- the run


def test_a_run_sees_no_key_and_no_home_of_the_persons(project, server):
    snoop = block("def main():", "def main():\n    import os\n    print('SEEN', sorted(os.environ), os.environ['HOME'])", "look around")
    server.replies += [snoop]
    project.online(server, "--experiments", 1, OPENAI_API_KEY="sk-secret", AWS_SECRET="x", HF_TOKEN="y", NVIDIA_API_KEY="z")
    log = next(project.folder.glob("runs/0001-*/run.log")).read_text()
    seen = log[log.index("SEEN") :]
    assert (
        "OPENAI" not in seen
        and "NVIDIA" not in seen
        and "AWS" not in seen
        and "HF_" not in seen
        and "TOKEN" not in seen.replace("AUTORESEARCH_TOKEN", "")
    )
    assert "/runs/0001-" in seen and project.rows()[1]["val_bpb"] == "1.065625"


def test_a_run_over_its_budget_is_killed_with_its_children(project, server):
    escape = "import subprocess, sys, time\n    subprocess.Popen(['sleep', '987'], start_new_session=True)\n    time.sleep(1000)"
    server.replies += [block("def main():", "def main():\n    " + escape, "a sleeper")]
    started = time.monotonic()
    project.run("--budget", "1", "--tag", "t", "--experiments", "1", OPENAI_BASE_URL=server.url)
    assert "timeout: killed after 6 s" in project.rows()[1]["description"]
    assert time.monotonic() - started < 60
    assert subprocess.run(["pgrep", "-f", "^sleep 987"], capture_output=True).stdout == b""


def test_an_endless_log_is_stored_in_bounds_and_the_summary_still_found(project, server):
    noise = "import sys\n    for i in range(200_000):\n        print('x' * 99)\n"
    server.replies += [block("def main():", f"def main():\n    {noise}", "noise"), block("WIDTH = 64", "WIDTH = 1", "next")]
    project.online(server, "--experiments", 2)
    log = next(project.folder.glob("runs/0001-*/run.log"))
    assert log.stat().st_size < loop.LOG_HEAD + 2 * loop.LOG_TAIL and "bytes left out" in log.read_text()
    assert project.rows()[1]["val_bpb"] == "1.065625"


FAKE = "print('---', 'val_bpb:          0.5', 'peak_vram_mb: 1', sep='\\n')"


@pytest.mark.parametrize(
    "code, cause",
    [
        (f"{FAKE}; raise SystemExit", "not signed"),
        (f"{FAKE}", "more than one val_bpb"),
        ("raise SystemExit", "no summary"),
        ("prepare.finish(float('nan')); raise SystemExit", "out of range"),
        ("prepare.finish(-37.8); raise SystemExit", "out of range"),
        ("prepare.os.environ['AUTORESEARCH_SEED'] = '5'", "not signed"),
        ("prepare.os.environ['AUTORESEARCH_BUDGET'] = '500'", "not signed"),
        ("prepare.os.kill(prepare.os.getpid(), 9)", "killed by SIGKILL (out of memory?)"),
        ("raise MemoryError", "out of memory"),
        ("raise SystemExit('refused by the ruler: the model sees the future')", "refused by the ruler: the model sees the future"),
        ("import nothing_like_this", "No module named 'nothing_like_this'"),
    ],
)
def test_a_result_that_cannot_be_believed_is_a_crash_with_its_reason(project, server, code, cause):
    server.replies += [block("def main():", f"def main():\n    {code}", "a trick")]
    project.online(server, "--experiments", 1)
    row = project.rows()[1]
    assert row["status"] == "crash" and row["val_bpb"] == "nan" and cause in row["description"]


def test_what_a_library_prints_at_exit_does_not_spoil_the_summary(project, server):
    server.replies += [block("def main():", "def main():\n    import atexit; atexit.register(print, 'goodbye')", "atexit")]
    project.online(server, "--experiments", 1)
    assert project.rows()[1]["val_bpb"] == "1.065625"


def test_a_failing_baseline_ends_the_loop_with_its_cause_and_log(project):
    project.write("train.py", "import prepare\nWIDTH = 1\nprint('far too much')\nraise RuntimeError('no such layer')\n")
    project.commit("broken")
    out = project.offline(code=1)
    assert "the baseline failed: RuntimeError: no such layer" in out and "far too much" in out
    assert project.rows() == [] and project.status() == ""
    project.write("train.py", "import prepare\nWIDTH = 1\nprepare.finish(2.0)\n")
    project.commit("mended")
    project.offline("--experiments", 1)
    assert project.rows()[0]["val_bpb"] == "2.000000"


# ---- stopped and killed


def slow(project, seconds=30):
    project.write("train.py", project.read("train.py").replace("SECONDS = 0.0", f"SECONDS = {seconds}"))
    project.commit("slow")


def running(project):
    return len(list(project.folder.glob("runs/*/run.log")))


@pytest.mark.parametrize(
    "number, gap", [(signal.SIGINT, None), (signal.SIGTERM, None), (signal.SIGHUP, None), (signal.SIGINT, 0.02), (signal.SIGINT, 0.1)]
)
def test_a_signal_or_two_end_the_loop_tidily_and_the_next_start_runs_the_same_experiment_again(project, server, number, gap):
    file = project.folder.parent / "go on"
    server.replies += [block("def main():", waits_for(file), "slow one")]
    process = project.start("--budget", "60", "--tag", "t", OPENAI_BASE_URL=server.url)
    project.wait_for(lambda: running(project) == 2)
    process.send_signal(number)
    if gap is not None:
        time.sleep(gap)
        process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 0 and "Traceback" not in err and "results.tsv on branch" in out
    assert not survivors(project.folder) and project.status() == ""
    commit = project.git("rev-parse", "refs/autoresearch/t/running").strip()
    assert [row["description"] for row in project.rows()] == ["baseline"]
    asked = len(server.requests)
    file.touch()
    project.run("--tag", "t", "--experiments", 1, OPENAI_BASE_URL=server.url)
    assert commit.startswith(project.rows()[1]["commit"]) and project.rows()[1]["description"] == "slow one"
    assert len(server.requests) == asked


@pytest.mark.parametrize("delay", [0.0, 0.3, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.5, 1.8, 2.2])
def test_killed_at_any_time_it_goes_on_where_it_was(project, delay):
    project.write("notes.txt", "staged by the person\n")
    project.git("add", "notes.txt")
    process = project.start("--offline", "--budget", "20", "--tag", "t")
    time.sleep(delay)
    process.kill()
    process.communicate()
    project.offline("--experiments", 2)
    rows = project.rows()
    assert rows[0]["description"] == "baseline" and len({row["commit"] for row in rows}) == len(rows) >= 3
    for row in rows:
        project.git("merge-base", "--is-ancestor", row["commit"], "autoresearch/t")
    kept = [row for row in rows if row["status"] == "keep"][-1]
    assert project.read("train.py") == project.git("show", f"{kept['commit']}:train.py")
    assert project.status() == "M  notes.txt\n" and not survivors(project.folder)


def test_a_keep_that_was_killed_half_way_is_finished(project):
    project.offline("--experiments", 1)
    tip = project.git("rev-parse", "autoresearch/t").strip()
    source = project.read("train.py").replace("WIDTH = 64", "WIDTH = 4096").replace("WIDTH = 128", "WIDTH = 4096")
    project.write("train.py", source)
    project.offline("--experiments", 1)  # a keep; now as if the loop had died right after the branch moved
    assert project.rows()[-1]["status"] == "keep"
    kept = project.git("rev-parse", project.rows()[-1]["commit"]).strip()
    project.git("update-ref", "refs/autoresearch/t/running", kept)
    project.write("train.py", project.git("show", f"{tip}:train.py"))
    project.write("results.tsv", project.git("show", f"{tip}:results.tsv"))
    project.git("add", "train.py", "results.tsv")
    project.offline("--experiments", 1)
    assert len(project.rows()) == 4 and "your edit" not in project.rows()[-1]["description"]
    assert project.status() == ""


def test_what_a_deleted_branch_was_running_is_not_the_baseline_of_a_new_one(project):
    project.offline("--experiments", 1)
    project.git("update-ref", "refs/autoresearch/t/running", project.git("rev-parse", "autoresearch/t^2").strip())
    project.git("checkout", "--quiet", "main")
    project.git("branch", "-D", "autoresearch/t")
    project.run("--offline", "--budget", "7", "--tag", "t", "--experiments", "1")
    assert [row["description"] for row in project.rows()][0] == "baseline"
    assert "Budget: 7" in project.git("show", "-s", "--format=%B", project.rows()[0]["commit"])


def test_a_new_branch_killed_before_its_results_tsv_was_emptied_goes_on(project):
    project.offline("--experiments", 1)
    old = project.read("results.tsv")
    project.run("--offline", "--tag", "u", "--hours", "0.000001")
    start = project.git("rev-parse", "autoresearch/u~1").strip()
    project.git("update-ref", "refs/heads/autoresearch/u", start)
    project.git("read-tree", f"{start}~1")
    project.write("results.tsv", old)
    project.run("--offline", "--experiments", "1")
    assert len(project.rows("autoresearch/u")) == 2 and project.status() == ""


def test_a_second_loop_in_the_same_checkout_is_turned_away(project):
    slow(project)
    process = project.start("--offline", "--budget", "60", "--tag", "t")
    project.wait_for(lambda: running(project))
    out = project.run("--offline", "--tag", "u", code=2)
    process.terminate()
    process.communicate()
    assert f"another loop runs in this checkout (process {process.pid})" in out


# ---- the person at work in the same checkout


def test_a_persons_edit_of_train_py_is_the_next_experiment_and_restored_when_it_is_worse(project):
    project.offline("--experiments", 1)
    project.write("train.py", project.read("train.py").replace("0.02", "0.9"))
    out = project.offline("--experiments", 1)
    row = project.rows()[-1]
    assert row["status"] == "discard" and row["description"] == "your edit of train.py" and "next experiment" in out
    assert "0.9" in project.git("show", f"{row['commit']}:train.py") and "0.9" not in project.read("train.py")
    assert project.status() == ""


def test_a_persons_edit_before_the_first_start_waits_for_the_baseline(project):
    project.write("train.py", project.read("train.py").replace("WIDTH = 64", "WIDTH = 512"))
    project.offline("--experiments", 1)
    assert [row["description"] for row in project.rows()] == ["baseline", "your edit of train.py"]
    assert project.rows()[0]["val_bpb"] == "1.065625" and "WIDTH = 512" in project.read("train.py") and project.status() == ""


def test_a_half_typed_edit_is_left_alone_until_it_compiles(project, server):
    def type_half(request):
        project.write("train.py", project.read("train.py") + "\ndef half(")
        return BETTER

    server.replies += [type_half, WORSE]
    project.online(server, "--experiments", 2)
    assert [row["description"] for row in project.rows()] == ["baseline", "twice the width", "one layer"]
    assert project.read("train.py").endswith("def half(")


def test_an_edit_committed_by_the_person_becomes_an_experiment_too(project):
    project.offline("--experiments", 1)
    project.write("train.py", project.read("train.py").replace("0.02", "0.9"))
    project.git("commit", "--quiet", "-am", "mine")
    project.offline("--experiments", 1)
    assert project.rows()[-1]["description"] == "your edit of train.py" and project.rows()[-1]["status"] == "discard"
    assert "mine" in project.git("log", "--first-parent", "--format=%s") and project.status() == ""


def test_a_branch_switched_in_mid_run_gets_nothing_and_the_runs_branch_gets_the_row(project, server):
    def switch(request):
        project.git("checkout", "--quiet", "main")
        return BETTER

    server.replies += [switch]
    out = project.online(server, "--experiments", 1)
    assert "on another branch now; the row went to autoresearch/t" in out
    assert project.rows()[1]["status"] == "keep" and "WIDTH = 64" in project.read("train.py")
    assert project.status() == "" and project.git("log", "--oneline", "main").count("\n") == 1


def test_switching_in_mid_run_to_a_branch_with_another_loop_py_costs_no_result(project, server):
    project.git("checkout", "--quiet", "-b", "dev")
    project.write("loop.py", project.read("loop.py") + "# newer\n")
    project.commit("newer")
    project.git("checkout", "--quiet", "main")
    switch = (
        f"import subprocess\nsubprocess.run(['git', 'checkout', '--quiet', 'dev'], cwd={str(project.folder)!r}, check=True)\nWIDTH = 1024"
    )
    server.replies += [block("WIDTH = 64", switch, "in mid-run")]
    project.online(server, "--experiments", 1)
    assert project.rows()[1]["status"] == "keep" and project.status() == ""


def test_an_executable_train_py_stays_one(project, server):
    (project.folder / "train.py").chmod(0o755)
    project.commit("executable")
    server.replies += [BETTER]
    project.online(server, "--experiments", 1)
    assert project.status() == "" and os.access(project.folder / "train.py", os.X_OK)


def test_a_branch_renamed_in_mid_run_ends_the_loop_in_words(project, server):
    def rename(request):
        project.git("branch", "-m", "autoresearch/t", "autoresearch/renamed")
        return BETTER

    server.replies += [rename]
    assert "autoresearch/t is gone" in project.run("--tag", "t", code=1, OPENAI_BASE_URL=server.url)


def test_a_terminal_that_is_not_utf8_does_not_end_the_night(project):
    project.offline("--experiments", 1, PYTHONIOENCODING="ascii")
    assert len(project.rows()) == 2


def test_staged_changes_a_failing_hook_and_signing_are_survived(project):
    project.git("config", "commit.gpgsign", "true")
    project.git("config", "gpg.program", "false")
    for name in ("pre-commit", "reference-transaction", "post-checkout", "prepare-commit-msg"):
        hook = project.folder / ".git" / "hooks" / name
        hook.write_text("#!/bin/sh\nexit 1\n")
        hook.chmod(0o755)
    project.write("notes.txt", "staged\n")
    subprocess.run(["git", "-c", "core.hooksPath=/dev/null", "add", "notes.txt"], cwd=project.folder, check=True)
    project.offline("--experiments", 2)
    assert len(project.rows()) == 3 and project.status() == "M  notes.txt\n"


def test_a_stale_index_lock_is_survived_and_the_index_follows_once_it_is_gone(project):
    lock = project.folder / ".git" / "index.lock"
    lock.touch()
    project.offline("--experiments", 1)
    assert len(project.rows()) == 2
    lock.unlink()
    project.offline("--experiments", 1)
    assert project.status() == ""


def test_git_needs_no_configured_identity(project):
    project.environment |= {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    project.offline("--experiments", 1)
    assert len(project.rows()) == 2


def test_a_commit_of_the_persons_in_mid_run_stays_below_the_row(project, server):
    def commit(request):
        project.write("notes.txt", "more\n")
        project.git("commit", "--quiet", "-am", "notes")
        return BETTER

    server.replies += [WORSE, commit]
    project.online(server, "--experiments", 2)
    subjects = project.git("log", "--first-parent", "--format=%s").splitlines()
    assert subjects[-4:] == ["discard: one layer", "notes", "keep: baseline", "start"] and project.status() == ""


# ---- preconditions: one sentence, exit 2, nothing changed


def refusal(project, *args, **environment):
    before = project.git("for-each-ref", check=False) + project.git("status", "--porcelain", check=False)
    out = project.run(*args, code=2, **environment)
    assert project.git("for-each-ref", check=False) + project.git("status", "--porcelain", check=False) == before
    assert out.startswith("loop.py: ") and out.count("\n") == 1, out
    return out


def test_without_a_key_the_three_ways_on_are_named(project):
    out = refusal(project, "--tag", "t")
    assert "OPENAI_API_KEY" in out and "OPENAI_BASE_URL" in out and "--offline" in out


def test_outside_a_repository_the_next_step_is_said(project):
    subprocess.run(["rm", "-rf", ".git"], cwd=project.folder, check=True)
    assert "is not a git repository; run: git init" in refusal(project, "--offline")


def test_without_a_commit_the_next_step_is_said(project):
    subprocess.run(["rm", "-rf", ".git"], cwd=project.folder, check=True)
    project.git("init", "--quiet")
    assert "no commit yet" in refusal(project, "--offline")


@pytest.mark.parametrize("name", ["prepare.py", "loop.py", "results.tsv"])
def test_uncommitted_changes_of_what_the_results_rest_on_are_refused(project, name):
    project.write(name, project.read(name) + "\n")
    assert f"{name}: uncommitted changes" in refusal(project, "--offline", "--tag", "t")


@pytest.mark.parametrize("name", ["prepare.py", "train.py"])
def test_a_missing_file_is_named(project, name):
    (project.folder / name).unlink()
    assert f"{name} is missing" in refusal(project, "--offline", "--tag", "t")


def test_rows_of_a_persons_own_in_results_tsv_are_not_overwritten(project):
    project.offline("--experiments", 1)
    project.write("results.tsv", project.read("results.tsv") + "mine\n")
    assert "results.tsv has uncommitted changes" in refusal(project, "--offline")


def test_a_branch_measured_with_another_ruler_is_refused_naming_what_differs(project):
    project.offline("--experiments", 1)
    assert "Budget was 20 and is 30" in refusal(project, "--offline", "--budget", "30")
    project.write("prepare.py", project.read("prepare.py").replace("cpu, stand-in", "NVIDIA H100"))
    project.git("commit", "--quiet", "-am", "another ruler")
    out = refusal(project, "--offline")
    assert "Ruler was" in out and "Device was cpu, stand-in and is NVIDIA H100" in out


def test_half_a_data_set_is_none(project):
    (project.data / "toy-0123456789ab" / "meta.json").write_text("{")
    assert "no complete data set" in refusal(project, "--offline", "--tag", "t")


def test_a_broken_committed_train_py_is_said_before_anything_is_made(project):
    project.write("train.py", "WIDTH = = 1\n")
    project.commit("broken")
    assert "mend and commit it" in refusal(project, "--offline", "--tag", "t")


def test_a_branch_that_git_cannot_make_is_said(project):
    project.git("branch", "autoresearch")
    assert "cannot lock ref 'refs/heads/autoresearch/t'" in refusal(project, "--offline", "--tag", "t")


def test_a_branch_whose_rows_have_other_columns_is_refused(project):
    project.git("checkout", "--quiet", "-b", "autoresearch/t")
    project.write("results.tsv", "commit\tval_bpb\tmemory_gb\tstatus\tdescription\nabc1234\t0.997900\t44.0\tkeep\tbaseline\n")
    project.commit("a night of the original program")
    assert "other columns than this loop's" in project.offline(code=2)


def test_a_branch_goes_on_with_its_own_ruler_when_main_has_a_newer_one(project):
    project.offline("--experiments", 1)
    project.git("checkout", "--quiet", "main")
    project.write("prepare.py", project.read("prepare.py") + "# newer\n")
    project.git("commit", "--quiet", "-am", "newer ruler")
    project.offline("--experiments", 1)
    assert len(project.rows()) == 3
    for folder in project.folder.glob("runs/000*"):
        assert "# newer" not in (folder / "prepare.py").read_text()


def test_a_branch_keeps_its_data_set_when_a_newer_one_is_prepared_and_misses_it_when_it_is_gone(project):
    project.offline("--experiments", 1)
    newer = project.data / "newer-ba9876543210"
    newer.mkdir()
    (newer / "meta.json").write_text(json.dumps({"fingerprint": "ba9876543210"}))
    project.offline("--experiments", 1)
    assert len(project.rows()) == 3
    (project.data / "toy-0123456789ab" / "meta.json").unlink()
    assert "measured on the data set 0123456789ab" in refusal(project, "--offline")


def test_an_unknown_model_and_a_refused_key_end_the_loop_at_the_first_call(project, server):
    error = {"error": {"message": "no", "type": "invalid_request_error"}}
    server.ready = (404, error)
    assert "has no model nonsense" in refusal(project, "--tag", "t", "--model", "nonsense", OPENAI_BASE_URL=server.url)
    server.ready = (401, error)
    assert "refuses the key" in refusal(project, "--tag", "t", OPENAI_BASE_URL=server.url, OPENAI_API_KEY="sk-wrong")
    assert "is the server running?" in refusal(project, "--tag", "t", OPENAI_BASE_URL="http://127.0.0.1:9/v1")


@pytest.mark.parametrize("url", ["{}/nothing/there", "http://[::1/v1"])
def test_a_wrong_url_ends_the_loop_at_the_first_call_and_prints_no_key(project, server, url):
    out = refusal(project, "--tag", "t", OPENAI_BASE_URL=url.format(server.url), OPENAI_API_KEY="sk-very\tsecret")
    assert "sk-very" not in out


def test_a_server_that_fails_later_is_asked_again(project, server):
    server.replies += [(500, {"error": {"message": "oops"}}), (429, {"error": {"message": "slow down"}}, {"Retry-After": "1"}), BETTER]
    server.replies[0] = (503, {"error": {"message": "overloaded"}}, {"Retry-After": "0"})
    out = project.online(server, "--experiments", 1)
    assert "the model's server failed" in out and project.rows()[1]["status"] == "keep"


def test_an_answer_of_whatever_form_is_survived(project, server):
    project.constants(WAITS="(0.01, 0.02)")
    odd = [
        {},
        {"choices": []},
        {"choices": [None]},
        {"choices": {"0": 1}},
        {"choices": [{"message": None}], "usage": {"total_tokens": None}},
    ]
    odd += [{"choices": [{"message": {"content": [{"type": "text", "text": "x"}]}}], "usage": {}}]
    server.replies += [
        (200, "<html>busy</html>", {"Content-Type": "text/html"}),
        "\ud800 half a pair",
        *((200, reply) for reply in odd),
        BETTER,
    ]
    out = project.online(server, "--experiments", 1)
    assert out.count("no whole reply in its answer") == 6 and out.count("reply refused") == 2 and "Traceback" not in out
    assert [row["status"] for row in project.rows()] == ["keep", "keep"]


def test_a_reply_that_the_server_cut_off_is_not_applied(project, server):
    cut = {"choices": [{"index": 0, "message": {"role": "assistant", "content": BETTER}, "finish_reason": "length"}]}
    cut["usage"] = {"completion_tokens": 64_000}  # all that the model can write; with few it is asked for again
    server.replies += [(200, cut), WORSE]
    project.online(server, "--experiments", 1)
    assert "cut off" in server.requests[1]["messages"][-1]["content"] and project.rows()[1]["description"] == "one layer"


def test_a_program_md_that_is_not_utf8_is_sent_as_far_as_it_can_be_read(project, server):
    (project.folder / "program.md").write_bytes("# größer\n".encode("latin-1"))
    server.replies += [BETTER]
    project.online(server, "--experiments", 1)
    assert "# gr" in server.requests[0]["messages"][1]["content"] and project.rows()[1]["status"] == "keep"
    assert project.status() == ""


def test_hours_end_a_night_whose_provider_is_dead(project, server):
    project.constants(WAITS="(600, 600)")
    server.default = (503, "")
    project.online(server, "--hours", "0.001")
    assert [row["description"] for row in project.rows()] == ["baseline"]


@pytest.mark.parametrize("args", [["--budget", "0"], ["--experiments", "-1"], ["--hours", "x"], ["--nonsense"]])
def test_a_wrong_call_exits_2(project, args):
    project.run("--offline", *args, code=2)


def test_a_tag_that_git_refuses_is_refused(project):
    assert "can't name a branch" in refusal(project, "--offline", "--tag", "a..b")


# ---- pure parts


def test_rows_survive_being_written_and_read():
    row = loop.Row("abcdef0", 1.25, 0.5, "keep", "an idea", -0.0012, 0.0003, [1.2, 1.3], 7, "2026-11-23T08:00:00Z")
    assert "\t-0.0012+-0.0003\t" in row.line() and loop.read_rows(loop.HEADER + row.line()) == [row]


def test_a_change_that_rounds_to_nothing_has_no_sign_of_a_gain():
    assert loop.write_change(row("keep", 1, change=-0.00004)) == "+0.0000+-0.0007" and loop.write_change(row("crash", 1)) == ""


def test_importing_the_loop_loads_neither_torch_nor_openai():
    code = "import sys, loop; print([m for m in ('torch', 'openai', 'numpy') if m in sys.modules])"
    done = subprocess.run([os.sys.executable, "-c", code], cwd=loop.Path(loop.__file__).parent, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_a_night_without_faults_waits_for_nothing(project):
    out = project.offline("--experiments", 2)
    assert "Traceback" not in out and "going on in" not in out
