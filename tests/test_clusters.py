"""Claims about runs on other machines: what crosses to a node and back, and what becomes of a run whose node fails.

The other machine is this one, behind `env` or a script that does to the worker what a cluster may do.
"""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from check_night import check as problems
from conftest import FACTS, block, python, stand_in
from test_isolation import CAGED, LINUX, Place, quiet, tools

import loop

HERE = os.uname().nodename
KILLS_ITS_WORKER = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)"


class Node(Place):
    """Another machine: a home of its own with nothing in it, and data."""

    def __init__(self, folder, monkeypatch):
        super().__init__(folder)
        self.home, self.patch = folder / "home", monkeypatch
        monkeypatch.setenv("HOME", str(self.home))
        monkeypatch.setattr(sys, "executable", python())
        monkeypatch.setenv("AUTORESEARCH_DATA", str(self.data))
        monkeypatch.setattr(loop.Device, "known", {})

    def job(self, code="", **more):
        facts = FACTS | {"folder": "", "data": "0123456789ab"}
        told = dict(facts=facts, branch="b", sandbox="off", at_once=2, kept="", name="box:0", index=0)
        return super().job(code, **(told | more))

    def device(self, script='exec "$@"', **constants):
        """A device behind a script, which gets `sh` as its argument, as after ssh's or srun's own words."""
        path = self.folder / "engine"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        device = loop.Device("box:0", self.runs, [str(path)])
        lines = "".join(f"{name} = {value}\n" for name, value in constants.items())
        device.text = device.text.replace("\nINVISIBLE = ", f"\n{lines}\nINVISIBLE = ", 1)
        return device

    def runs_there(self):
        """The live processes of runs on the node."""
        place, found = str(self.home / ".cache"), []
        for process in psutil.process_iter():
            try:
                if process.environ().get("AUTORESEARCH_RUNS", "").startswith(place):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def gone(self):
        """Waits until nothing of a run is left on the node; a test that fails here waits long."""
        end = time.monotonic() + 60
        while self.runs_there():
            assert time.monotonic() < end, self.runs_there()
            time.sleep(0.05)


@pytest.fixture
def node(tmp_path, monkeypatch):
    return Node(tmp_path, monkeypatch)


# ---- what a node does


def test_a_run_elsewhere_has_the_result_of_one_here_and_its_code_and_log_come_home(node):
    result = node.device().run(node.job("print('hello from afar')"), quiet)
    assert (result["cause"], result["value"], result["node"]) == ("", 1.065625, HERE)
    folder = node.runs / "0001-abcdef0" / "0"
    log = (folder / "run.log").read_text()
    assert (
        result["log"] == str(folder / "run.log")
        and "hello from afar" in log
        and "def main" in (folder / "train.py").read_text()
    )
    assert log.startswith(f"on {HERE}, no cage\n") and result["info"].endswith(f", on {HERE}, no cage")


@CAGED
def test_the_log_says_where_a_cage_works(node):
    result = node.device().run(
        node.job("import os\nprint('HOME', os.listdir(os.path.expanduser('~')))", sandbox="auto"), quiet
    )
    assert Path(result["log"]).read_text().startswith(f"on {HERE}, caged\n") and result["cause"] == ""


@pytest.mark.slow
def test_a_node_keeps_nothing_of_a_run_but_its_compile_cache_and_that_of_what_was_kept(node):
    code = "import os\nopen(os.environ['AUTORESEARCH_CACHE'] + '/kernel', 'w').write('compiled')"
    node.device().run(node.job(code), quiet)
    (place,) = node.home.glob(".cache/autoresearch/nodes/*")
    assert [path.name for path in (place / "0001-abcdef0").iterdir()] == ["cache"] and not (
        place / "cache"
    ).exists()
    code = "import os\nassert os.path.exists(os.environ['AUTORESEARCH_CACHE'] + '/kernel')"
    assert node.device().run(node.job(code, number=2, kept="0001-abcdef0"), quiet)["cause"] == ""
    os.utime(place / "0001-abcdef0", (0, 0))
    node.device().run(node.job(number=2, seed=1), quiet)
    assert not (place / "0001-abcdef0").exists() and (place / "0002-abcdef0").exists()


@pytest.mark.slow
def test_the_ruler_is_asked_once_and_again_after_a_failure(node):
    said = []
    for job in (node.job(), node.job(seed=1), node.job(probe=True)):
        assert node.device().run(job, said.append)["cause"] == ""
    assert said.count("asking the ruler for its facts") == 2


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "facts, reason",
    [
        ({"device": "an H100"}, "is left out: device was an H100 and is cpu, stand-in"),
        (
            {"software": "torch 2", "device": "x"},
            "device was x and is cpu, stand-in; software was torch 2 and is none",
        ),
        ({"data": "another"}, "this branch was measured on the data set another, which is not in"),
    ],
)
def test_a_node_with_another_device_software_or_data_is_left_out_in_a_sentence(node, facts, reason):
    job = node.job()
    job["facts"] |= facts
    result = node.device().run(job, quiet)
    assert reason in result["cause"] and HERE in result["cause"] and "\n" not in result["cause"]
    assert result["machine"] and result["blame"] == 0 and "value" not in result


def test_where_a_cage_is_required_a_node_without_one_is_left_out(node):
    broken = node.folder / "bwrap"
    broken.write_text("#!/bin/sh\necho no namespaces here >&2\nexit 1\n")
    broken.chmod(0o755)
    result = node.device(f'PATH="{node.folder}:$PATH" exec "$@"').run(node.job(sandbox="require"), quiet)
    assert result["cause"] == f"{HERE} is left out: no sandbox: behind bwrap no namespaces here"


@pytest.mark.slow
def test_devices_of_a_node_that_no_engine_shares_out_are_shared_out_in_turns(node):
    node.patch.setenv("STAND_IN_DEVICES", "2")
    code = "import os\nprint('ON', os.environ['AUTORESEARCH_WHERE'])"
    ruler = "import os; os.environ['AUTORESEARCH_WHERE'] = os.environ.get('CUDA_VISIBLE_DEVICES', 'none')\n"
    for number in range(3):
        job = node.job(code, seed=number, index=number)
        job["files"]["prepare.py"] = (
            job["files"]["prepare.py"]
            .replace("fake:", "cuda:")
            .replace("import hmac\n", f"import hmac\n{ruler}", 1)
        )
        log = Path(node.device().run(job, quiet)["log"]).read_text()
        assert f"ON {number % 2}\n" in log


# ---- what crosses


def test_what_starts_a_worker_gets_no_key(node):
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "MY_SECRET", "DB_PASSWORD", "OPENAI_BASE_URL"):
        node.patch.setenv(name, "hidden")
    node.patch.setenv("SSH_AUTH_SOCK", "needed")
    result = node.device(f'env > "{node.folder}/seen"; exec "$@"').run(node.job(), quiet)
    seen = (node.folder / "seen").read_text()
    assert result["cause"] == "" and "hidden" not in seen and "SSH_AUTH_SOCK=needed" in seen


def test_a_runs_secret_is_made_on_its_node(node):
    result = node.device(f'tee "{node.folder}/sent" | "$@"').run(node.job(), quiet)
    job = json.loads((node.folder / "sent").read_text().splitlines()[2])
    assert result["cause"] == "" and "TOKEN" not in json.dumps(
        {name: job[name] for name in job if name != "files"}
    )


HARMLESS = {
    "says something first": 'echo Welcome to box; echo \'[1, 2]\'; echo \'{"message": "of the day"}\' >&2; exec "$@"',
    "is slow": 'sleep 0.5; exec "$@"',
    "drops the lines in which a run tells of itself": '"$@" | grep --line-buffered -v line',
    "breaks lines and adds some": '"$@" | sed -u "s/^/\\n/; s/$/\\n/"',
    "sends signs that are no text": "printf '\\377\\376\\n'; exec \"$@\"",
    "is in another folder": 'cd /tmp; exec "$@"',
}


@pytest.mark.every(3)
@pytest.mark.parametrize("what", HARMLESS)
def test_a_run_is_whole_behind_an_engine_that(node, what):
    assert node.device(HARMLESS[what]).run(node.job(), quiet)["cause"] == ""


NEVER_BEGUN = {
    "is full": (
        "echo 'srun: error: Unable to allocate resources' >&2; exit 1",
        "Unable to allocate resources",
    ),
    "ends without a word, with status 0": ("exit 0", "it ended"),
    "knows no such command": ('exec no-such-command "$@"', "not found"),
}


@pytest.mark.parametrize("what", NEVER_BEGUN)
def test_no_run_begins_and_none_is_blamed_where_an_engine(node, what):
    script, reason = NEVER_BEGUN[what]
    result = node.device(script).run(node.job(), quiet)
    assert reason in result["cause"] and result["machine"] and result["blame"] == 0


def test_a_prefix_that_is_not_there_is_said(node):
    result = loop.Device("srunn:0", node.runs, ["srunn", "-Q"]).run(node.job(), quiet)
    assert "srunn" in result["cause"] and "No such file" in result["cause"] and result["blame"] == 0


@pytest.mark.slow
def test_the_nodes_python_is_the_loops_own_or_that_of_its_path_or_one_that_it_names(node, monkeypatch):
    real, packages = sys.executable, Path(psutil.__file__).parents[1]
    monkeypatch.setattr(loop.sys, "executable", "/nowhere/python")
    bare = f'export PATH="{tools(node.folder)}"; exec "$@"'
    assert "there is no python3" in node.device(bare).run(node.job(), quiet)["cause"]
    assert node.device(f"export AUTORESEARCH_PYTHON={real}; {bare}").run(node.job(), quiet)["cause"] == ""
    (node.folder / "tools" / "python3").symlink_to(real)
    assert node.device(f"export PYTHONPATH={packages}; {bare}").run(node.job(), quiet)["cause"] == ""


# ---- nodes that fail


def test_a_worker_that_dies_in_a_run_is_a_lost_node(node):
    result = node.device().run(node.job(KILLS_ITS_WORKER), quiet)
    assert (
        result["machine"]
        and result["blame"] == loop.LOST
        and f"the worker of box:0 on {HERE}: it ended" == result["cause"]
    )


def test_a_result_that_gets_lost_is_no_result_whatever_the_status(node):
    result = node.device('"$@" | grep --line-buffered -v result; exit 0').run(node.job(), quiet)
    assert result["machine"] and result["blame"] == loop.LOST and "value" not in result


@pytest.mark.slow
def test_a_silent_node_is_given_up_and_what_started_its_worker_is_ended(node, monkeypatch):
    monkeypatch.setattr(loop, "SILENCE", 0.2)
    words = 'echo \'{"wants": "text"}\'; read line; read text; echo \'{"wants": "job", "place": "n1 x"}\'; sleep 982'
    device = node.device(words)
    monkeypatch.setattr(device, "wait", lambda seconds: loop.Device.wait(device, 0.2))
    result = device.run(node.job(), quiet)
    assert result["cause"] == "the worker of box:0 on n1: not a word in 0.2 s" and result["machine"]
    assert device.process.wait(30) < 0


@pytest.mark.slow
def test_a_late_answer_changes_nothing(node, monkeypatch):
    monkeypatch.setattr(loop, "SILENCE", 0.2)
    late = node.device('"$@" | (read a; echo "$a"; read b; echo "$b"; sleep 1; cat)')
    monkeypatch.setattr(late, "wait", lambda *_: None)
    assert "not a word" in late.run(node.job(), quiet)["cause"]
    monkeypatch.setattr(loop, "SILENCE", 60)
    late.launch = ["env"]
    late.process = None
    again = late.run(node.job("print('again')"), quiet)
    assert again["cause"] == "" and "again" in Path(again["log"]).read_text()


@LINUX
def test_a_worker_whose_loop_has_fallen_silent_ends_its_run(node):
    device = node.device(BEAT=0.05, SILENCE=0.5)
    device.start()
    for message in device.messages():
        if message.get("wants") == "text":
            device.send(json.dumps(device.text))
        elif "wants" in message:
            device.send(json.dumps(node.job("import time\ntime.sleep(600)")))
        elif node.runs_there():
            break
    assert device.process.wait(60) == 0
    node.gone()


@LINUX
def test_a_worker_that_is_asked_to_end_ends_its_run_first(node):
    device, started = node.device(), []

    def tell(line):
        if not started and node.runs_there():
            started.append(device.process.terminate())

    result = device.run(node.job("import time\nprint('now', flush=True)\ntime.sleep(600)"), tell)
    assert started and result["machine"]
    node.gone()


@LINUX
@pytest.mark.slow
def test_what_a_worker_that_was_killed_left_running_ends_before_the_next_run(node):
    leaves = f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\n{KILLS_ITS_WORKER}\ntime.sleep(600)"
    node.patch.setattr(loop, "kill_leftovers", lambda *args: None)  # the loop is elsewhere: it can't
    node.device().run(node.job(leaves), quiet)
    assert node.runs_there()
    assert node.device().run(node.job(seed=1), quiet)["cause"] == ""
    node.gone()


@pytest.mark.slow
@LINUX
def test_the_runs_of_a_killed_loop_end_on_their_nodes(project):
    node = Node.__new__(Node)
    node.home = project.folder.parent
    slow = project.read("train.py").replace("finish(val_bpb, SECONDS)", "finish(val_bpb, 60, steps=1200)")
    project.write("train.py", slow)
    project.commit("slow")
    process = project.start("--offline", "--budget", 90, "--tag", "t", "--launch", "env", "--at-once", 2)
    project.wait_for(node.runs_there)
    process.kill()
    process.communicate()
    node.gone()


@pytest.mark.slow
def test_a_night_elsewhere_is_whole(project):
    out = project.offline("--experiments", 5, "--launch", "env", "--at-once", 3)
    counts, found = problems(project.folder, "t")
    assert found == [] and counts["rows"] == 6 and "env:2: #" in out


# ---- what the loop makes of it


DEEPER, WIDER = block("DEPTH = 4", "DEPTH = 5", "deeper"), block("WIDTH = 64", "WIDTH = 128", "wider")
GONE = {"cause": "the worker of box:0 on n1: it ended", "machine": True}


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(loop, "WAITS", (0.001, 0.002))


def losing(edit, times, blame):
    """run(job) for a night: so many runs of an edit are lost."""
    left, lost = [times], []

    def run(job):
        if edit in job["files"]["train.py"] and left[0]:
            left[0] -= 1
            lost.append(job["name"])
            return GONE | {"blame": blame}
        return stand_in(job)

    return run, lost


def statuses(session):
    return sorted((row.description.partition(" [")[0], row.status) for row in session.ledger.rows)


BOX = "--launch", "box -T", "--at-once", 2


@pytest.mark.every(2)
@pytest.mark.parametrize("times, blame", [(3, loop.LOST), (8, loop.LOST), (40, 0)])
def test_a_lost_node_is_no_fault_of_the_experiment(project, hasty, times, blame):
    run, lost = losing("DEPTH = 5", times, blame)
    session = project.night(*BOX, "--experiments", 2, replies=[DEEPER, WIDER], run=run)
    assert len(lost) == times and statuses(session) == [
        ("baseline", "keep"),
        ("deeper", "keep"),
        ("wider", "keep"),
    ]
    assert problems(project.folder, "t")[1] == []


def test_an_edit_under_which_a_dozen_nodes_in_a_row_are_lost_does_not_hold_one_for_ever(project, hasty):
    run, lost = losing("DEPTH = 5", 99, loop.LOST)
    session = project.night(*BOX, "--experiments", 2, replies=[DEEPER, WIDER], run=run)
    assert ("deeper", "crash") in statuses(session)
    assert 12 <= len(lost) <= 13  # the other node may have it while the one before is still being asked


def test_a_lost_run_goes_to_another_node_while_its_own_does_not_answer(project, monkeypatch):
    ran, lost = Counter(), []

    def run(job):
        ran[job["name"]] += 1
        if not lost and "DEPTH = 5" in job["files"]["train.py"]:
            lost.append(job["name"])
            return GONE | {"blame": loop.LOST}
        return stand_in(job)

    # The first wait is one for the night: who would wait for its node would never end.
    monkeypatch.setattr(loop, "WAITS", (3600, 3600))
    session = project.night(*BOX, "--experiments", 1, replies=[DEEPER], run=run)
    assert statuses(session) == [("baseline", "keep"), ("deeper", "keep")] and len(lost) == 1
    assert "going on in 3600 s" in session.output.getvalue()


def test_the_local_devices_are_used_only_when_they_are_named(project):
    session = project.night(*BOX, "--experiments", 1, replies=[DEEPER])
    assert [*session.devices] == ["box:0", "box:1"]
    session = project.night(
        *BOX, "--launch", "/opt/box", "--at-once", 1, "--devices", 0, "--experiments", 1, replies=[WIDER]
    )
    assert [*session.devices] == ["box:0", "box:1", "box:2", "cpu:0"]


def test_each_launch_has_its_own_number_or_none_has(project):
    with pytest.raises(loop.Stop, match="give each an --at-once of its own"):
        project.night(*BOX, "--launch", "other", offline=True)
    with pytest.raises(loop.Stop, match="--launch needs a command"):
        project.night("--launch", "", offline=True)
    with pytest.raises(SystemExit):
        loop.parse_arguments(["--launch", "ssh 'box"])


def test_where_no_machine_answers_the_loop_does_not_start_and_says_why(project):
    out = project.offline("--launch", "no-such-engine", "--launch", "env false", code=2)
    assert "no-such-engine:0" in out and "no other machine can be used: the worker of env:1: it ended" in out


# ---- machines whose runs are off


def night_on(off, seeds=3, experiments=20):
    """Groups of a night on two nodes in turns, of which the second is off by so much."""
    for number in range(experiments):
        places = [("a", "ab"[(number + seed) % 2]) for seed in range(seeds)]
        wobble = [((number * 7 + seed * 3) % 5 - 2) * 0.0003 for seed in range(seeds)]
        yield [
            (0.001 + off * (after == "b") + more, before, after)
            for (before, after), more in zip(places, wobble, strict=True)
        ]


def test_a_node_whose_pairs_are_off_by_more_than_the_noise_explains_is_named():
    assert [*loop.odd_nodes(night_on(0.0), 0.0005)] == []
    worse = [*loop.odd_nodes(night_on(-0.002), 0.0005)]
    assert len(worse) == 2 and "b: 30 runs were worse than elsewhere by 0.00" in worse[1]


def test_one_node_alone_and_experiments_with_one_run_say_nothing_of_it():
    assert [*loop.odd_nodes([[(0.5, "a", "a"), (0.0, "a", "a")]] * 9, 0.0005)] == []
    assert [*loop.odd_nodes([[(0.5, "a", "b")]] * 9, 0.0005)] == []


@pytest.mark.slow
def test_the_report_of_a_branch_names_such_a_node(project, monkeypatch):
    """A night on two nodes of which one measures worse; every experiment has three runs."""
    monkeypatch.setattr(loop, "judge", lambda gains, *_: "again" if len(gains) < 3 else "discard")

    def run(job):
        seed, result = int(job["told"]["SEED"]), stand_in(job)
        bad = "0000-" not in job["folder"] and seed == 1
        return result | {"node": "hot" if bad else "cool", "value": result["value"] + 0.02 * bad}

    project.night(*BOX, "--experiments", 6, offline=True, run=run)
    report = loop.read_report(project.folder, "t", "")
    assert [line.partition(":")[0] for line in report.nodes] == ["cool", "hot"] and "worse" in report.nodes[1]
    assert report.nodes[1] in "\n".join(map(str, report.render()))
