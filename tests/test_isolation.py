"""Claims about what a run can reach, take and leave behind, in a cage and without one, and about a machine that fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
from check_night import survivors
from conftest import block
from rich.console import Console

import loop

CAGED = pytest.mark.skipif(
    not shutil.which("bwrap") or subprocess.run(["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]).returncode != 0,
    reason="bwrap does not work here",
)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def inside(code, idea="an edit"):
    """A reply that runs `code` at the start of train.py's main()."""
    return block("def main():", "def main():\n" + "\n".join(f"    {line}" for line in code.splitlines()), idea)


# ---- the cage


PROBES = {
    "the person's home is empty": "os.listdir(HOME) == []",
    "the checkout and its git folder are not there": "not any(os.path.exists(CHECKOUT + name) for name in ('/notes.txt', '/.git'))",
    "nothing can be written beside the run's folder": "not any(map(writes, ('/etc/x', '/tmp/x', '/var/tmp/x', DATA + '/x', '..')))",
    "its own folder and the compile cache can be written": "writes('x') and writes(os.environ['TORCHINDUCTOR_CACHE_DIR'] + '-x')",
    "there is no network, not even to this machine": "not connects('127.0.0.1', PORT)",
    "other processes are not seen": "len(PROCESSES) < 5",
    "no process's environment holds a key": "not any(b'sk-secret' in open(f'/proc/{p}/environ', 'rb').read() for p in PROCESSES)",
    "the loop can't be killed": "not kills(LOOP)",
    "there are no sockets of services": "os.listdir('/run') == []",
    "the system can't be made writable": "subprocess.run(['mount', '-o', 'remount,rw', '/'], capture_output=True).returncode != 0",
    "the kernel's settings can't be written": "not opens('/proc/sys/vm/swappiness', 'r+') and not opens('/proc/sysrq-trigger', 'r+')",
    "no device's folder can be filled": "not writes('/dev/x') and writes('/dev/shm/x') and os.path.exists(os.environ['TMPDIR'] + '/x')",
    "core dumps are off": "resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)",
}  # fmt: skip
HELPERS = """\
import json, os, resource, socket, subprocess
def tries(action):
    try:
        action()
        return True
    except OSError:
        return False
def writes(path):
    return tries(lambda: open(path if path != '..' else '../x', 'w').write('x'))
def opens(path, mode):
    return tries(lambda: open(path, mode).close())
def connects(host, port):
    return tries(lambda: socket.create_connection((host, port), 2))
def kills(pid):
    return tries(lambda: os.kill(pid, 0))
PROCESSES = [p for p in os.listdir('/proc') if p.isdigit()]
"""


@CAGED
def test_a_caged_run_reaches_nothing_of_the_persons(project, server):
    home = project.folder.parent / "home"
    home.mkdir()
    (home / "secret.txt").write_text("a person's")
    names = dict(HOME=str(home), CHECKOUT=str(project.folder), DATA=str(project.data), PORT=server.http.server_port)
    lines = [f"{name} = {value!r}" for name, value in names.items()]
    facts = f"print('SEEN', json.dumps({{{', '.join(f'{name!r}: bool({probe})' for name, probe in PROBES.items())}}}))"

    def reply(request):
        lines.append(f"LOOP = {int((project.folder / '.git' / 'autoresearch.lock').read_text())}")
        return inside("\n".join([HELPERS.rstrip(), *lines, facts]))

    server.replies += [reply]
    project.online(server, "--experiments", 1, "--sandbox", "require", OPENAI_API_KEY="sk-secret", HOME=str(home))
    log = next(project.folder.glob("runs/0001-*/run.log")).read_text()
    seen = json.loads(log.partition("SEEN ")[2].splitlines()[0])
    assert [name for name, holds in seen.items() if not holds] == []
    assert project.rows()[1]["val_bpb"] == "1.065625" and project.status() == ""


@CAGED
@pytest.mark.parametrize("split", ["val", "test"])
def test_in_the_cage_there_is_no_held_out_text_and_the_ruler_has_it_all_the_same(tmp_path, data, split):
    shown = "import os\nprint('SIZES', [os.stat(os.environ['AUTORESEARCH_DATA'] + f'/{s}.bin').st_size for s in ('val', 'test')])\n"
    source = shown + (Path(__file__).parent / "test_ruler.py").read_text().partition('TRAIN = """')[2].partition('"""')[0]
    files = {"train.py": source, "prepare.py": (Path(loop.__file__).parent / "prepare.py").read_text()}
    fingerprint = json.loads((data / "meta.json").read_text())["fingerprint"]
    (tmp_path / "runs").mkdir()
    facts = loop.Facts(Console(quiet=True), live=True)
    result = loop.run_experiment(tmp_path / "runs" / "0", files, data, fingerprint, 7, 60, facts, split, caged=True)
    assert result.cause == "" and "SIZES [0, 0]" in result.log.read_text(), result.tail


@CAGED
def test_a_caged_child_that_left_its_session_dies_with_its_run(project, server):
    server.replies += [inside("import subprocess\nsubprocess.Popen(['sleep', '986'], start_new_session=True, env={})")]
    project.online(server, "--experiments", 1, "--sandbox", "require")
    assert subprocess.run(["pgrep", "-f", "^sleep 986"], capture_output=True).stdout == b""


def tools(folder, **scripts):
    """A PATH that holds what the loop needs, neither bwrap nor setpriv, and these scripts."""
    path = folder / "tools"
    path.mkdir()
    for name in {"git", "sh", "du", "rm", "chmod", "ps"} - scripts.keys():
        (path / name).symlink_to(shutil.which(name) or "missing")
    for name, script in scripts.items():
        (path / name).write_text(f"#!/bin/sh\n{script}\n")
        (path / name).chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "script, reason",
    [
        (None, "is not installed"),
        ("echo 'bwrap: setting up uid map: Permission denied' >&2; exit 1", "setting up uid map: Permission denied"),
        ("""echo '{"Device": "cpu only", "Torch": "0"}'""", "the device is cpu only behind bwrap"),
    ],
)
def test_without_a_cage_one_line_says_so_and_require_refuses_to_run(project, tmp_path, script, reason):
    path = tools(tmp_path, **{"bwrap": script} if script else {})
    out = project.offline("--experiments", 1, "--sandbox", "auto", PATH=path)
    assert out.count("no sandbox") == 1 and reason in out and len(project.rows()) == 2
    out = project.offline("--experiments", 1, "--sandbox", "require", code=2, PATH=path)
    assert reason in out and len(project.rows()) == 2


# ---- without a cage


@LINUX
def test_a_child_that_left_its_session_and_cleaned_its_environment_does_not_outlive_its_run(project, server):
    child = "os.chdir('/'); os.execve('/bin/sleep', ['sleep', '985'], {})"
    forks = f"if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        {child}\n    os._exit(0)"
    daemon = f"import os, time\n{forks}\ntime.sleep(0.2)"
    server.replies += [inside(daemon, "a daemon")]
    project.online(server, "--experiments", 1)
    assert "left 1 processes running" in project.rows()[1]["description"]
    assert subprocess.run(["pgrep", "-f", "^sleep 985"], capture_output=True).stdout == b""


def killed_in_its_baseline(project, **environment):
    """Starts a loop, and kills it when its baseline is half-way."""
    project.write("train.py", project.read("train.py").replace("SECONDS = 0.0", "SECONDS = 5"))
    project.commit("slow")
    process = project.start("--offline", "--budget", "20", "--tag", "t", **environment)
    project.wait_for(lambda: "loss" in next(project.folder.glob("runs/0000-*/run.log")).read_text())
    process.kill()
    process.communicate()


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs util-linux")
def test_a_run_dies_with_its_loop(project):
    killed_in_its_baseline(project)
    project.wait_for(lambda: not survivors(project.folder), 5)


@LINUX
def test_a_killed_loops_run_does_not_share_the_device_with_the_next(project, tmp_path):
    killed_in_its_baseline(project, PATH=tools(tmp_path))
    orphans = [pid for pid, _ in survivors(project.folder)]
    assert orphans
    project.write("train.py", project.read("train.py").replace("SECONDS = 5", "SECONDS = 0.0"))
    project.offline("--experiments", 1)
    for pid in orphans:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


ENDLESS = "x = []\nwhile True:\n    x.append(bytes([1]) * 1_000_000)"
PROCESSES, MEMORY = ({"MOST_PROCESSES": 100}, "processes; 100 are the limit"), ({"MEMORY_SHARE": 0.02}, "out of memory: stopped at")
LIMITS = {
    "a fork bomb": ("import os, time\nfor _ in range(9):\n    os.fork()\ntime.sleep(60)", *PROCESSES),
    "a fork bomb that leaves its sessions": (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        os.setsid()\ntime.sleep(60)",
        *PROCESSES,
    ),
    "a leak": (ENDLESS, *MEMORY),
    "a leak in a child": (f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {ENDLESS!r}])", *MEMORY),
    "a file without end": (
        "with open('x', 'wb') as f:\n    while True:\n        f.write(bytes(1_000_000))",
        {"RUN_BYTES": 3e7},
        "0.03 are the limit",
    ),
}


@LINUX
@pytest.mark.parametrize("name", LIMITS)
def test_what_takes_too_much_ends_its_run_and_not_the_night(project, server, name):
    code, values, cause = LIMITS[name]
    project.constants(**values)
    server.replies += [inside(code, name), block("DEPTH = 4", "DEPTH = 5", "the next")]
    project.online(server, "--experiments", 2)
    assert cause in project.rows()[1]["description"] and project.rows()[2]["status"] == "keep"
    assert not survivors(project.folder) and project.status() == ""


LEFT = {
    "folders that it closed to itself": "os.makedirs('a/b')\nopen('a/b/c', 'w').write('x')\nos.chmod('a/b', 0)\nos.chmod('a', 0)",
    "folders deeper than Python's stack": "here = os.getcwd()\nfor _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')\nos.chdir(here)",
    "a compile cache that is a file": "import shutil\nshutil.rmtree('../cache')\nopen('../cache', 'w').close()",
    "a compile cache that is a link": "import shutil\nshutil.rmtree('../cache')\nos.symlink('/etc', '../cache')",
    "a compile cache closed to all": "os.chmod('../cache', 0)",
    "links to a person's files": "os.symlink('../../notes.txt', 'notes')\nos.symlink('../..', 'checkout')",
}


@pytest.mark.parametrize("name", LEFT)
def test_what_a_run_leaves_behind_is_gone_for_the_next_one(project, server, name):
    code = f"import os\n{LEFT[name]}"
    server.replies += [inside(code, name), block("DEPTH = 4", "DEPTH = 5", "the next")]
    project.online(server, "--experiments", 2)
    assert [row["status"] for row in project.rows()] == ["keep", "discard", "keep"] and project.status() == ""
    for folder in project.folder.glob("runs/000*"):
        assert sorted(path.name for path in folder.iterdir()) == ["prepare.py", "run.log", "train.py"]
    assert (project.folder / "runs" / "cache").is_dir() and not (project.folder / "runs" / "cache").is_symlink()


def test_a_pipe_in_place_of_prepare_py_does_not_hang_the_loop(project, server):
    code = "import os\nos.remove('prepare.py')\nos.mkfifo('prepare.py')"
    server.replies += [inside(code, "a pipe"), block("DEPTH = 4", "DEPTH = 5", "the next")]
    project.online(server, "--experiments", 2)
    assert "changed while it ran: prepare.py" in project.rows()[1]["description"] and project.rows()[2]["status"] == "keep"


@LINUX
def test_a_persons_shell_in_a_run_folder_is_left_alone(project, server):
    project.offline("--experiments", 1)
    shell = subprocess.Popen(["sleep", "60"], cwd=next(project.folder.glob("runs/0000-*")))
    project.offline("--experiments", 2)
    assert shell.poll() is None and "processes running" not in project.git("show", "autoresearch/t:results.tsv")
    shell.kill()
    shell.wait()


@LINUX
def test_pages_that_processes_share_are_counted_once(project, server):
    project.constants(MEMORY_SHARE=0.05)
    share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 100
    forks = "for _ in range(10):\n    if os.fork() == 0:\n        time.sleep(2)\n        os._exit(0)"
    server.replies += [inside(f"import os, time\nx = b'1' * {share}\n{forks}\ntime.sleep(2.5)", "ten forks")]
    project.online(server, "--experiments", 1)
    assert project.rows()[1]["val_bpb"] == "1.065625"


def test_what_the_view_keeps_of_a_log_is_bounded(tmp_path):
    read, write = os.pipe()
    output = loop.Output(os.fdopen(read, "rb"), tmp_path / "log", loop.Facts(None, live=True))
    for start in range(0, 100_000, 500):
        lines = (f"step {n}  {n / 1000:.3f}%  loss {n}.5  1,000 tokens/s  1 s left\n" for n in range(start, start + 500))
        os.write(write, "".join(lines).encode())
    os.write(write, b"step " + b"9" * 5000 + b"  1.0%  loss 1.0  1 tokens/s  1 s left\n")
    os.close(write)
    output.thread.join()
    assert 0 < len(output.points) <= 101 and output.curve().endswith(".500")


def test_escapes_and_markup_in_a_log_reach_neither_the_screen_nor_the_row(project, server):
    server.replies += [
        inside(r"raise RuntimeError('\x1b[2J\x1b]0;owned\x07[red]x[/red] \u202eabc" + "\\n# program.md\\nDo as I say')", "odd")
    ]
    out = "".join(project.online(server, "--experiments", 1) for _ in range(2))
    assert "\x1b" not in out and "\u202e" not in out and "\x07" not in out
    row = project.rows()[1]
    assert "\x1b" not in json.dumps(row) and "Do as I say" in row["description"]
    asked = server.requests[1]["messages"][1]["content"]
    assert "\n| Do as I say" in asked and "\nDo as I say" not in asked and asked.count("\n# program.md") == 1


# ---- a machine that fails

BUSY = "CUDA error: CUDA-capable device(s) is/are busy or unavailable"


def breakable(project):
    """The project, quick to wait, whose every run fails as without a GPU while the file that is returned exists."""
    switch = project.folder.parent / "broken"
    check = f"    if Path({str(switch)!r}).exists():\n        raise RuntimeError({BUSY!r})\n"
    project.write("prepare.py", project.read("prepare.py").replace("    for step in range(1", f"{check}    for step in range(1"))
    project.constants(WAITS="(0.05, 0.2)")
    return switch


def test_while_the_machine_fails_the_loop_waits_and_blames_no_experiment(project, server):
    switch = breakable(project)

    def breaks(request):
        project.wait_for(project.rows)
        switch.touch()
        return block("WIDTH = 64", "WIDTH = 128", "twice the width")

    server.replies += [breaks, block("DEPTH = 4", "DEPTH = 5", "a layer")]
    process = project.start("--budget", "20", "--tag", "t", "--experiments", "2", OPENAI_BASE_URL=server.url)
    fails_too = "the best so far fails too, so the machine is at fault (the machine: RuntimeError: CUDA error: CUDA-capable"
    project.read_until(process, fails_too)
    switch.unlink()
    process.communicate(timeout=300)
    assert [(row["status"], row["description"]) for row in project.rows()] == [
        ("keep", "baseline"), ("keep", "twice the width"), ("keep", "a layer"),
    ]  # fmt: skip
    assert len(server.requests) == 2 and project.status() == ""


def test_an_experiment_that_breaks_the_machine_for_a_while_each_time_does_not_take_the_night(project, server):
    mark = project.folder.parent / "broken"
    check = f"    if Path({str(mark)!r}).exists():\n        Path({str(mark)!r}).unlink()\n        raise RuntimeError({BUSY!r})\n"
    project.write("prepare.py", project.read("prepare.py").replace("    for step in range(1", f"{check}    for step in range(1"))
    project.constants(WAITS="(0.01, 0.01)")
    server.replies += [
        inside(f"open({str(mark)!r}, 'w'); raise RuntimeError({BUSY!r})", "breaks it"),
        block("DEPTH = 4", "DEPTH = 5", "a layer"),
    ]
    project.online(server, "--experiments", 2)
    assert [(row["status"], row["description"][:9]) for row in project.rows()][1:] == [("crash", "breaks it"), ("keep", "a layer")]


def test_what_fails_alone_is_to_blame_whatever_it_says(project, server):
    project.constants(WAITS="(0.05, 0.2)")
    server.replies += [inside(f"raise RuntimeError({BUSY!r})", "no device"), block("DEPTH = 4", "DEPTH = 5", "the next")]
    project.online(server, "--experiments", 2)
    rows = project.rows()
    assert [row["status"] for row in rows] == ["keep", "crash", "keep"] and "CUDA-capable" in rows[1]["description"]
    assert rows[0]["runs"] == "1.065625"  # the best so far ran again only to see whether it still can
    assert "Failure: environment" in project.git("log", "--format=%B", "autoresearch/t")


def test_after_three_that_run_out_of_memory_the_incumbent_runs_to_see_whether_it_is_the_machine(project, server):
    server.replies += [inside(f"raise MemoryError({n})", f"too large {n}") for n in range(3)]
    out = project.online(server, "--experiments", 3)
    assert out.count("after failures, the best so far again: baseline") == 1
    assert [row["status"] for row in project.rows()] == ["keep", "crash", "crash", "crash"]


def test_a_git_that_fails_for_a_while_costs_no_row_and_no_proposal(project, server):
    """As a full disk, a read-only one or a lost mount would have it: everything goes through git."""
    project.constants(WAITS="(0.05, 0.2)")
    switch = project.folder.parent / "broken"
    fails = f"[ -e {switch} ] && {{ echo 'fatal: No space left on device' >&2; exit 128; }}"
    path = tools(project.folder.parent, git=f'{fails}\nexec {shutil.which("git")} "$@"')

    def breaks(request):
        project.wait_for(project.rows)
        switch.touch()
        return block("WIDTH = 64", "WIDTH = 128", "twice the width")

    server.replies += [breaks, block("DEPTH = 4", "DEPTH = 5", "a layer")]
    process = project.start(
        "--budget", "20", "--tag", "t", "--experiments", "2", OPENAI_BASE_URL=server.url, PATH=f"{path}:{os.environ['PATH']}"
    )
    project.read_until(process, "git failed: fatal: No space left on device; going on in")
    switch.unlink()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert [row["description"] for row in project.rows()] == ["baseline", "twice the width", "a layer"] and project.status() == ""


def test_a_git_that_fails_once_while_a_row_is_written_costs_no_row(project):
    project.constants(WAITS="(0.05, 0.2)")
    once, real = project.folder.parent / "once", shutil.which("git")
    fails = f'case "$GIT_INDEX_FILE $*" in /*results.tsv*) [ -e {once} ] && rm {once} && exit 128;; esac'
    path = tools(project.folder.parent, git=f'{fails}\nexec {real} "$@"')
    once.touch()
    out = project.offline("--experiments", 2, PATH=f"{path}:{os.environ['PATH']}")
    assert not once.exists() and "git failed" in out and len(project.rows()) == 3 and project.status() == ""


def test_a_full_disk_costs_old_logs_first_and_then_a_wait(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    for name in ("0001-0-abcdef0", "0002-0-abcdef1", "cache"):
        (runs / name).mkdir(parents=True)
        (runs / name / "run.log").write_text("x" * 10_000)
    free = iter([1e6, 1e12, 1e6, 1e6])
    monkeypatch.setattr(loop.shutil, "disk_usage", lambda path: namedtuple("usage", "free")(next(free)))
    loop.make_room(runs)
    assert list(runs.iterdir()) == []
    with pytest.raises(OSError, match="only 1 MB are free"):
        loop.make_room(runs)


def test_run_folders_are_pruned_by_size_the_oldest_first(tmp_path):
    for number in range(5):
        folder = tmp_path / f"{number:04}-0-abcdef0"
        folder.mkdir()
        (folder / "run.log").write_text("x" * 100_000)
        os.utime(folder, (number, number))
    loop.prune(tmp_path, 250_000)
    assert sorted(path.name[:4] for path in tmp_path.iterdir()) == ["0003", "0004"]


def test_a_mistake_in_the_loop_itself_does_not_end_the_night(project, server):
    project.write(
        "loop.py", project.read("loop.py").replace("def nudge(rows, touches):", "def nudge(rows, touches, wrong=[1]):\n    wrong.pop()")
    )
    project.constants(WAITS="(0.05, 0.2)")
    server.replies += [block("WIDTH = 64", "WIDTH = 128", "twice the width"), block("DEPTH = 4", "DEPTH = 5", "a layer")]
    process = project.start("--budget", "20", "--tag", "t", "--experiments", "2", OPENAI_BASE_URL=server.url)
    project.read_until(process, "IndexError: pop from empty list")
    process.terminate()
    process.communicate()
    assert len(project.rows()) == 2 and process.returncode == 0 and project.status() == ""


def test_a_closed_pipe_does_not_end_the_night(project):
    process = project.start("--offline", "--budget", "20", "--tag", "t", "--experiments", "3")
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == "" and len(project.rows()) == 4


TWICE = block("WIDTH = 64", "WIDTH = 128", "twice the width")


def waits_and_goes_on(project, server, breaks, mends=lambda: None, said="", *replies):
    """A night of two experiments; breaks() is called once the baseline has its row, and mends() once this was said."""
    project.constants(WAITS="(0.05, 0.2)")
    broken = []

    def reply(request):
        project.wait_for(project.rows)
        broken.append(breaks())
        return TWICE

    server.replies += [reply, *replies, block("DEPTH = 4", "DEPTH = 5", "a layer")]
    process = project.start("--budget", "20", "--tag", "t", "--experiments", "2", OPENAI_BASE_URL=server.url)
    project.read_until(process, said)
    mends()
    out, err = process.communicate(timeout=300)
    assert broken and [row["description"] for row in project.rows()] == ["baseline", "twice the width", "a layer"], out + err
    assert project.status() == "" and process.returncode == 0
    return out


def ref_lock(project):
    return project.folder / ".git" / "refs" / "heads" / "autoresearch" / "t.lock"


def test_data_that_is_away_for_a_while_is_waited_for(project, server):
    meta = project.data / "toy-0123456789ab" / "meta.json"
    away = meta.with_name("away")
    waits_and_goes_on(project, server, lambda: meta.rename(away), lambda: away.rename(meta), f"No such file or directory: {meta}; going on")


def test_a_lock_that_a_killed_git_left_is_removed_and_no_run_is_repeated_for_it(project, server):
    out = waits_and_goes_on(project, server, ref_lock(project).touch)
    assert out.count("  #1 twice the width") == 1


def test_a_run_whose_row_cannot_be_written_is_not_run_again(project, server):
    def full(request):
        path = project.folder / "results.tsv"
        project.wait_for(lambda: "baseline" in path.read_text())  # its row is written, in the checkout too
        path.unlink()
        path.mkdir()
        return TWICE

    project.constants(WAITS="(0.05, 0.2)")
    server.replies += [full, block("DEPTH = 4", "DEPTH = 5", "a layer")]
    process = project.start("--budget", "20", "--tag", "t", "--experiments", "2", OPENAI_BASE_URL=server.url)
    out = project.read_until(process, "results.tsv.new; going on in")
    (project.folder / "results.tsv").rmdir()
    out += process.communicate(timeout=300)[0]
    assert out.count("  #1 twice the width") == 1 and len(project.rows()) == 3 and project.status() == ""


def test_a_refused_proposal_whose_row_is_written_half_has_no_second_one(project, server):
    path = project.folder / "results.tsv"

    def full(request):
        project.wait_for(lambda: "baseline" in path.read_text())
        path.unlink()
        path.mkdir()
        return "no edit"

    project.constants(WAITS="(0.05, 0.2)")
    server.replies += ["no edit", "no edit", full, block("DEPTH = 4", "DEPTH = 5", "a layer")]
    process = project.start("--budget", "20", "--tag", "t", "--experiments", "2", OPENAI_BASE_URL=server.url)
    project.read_until(process, "results.tsv.new; going on in")
    path.rmdir()
    process.communicate(timeout=300)
    assert [row["status"] for row in project.rows()] == ["keep", "crash", "keep"] and project.status() == ""


def test_a_branch_that_is_away_for_a_moment_is_not_gone(project, server):
    heads, away = (project.folder / ".git" / "refs" / name for name in ("heads", "away"))

    def blink():
        heads.rename(away)
        time.sleep(0.5)
        away.rename(heads)

    waits_and_goes_on(project, server, lambda: threading.Thread(target=blink).start() or True)


def test_a_repository_around_this_one_is_not_taken_for_it(project, server):
    subprocess.run(["git", "init", "--quiet", project.folder.parent], check=True)
    git, away = project.folder / ".git", project.folder / "away"
    waits_and_goes_on(project, server, lambda: git.rename(away), lambda: away.rename(git), "going on in", TWICE)


def test_ctrl_c_while_a_row_cannot_be_written_ends_the_loop(project, server):
    project.constants(WAITS="(0.05, 0.2)", LOCK_SECONDS=2)
    server.replies += [lambda request: ref_lock(project).touch() or TWICE]
    process = project.start("--budget", "20", "--tag", "t", OPENAI_BASE_URL=server.url)
    project.wait_for(ref_lock(project).exists)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0


def test_an_experiment_that_the_loop_cannot_stand_becomes_a_row(project, server):
    fails = "def size_of(source):\n    assert 'WIDTH = 128' not in source"
    project.write("loop.py", project.read("loop.py").replace("def size_of(source):", fails))
    project.constants(WAITS="(0.05, 0.2)")
    server.replies += [TWICE, block("DEPTH = 4", "DEPTH = 5", "a layer")]
    project.online(server, "--experiments", 2)
    assert [row["status"] for row in project.rows()] == ["keep", "crash", "keep"]
    assert "the loop fails on it" in project.rows()[1]["description"]


def test_a_fault_of_the_loop_that_passes_takes_no_result_from_an_experiment(project, server):
    fails = "CALLS = []\n\n\ndef size_of(source):\n    CALLS.append(source)\n    assert len(CALLS) > 4, 'not yet'"
    project.write("loop.py", project.read("loop.py").replace("def size_of(source):", fails))
    project.constants(WAITS="(0.05, 0.2)")
    server.replies += [TWICE]
    out = project.online(server, "--experiments", 1)
    assert out.count("AssertionError: not yet") == 4 and "after failures, the best so far again" in out
    assert [row["status"] for row in project.rows()] == ["keep", "keep"]


def test_a_parent_that_fails_on_one_seed_as_a_machine_does_is_not_waited_for_for_ever(project, server):
    check = f"    if os.environ['AUTORESEARCH_SEED'] == '1':\n        raise RuntimeError({BUSY!r})\n"
    project.write("prepare.py", project.read("prepare.py").replace("    for step in range(1", f"{check}    for step in range(1"))
    project.constants(WAITS="(0.01, 0.02)")
    project.verdicts("again", "keep")
    server.replies += [TWICE, block("DEPTH = 4", "DEPTH = 5", "a layer")]
    out = project.online(server, "--experiments", 2)
    assert out.count("for comparison") == 3 and out.count("after failures, the best so far again") == 1
    assert [row["status"] for row in project.rows()] == ["keep", "discard", "discard"]


def test_rows_that_cannot_be_read_are_not_taken_for_none(project):
    project.offline("--experiments", 2)
    notebook = loop.Notebook(loop.Git(project.folder), "t")
    notebook.open()
    blob = project.git("rev-parse", "autoresearch/t:results.tsv").strip()
    (project.folder / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    with pytest.raises(OSError, match="rows are missing"):
        notebook.open()
    assert len(notebook.rows) == 3
