"""The live view: what a window shows, what a terminal is sent, and the plain lines where there is none."""

import fcntl
import io
import math
import os
import pty
import re
import select
import signal
import struct
import termios
import time

import pytest
from conftest import block, python
from rich.cells import cell_len
from rich.console import Console

import loop

NOW = 10_000.0
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PLAIN = """\
import prepare
width = 64
depth = 4
prepare.finish(1 + 1 / width + abs(depth - 9) / 100)
"""
BETTER = block("width = 64", "width = 128", "twice the [width]")
WORSE = block("depth = 4", "depth = 1", "one layer")


@pytest.fixture(autouse=True)
def now(request, monkeypatch):
    """The time is NOW, but for tests of a real terminal."""
    if "project" not in request.fixturenames:
        monkeypatch.setattr(loop.time, "monotonic", lambda: NOW)


def row(number, status="discard", value=1.0, runs=1, description="an idea", change=0.1):
    runs = [] if status == "crash" else [value] * runs
    change, error = (change, 0.0007 / len(runs) ** 0.5) if runs and number else (math.nan, math.nan)
    value = value if runs else math.nan
    return loop.Row(f"{number:07}", value, 1.0, status, description, change, error, runs, 100, "")


def busy_night(devices=1, description="a wider [mlp]", **values):
    """A view in the middle of a night of an hour, with something of everything."""
    view = loop.View(
        Console(), live=True, title="autoresearch/t  ·  a-model  ·  1 x a device", began=NOW - 3600
    )
    view.rows += [row(0, "keep", 1.5, 3, "baseline")]
    view.rows += [row(n, value=1.6, description=f"loss {n} [mlp]") for n in range(1, 40)]
    view.rows += [row(40, "keep", 1.25, 2, "gain 40", -0.25), row(41, "crash", description="crash 41")]
    view.rows += [row(42, "keep", 1.125, 2, "gain 42", -0.125)]
    view.said += [f"12:00:{n:02}  said {n}" for n in range(20)]
    for n in range(devices):
        line = "step 400   42.0%  loss 3.1416  12,345 tokens/s  170 s left"
        view.runs[f"cuda:{n}"] = loop.Run(f"#{43 + n} {description}", NOW - 100, line)
    view.now, view.tokens, view.refused = "a-model thinks about 1 more", 1234567, 2
    view.busy = 3104.0 * devices
    for name, value in values.items():
        setattr(view, name, value)
    return view


def screen(view, width=80, height=24, spare=0, **kwargs):
    view.console = Console(width=width, height=height, **kwargs)
    with view.console.capture() as capture:
        view.console.print(view.draw(spare))
    return capture.get()


# ---- windows


SIZES = [(1, 1), (2, 50), (10, 4), (20, 5), (40, 12), (80, 10), (80, 24), (200, 60), (500, 100)]


@pytest.mark.parametrize("description", ["an idea", "一个想法" * 40, "x" * 200, "👩\u200d🔬🚀é" * 30])
@pytest.mark.parametrize("width, height", SIZES)
def test_nothing_is_wider_or_higher_than_the_window(width, height, description):
    for devices in (1, 2, 8):
        view = busy_night(devices, description, now=description, title=description)
        view.rows.append(row(43, description=description))
        view.said.append(f"12:00:00  {description}")
        lines = screen(view, width, height).splitlines()
        assert len(lines) <= height and max(map(cell_len, lines)) <= width


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_an_ordinary_terminal_shows_every_device_the_rows_and_what_it_took(devices):
    shown = screen(busy_night(devices))
    assert len(shown.splitlines()) == 24
    for text in (
        "autoresearch/t  ·  a-model  ·  1 x a device", "keep    1.1250 x2", "-0.1250+-0.0005  gain 42", "crash 41",
        "loss 39 [mlp]",
        "said 19", "best 1.1250, baseline 1.5000: gain 0.3750 +- 0.0007", "noise of a difference 0.0007",
        "42 experiments, 2 kept, 1 crashed", "1:00:00, 42.0 an hour", "devices busy 89 %",
        "1,234,567 tokens, 2 replies refused", "a-model thinks about 1 more",
    ):  # fmt: skip
        assert text in shown, text
    for n in range(devices):
        (line,) = (line for line in shown.splitlines() if line.startswith(f"cuda:{n} "))
        assert "━" in line and "─" in line and "42 %" in line and "138 s left" in line
        assert f"#{43 + n} a wider [mlp]" in line


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_wide_characters_leave_the_numbers_of_each_device_legible(devices):
    lines = screen(busy_night(devices, "一个想法" * 40)).splitlines()
    found = [line for line in lines if line.startswith("cuda:")]
    assert len(found) == devices
    assert all(re.search("42 %  138 s left  #[45]", line) for line in found)
    assert all("一个想法" in line for line in found)


def test_a_large_window_shows_more_of_the_rows_and_of_what_was_said_and_what_a_run_printed_last():
    small, large = screen(busy_night(2)), screen(busy_night(2), 200, 60)
    assert large.count("discard") > 25 > small.count("discard") and large.count("said") > small.count("said")
    assert large.count("loss 3.1416  12,345 tokens/s") == 2


def test_a_small_window_shows_what_runs_now_and_what_was_won():
    small = screen(busy_night(), 80, 6)
    assert "cuda:0" in small and "42 %" in small and "best 1.1250" in small and "discard" not in small


@pytest.mark.parametrize("rows, number, seen", [(43, 3, 3), (43, 40, 10), (5, 40, 40), (200, 40, 6)])
def test_what_was_said_is_shown_whole_where_the_rows_leave_room(rows, number, seen):
    view = busy_night()
    view.rows[:] = (view.rows * 5)[:rows]
    view.said.clear()
    view.said += [f"12:00:00  said {n}." for n in range(number)]
    shown = screen(view, 100, 60)
    assert [n for n in range(number) if f"said {n}." in shown] == [*range(number)][-seen:]


def test_a_long_message_is_shown_whole():
    view = busy_night()
    view.said.append("12:00:00  NO SANDBOX, " + "because of this and that " * 4 + "to the end")
    lines = screen(view).splitlines()
    (first,) = (n for n, line in enumerate(lines) if "NO SANDBOX" in line)
    assert lines[first + 1].startswith(" " * 10 + "of this and") and "to the end" in lines[first + 1]


def test_of_what_was_said_the_last_line_is_shown():
    view = busy_night()
    view.said.append("12:00:00  Traceback (most recent call last):\n  File\nKeyError: 'x'")
    assert "KeyError: 'x'" in screen(view) and "Traceback" not in screen(view)


def test_room_that_is_kept_free_below_stays_free():
    assert len(screen(busy_night(), 80, 24, spare=3).splitlines()) == 21
    assert len(screen(busy_night(), 80, 2, spare=3).splitlines()) == 1


def test_an_empty_night_and_one_that_is_over_are_shown_too():
    empty = screen(loop.View(Console()))
    assert "no baseline yet" in empty and "noise not known" in empty and "0 experiments" in empty
    over = screen(busy_night(now="", runs={"cuda:0": None}))
    assert "gain 42" in over and "s left" not in over and "devices busy 86 %" in over


def test_a_device_without_work_is_free_and_its_neighbour_runs():
    view = busy_night(2)
    view.runs["cuda:0"] = None
    shown = screen(view)
    assert re.search(r"^cuda:0 +free$", shown, re.MULTILINE) and "#44 a wider [mlp]" in shown
    assert "devices busy 88 %" in shown


@pytest.mark.parametrize(
    "line, percent",
    [
        ("starting", 0), ("step 1  0.3%  loss 9", 0), ("step 400 42.0%  loss 3", 42), ("eval 99.6 %", 100),
        ("250 % of it", 100), ("[50%] then 75%", 75), ("100%|████| 7/7", 100), ("%", 0), ("1e9%", 9), ("", 0),
    ],
)  # fmt: skip
def test_how_far_a_run_is_it_says_itself(line, percent):
    view = busy_night()
    view.runs["cuda:0"].line = line
    shown = next(line for line in screen(view).splitlines() if line.startswith("cuda:0"))
    bar = re.search(r"[━─]+", shown)[0]
    left = min(200, 100 * (100 / percent - 1)) if percent else 200  # of the budget, or as fast as until now
    assert f" {percent} %  {left:3.0f} s left" in shown and bar.count("━") == round(len(bar) * percent / 100)


def test_a_run_that_is_late_has_no_seconds_left():
    view = busy_night(budget=20)
    assert "0 s left" in screen(view) and "-" not in re.search(r"%(.*)s left", screen(view))[1]


def test_the_share_of_devices_that_are_busy_is_of_all_and_never_above_all():
    runs = busy_night().runs | {"cuda:1": None}
    assert "devices busy 45 %" in screen(busy_night(2, busy=3140.0, runs=runs))
    assert "devices busy 100 %" in screen(busy_night(2, busy=1e9))


def test_what_a_model_or_a_run_wrote_is_no_markup_and_no_command_to_the_terminal():
    evil = "[bold red]x[/] [link=http://a]y[/link] [/nothing]"
    view = busy_night(2, evil, title=evil, now=evil)
    view.rows.append(row(43, description=evil))
    view.said.append(f"12:00:00  {evil}")
    view.runs["cuda:1"].line = evil
    shown = screen(view, 200, 30, force_terminal=True, color_system="truecolor")
    assert ESCAPE.sub("", shown).count(evil) >= 6
    assert "\x1b]" not in shown and set(re.findall(r"\x1b\[([0-9;]*)m", shown)) <= {"0", "1", "31", "32"}


def test_only_colours_that_dark_and_light_terminals_show():
    for width, height in ((80, 24), (200, 60)):
        shown = screen(busy_night(), width, height, force_terminal=True, color_system="truecolor")
        assert set(re.findall(r"\x1b\[([0-9;]*)m", shown)) == {"0", "1", "31", "32"}  # bold, red, green


def test_where_higher_is_better_a_rise_is_the_gain():
    view = busy_night(sign=-1)
    view.rows[:] = [row(0, "keep", 0.5, 1, "baseline"), row(1, "keep", 0.75, 1, "up", 0.25)]
    assert "best 0.7500, baseline 0.5000: gain 0.2500 +- 0.0007" in screen(view)


# ---- plain lines


def said(view, *lines, **kwargs):
    view.console = Console(file=io.StringIO(), width=40, highlight=False)
    for line in lines:
        view.say(line, **kwargs)
    return view.console.file.getvalue()


def test_without_a_terminal_what_is_said_is_printed_whole_with_its_time_and_never_as_markup():
    view = loop.View(Console())
    out = said(view, "[bold]" + "x" * 100 + "[/bold] [/nothing]", "two\nlines")
    assert re.fullmatch(r"\d\d:\d\d:\d\d  \[bold\]x{100}\[/bold\] \[/nothing\]\n\S+  two\nlines\n", out)
    assert len(view.said) == 2


def test_what_is_seen_in_the_view_is_printed_where_there_is_none_and_not_said_twice():
    view = loop.View(Console())
    assert "a row" in said(view, "a row", seen=True) and not view.said


def test_while_the_view_is_on_the_screen_nothing_is_printed_over_it():
    view = loop.View(Console(), live=True)
    assert said(view, "a line") == "" and len(view.said) == 1


@pytest.mark.parametrize("error", [OSError(5, "gone"), BrokenPipeError(), SystemExit(1)])
def test_a_terminal_that_is_gone_does_not_end_the_night(error):
    class Gone(io.StringIO):
        def write(self, text):
            raise error

    view = loop.View(Console(file=Gone()))
    view.say("a line")
    assert len(view.said) == 1


def test_a_night_of_plain_lines_tells_each_run_each_row_and_how_it_goes(project):
    project.write("train.py", PLAIN)
    project.commit("plain")
    session = project.night("--experiments", 2, replies=[BETTER, WORSE])
    lines = [line[10:] for line in session.output.getvalue().splitlines()]
    told = [line.partition("  ")[0] for line in lines if re.match(r"cpu:0: #|\w{7} (keep|discard)", line)]
    commits = [row["commit"] for row in project.rows()]
    assert told == [
        "cpu:0: #0 baseline (timing run)", "cpu:0: #0 baseline", f"{commits[0]} keep",
        "cpu:0: #1 twice the [width]", f"{commits[1]} keep",
        "cpu:0: #2 one layer", f"{commits[2]} discard 1.0878",
    ]  # fmt: skip
    assert lines[:6] == [
        "asking prepare.py about the data and this machine, a few seconds",
        "autoresearch/t  ·  local-model  ·  1 x cpu, stand-in",
        "180 or more experiments an hour; the search moves 0 constants",
        "a run takes at most 20 s, on cpu:0; --devices chooses",
        "the model is asked for an edit a run; --tokens N limits what that costs",
        "Ctrl-C stops, the same command goes on; --report shows the results",
    ]
    kept = r"\w{7} keep +1\.0578 +-0\.0078\+-0\.0007  twice the \[width\]$"
    assert any(re.match(kept, line) for line in lines)
    totals = session.view.totals()
    assert totals[0].startswith("best 1.0578, baseline 1.0656: gain 0.00") and "200 tokens" in totals[3]


# ---- a real terminal


class Terminal:
    """The loop of a project in a pseudo-terminal: what it sent, as text."""

    def __init__(self, project, *args, columns=80, **environment):
        self.sent, self.columns = "", columns
        self.pid, self.file = pty.fork()
        if not self.pid:
            os.chdir(project.folder)
            words = "--budget 20 --tag t --sandbox off".split()
            command = [python(), "loop.py", *words, *map(str, args)]
            os.execve(python(), command, project.environment | {"TERM": "xterm"} | environment)
        self.resize(columns)

    def resize(self, columns, rows=24):
        self.columns = columns
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait_for(self, condition, seconds=120):
        """Reads on until condition(self.sent) holds, or the loop's end."""
        end = time.monotonic() + seconds
        while not condition(self.sent):
            assert time.monotonic() < end, f"never happened:\n{self.sent[-3000:]}"
            if select.select([self.file], [], [], 0.1)[0]:
                try:
                    self.sent += os.read(self.file, 65536).decode("utf-8", "replace")
                except OSError:  # Linux says so when the other side is closed
                    break

    def end(self):
        """Waits for the loop's end: its exit code, and what it sent after it left its screen."""
        self.wait_for(lambda sent: False)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.file)
        assert (
            self.sent.rfind("\x1b[?25l") < self.sent.rfind("\x1b[?25h")
            and self.sent.count("\x1b[?1049h") == 1
        )
        return code, ESCAPE.sub("", self.sent.rpartition("\x1b[?1049l")[2])


def slow(project, seconds=100.0):
    """A project whose runs take so long."""
    project.write("train.py", project.read("train.py").replace("SECONDS = 0.0", f"SECONDS = {seconds}"))
    project.commit("slow")


@pytest.mark.slow
def test_the_last_picture_and_what_was_said_stay_when_the_night_ends(project, server):
    project.write("train.py", PLAIN)
    project.commit("plain")
    server.replies += [BETTER, "no edit", WORSE]
    terminal = Terminal(
        project, "--experiments", 2, "--model", "/models/local-model", OPENAI_BASE_URL=server.url
    )
    code, after = terminal.end()
    assert code == 0 and after.index("reply refused") < after.index("autoresearch/t  ·  local-model")
    assert after.count("reply refused") == 1
    assert re.search(r"keep +1\.0578.* -0\.0078\+-0\.000\d  twice the \[width\]", after)
    assert "2 experiments, 1 kept" in after and "results.tsv on" in after
    assert (
        "\x1b[2J" not in terminal.sent and "\x1b[2K" not in terminal.sent
    )  # erased before it is drawn, it flickers


@pytest.mark.slow
def test_a_window_is_drawn_to_its_measure_and_the_screen_comes_back_after_a_signal(project):
    slow(project)
    terminal = Terminal(project, "--offline", columns=100)
    terminal.wait_for(lambda sent: "#0 baseline" in sent)
    for columns, rows in ((37, 10), (120, 30)):
        terminal.resize(columns, rows)
        start = len(terminal.sent)
        measure = (start, columns, rows)
        terminal.wait_for(lambda sent, measure=measure: whole_frame(sent[measure[0] :], *measure[1:]))
    os.kill(terminal.pid, signal.SIGTERM)
    code, after = terminal.end()
    assert (
        code == 0
        and "no baseline yet" in after
        and "results.tsv on autoresearch/t" in after
        and "going on" not in after
    )


def whole_frame(sent, columns, rows):
    """Whether a picture of this measure was sent."""
    frames = [ESCAPE.sub("", frame).split("\r\n") for frame in sent.split("\x1b[H")]
    return any(
        [len(line) for line in frame] == [columns] * rows for frame in frames if "#0" in "".join(frame)
    )


@pytest.mark.slow
def test_a_terminal_that_is_not_utf8_gets_what_it_can_show(project):
    slow(project)
    terminal = Terminal(project, "--offline", PYTHONIOENCODING="ascii")
    terminal.wait_for(lambda sent: "#0 baseline" in sent)
    os.kill(terminal.pid, signal.SIGTERM)
    code, after = terminal.end()
    assert (
        code == 0
        and terminal.sent.isascii()
        and "autoresearch/t  ?  offline search" in after
        and "0 experiments" in after
    )


def test_a_dumb_terminal_gets_plain_lines(project):
    slow(project)
    terminal = Terminal(project, "--offline", TERM="dumb")
    terminal.wait_for(lambda sent: "#0 baseline" in sent)
    os.kill(terminal.pid, signal.SIGINT)
    terminal.wait_for(lambda sent: False)
    assert "\x1b" not in terminal.sent and "no baseline yet" in terminal.sent
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 0
    os.close(terminal.file)
