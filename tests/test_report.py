"""The morning after: --report and progress.png, of a branch, of a running loop and of other people's logs."""

import io
import math
import os
import re
import sys
import threading
from pathlib import Path

import pytest
from conftest import block
from rich.console import Console

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


def read(text, name="a log"):
    return loop.Report(name, *loop.read_rows(text, name))


def night(*rows_of):
    """A Report of (status, value of each run, finished), in which a change on one seed is off by 0.001."""
    rows, nan = [], math.nan
    for number, (status, runs, finished) in enumerate(rows_of):
        value, parent = sum(runs) / len(runs) if runs else nan, loop.kept_before(rows)[-1]
        change, error = (nan, nan)
        if parent and runs:
            change, error = value - parent.value, 0.001 / len(runs) ** 0.5
        about = f"{number:07}", value, 1.0, status, f"idea {number}"
        rows.append(loop.Row(*about, change, error, list(runs), 1000, finished))
    return loop.Report("a night", "val_bpb", rows)


def screen(report, width=80):
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(*report.render(), sep="\n")
    return capture.get()


ROW = re.compile(r"^ *(\d+) +(clear)? +(\S+) +(keep|discard) +([\d.]+)(?: x(\d))? +(\S+-\S+)?", re.MULTILINE)


def table(report):
    """The rows that a report shows, in its order: (number, whether it is clear, metric, runs, change)."""
    found = ROW.findall(screen(report, 120))
    return [
        (int(n), bool(clear), value, int(runs or 1), change) for n, clear, _, _, value, runs, change in found
    ]


def numbers(report):
    return [number for number, *_ in table(report)]


def clear(report):
    return [number for number, clear, *_ in table(report) if clear]


# ---- other people's logs


def test_a_log_of_the_first_five_columns_is_reported():
    out = screen(read(FIVE), 100)
    assert "5 experiments, 2 kept, 1 crashed" in out and "best 0.9859, baseline 0.9979" in out
    assert "hours" not in out and "tokens" not in out  # nothing that the log doesn't say


def test_kept_rows_stand_in_order_with_their_change_and_near_misses_below():
    assert table(read(FIVE)) == [
        (0, False, "0.9979", 1, ""),
        (1, True, "0.9860", 1, "-0.0119+-0.0010"),
        (5, False, "0.9859", 1, "-0.0001+-0.0010"),
        (2, False, "0.9861", 1, "+0.0001+-0.0010"),
    ]
    out = screen(read(FIVE)).lower()
    assert out.index("warmdown") < out.index("near misses") < out.index("add 5% warmup")
    assert out.index("add 5% warmup") < out.index("5 experiments")


OLD = """\
commit\tval_bpb\tmemory_gb\tstatus\tdescription\truns\tllm_tokens\tfinished
aaaaaaa\t1.230000\t0.8\tkeep\tbaseline\t1.240000,1.220000\t0\t2026-11-24T15:43:04Z
bbbbbbb\tnan\t0.0\tcrash\ta typo\t\t900\t2026-11-24T15:44:04Z
ccccccc\t1.200000\t0.8\tkeep\twider\t1.190000,1.210000\t900\t2026-11-24T15:45:04Z
"""


def test_a_log_of_this_projects_first_form_is_reported_with_the_noise_of_unpaired_runs():
    report = read(OLD)
    assert report.rows[2].change == pytest.approx(-0.03)
    assert report.rows[2].error == pytest.approx(loop.PRIOR_NOISE * 2**0.5)
    assert [row.llm_tokens for row in report.rows] == [0, 900, 900] and report.rows[0].runs == [1.24, 1.22]
    out = screen(report, 100)
    assert "2 experiments, 1 kept, 1 crashed" in out and "-0.0300+-0.0010" in out and "1,800 tokens" in out


def test_a_change_that_a_spreadsheet_spoilt_is_the_difference_of_the_values():
    spoilt = loop.header("val_bpb") + "".join(
        f"{commit}\t{value}\t0.5\tkeep\tan idea\t{change}\t{value}\t0\t\n"
        for commit, value, change in (
            ("aaaaaaa", 1.25, ""),
            ("bbbbbbb", 1.2, "#NAME?"),
            ("ccccccc", 1.1, "-0.1000+-0.0010"),
        )
    )
    report = read(spoilt)
    assert [row.change for row in report.rows[1:]] == pytest.approx([-0.05, -0.1])
    assert "nan" not in screen(report, 100)


HEADERS = [
    "commit\tval_bpb\tmemory_gb\tmfu\tstatus\tdescription",
    "commit\tval_bpb\tgap\tmemory_gb\tnum_steps\tstatus\tdescription",
    "date\tcommit\tstatus\tval_bpb\tdescription",
    "status\tval_bpb",
    "\ufeffcommit \tval_bpb\t memory_gb\tstatus\tdescription\truns\tseed\tfinished",
]


@pytest.mark.parametrize("head", HEADERS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\n \t\n"])
def test_columns_are_read_by_their_names_whatever_lies_between(head, end):
    cells = {
        "commit": "aaaaaaa",
        "val_bpb": "1.2",
        "memory_gb": "5.5",
        "status": "keep",
        "description": "wider",
    }
    names = [name.strip("\ufeff ") for name in head.split("\t")]
    line = "\t".join(cells.get(name, "58.1" if name != "runs" else "") for name in names)
    report = read(end.join([head, line, line.replace("keep", "discard"), ""]))
    assert [(row.value, row.status) for row in report.rows] == [(1.2, "keep"), (1.2, "discard")]
    assert not report.unread and ("description" not in names or report.rows[0].description == "wider")


def test_the_metric_is_the_second_column_whatever_its_name():
    text = loop.header("accuracy") + "a\t0.5\t1\tkeep\tbaseline\t\t0.5\t0\t\n"
    report = read(text + "b\t0.75\t1\tkeep\twider\t+0.2500+-0.0100\t0.75\t0\t\n")
    assert report.metric == "accuracy" and "accuracy" in screen(report) and "val_bpb" not in screen(report)
    assert clear(report) == [1]
    assert "best 0.7500, baseline 0.5000: gain 0.2500" in screen(report)


@pytest.mark.parametrize(
    "metric", ["model_loss", "validate_loss", "sentiment_acc", "tokens_per_step", "step_loss"]
)
def test_a_metric_may_hold_the_name_of_what_is_none(metric):
    report = read(f"experiment\t{metric}\tvram\tstatus\ne1\t1.0\t5\tkeep\ne2\t0.9\t5\tkeep\n")
    assert report.metric == metric and [row.value for row in report.rows] == [1.0, 0.9]


def test_a_0_that_was_not_kept_is_a_run_that_failed():
    report = read("commit\tval_loss\tstatus\na\t1.0\tkeep\nb\t0.9\tkeep\nc\t0.0\tdiscard\n")
    assert report.sign == 1 and report.rows[2].runs == []


@pytest.mark.parametrize("between", ["date", "timestamp", "run_id", "step", "Elapsed hours", "model"])
def test_a_column_between_that_no_metric_is_called_is_none(between):
    head = f"commit\t{between}\tacc\tstatus\n"
    report = read(f"{head}a\t20260101\t0.5\tkeep\nb\t20260102\t0.6\tkeep\n")
    assert report.metric == "acc" and [row.value for row in report.rows] == [0.5, 0.6]
    assert "gain 0.1000 (its error isn't known)" in screen(report)
    assert "nan" not in screen(report)


def test_a_metric_may_be_called_like_a_time():
    text = loop.header("seconds_time") + "a\t0.5\t1\tkeep\tbaseline\t\t0.5\t0\t\n"
    assert read(text).metric == "seconds_time" and len(read(text).rows) == 1


@pytest.mark.parametrize("first, second", [(-3.0, -2.5), (0.0, 0.5), (-1.0, 0.0)])
def test_a_metric_may_be_0_or_less(first, second):
    report = read(f"commit\treward\tstatus\na\t{first}\tkeep\nb\t{second}\tkeep\n")
    assert f"best {second:.4f}, baseline {first:.4f}: gain" in screen(report)


@pytest.mark.every(3)
@pytest.mark.parametrize("above", ["\n", "# my log\n\n", "My night of May\n"])
@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_what_stands_above_the_header_and_how_lines_end_does_not_matter(above, end):
    report = read((above + FIVE + "half a row\n").replace("\n", end))
    assert len(report.rows) == 6
    assert report.unread[0].startswith(f"line {above.count(chr(10)) + 8} is")


def test_the_report_speaks_in_the_changes_of_the_rows():
    lines = (
        "a\t1.5\t1\tkeep\tbaseline\t\t1.5,1.6\t0\t",
        "b\t1.4\t1\tkeep\twider\t-0.1000+-0.0300\t1.45,1.45\t0\t",
        "c\t1.37\t1\tkeep\tdeeper\t-0.0300+-0.0300\t1.42\t0\t",
        "d\t1.39\t1\tdiscard\tlonger\t+0.0200+-0.0300\t1.44\t0\t",
    )
    report = read(loop.header("val_bpb") + "\n".join(lines))
    assert table(report) == [
        (0, False, "1.5000", 2, ""),
        (1, True, "1.4000", 2, "-0.1000+-0.0300"),
        (2, False, "1.3700", 1, "-0.0300+-0.0300"),
        (3, False, "1.3900", 1, "+0.0200+-0.0300"),
    ]
    assert "noise of a difference 0.0300" in screen(report)


def test_what_a_model_wrote_reaches_the_screen_as_text():
    out = screen(read(FIVE), 120)
    assert "halve the batch of [mlp]" in out and "\x1b" not in out and "warmdown $0.5$" in out
    assert "warmup and a tab" in out


def test_nothing_is_cut_off_at_any_width():
    for width in (60, 80, 200):
        shown = screen(read(FIVE.replace("warmup", "warmup " * 8)), width)
        assert shown.count("warmup") == 8 and max(map(len, shown.splitlines())) <= width


@pytest.mark.parametrize(
    "text", ["once upon a time\n", "", "commit\tval_bpb\n", "commit,val_bpb,status\n", "a\tb\tc\n1\t2\t3\n"]
)
def test_what_is_no_log_is_refused_in_a_sentence(text):
    with pytest.raises(loop.Stop, match="header line") as stop:
        read(text)
    assert stop.value.code == 2 and "\n" not in str(stop.value)


ODD = {
    "half a row": "half a row",
    "a value that is none": "a\tone\t1.0\tkeep\tx",
    "a header in the middle": FIVE.partition("\n")[0],
    "a remark": "# the second night",
    "no status": "a\t1.0\t1.0\t\tx",
    "a kept row without a value": "a\t-\t1.0\tkeep\tx",
}


@pytest.mark.parametrize("line", ODD.values(), ids=ODD)
def test_lines_that_are_no_rows_are_counted_and_the_first_is_named(line):
    first, *rest = FIVE.splitlines()
    report = read("\n".join([first, *rest[:2], line, *rest[2:], line]))
    assert len(report.rows) == 6 and len(report.unread) == 2
    assert "lines left out: 2; line 4 is not a row" in screen(report, 120) and "fix" not in screen(report)


STATUSES = {
    "keep": [
        "baseline",
        "best",
        "KEEP",
        "kept",
        " keep ",
        "accepted",
        "improved",
        "✅ keep",
        "**keep**",
        "`keep`",
    ]
    + ["new best", "NEW_BEST", "win", "pass", "advance", "merged"],
    "crash": ["CRASH", "crashed", "failed", "error", "timeout", "OOM", "killed", "diverged", "❌ crash"],
    "discard": ["Discard", "reverted", "rejected", "worse", "no gain", "?", "failed to improve", "not kept"]
    + ["won't keep", "passed over", "merge conflict", "window too long", "nano model"],
}


@pytest.mark.every(4)
@pytest.mark.parametrize(
    "status, said", [(status, said) for status, words in STATUSES.items() for said in words]
)
def test_the_communitys_words_for_a_status_are_understood(status, said):
    report = read(f"{FIVE}a\t0.98\t1.0\t{said}\tx\n")
    assert report.rows[-1].status == status and not report.unread
    assert math.isnan(report.rows[-1].value) == (status == "crash")


@pytest.mark.parametrize("cell", ["", "-", "24 GB", "n/a", "1e999"])
def test_a_cell_beside_the_metric_that_is_no_number_is_no_reason_to_leave_a_row_out(cell):
    names = loop.header("val_bpb")
    report = read(f"{names}a\t1.5\t{cell}\tkeep\tx\t{cell}\t\t{cell}\t{cell}\n")
    assert len(report.rows) == 1 and not report.unread and "baseline 1.5" in screen(report)


def test_a_row_that_was_written_is_read_back_as_it_was():
    rows = [
        loop.Row("aaaaaaa", 1.5, 0.5, "keep", "baseline", runs=[1.5, 1.6], finished="2026-11-24T15:43:04Z"),
        loop.Row("bbbbbbb", 1.25, 0.5, "keep", "a [b]", -0.25, 0.0007, [1.25], 900, "2026-11-24T15:45:04Z"),
        loop.Row("ccccccc", 1.5, 0.5, "discard", "tiny", 0.000012, 0.000005, [1.5], 9, ""),
        loop.Row("ddddddd", math.nan, 0.0, "crash", "a crash"),
    ]
    metric, again, _ = loop.read_rows(loop.header("loss") + "".join(row.line() for row in rows), "x")
    assert metric == "loss" and repr(again) == repr(rows)  # nan equals nothing, not even itself


def test_a_row_of_the_report_is_one_line_however_narrow_the_window(tmp_path):
    row = loop.Row("1234567", 1.0, 0.5, "keep", "a description of more than eighty columns " * 2, runs=[1.0])
    (tmp_path / "a.tsv").write_text(loop.header("val_bpb") + row.line())
    console = Console(file=io.StringIO(), width=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Report, "paint", lambda report, path: None)
        loop.report(tmp_path, "", str(tmp_path / "a.tsv"), console)
    (line,) = [line for line in console.file.getvalue().splitlines() if "1234567" in line]
    assert line.endswith(row.description.strip())


@pytest.mark.parametrize("error", [0.00009949, 0.0000995, 0.0000997, 0.00009999, 0.0001, 0.0001004])
def test_a_row_reads_back_as_it_was_written_however_small_its_error(error):
    row = loop.Row("1234567", 1.0, 0.5, "discard", "an idea", 0.00123456, error, [1.0])
    (again,) = loop.read_rows(loop.header("val_bpb") + row.line(), "x")[1]
    assert again.line() == row.line()


def test_an_empty_log_and_one_of_crashes_are_reported_too():
    empty = screen(read(loop.header("val_bpb")))
    assert "no baseline yet\nnoise not known\n0 experiments, 0 kept, 0 crashed" in empty
    crashes = FIVE.splitlines()[0] + "\na\t0\t0\tcrash\tx\nb\t0\t0\tcrash\ty\n"
    assert "no baseline yet\nnoise not known\n2 experiments, 0 kept, 2 crashed" in screen(read(crashes))


# ---- what the rows tell


def test_a_gain_is_clear_when_luck_alone_would_not_explain_it():
    kept = ("keep", [1.0, 1.001, 0.999], ""), ("keep", [0.9995] * 3, ""), ("keep", [0.99] * 3, "")
    assert numbers(night(*kept)) == [0, 1, 2] and clear(night(*kept)) == [2]


def test_a_near_miss_is_what_was_not_a_standard_error_worse_the_best_first_and_five_at_most():
    values = [1.0005, 0.9995, 1.0015, 1.0, 1.0001, 1.0002, 1.0003]
    report = night(("keep", [1.0], ""), *(("discard", [value], "") for value in values), ("crash", [], ""))
    assert numbers(report) == [0, 2, 4, 5, 6, 7]


def test_where_higher_is_better_a_near_miss_is_one_that_rose():
    report = night(
        ("keep", [0.5], ""), ("keep", [0.6], ""), ("discard", [0.5999], ""), ("discard", [0.3], "")
    )
    assert report.sign == -1 and numbers(report) == [0, 1, 2]


def test_where_higher_is_better_and_nothing_was_kept_yet_a_clear_loss_is_no_near_miss():
    report = night(("keep", [0.5], ""), *(("discard", [value], "") for value in (0.3, 0.4999, 0.2, 0.45)))
    assert numbers(report) == [0, 2] and clear(report) == []


def test_what_an_experiment_edited_is_the_last_kept_not_the_lowest():
    report = night(
        ("keep", [1.0], ""), ("keep", [0.9], ""), ("keep", [0.9001], ""), ("discard", [0.8], ""),
        ("crash", [], ""),
    )  # fmt: skip
    before = [row and row.commit for row in loop.kept_before(report.rows)]
    assert before == [None, "0000000", "0000001", *["0000002"] * 3]


def test_the_hours_are_from_the_first_row_to_the_last():
    times = [f"2026-11-23T2{hour}:30:00Z" for hour in range(4)]
    for order in (times, times[::-1]):  # a spreadsheet may have sorted the rows
        report = night(*(("discard" if n else "keep", [1.0], finished) for n, finished in enumerate(order)))
        assert "3.0 hours, 1.0 an hour" in screen(report) and "4,000 tokens" in screen(report)


@pytest.mark.parametrize("finished", ["yesterday", "2026-11-24 15:43", "15:43"])
def test_times_in_another_form_are_no_reason_to_fail(finished):
    report = night(("keep", [1.0], "2026-11-23T20:30:00Z"), ("discard", [1.0], finished))
    assert "1 experiment, 0 kept" in screen(report)


# ---- a branch


PLAIN = """\
import prepare
width = 64
depth = 4
prepare.finish(1 + 1 / width + abs(depth - 9) / 100)
"""


@pytest.fixture
def branch(project):
    """A project with a night of three experiments on autoresearch/t."""
    project.write("train.py", PLAIN)
    project.commit("plain")
    replies = [
        block("width = 64", "width = 128", "twice the width"),
        block("depth = 4", "depth = 1", "one layer"),
    ]
    project.night("--experiments", 3, replies=[*replies, block("depth = 4", "depth = [", "a typo")])
    return project


def test_the_report_of_a_branch_tells_its_rows_and_changes_nothing(branch):
    before = branch.git("for-each-ref") + branch.status()
    report = loop.read_report(branch.folder, "t", "")
    out = screen(report, 120)
    assert report.name == "autoresearch/t" and "3 experiments, 1 kept, 1 crashed" in out
    assert "twice the width" in out and "gain 0.00" in out and "noise of a difference 0.0007" in out
    assert branch.git("for-each-ref") + branch.status() == before == branch.git("for-each-ref")


@pytest.mark.slow
def test_the_branch_is_the_tags_else_the_one_checked_out_else_the_newest(branch):
    def name(tag=""):
        return loop.read_report(branch.folder, tag, "").name

    branch.environment["GIT_COMMITTER_DATE"] = "2001-01-01T00:00:00Z"
    branch.git(
        "branch", "autoresearch/older", branch.git("commit-tree", "main^{tree}", "-m", "older").strip()
    )
    assert name() == "autoresearch/t"
    branch.git("checkout", "--quiet", "main")
    assert name() == "autoresearch/t" and name("older") == name("autoresearch/older") == "autoresearch/older"
    branch.git("checkout", "--quiet", "autoresearch/older")
    assert name() == "autoresearch/older"
    with pytest.raises(
        loop.Stop, match="no branch autoresearch/u; run: python loop.py, or name a file: --report"
    ):
        name("u")
    assert branch.git("branch", "--show-current") == "autoresearch/older\n"


def test_before_the_first_night_there_is_no_branch_and_a_file_that_is_not_there_cannot_be_read(project):
    with pytest.raises(loop.Stop, match="no branch autoresearch/TAG yet"):
        loop.read_report(project.folder, "", "")
    with pytest.raises(loop.Stop, match="none.tsv can't be read"):
        loop.read_report(project.folder, "", str(project.folder / "none.tsv"))


def test_while_the_baseline_runs_there_is_a_report_without_rows(project):
    seen = []

    def run(job):
        seen.append(screen(loop.read_report(project.folder, "t", "")))
        return {"cause": "", "value": 1.0, "work": 1, "trained": 1.0}

    project.write("train.py", PLAIN)
    project.commit("plain")
    project.night("--hours", "1e-9", run=run, offline=False)
    assert len(seen) == 2 and "no baseline yet" in seen[0]


def test_the_command_reports_files_and_refuses_in_a_sentence(project):
    project.write("five.tsv", FIVE)
    out = project.run("--report", "five.tsv", AUTORESEARCH_DATA="/nowhere")
    assert out.startswith("five.tsv") and "5 experiments, 2 kept, 1 crashed" in out
    drawn = "picture: five.tsv.png", "no picture: matplotlib is missing; run: pip install -e '.[plot]'"
    assert (
        any(text in out for text in drawn)
        and not (project.folder / "progress.png").exists()
        and "Traceback" not in out
    )
    os.mkfifo(project.folder / "pipe")
    threading.Thread(target=(project.folder / "pipe").write_text, args=[FIVE], daemon=True).start()
    assert "no picture: " in project.run("--report", "pipe") and not (project.folder / "pipe.png").exists()
    project.write("prose.tsv", "once upon a time\n")
    out = project.run("--report", "prose.tsv", code=2)
    assert out.startswith("loop.py: prose.tsv ") and "header line" in out and out.count("\n") == 1


# ---- the picture


CRASHES_AND_GIANTS = FIVE.partition("\n")[2] * 60 + "z\t1e300\t1\tdiscard\tz\n"


@pytest.mark.every(2)
@pytest.mark.parametrize("rows", ["", "a\t1.0\t1\tkeep\tb\n", "a\t0\t0\tcrash\tb\n", CRASHES_AND_GIANTS])
def test_any_log_can_be_drawn(tmp_path, rows):
    pytest.importorskip("matplotlib")
    path = tmp_path / "progress.png"
    read(FIVE.partition("\n")[0] + "\n" + rows, "$a_b$ night\ud800").paint(path)
    assert path.read_bytes().startswith(b"\x89PNG") and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("sign, best", [(1, 0.9), (-1, 0.9)])
def test_the_picture_shows_every_kept_row_and_the_side_on_which_better_lies(
    tmp_path, monkeypatch, sign, best
):
    figures = pytest.importorskip("matplotlib.figure")
    found = []
    monkeypatch.setattr(
        figures.Figure, "savefig", lambda figure, path, **how: (found.append(figure), path.touch())
    )
    values = [1.0, 0.99, 1.002, 5.0, best]
    runs = [[1 - sign * (1 - value)] for value in values]
    report = night(*zip(("keep", "keep", "discard", "discard", "keep"), runs, [""] * 5, strict=True))
    report.paint(tmp_path / "progress.png")
    (axes,) = found[0].axes
    low, high = axes.get_ylim()
    assert all(
        low < run[0] < high for run, row in zip(runs, report.rows, strict=True) if row.status == "keep"
    )
    assert axes.get_ylabel() == f"val_bpb, {'lower' if sign > 0 else 'higher'} is better"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert {"keep (3)", "discard (2)", "crash (0)", "best so far"} <= {*labels}


def test_a_disk_that_is_full_leaves_no_half_of_a_picture(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")

    def fails(figure, path, **how):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figures.Figure, "savefig", fails)
    with pytest.raises(OSError):
        read(FIVE).paint(tmp_path / "progress.png")
    assert [*tmp_path.iterdir()] == []


def test_without_matplotlib_the_table_comes_and_a_sentence_says_how_to_get_the_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "five.tsv").write_text(FIVE)
    console = Console(file=io.StringIO(), width=100)
    assert loop.report(tmp_path, "", str(tmp_path / "five.tsv"), console) == 0
    out = console.file.getvalue()
    assert (
        "5 experiments" in out and "no picture: matplotlib is missing; run: pip install -e '.[plot]'" in out
    )
    assert not (tmp_path / "progress.png").exists()


@pytest.mark.slow
def test_the_picture_of_a_file_lies_beside_it_and_leaves_the_night_s_own_alone(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "five.tsv").write_text(FIVE)
    console = Console(file=io.StringIO(), width=200)
    assert loop.report(tmp_path, "", str(tmp_path / "five.tsv"), console) == 0
    assert f"picture: {tmp_path}/five.tsv.png" in console.file.getvalue()
    assert (tmp_path / "five.tsv.png").exists() and not (tmp_path / "progress.png").exists()


@pytest.mark.slow
def test_where_a_picture_can_not_be_written_the_table_comes_all_the_same(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "five.tsv").write_text(FIVE)
    (tmp_path / "five.tsv.png").mkdir()
    console = Console(file=io.StringIO(), width=200)
    assert loop.report(tmp_path, "", str(tmp_path / "five.tsv"), console) == 0
    assert (
        "5 experiments" in console.file.getvalue() and "no picture: Is a directory" in console.file.getvalue()
    )


def test_the_report_says_why_the_latest_crashed():
    lines = [f"{n}\tnan\t0.0\tcrash\tidea {n} [out of memory]" for n in range(9)]
    out = screen(read("commit\tval_bpb\tmemory_gb\tstatus\tdescription\n" + "\n".join(lines)), 100)
    told = out.partition("of those that crashed:")[2]
    assert told.count("[out of memory]") == loop.LATEST and "idea 8" in told and "idea 0" not in told
    assert "of those that crashed" not in screen(night(("keep", [1.0], "")))


def test_a_report_and_an_audit_are_two_commands():
    with pytest.raises(SystemExit):
        loop.parse_arguments(["--report", "--audit"])


@pytest.mark.slow
def test_the_picture_is_drawn_beside_the_log_and_git_ignores_it(branch):
    pytest.importorskip("matplotlib")
    out = branch.run("--report")
    assert f"picture: {branch.folder}/progress.png" in out and branch.status() == ""
    assert (branch.folder / "progress.png").read_bytes().startswith(b"\x89PNG")


def test_the_night_in_the_readme_is_what_the_report_makes_of_it():
    folder = Path(__file__).parent
    out = screen(read((folder / "night" / "results.tsv").read_text()), 120)
    readme = (folder.parent / "README.md").read_text().replace("\n", " ")
    told = [line.strip() for line in out.splitlines() if line.startswith(("best ", "noise of a difference"))]
    told += [line.strip() for line in out.splitlines() if " experiments, " in line]
    assert len(told) == 3 and all(line in readme for line in told), told
