"""The live view: what a window of any size shows, what a terminal is sent, and the plain lines where there is none."""

import fcntl
import json
import math
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import threading
import time

import pytest
from conftest import block
from rich.cells import cell_len
from rich.console import Console
from test_loop import BETTER, CRASHING, WORSE, slow, waiting, waits_for

import loop

NOW = 1000.0
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def row(number, status="discard", bpb=1.0, runs=1, description="an idea", change=0.1):
    runs = [] if status == "crash" else [bpb] * runs
    change, error = (change, 0.0007 / len(runs) ** 0.5) if runs and number else (math.nan, math.nan)
    return loop.Row(f"{number:07}", bpb if runs else math.nan, 1.0, status, description, change, error, runs, 100, "")


def busy_night(**values):
    """Facts in the middle of a night, with something of everything."""
    facts = loop.Facts(Console(), live=True, title="autoresearch/t  ·  data-0123456789ab  ·  a device  ·  a-model", before=1, began=0.0)
    facts.rows += [row(0, "keep", 1.5, 3, "baseline"), *(row(n, bpb=1.6, description=f"loss {n} [mlp]") for n in range(1, 40))]
    facts.rows += [row(40, "keep", 1.25, 2, "gain 40", -0.25), row(41, "crash", description="crash 41")]
    facts.rows += [row(42, "keep", 1.125, 2, "gain 42", -0.125)]
    facts.said += [f"12:00:{n:02}  said {n}" for n in range(20)]
    facts.show(
        activity="run 2 of up to 3: #43 a wider [mlp]", since=NOW - 100, why="A wider layer holds more. " * 30,
        points={n: 2.0 for n in range(1, 43)}, rival=[(n, 2.5) for n in range(1, 101)], pace="953 steps, 12,345 tokens/s",
        thinking="a-model thinks about the next edit", thinking_since=NOW - 34, busy=790.0, tokens=1234567, wasted=1234, refused=2,
    )  # fmt: skip
    facts.show(**values)
    return facts


def screen(facts, width=80, height=24, **kwargs):
    console = Console(width=width, height=height, **kwargs)
    with console.capture() as capture:
        console.print(loop.render(facts, NOW, width, height))
    return capture.get()


# ---- windows


@pytest.mark.parametrize("description", ["an idea", "一个想法" * 40, "x" * 200])
@pytest.mark.parametrize("width, height", [(1, 1), (2, 50), (10, 4), (20, 5), (40, 12), (80, 10), (80, 24), (200, 60), (500, 100)])
def test_nothing_is_wider_or_higher_than_the_window(width, height, description):
    facts = busy_night(activity=description, why=description, thinking=description, title=description)
    facts.rows.append(row(43, description=description))
    lines = screen(facts, width, height).splitlines()
    assert len(lines) <= height and max(map(cell_len, lines)) <= width


def test_no_number_is_cut_in_any_window():
    whole = set(screen(busy_night(), 250, 100).split())
    for width in range(30, 130, 7):
        shown = screen(busy_night(), width, 24).replace("…", " ").split()
        assert [word for word in shown if re.search(r"\d", word) and word not in whole] == []


def test_an_ordinary_terminal_shows_what_is_tried_and_why_and_how_it_does():
    shown = screen(busy_night())
    assert len(shown.splitlines()) == 24
    for text in (
        "autoresearch/t  ·  data", "baseline 1.5000", "best 1.1250", "keep     1.1250 x2 -0.1250+-0.0005  gain 42",
        "loss 39 [mlp]", "said 19",
        "> 100 s  run 2 of up to 3: #43 a wider [mlp]", "A wider layer holds more.", "42 %  200 s left  953 steps, 12,345 tokens/s",
        "loss 2.000 at 42 %: -0.500 against the best so far, which had 2.500 there", "? 34 s  a-model thinks about the next edit",
        "noise of a difference 0.0007",
        "42 experiments, 2 kept, 1 crashed", "device busy 89 %", "1,234,567 tokens (1,234 for nothing), 2 replies",
    ):  # fmt: skip
        assert text in shown, text


def test_a_large_window_shows_more_of_the_rows_and_a_small_one_what_runs_now():
    large = screen(busy_night(), 200, 60)
    assert large.count("discard") > 25 and large.count("said") == 8 and large.count("A wider layer") > 20
    small = screen(busy_night(), 80, 4).splitlines()
    assert [line.split()[0] for line in small] == [">", small[1].split()[0], "loss", "best"] and "42 %" in small[1]


def test_an_empty_night_and_one_that_is_over_are_shown_too():
    assert "no baseline yet" in screen(loop.Facts(Console()))
    over = screen(busy_night(activity="", why="", points=None, thinking=""))
    assert "gain 42" in over and "left" not in over and "device busy 79 %" in over


def test_a_run_that_has_not_begun_to_train_is_starting():
    assert "0 %  200 s left  starting" in screen(busy_night(points={}, pace=""))


def test_waits_count_down_and_name_their_cause():
    facts = busy_night(thinking="waiting for the model's server: overloaded", thinking_since=NOW + 20)
    facts.show(activity="waiting: no CUDA device", since=NOW + 7.5, why="", points=None)
    shown = screen(facts)
    assert "> 8 s more  waiting: no CUDA device" in shown and "? 20 s more  waiting for the model's server: overloaded" in shown


def test_the_error_that_a_wait_names_is_the_tracebacks_last_line(monkeypatch):
    monkeypatch.setattr(loop.time, "sleep", lambda seconds: None)
    facts = loop.Facts(Console(quiet=True))
    facts.wait(1, "Traceback (most recent call last):\n  File\nKeyError: 'x'\n")
    assert facts.activity == "waiting: KeyError: 'x'" and facts.points is None


def test_only_colours_that_dark_and_light_terminals_show():
    for width, height in ((80, 24), (200, 60)):
        shown = screen(busy_night(), width, height, force_terminal=True, color_system="truecolor")
        assert set(re.findall(r"\x1b\[([0-9;]*)m", shown)) <= {"0", "1", "31", "32"}  # bold, red, green


# ---- the loss against the best's


def test_the_loss_is_compared_at_the_same_point_of_the_run_as_a_mean_of_the_last_percents():
    points = {percent: 3.0 + (percent % 2) for percent in range(43)}
    rival = [(percent, 4.0) for percent in range(101) if percent != 40] + [(41, 5.0)]  # two runs of it, and one point is missing
    assert loop.race(points, rival) == "loss 3.500 at 42 %: -0.550 against the best so far, which had 4.050 there"


def test_nothing_is_compared_with_nothing_nor_at_the_first_steps():
    assert loop.race({42: 3.0}, []) == loop.race({42: 3.0}, [(20, 2.0), (43, 2.0)]) == "loss 3.000 at 42 %"
    assert loop.race({1: 9.0, 3: 7.0}, [(1, 8.0), (3, 6.0)]) == "loss 8.000 at 3 %"


def test_the_bests_curve_comes_from_the_logs_that_are_still_there(tmp_path):
    line = "step 1  {:.1f}%  loss {}  1,000 tokens/s  1 s left\n"
    for name, text in (
        ("0003-0-abcdef1", line.format(10.4, 3.5) + "noise\n" + line.format(20, 3.25)), ("0003-1-abcdef1", line.format(10, 3.0)),
        ("0004-0-fffffff", line.format(10, 9.0)), ("0003-2-abcdef1", "x" * 2 * loop.LOG_HEAD + "\n" + line.format(10, 9.0)),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.log").write_text(text)
    (tmp_path / "0003-3-abcdef1").mkdir()
    os.mkfifo(tmp_path / "0003-3-abcdef1" / "run.log")  # a run can put there what it likes
    best = row(3)
    best.commit = "abcdef1"
    assert sorted(loop.read_curve(tmp_path, best)) == [(10, 3.0), (10, 3.5), (20, 3.25)]
    assert loop.read_curve(tmp_path, row(5)) == loop.read_curve(tmp_path, None) == []


# ---- the chart


def test_the_chart_falls_from_the_first_value_to_the_last():
    *columns, ends = (line.plain for line in loop.chart([4.0, 4.0, 2.0, 0.0], 40, 5))
    assert ends.startswith("baseline 4.0000 ") and ends.endswith(" best 0.0000") and len(columns) == 4
    assert [line[0] for line in columns] == ["█", "░", "░", "░"] and [line[-1] for line in columns] == [" ", " ", " ", "▁"]
    assert [line[20] for line in columns] == [" ", "▁", "░", "░"]  # half of the way, and an eighth of a cell


def test_there_is_no_chart_before_the_first_gain():
    rows = [row(0, "keep", 1.0), row(1, bpb=1.1), row(2, "crash")]
    assert "baseline 1.0000  " not in screen(busy_night(rows=rows))
    assert "baseline 1.0000  " in screen(busy_night(rows=[*rows, row(3, "keep", 0.9)]))


# ---- a real terminal


class Terminal:
    """The loop of a project in a pseudo-terminal: what it sent, as text."""

    def __init__(self, project, *args, columns=80, **environment):
        self.sent, self.columns = "", columns
        self.pid, self.file = pty.fork()
        if not self.pid:
            os.chdir(project.folder)
            command = [sys.executable, "loop.py", "--budget", "20", "--tag", "t", "--sandbox", "off", *map(str, args)]
            os.execve(sys.executable, command, project.environment | {"TERM": "xterm"} | environment)
        self.resize(columns)

    def resize(self, columns, rows=24):
        self.columns = columns
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait_for(self, condition, seconds=30):
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
        assert self.sent.rfind("\x1b[?25l") < self.sent.rfind("\x1b[?25h") and self.sent.count("\x1b[?1049h") == 1
        return code, ESCAPE.sub("", self.sent.rpartition("\x1b[?1049l")[2])


def test_the_last_picture_and_what_was_said_stay_when_the_night_ends(project, server):
    server.replies += [BETTER, "no edit", WORSE]
    terminal = Terminal(project, "--experiments", 2, OPENAI_BASE_URL=server.url)
    code, after = terminal.end()
    assert code == 0 and after.index("reply refused") < after.index("autoresearch/t  ·  toy")
    assert re.search(r"keep +1\.0578.* -0\.0078\+-0\.000\d  twice the width", after)
    assert "2 experiments, 1 kept" in after and "results.tsv on" in after
    assert "\x1b[2J" not in terminal.sent and "\x1b[2K" not in terminal.sent  # what is erased before it is drawn flickers


def test_what_an_audit_found_stands_below_the_last_picture(project, server):
    server.replies += [BETTER]
    project.online(server, "--experiments", 1)
    code, after = Terminal(project, "--audit").end()
    assert code == 0 and after.index("1 experiments, 1 kept") < after.index("audited gain 0.0078") < after.index("results: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_cursor_and_the_screen_come_back_after_a_signal(project, number):
    slow(project)
    terminal = Terminal(project, "--offline")
    terminal.wait_for(lambda sent: "#0 baseline" in sent)
    os.kill(terminal.pid, number)
    code, after = terminal.end()
    assert code == 0 and "no baseline yet" in after and "results: results.tsv" in after


def test_the_cursor_and_the_screen_come_back_when_the_loop_gives_up(project):
    project.write("train.py", project.read("train.py").replace("SECONDS = 0.0", "SECONDS = 0.4"))
    project.commit("slower")
    terminal = Terminal(project, "--offline")
    terminal.wait_for(lambda sent: "#1 " in sent)
    meta = project.data / "toy-0123456789ab" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"more": 1}))
    code, after = terminal.end()
    assert code == 1 and "baseline" in after and "was changed, so what follows" in after


def test_a_resized_window_is_drawn_anew_to_its_measure(project):
    slow(project)
    terminal = Terminal(project, "--offline", columns=100)
    terminal.wait_for(lambda sent: "#0 baseline" in sent)
    for columns, rows in ((37, 10), (120, 30)):
        terminal.resize(columns, rows)
        start = len(terminal.sent)
        terminal.wait_for(lambda sent, start=start: sent.count("\x1b[H", start) > 4)
        frame = ESCAPE.sub("", terminal.sent.split("\x1b[H")[-2]).split("\r\n")
        assert [len(line) for line in frame] == [columns] * rows and any("#0 baseline" in line for line in frame)
    os.kill(terminal.pid, signal.SIGTERM)
    terminal.end()


def test_a_terminal_that_is_not_utf8_gets_ascii(project, server):
    slow(project, 2)  # so that its bar is seen
    server.replies += [BETTER, WORSE]
    terminal = Terminal(project, "--experiments", 2, OPENAI_BASE_URL=server.url, PYTHONIOENCODING="ascii")
    code, after = terminal.end()
    assert code == 0 and terminal.sent.isascii() and "autoresearch/t  -  toy" in after and "2 experiments" in after
    assert "??" not in terminal.sent
    assert "=====" in terminal.sent and "____" in terminal.sent  # the bar and the chart


def test_a_dumb_terminal_gets_plain_lines(project):
    terminal = Terminal(project, "--offline", "--experiments", 1, TERM="dumb")
    terminal.wait_for(lambda sent: False)
    assert "\x1b" not in terminal.sent and "#1 " in terminal.sent and "1 experiments" in terminal.sent
    os.waitpid(terminal.pid, 0)
    os.close(terminal.file)


def test_the_next_idea_is_seen_before_its_turn_and_a_repair_is_told_from_a_new_idea(project, server):
    """What is looked for stays on the screen until it was seen."""
    first, second, third = waiting(project), project.folder.parent / "second", threading.Event()
    crash = block("def main():", f"{waits_for(second)}\n    raise RuntimeError('shapes')", "a crash")
    server.replies += [crash, BETTER, lambda request: third.wait(30) and "no edit"]
    terminal = Terminal(project, "--experiments", 3, OPENAI_BASE_URL=server.url)
    for text, goes_on in (
        ("next: a crash", first.touch),
        ("next: twice the width", second.touch),
        ("local-model mends the crash of a crash [RuntimeError", third.set),
    ):
        terminal.wait_for(lambda sent, text=text: f" s  {text}" in sent)
        goes_on()
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.end()[0] == 0


# ---- plain lines


def test_plain_lines_tell_the_idea_and_why_the_loss_the_row_and_the_next_idea(project, server):
    server.replies += [BETTER, WORSE, CRASHING, block("DEPTH = 4", "DEPTH = 5", "deeper")]
    out = project.online(server, "--experiments", 4)
    lines = [line[10:] for line in out.splitlines()]
    assert "#1 twice the width: Because." in lines
    assert "loss 4.500 at 50 %" in lines and "loss 4.500 at 50 %: +0.000 against the best so far, which had 4.500 there" in lines
    assert {line for line in lines if line.startswith("next: ")} == {
        f"next: {idea}" for idea in ("twice the width", "one layer", "a crash", "deeper")
    }  # when the model is done is not the loop's matter
    told = [line.split()[0] for line in lines if re.match(r"#\d|keep|discard|crash", line)]
    assert told == ["#0", "keep", "#1", "keep", "#2", "discard", "#3", "crash", "#4", "keep"]
