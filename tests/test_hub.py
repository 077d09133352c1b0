"""Claims about real corpora: what prepare.py downloads from the Hugging Face hub, what it says when it can't, and parquet files."""

import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pyarrow
import pyarrow.parquet
import pytest
from conftest import prepare_main

import prepare

SIZES = dict(seq_len=16, vocab_size=300, eval_tokens=2048, eval_rows=8)
MB = 2**20


def stories(count=240, seed=0):
    generator = random.Random(seed)
    words = ["".join(generator.choices("etaoinshr", k=generator.randint(1, 7))) for _ in range(200)]
    return [
        f"Once {' '.join(generator.choices(words, k=60))}, naïve 🙂.\nThe end {seed}-{number}.\n"
        for number in range(count)
    ]


def text_file(texts):
    return "".join(f"{text}<|endoftext|>\n" for text in texts).encode()


def parquet_file(texts, column="text", **options):
    table = pyarrow.table({"id": list(range(len(texts))), column: texts})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


class Server(ThreadingHTTPServer):
    def handle_error(self, *args):
        pass  # a client that breaks the connection


class Hub:
    """Speaks the hub's file protocol: /datasets/REPOSITORY/resolve/COMMIT/FILE redirects to /cdn/SHA256, on what is another host.

    `files` is {(repository, file): bytes}; `requests` records (method, path, headers). `resolve` and `cdn` are iterators of what
    goes wrong at the next request of that kind: None (nothing), an HTTP status with headers, or a function of the handler.
    """

    def __init__(self):
        self.files, self.requests, self.resolve, self.cdn = {}, [], iter(()), iter(())
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def reply(self, status, headers=(), body=b""):
                self.send_response(status)
                for name, value in {"Content-Length": len(body), **dict(headers)}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_GET(self):
                path = urlsplit(self.path).path  # the whole address, when we are asked as a proxy
                hub.requests.append((self.command, path, self.headers))
                kind, _, rest = path[1:].partition("/")
                wrong = next(hub.cdn if kind == "cdn" else hub.resolve, None)
                if wrong:
                    return wrong(self) if callable(wrong) else self.reply(*wrong)
                if kind == "cdn":
                    self.body = next(
                        body for body in hub.files.values() if hashlib.sha256(body).hexdigest() == rest
                    )
                    start = int(self.headers.get("Range", "bytes=0-")[6:-1])
                    ranged = (
                        {"Content-Range": f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"}
                        if start
                        else {}
                    )
                    return self.reply(206 if start else 200, ranged, self.body[start:])
                owner, name, _, commit, file = rest.split("/")
                if all(repository != f"{owner}/{name}" for repository, _ in hub.files):
                    return self.reply(404, {"X-Error-Code": "RepoNotFound"})
                if all(commit != known for _, known, _, _ in prepare.HUB.values()):
                    return self.reply(404, {"X-Error-Code": "RevisionNotFound"})
                body = hub.files.get((f"{owner}/{name}", file))
                if body is None:
                    return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                digest = hashlib.sha256(body).hexdigest()
                facts = {
                    "X-Repo-Commit": commit,
                    "X-Linked-ETag": f'"{digest}"',
                    "X-Linked-Size": len(body),
                    "ETag": '"of the pointer"',
                }
                self.reply(
                    302, {"Location": f"http://localhost:{hub.http.server_port}/cdn/{digest}", **facts}
                )

            do_HEAD = do_GET

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def asked(self, method, part):
        """The requests of this method whose path holds this."""
        return [(path, headers) for how, path, headers in self.requests if how == method and part in path]


def cut(after):
    """Breaks the connection after so many bytes of the answer."""

    def wrong(handler):
        body = max(handler.server.hub.files.values(), key=len)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:after])
        handler.close_connection = True

    return wrong


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Sets variables as a shell does before Python starts: huggingface_hub reads them when it is imported, so it is imported anew."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            monkeypatch.delitem(sys.modules, name)

    for name in [name for name in os.environ if name.startswith("HF_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_VERBOSITY", "error")  # as prepare.py does, but taken back after the test
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the library's tries
    forget()
    yield (
        lambda **variables: (
            [monkeypatch.setenv(name, value) for name, value in variables.items()] and forget()
        )
    )


@pytest.fixture
def hub(environment):
    server = Hub()
    server.http.hub = server
    server.files = {
        ("roneneldan/TinyStories", "TinyStoriesV2-GPT4-valid.txt"): text_file(stories(seed=1)),
        ("roneneldan/TinyStories", "TinyStoriesV2-GPT4-train.txt"): text_file(stories(seed=2)),
        **{
            ("karpathy/climbmix-400b-shuffle", f"shard_{i:05d}.parquet"): parquet_file(stories(seed=i))
            for i in range(12)
        },
    }
    environment(HF_ENDPOINT=server.url)
    yield server
    server.close()


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """prepare.py's main() in this process, with tiny sizes: call(argument, ...) -> (exit code, stderr)."""
    monkeypatch.setattr(prepare, "machine_sizes", lambda: SIZES)
    monkeypatch.setenv("AUTORESEARCH_DATA", str(tmp_path / "data"))

    return lambda *arguments: prepare_main(monkeypatch, capsys, *arguments)


@pytest.fixture
def made(tmp_path):
    """What the data set that was asked for last says about itself."""
    return lambda: prepare.read_meta(prepare.newest(tmp_path / "data"))


def documents(meta):
    return sum(facts["documents"] for facts in meta["splits"].values())


def left_over(tmp_path):
    """Folders of data sets. What is half-written in the hub's cache is the library's to keep, for a later try, or to remove."""
    return [path.name for path in (tmp_path / "data").glob("*") if path.name != "prepare.lock"]


# ---- from the hub


@pytest.mark.slow
def test_tinystories_is_both_files_of_stories(hub, call, made):
    assert call("--source", "tinystories") == (0, "")
    meta = made()
    assert (meta["source"], meta["shards"], documents(meta)) == ("tinystories", 2, 480)
    assert sum(facts["bytes"] for facts in meta["splits"].values()) == sum(
        len(text.encode()) for i in (1, 2) for text in stories(seed=i)
    )


@pytest.mark.slow
def test_climbmix_is_the_first_shards_as_many_as_asked_for(hub, call, made):
    assert call("--source", "climbmix", "--shards", 2) == (0, "")
    assert documents(made()) == 480
    assert [path.split("/")[-1] for path, _ in hub.asked("HEAD", "/resolve/")] == [
        "shard_00000.parquet",
        "shard_00001.parquet",
    ]
    assert call("--source", "climbmix") == (0, "")
    assert documents(made()) == 2400


@pytest.mark.slow
def test_more_shards_fetch_only_the_new_ones(hub, call, made):
    call("--source", "climbmix", "--shards", 2)
    first, fetched = made()["fingerprint"], len(hub.asked("GET", "/cdn/"))
    call("--source", "climbmix", "--shards", 3)
    assert made()["fingerprint"] != first
    assert len(hub.asked("GET", "/cdn/")) == fetched + 1


def test_a_second_call_asks_nobody_and_reads_nothing(hub, call, made, tmp_path):
    call("--source", "climbmix", "--shards", 1)
    first, asked = made(), len(hub.requests)
    shutil.rmtree(tmp_path / "hf")
    assert call("--source", "climbmix", "--shards", 1) == (0, "") and made() == first
    assert len(hub.requests) == asked


def test_the_text_is_pinned_to_a_commit(hub, call):
    call("--source", "climbmix", "--shards", 1)
    call("--source", "tinystories", "--shards", 1)
    commits = {path.split("/")[5] for path, _ in hub.asked("HEAD", "/resolve/")}
    assert commits == {commit for _, commit, _, _ in prepare.HUB.values()} and all(
        len(commit) == 40 for commit in commits
    )


@pytest.mark.slow
def test_the_same_text_from_the_hub_and_from_my_own_file_has_one_fingerprint(hub, call, made, tmp_path):
    call("--source", "climbmix", "--shards", 1)
    from_hub = made()["fingerprint"]
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in stories(seed=0))
    )
    call("--source", tmp_path / "mine.jsonl")
    assert made()["fingerprint"] == from_hub


def test_the_token_goes_to_the_hub_and_not_to_the_host_it_redirects_to(hub, call, environment):
    environment(HF_TOKEN="hf_secret")
    assert call("--source", "climbmix", "--shards", 1) == (0, "")
    assert {headers.get("Authorization") for _, headers in hub.asked("HEAD", "/resolve/")} == {
        "Bearer hf_secret"
    }
    assert {headers.get("Authorization") for _, headers in hub.asked("GET", "/cdn/")} == {None}


@pytest.mark.slow
def test_a_proxy_is_used(hub, call, environment):
    environment(HTTP_PROXY=hub.url, HF_ENDPOINT="http://hub.invalid")
    assert call("--source", "climbmix", "--shards", 1) == (0, "")


@pytest.mark.slow
def test_what_is_in_the_cache_needs_no_network(hub, call, environment, tmp_path, made):
    call("--source", "climbmix", "--shards", 2)
    first, asked = made(), len(hub.requests)
    shutil.rmtree(tmp_path / "data")
    environment(HF_HUB_OFFLINE="1")
    assert call("--source", "climbmix", "--shards", 2) == (0, "")
    assert made()["fingerprint"] == first["fingerprint"] and len(hub.requests) == asked


@pytest.mark.slow
def test_a_second_call_loads_neither_the_hub_nor_pyarrow_nor_torch(hub, call, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(prepare.__file__).parent)!r});"
        f"import prepare; prepare.machine_sizes = lambda: {SIZES};"
        "sys.argv = ['prepare.py', '--source', 'climbmix', '--shards', '1']; prepare.main();"
        "print(*{'huggingface_hub', 'pyarrow', 'torch'} & set(sys.modules))"
    )
    call("--source", "climbmix", "--shards", 1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("already prepared") and done.stdout.endswith("\n\n")


# ---- when the network is bad


@pytest.mark.slow
def test_a_broken_transfer_goes_on_where_it_broke_off(hub):
    name = "shard_00012.parquet"
    hub.files["karpathy/climbmix-400b-shuffle", name] = body = random.Random(0).randbytes(
        25 * MB
    )  # the library writes 10 MB at a time
    hub.cdn = iter([cut(15 * MB), None])
    (path,) = prepare.download(*prepare.HUB["climbmix"][:2], name)
    assert path.read_bytes() == body
    assert [headers.get("Range") for _, headers in hub.asked("GET", "/cdn/")] == [None, f"bytes={10 * MB}-"]


def test_a_busy_hub_is_asked_again(hub, call):
    hub.resolve, hub.cdn = iter([(429, {"Retry-After": "1"}), (429,), (503,)]), iter([(429,)])
    assert call("--source", "climbmix", "--shards", 1) == (0, "")


@pytest.mark.slow
def test_after_a_failure_only_what_is_missing_is_fetched(hub, call, tmp_path, made):
    hub.cdn = itertools.chain([None], itertools.repeat((500,)))
    assert call("--source", "climbmix", "--shards", 2)[0] == 1 and left_over(tmp_path) == []
    hub.cdn = iter(())
    assert call("--source", "climbmix", "--shards", 2) == (0, "")
    fetched = Counter(path for path, _ in hub.asked("HEAD", "/resolve/"))
    assert documents(made()) == 480 and sorted(fetched.values()) == [1, 2]


GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to dataset is restricted"}
FAILURES = {  # what the hub does at each request -> what must be in the sentence
    "too many requests": ("resolve", (429,), ["429", "HF_TOKEN"]),
    "too many requests of the file": ("cdn", (429,), ["429", "HF_TOKEN"]),
    "no repository": ("resolve", (404, {"X-Error-Code": "RepoNotFound"}), ["404", "HF_ENDPOINT"]),
    "no such commit": ("resolve", (404, {"X-Error-Code": "RevisionNotFound"}), ["404", "HF_ENDPOINT"]),
    "no such file": ("resolve", (404, {"X-Error-Code": "EntryNotFound"}), ["404", "HF_ENDPOINT"]),
    "private": ("resolve", (401,), ["401", "HF_TOKEN"]),
    "gated": ("resolve", (403, GATED), ["403", "HF_TOKEN"]),
    "an error": ("resolve", (500,), ["500"]),
    "an error for the file": ("cdn", (503,), ["503"]),
    "not a hub": ("resolve", (200, {}, b"<html>hello</html>"), ["X-Repo-Commit", "HF_ENDPOINT"]),
    "wrong size": ("cdn", (200, {}, b"too short"), ["size", "run it again"]),
    "cut each time": ("cdn", cut(1000), ["run it again"]),
}


@pytest.mark.every(4)
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_download_is_one_sentence_and_leaves_nothing(hub, call, tmp_path, failure):
    kind, wrong, reasons = FAILURES[failure]
    setattr(hub, kind, itertools.repeat(wrong))
    code, message = call("--source", "climbmix", "--shards", 1)
    assert code == 1 and message.startswith("karpathy/climbmix-400b-shuffle can't be downloaded (")
    assert message.count("\n") == 1 and all(reason in message for reason in reasons), message
    assert left_over(tmp_path) == []
    setattr(hub, kind, iter(()))
    assert call("--source", "climbmix", "--shards", 1) == (0, "")


def test_no_network_is_one_sentence(hub, call, tmp_path):
    hub.close()
    code, message = call("--source", "tinystories")
    assert code == 1 and "check the network and HF_ENDPOINT" in message and message.count("\n") == 1
    assert left_over(tmp_path) == []


def test_offline_with_an_empty_cache_is_one_sentence(hub, call, environment):
    environment(HF_HUB_OFFLINE="1")
    code, message = call("--source", "tinystories")
    assert code == 1 and "unset HF_HUB_OFFLINE" in message and message.count("\n") == 1
    assert hub.requests == []


@pytest.mark.parametrize("name", ["huggingface_hub", "pyarrow"])
def test_a_missing_extra_is_named_before_anything_is_asked_for(hub, call, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert call("--source", "climbmix") == (
        1,
        f"{name} is not installed here; run: pip install -e '.[hub]'\n",
    )
    assert hub.requests == []


def test_too_little_room_is_seen_before_the_first_byte(hub, call, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    code, message = call("--source", "climbmix")
    assert code == 1 and "make room or set HF_HOME" in message and message.count("\n") == 1
    assert hub.asked("GET", "/cdn/") == [] and left_over(tmp_path) == []


@pytest.mark.slow
def test_a_disk_that_fills_up_meanwhile_is_one_sentence(hub, call, tmp_path):
    hub.files["karpathy/climbmix-400b-shuffle", "shard_00000.parquet"] = bytes(MB)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MB // 2, hard))
    try:
        code, message = call("--source", "climbmix")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1 and "make room or set HF_HOME" in message and message.count("\n") == 1
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_download_stops_at_once_when_asked_to(hub, call, tmp_path, sent):
    def wrong(handler):
        os.kill(os.getpid(), sent)
        handler.reply(200)

    hub.cdn = iter([None, wrong])
    assert call("--source", "climbmix", "--shards", 3) == (
        1,
        "stopped; nothing is half-written\n",
    )
    assert len(hub.asked("GET", "/cdn/")) == 2 and left_over(tmp_path) == []


@pytest.mark.parametrize(
    "arguments", [("climbmix", 0), ("climbmix", 6544), ("tinystories", 3), ("pytorch", 1), ("some/path", 1)]
)
def test_a_number_of_shards_that_there_are_not_is_refused(call, arguments):
    source, shards = arguments
    code, message = call("--source", source, "--shards", shards)
    known = {"climbmix": "has 6,543 files", "tinystories": "has 2 files"}
    assert code == 1 and known.get(source, "isn't on the hub") in message and message.count("\n") == 1


# ---- parquet files of my own


def test_a_folder_of_parquet_files_is_read_and_empty_rows_are_left_out(call, made, tmp_path):
    (tmp_path / "mine").mkdir()
    for seed in (1, 2):
        (tmp_path / "mine" / f"{seed}.parquet").write_bytes(parquet_file([*stories(seed=seed), None, ""]))
    assert call("--source", tmp_path / "mine") == (0, "")
    assert (made()["source"], documents(made())) == ("mine", 480)


def test_a_nul_in_a_row_is_text(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet_file(["a\0b"]))
    assert [text for _, text, _ in prepare.split_documents([tmp_path / "a.parquet"], whole=False)] == ["a\0b"]


@pytest.mark.slow
def test_a_row_group_of_any_size_needs_little_memory(tmp_path):
    generator = random.Random(0)
    (tmp_path / "a.parquet").write_bytes(
        parquet_file([generator.randbytes(1000).hex() for _ in range(25_000)], use_dictionary=False)
    )
    before = pyarrow.default_memory_pool().bytes_allocated()
    tracemalloc.start()
    size = peak = 0
    for text in prepare.read_documents(tmp_path / "a.parquet", whole=False):
        size += len(text)
        peak = max(
            peak,
            pyarrow.default_memory_pool().bytes_allocated() - before + tracemalloc.get_traced_memory()[0],
        )
    tracemalloc.stop()
    assert size == 50_000_000 and peak < 10_000_000


def test_a_row_of_any_length_is_cut_and_loses_nothing(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet_file(["word " * 500_000]))
    cut = list(prepare.read_documents(tmp_path / "a.parquet", whole=False))
    assert "".join(cut) == "word " * 500_000 and len(cut) == 3


BAD = {
    "empty": b"",
    "not parquet": b"some text",
    "cut short": parquet_file(stories())[:-100],
    "no text column": parquet_file(stories(), column="story"),
    "numbers": parquet_file([1, 2, 3]),
    "bytes": parquet_file([b"one", b"two"]),
    "not UTF-8": parquet_file(pyarrow.array([b"na\xefve"]).view(pyarrow.string())),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_parquet_file_is_named_in_one_sentence(call, tmp_path, name):
    (tmp_path / "bad.parquet").write_bytes(BAD[name])
    code, message = call("--source", tmp_path / "bad.parquet")
    assert (
        code == 1
        and message.startswith(f"{tmp_path / 'bad.parquet'}: not a parquet file")
        and message.count("\n") == 1
    )
    assert left_over(tmp_path) == []
