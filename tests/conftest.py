"""Shared by all tests: a chat server over real HTTP, and a git repository with the loop and stand-ins for what it runs."""

import ast
import atexit
import contextlib
import functools
import gc
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import types
import venv
from collections import Counter, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = Path(__file__).resolve().parent / "stand_in"
SIZES = dict(seq_len=16, vocab_size=300, eval_tokens=2048, eval_rows=16)  # of the tiny data set
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background job ignores it, nohup SIGHUP; so would the loops here
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.path.insert(0, str(ROOT))  # loop.py and prepare.py are scripts: no installed package to import

import loop  # noqa: E402
import prepare  # noqa: E402

# Two processes of tests share two cores, and threads would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure(config):
    """Loads torch, as a Run does, but not in the process that only hands out the tests."""
    if hasattr(config, "workerinput") or not config.option.numprocesses:
        prepare.load_torch()
        gc.freeze()  # its objects are as good as eternal


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Of the cases of a test that is marked every(n), all but one of n are slow."""
    seen = Counter()
    for item in items:
        if mark := item.get_closest_marker("every"):
            if seen[item.originalname] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[item.originalname] += 1


class ChatServer:
    """Speaks the chat-completions protocol: sends queued replies, records requests.

    A reply is a text, an HTTP status with a body and headers, bytes (sent as they are, then the connection ends), a choice as
    a dictionary, or a function of the request; with the queue empty, `default`.
    The loop's first calls (is the model there, and how does it want to be asked?) are answered by `ready`, and not recorded.
    """

    def __init__(self):
        self.replies, self.requests, self.default, self.ready = deque(), [], "nothing to say", "ready"
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def send(self, status, body, headers=()):
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {
                    "Content-Type": "application/json",
                    "Content-Length": len(data),
                    **dict(headers),
                }.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                if self.path != "/v1/models":
                    return self.send(404, {"error": "not found"})
                self.send(
                    200,
                    {
                        "object": "list",
                        "data": [{"id": "local-model", "object": "model", "created": 0, "owned_by": "me"}],
                    },
                )

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if request["messages"][-1]["content"].endswith("Answer with the one word: ready"):
                    reply = chat.ready
                else:
                    chat.requests.append(request)
                    reply = chat.replies.popleft() if chat.replies else chat.default
                reply = reply(request) if callable(reply) else reply
                if isinstance(reply, bytes):
                    self.close_connection = True
                    return self.wfile.write(reply)
                if isinstance(reply, tuple):
                    return self.send(*reply)
                choice = {
                    "index": 0,
                    "message": {"role": "assistant", "content": reply},
                    "finish_reason": "stop",
                }
                choice = choice | reply if isinstance(reply, dict) else choice
                read = sum(len(message["content"]) for message in request["messages"]) // 4
                usage = {"prompt_tokens": read, "completion_tokens": 10, "total_tokens": 100}
                self.send(
                    200,
                    dict(
                        id="1",
                        object="chat.completion",
                        created=0,
                        model=request["model"],
                        choices=[choice],
                        usage=usage,
                    ),
                )

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(
            target=self.http.serve_forever, args=(0.01,), daemon=True
        ).start()  # its end is seen at once


@pytest.fixture
def server():
    chat = ChatServer()
    yield chat
    chat.http.shutdown()


FACTS = {
    "metric": "val_bpb", "better": "lower", "edits": "train.py", "device": "cpu, stand-in", "software": "none",
    "data": "0123456789ab", "noise": 0.0007, "api": "It must go on calling prepare.finish().", "held_out": {},
    "settings": {"PACE": "0.0101"}, "fixed": ["SECONDS"], "budget": 300,
}  # fmt: skip


def check_reach(session, source):
    if "# outside" in source:
        raise loop.Refused("The ruler doesn't allow this: line 1, reaches outside.")


def thought_out(think):
    """Session.think for a night in this process: what the model has ready is ready before the loop looks for work. Else
    threads would decide whether the next experiment is a reply or a step of the search."""

    def think_and_wait(session):
        think(session)
        while not all(proposal.done for proposal in session.proposals):
            time.sleep(0.001)

    return think_and_wait


def stand_in(job):
    """What a run of a job's train.py gives, computed in this process: its prepare.finish() takes what the stand-in's does."""
    found, told = {}, job["told"]

    def finish(val_bpb, seconds=0.0, steps=4, trained=1.0, work=100_000):
        found.update(
            value=round(val_bpb, 6),
            trained=trained,
            work=work,
            memory_mb=512.0,
            info=f"{steps} steps",
            cause="",
        )

    prepare = types.SimpleNamespace(finish=finish)
    with ONE_AT_A_TIME, pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "prepare", prepare)
        for name, value in told.items():
            patch.setenv(f"AUTORESEARCH_{name}", value)
        try:
            exec(
                compile(job["files"]["train.py"], "train.py", "exec"),
                {"__name__": "__main__", "__file__": "train.py"},
            )
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            return {
                "cause": cause,
                "tail": f"Traceback (most recent call last):\n{cause}\n",
                "log": "run.log",
            }
    return {"seconds": 1.0, "tail": "", "log": "run.log", **(found or {"cause": "no result"})}


ONE_AT_A_TIME = threading.Lock()  # the environment and the modules are the process's


class FakeDevice:
    """A device in this process: it runs nothing but run(job)."""

    def __init__(self, name, facts, run):
        self.name, self.facts, self.answer, self.process = name, facts, run, None

    def run(self, job, tell):
        if job["probe"]:
            return {"cause": "", "facts": dict(self.facts), "caged": False, "why": ""}
        result = self.answer(job)
        return result | ({"facts": dict(self.facts)} if result["cause"] and "facts" not in result else {})

    def close(self):
        pass


class FakeModel:
    """A model that has its replies ready; with none left it answers "nothing to say"."""

    def __init__(self, replies):
        self.name, self.replies, self.chats = "local-model", deque(replies), []

    def ask(self, chat, unwanted):
        self.chats.append([dict(message) for message in chat])
        reply = self.replies.popleft() if self.replies else "nothing to say"
        return (reply(chat) if callable(reply) else reply), 100


def own_folder(prefix):
    """A temporary folder of this process."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def python():
    """A Python with few packages of its own, and by a .pth file all of this one's: a run without a cage has its packages
    compared before and after, which are tens of thousands of files with torch."""
    folder = own_folder("python-")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "all.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return str(folder / "bin" / "python")


@functools.cache
def first_commit():
    """A repository with the real loop.py and the stand-ins, committed: each Project begins as its copy."""
    folder = own_folder("checkout-")
    for path in (
        *(ROOT / name for name in ("loop.py", "results.tsv", ".gitignore")),
        *(STAND_IN / name for name in ("train.py", "prepare.py")),
    ):
        shutil.copy(path, folder)
    (folder / "program.md").write_text("# The goal\nLower val_bpb.\n")
    (folder / "notes.txt").write_text("a person's file\n")
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    run_git(folder, environment, "init", "--quiet", "--initial-branch=main")
    run_git(folder, environment, "add", "-A")
    run_git(folder, environment, "commit", "--quiet", "-m", "start")
    return folder


def run_git(folder, environment, *args, check=True):
    who = {
        f"GIT_{role}_{key}": "someone@localhost"
        for role in ("AUTHOR", "COMMITTER")
        for key in ("NAME", "EMAIL")
    }
    how = dict(cwd=folder, env=environment | who, capture_output=True, text=True, check=check)
    return subprocess.run(["git", *args], **how).stdout


class Project:
    """A repository with the real loop.py and, for what it starts, the stand-ins or any text given for them."""

    def __init__(self, folder):
        self.folder, self.data = folder / "checkout", folder / "data"
        shutil.copytree(first_commit(), self.folder)
        (self.data / "toy-0123456789ab").mkdir(parents=True)
        (self.data / "toy-0123456789ab" / "meta.json").write_text(json.dumps({"fingerprint": "0123456789ab"}))
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "AUTORESEARCH_DATA": str(self.data),
        }

    def git(self, *args, check=True):
        return run_git(self.folder, self.environment, *args, check=check)

    def commit(self, message):
        self.git("add", "-A")
        self.git("commit", "--quiet", "-m", message)

    def constants(self, **values):
        """Other constants in its loop.py, committed."""
        for name, value in values.items():
            text = self.read("loop.py")
            statement = next(
                node for node in ast.parse(text).body if ast.unparse(node).startswith(f"{name} = ")
            )
            self.write("loop.py", text.replace(ast.get_source_segment(text, statement), f"{name} = {value}"))
        self.commit("constants")

    def verdicts(self, *verdicts):
        """A judge in its loop.py that says this after one, two and three runs, committed."""
        rule = f"def judge(differences, noise, size, spread):\n    return {verdicts!r}[len(differences) - 1]\n\n\ndef not_asked("
        self.write("loop.py", self.read("loop.py").replace("def judge(", rule, 1))
        self.commit("verdicts")

    def night(self, *words, replies=(), devices=1, run=None, offline=False, late=False):
        """A session of the loop in this process: real git, but a model that gives these replies (texts, or functions of the
        chat), and devices that only compute. run(job), where it is given, answers a job instead of stand_in().
        late: a reply waits for what the loop does meanwhile."""
        with pytest.MonkeyPatch.context() as patch:
            names = [f"cpu:{number}" for number in range(devices)]
            facts = FACTS | {"devices": names, "folder": str(self.data)}
            patch.setattr(loop, "ask_facts", lambda *args, **kwargs: dict(facts))
            patch.setattr(loop, "Device", lambda name, *_: FakeDevice(name, facts, run or stand_in))
            patch.setattr(loop, "Model", lambda name, say: FakeModel(replies))
            patch.setattr(loop, "kill_leftovers", lambda runs: None)
            patch.setattr(loop.Session, "check_reach", check_reach)
            if not late:
                patch.setattr(loop.Session, "think", thought_out(loop.Session.think))
            for name in (
                "SEED",
                "SPLIT",
                "BUDGET",
                "WORK",
                *facts["settings"],
            ):  # git copies the environment while runs
                patch.setenv(
                    f"AUTORESEARCH_{name}", ""
                )  # change it: a name that goes meanwhile is an error there
            before = {
                number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            }
            words = ["--budget", "20", "--tag", "t", "--sandbox", "off", *map(str, words)] + [
                "--offline"
            ] * offline
            output = io.StringIO()
            session = loop.Session(
                loop.parse_arguments(words), self.folder, Console(file=output, highlight=False, width=200)
            )
            session.output = output
            try:
                session.prepare()
                session.go_on()
                session.audited = session.audit_lines() if session.compared else ()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
                session.lock.close()
            return session

    def start(self, *args, **environment):
        """The loop as a process."""
        sandbox = () if "--sandbox" in args else ("--sandbox", "off")  # whether this machine has bwrap or not
        command = [python(), "loop.py", *map(str, args), *sandbox]
        return subprocess.Popen(command, cwd=self.folder, env=self.environment | environment, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip

    def run(self, *args, code=0, **environment):
        """Runs the loop to its end; returns its output (stdout, then stderr)."""
        process = self.start(*args, **environment)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
        return out + err

    def offline(self, *args, **kwargs):
        return self.run("--offline", "--budget", "20", "--tag", "t", *args, **kwargs)

    def online(self, server, *args, **kwargs):
        return self.run("--budget", "20", "--tag", "t", *args, OPENAI_BASE_URL=server.url, **kwargs)

    def rows(self, branch="autoresearch/t"):
        """results.tsv of the branch as dictionaries."""
        header, *lines = self.git("show", f"{branch}:results.tsv").splitlines()
        return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]

    def status(self):
        return self.git("status", "--porcelain")

    def read(self, name):
        return (self.folder / name).read_text()

    def write(self, name, text):
        (self.folder / name).write_text(text)

    def read_until(self, process, text):
        """What a loop prints, up to a line that holds this text; it is ended if that doesn't come."""
        lines, hangs = [], threading.Timer(300, process.kill)
        hangs.start()
        try:
            for line in process.stdout:
                lines.append(line)
                if text in line:
                    return "".join(lines)
        finally:
            hangs.cancel()
        raise AssertionError(f"it ended without {text!r}:\n{''.join(lines)[-3000:]}{process.stderr.read()}")

    def wait_for(self, condition, seconds=30):
        """Waits until condition() is true; fails when it never becomes so."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError, StopIteration):
                if condition():
                    return
            time.sleep(0.02)
        raise AssertionError("never happened")


def prepare_main(monkeypatch, capsys, *arguments):
    """prepare.py's main() in this process: (exit code, stderr); signals are handled as before."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        prepare.main()
        code = 0
    except SystemExit as exit:
        code = 1
        print(exit.code, file=sys.stderr)  # as Python does
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
    return code, capsys.readouterr().err


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A tiny data set for the real ruler: made-up words in a made-up order, as bytes that need several tokens each."""
    folder = tmp_path_factory.mktemp("ruler")
    generator = random.Random(0)
    dictionary = ["".join(generator.choices("abcdeé🙂", k=generator.randint(1, 6))) for _ in range(50)]
    texts = [" ".join(generator.choices(dictionary, k=80)) for _ in range(400)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "machine_sizes", lambda: SIZES)
        return prepare.prepare(str(folder / "text.jsonl"), folder / "data")[0]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def most_quick(names, *slow):
    """Cases of a table for parametrize, of which these take many seconds."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow), id=name) for name in names]


def reply_of(idea, reason, *blocks):
    """A reply with these blocks, each a pair of what is searched and what replaces it."""
    parts = [f"<<<<<<< SEARCH\n{search}\n=======\n{replace}\n>>>>>>> REPLACE\n" for search, replace in blocks]
    return f"IDEA: {idea}\n{reason}\n\n" + "\n".join(parts)


def block(search, replace, idea="an idea"):
    """A reply with one SEARCH/REPLACE block."""
    return reply_of(idea, "Because.", (search, replace))
