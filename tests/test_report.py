"""The morning after: --report and progress.png, of a branch, of a running loop and of other people's logs."""

import contextlib
import os
import re
import signal
from pathlib import Path

import pytest
from conftest import block
from rich.console import Console
from test_loop import BETTER, CRASHING, WORSE, running, slow

import loop

FIVE = """\
commit\tval_bpb\tmemory_gb\tstatus\tdescription
baseline\t0.997900\t44.0\tkeep\tbaseline
bea057b\t0.986041\t43.9\tkeep\thalve the batch of [mlp]
187e419\t0.986100\t60.2\tdiscard\tadd 5% warmup\tand a tab
e05a87d\t0.000000\t0.0\tcrash\tbatch 131K
d70987b\t3.215849\t60.2\tdiscard\tweight tying
4e6697f\t0.985901\t60.2\tkeep\t\x1b[31mwarmdown\x1b[0m $0.5$ to $0.7$
"""


def night(*rows_of):
    """A Report of (status, val_bpb of each run, finished), in which a change on one seed is off by 0.001."""
    rows, nan = [], loop.math.nan
    for number, (status, runs, finished) in enumerate(rows_of):
        bpb, parent = sum(runs) / len(runs) if runs else nan, loop.parents(rows)[-1]
        change, error = (bpb - parent.val_bpb, 0.001 / len(runs) ** 0.5) if parent and runs else (nan, nan)
        rows.append(loop.Row(f"{number:07}", bpb, 1.0, status, f"idea {number}", change, error, list(runs), 1000, finished))
    return loop.Report("a night", rows)


def screen(report, width=80):
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(loop.render_report(report))
    return capture.get()


def without_matplotlib(folder):
    """A PYTHONPATH on which matplotlib can't be imported, whether it is installed or not."""
    return stand_in_for_matplotlib(folder, "raise ImportError('not here')")


def stand_in_for_matplotlib(folder, code):
    (folder / "matplotlib").mkdir()
    (folder / "matplotlib" / "__init__.py").write_text(f"{code}\n")
    return str(folder)


# ---- other people's logs


def test_a_log_of_the_first_five_columns_is_reported(project):
    project.write("five.tsv", FIVE)
    out = project.run("--report", "five.tsv")
    assert "5 experiments, 2 kept, 1 crashed" in out and "best 0.9859, baseline 0.9979" in out
    assert "gains kept: 2, one for 2.5 experiments" in out and "gains clear of the noise: 1, one for 5.0 experiments" in out
    assert "the noise is assumed" in out and "hours" not in out and "tokens" not in out  # nothing that the log doesn't say


def test_kept_rows_stand_in_order_with_their_change_and_near_misses_below():
    lines = [line.split() for line in screen(loop.Report("x", loop.read_rows(FIVE))).splitlines()]
    rows = [line for line in lines if line and line[0].isdigit() and line[1] not in ("experiments,",)]
    assert [row[:6] for row in rows[1:]] == [
        ["1", "bea057b", "0.9860", "-0.0119+-0.0010", "yes", "0.9860"],
        ["5", "4e6697f", "0.9859", "-0.0001+-0.0010", "no", "0.9859"],
        ["2", "187e419", "0.9861", "+0.0001+-0.0010", "no", "0.9860"],
    ]


def test_the_night_in_the_readme_is_what_the_report_makes_of_it():
    text = (Path(__file__).parent / "night" / "results.tsv").read_text()
    out = screen(loop.Report("a night", loop.read_rows(text)), 120)
    readme = (Path(__file__).parent.parent / "README.md").read_text().replace("\n", " ")
    told = [line.strip() for line in out.splitlines() if re.match(r"best \d|\d+ experiments, |noise of a difference", line)]
    assert len(told) == 3 and all(line in readme for line in told), told


OLD = """\
commit\tval_bpb\tmemory_gb\tstatus\tdescription\truns\tllm_tokens\tfinished
aaaaaaa\t1.230000\t0.8\tkeep\tbaseline\t1.240000,1.220000\t0\t2026-11-24T15:43:04Z
bbbbbbb\tnan\t0.0\tcrash\ta typo\t\t900\t2026-11-24T15:44:04Z
ccccccc\t1.200000\t0.8\tkeep\twider\t1.190000,1.210000\t900\t2026-11-24T15:45:04Z
"""


def test_a_log_of_this_projects_first_form_is_reported_with_the_noise_of_its_unpaired_runs():
    rows = loop.read_rows(OLD)
    assert rows[2].change == pytest.approx(-0.03) and rows[2].error == loop.noise_of([[1.24, 1.22], [1.19, 1.21]], loop.PRIOR_NOISE)
    assert [row.llm_tokens for row in rows] == [0, 900, 900] and rows[0].runs == [1.24, 1.22] and rows[2].finished.startswith("2026")
    out = screen(loop.Report("x", rows), 100)
    assert "2 experiments, 1 kept, 1 crashed" in out and "-0.0300+-0.0" in out


def test_columns_are_read_by_their_names():
    text = "commit\tval_bpb\tmemory_gb\tmfu\tstatus\tdescription\na\t1.2\t5.5\t58.1\tkeep\tbaseline\n\nb\t1.1\t5.5\t58\tkeep\twider\n"
    found = [(row.val_bpb, row.status, row.description) for row in loop.read_rows(text)]
    assert found == [(1.2, "keep", "baseline"), (1.1, "keep", "wider")]


def test_the_report_speaks_in_the_changes_of_the_rows():
    lines = [f"a\t1.5\t1\tkeep\tbaseline\t\t1.5,1.6\t0\t{''}", "b\t1.4\t1\tkeep\twider\t-0.1000+-0.0300\t1.45,1.45\t0\t",
             "c\t1.37\t1\tkeep\tdeeper\t-0.0300+-0.0300\t1.42\t0\t", "d\t1.39\t1\tdiscard\tlonger\t+0.0200+-0.0300\t1.44\t0\t"]  # fmt: skip
    out = screen(loop.Report("x", loop.read_rows(loop.HEADER + "\n".join(lines))), 100)
    told = [line.split()[1:5] for line in out.splitlines() if line.strip()[:2] in ("1 ", "2 ", "3 ")][:3]
    assert told == [
        ["b", "1.4000", "x2", "-0.1000+-0.0300"], ["c", "1.3700", "-0.0300+-0.0300", "no"], ["d", "1.3900", "+0.0200+-0.0300", "no"],
    ]  # fmt: skip
    assert "gains clear of the noise: 1" in out and "noise of a difference 0.0300" in out


def test_what_a_model_wrote_reaches_the_screen_as_text():
    out = screen(loop.Report("x", loop.read_rows(FIVE)))
    assert "halve the batch of [mlp]" in out and "\x1b" not in out and "warmdown $0.5$" in out and "warmup and a tab" in out


def test_nothing_is_cut_off_at_any_width():
    for width in (60, 80, 200):
        shown = screen(loop.Report("x", loop.read_rows(FIVE.replace("warmup", "warmup " * 8))), width)
        assert shown.count("warmup") == 8 and max(map(len, shown.splitlines())) <= width


def test_a_file_that_is_no_log_is_refused_in_a_sentence(project):
    project.write("row.tsv", FIVE + "half a row\n")
    project.write("prose.tsv", "once upon a time\n")
    for name, reason in (("row.tsv", "row.tsv, line 8, is not a row"), ("prose.tsv", "header line"), ("none.tsv", "can't be read")):
        assert reason in project.run("--report", name, code=2)


def test_an_empty_log_and_one_of_crashes_are_reported_too(project, tmp_path):
    nowhere = without_matplotlib(tmp_path)
    project.write("empty.tsv", loop.HEADER)
    assert "0 experiments" in project.run("--report", "empty.tsv", PYTHONPATH=nowhere)
    project.write("crashes.tsv", FIVE.splitlines()[0] + "\na\t0\t0\tcrash\tx\nb\t0\t0\tcrash\ty\n")
    assert "no baseline yet\nnoise not known\n2 experiments, 0 kept, 2 crashed" in project.run(
        "--report", "crashes.tsv", PYTHONPATH=nowhere
    )


# ---- what the rows tell


def test_a_gain_is_clear_when_luck_alone_would_not_explain_it():
    report = night(("keep", [1.0, 1.001, 0.999], ""), ("keep", [0.9995, 0.9995], ""), ("keep", [0.99, 0.99], ""))
    assert [report.clear(number) for number in report.kept] == [False, False, True]


def test_what_an_experiment_edited_is_the_last_kept_not_the_lowest():
    report = night(("keep", [1.0], ""), ("keep", [0.9], ""), ("keep", [0.9001], ""), ("discard", [0.8], ""), ("crash", [], ""))
    assert [best and best.commit for best in report.best] == [None, "0000000", "0000001", *["0000002"] * 3]


def test_hours_leave_out_the_days_on_which_the_loop_was_stopped():
    times = ["2026-11-23T20:00:00Z", "2026-11-23T20:30:00Z", "2026-11-23T21:00:00Z", "2026-11-25T21:00:00Z", "2026-11-25T21:30:00Z"]
    report = night(*(("keep" if not number else "discard", [1.0], finished) for number, finished in enumerate(times)))
    assert loop.hours_of(report) == (1.5, 3, 48.0, 0)
    assert "1.5 hours, 2.0 an hour (not counting 48.0 hours of pauses)" in screen(report, 200)


def test_the_devices_busy_share_is_of_the_hours_that_count():
    times = ["2026-11-23T20:00:00Z", "2026-11-23T20:30:00Z", "2026-11-23T21:00:00Z", "2026-11-25T21:00:00Z"]
    report = night(*(("keep" if not number else "discard", [1.0], finished) for number, finished in enumerate(times)))
    assert "device busy" not in screen(report)
    report.seconds = dict(zip((row.commit for row in report.rows), (9000, 1800, 900, 9000), strict=True))
    assert "1.0 hours, 2.0 an hour, device busy 75 % (not counting 48.0 hours of pauses)" in screen(report, 200)
    report.seconds[report.rows[1].commit] = None  # a row of an earlier version
    assert "device busy" not in screen(report)


def test_what_a_gain_took_is_told():
    report = night(*(("keep" if n in (0, 3) else "discard", [1 - n / 100], f"2026-11-23T20:{10 * n:02}:00Z") for n in range(5)))
    assert "gains kept: 1, one for 4.0 experiments, 0.67 hours, 5,000 tokens" in screen(report)


# ---- a branch


def test_a_branch_tells_its_crashes_by_class(project, server):
    server.replies += [BETTER, CRASHING, "no edit", "no edit", "no edit"]
    project.online(server, "--experiments", 3)
    out = project.run("--report")
    assert "autoresearch/t" in out and "3 experiments, 1 kept, 2 crashed (1 code, 1 no edit)" in out and "twice the width" in out


def test_a_branchs_rows_and_repeats_tell_how_long_the_device_was_busy(project):
    slow(project, 0.1)
    project.verdicts("again", "discard")
    project.offline("--experiments", 4)
    log = project.git("log", "--first-parent", "--format=%(trailers:key=Seconds,valueonly)", "autoresearch/t").split()
    report = loop.read_report(project.folder, "t", "")
    assert list(report.seconds) == [row["commit"] for row in project.rows()]
    assert sum(report.seconds.values()) == pytest.approx(sum(map(float, log)))
    assert len(log) == 5 + 1  # rows, the baseline's run for comparison


def test_the_branch_is_the_tags_else_the_one_checked_out_else_the_newest(project):
    assert "there is no branch autoresearch/TAG yet" in project.run("--report", code=2)
    project.offline("--experiments", 1)
    project.git("checkout", "--quiet", "main")
    assert project.run("--report").startswith("autoresearch/t\n")
    assert "there is no branch autoresearch/u;" in project.run("--report", "--tag", "u", code=2)
    assert project.git("branch", "--show-current") == "main\n"


def test_a_report_needs_no_data_and_changes_nothing_while_a_loop_runs(project):
    slow(project)
    process = project.start("--offline", "--budget", "60", "--tag", "t")
    project.wait_for(lambda: running(project))
    before = project.git("for-each-ref") + project.git("status", "--porcelain")
    out = project.run("--report", AUTORESEARCH_DATA="/nowhere")
    assert "no baseline yet" in out and project.git("for-each-ref") + project.git("status", "--porcelain") == before
    assert process.poll() is None and running(project) == 1
    process.terminate()
    process.communicate()


# ---- the picture


def test_without_matplotlib_the_table_comes_and_a_sentence_says_how_to_get_the_picture(project, tmp_path):
    project.write("five.tsv", FIVE)
    out = project.run("--report", "five.tsv", PYTHONPATH=without_matplotlib(tmp_path))
    assert "5 experiments" in out and "no picture: matplotlib is missing; run: pip install -e '.[plot]'" in out
    assert not (project.folder / "progress.png").exists()


def drawn(project):
    return (project.folder / "progress.png").read_bytes().startswith(b"\x89PNG")


def test_a_loop_draws_the_picture_and_the_checkout_stays_clean(project):
    pytest.importorskip("matplotlib")
    project.offline("--experiments", 2, PYTHONPATH="")
    project.wait_for(lambda: drawn(project))
    assert project.status() == "" and len(project.rows()) == 3


@pytest.mark.parametrize(
    "rows", ["", "a\t1.0\t1\tkeep\tb\n", "a\t0\t0\tcrash\tb\n", FIVE.partition("\n")[2] * 60 + "z\t1e300\t1\tdiscard\tz\n"]
)
def test_any_log_can_be_drawn(tmp_path, rows):
    pytest.importorskip("matplotlib")
    loop.draw(loop.Report("$a_b$ night", loop.read_rows(FIVE.partition("\n")[0] + "\n" + rows)), tmp_path / "progress.png")
    signal.alarm(0)  # it is meant for a process of its own
    assert [path.name for path in tmp_path.iterdir()] == ["progress.png"]


def test_a_picture_that_hangs_is_no_matter_to_the_night(project, server, tmp_path):
    hangs = f"import os, pathlib, time; pathlib.Path({str(tmp_path)!r}, f'drawing-{{os.getpid()}}').touch(); time.sleep(100)"
    seconds = block("SECONDS = 0.0", "SECONDS = 0.3\nDEPTH = 5", "slower")  # so that one hangs beside a run and at its end
    server.replies += [BETTER, seconds, WORSE]
    project.online(server, "--experiments", 3, PYTHONPATH=stand_in_for_matplotlib(tmp_path, hangs))
    assert [row["status"] for row in project.rows()] == ["keep", "keep", "keep", "discard"] and project.status() == ""
    project.wait_for(lambda: list(tmp_path.glob("drawing-*")))
    for path in tmp_path.glob("drawing-*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.name.split("-")[1]), signal.SIGKILL)


def test_what_draws_is_none_of_a_runs_processes(tmp_path, monkeypatch):
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "loop.py").write_text("import time\ntime.sleep(100)\n")
    monkeypatch.syspath_prepend(stand_in_for_matplotlib(tmp_path, ""))
    monkeypatch.setattr(loop, "PLOTS", [])
    before = loop.find_runs(folder / "runs")
    loop.plot(folder, "t")
    (drawing,) = loop.PLOTS
    assert Path(f"/proc/{drawing.pid}").exists() or os.sys.platform != "linux"
    assert drawing.pid not in loop.find_runs(folder / "runs") and before == {}
    loop.plot(folder, "t")  # the next one ends it
    assert drawing.wait(10) == -signal.SIGKILL
    loop.PLOTS[-1].kill()
    loop.PLOTS[-1].wait()
