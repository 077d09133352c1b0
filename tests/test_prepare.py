"""Claims about the data: what prepare.py writes, what it refuses, and what survives when it is stopped."""

import base64
import contextlib
import errno
import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiktoken.load
from conftest import prepare_main

import prepare

SIZES = dict(seq_len=16, vocab_size=300, eval_tokens=2048, eval_rows=8)
SCRIPT = Path(prepare.__file__)


def words(count, seed=0):
    generator = random.Random(seed)
    return " ".join("".join(generator.choices("etaoinshr", k=generator.randint(1, 7))) for _ in range(count))


def documents(count=240, length=60):
    return [words(length, seed) + ", naïve café 🙂\r\n" for seed in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(prepare, "machine_sizes", lambda: SIZES)


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "text.jsonl", documents())


@pytest.fixture
def call(tiny, tmp_path, monkeypatch, capsys):
    """prepare.py's main() in this process: call(source) -> (exit code, stderr)."""

    def call(source):
        monkeypatch.setenv("AUTORESEARCH_DATA", str(tmp_path / "data"))
        return prepare_main(monkeypatch, capsys, "--source", source)

    return call


def left_over(root):
    return [path.name for path in root.iterdir() if path.name not in ("prepare.lock", "asked")]


def spawn(source, root, **more):
    """prepare.py as a process of its own, with the sizes of a machine without a GPU."""
    environment = {**os.environ, "AUTORESEARCH_DATA": str(root), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--source", str(source)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def decode(folder, split):
    ranks = prepare.read_tokenizer(folder / "tokenizer.tiktoken")
    raw = {rank: token for token, rank in ranks.items()}
    tokens = np.fromfile(folder / f"{split}.bin", dtype=np.uint16)
    assert tokens[0] == len(ranks)  # BOS
    bos = np.flatnonzero(tokens == len(ranks))
    return [b"".join(raw[t] for t in part[1:].tolist()).decode() for part in np.split(tokens, bos[1:])]


# ---- what is written


@pytest.mark.slow
def test_every_document_is_in_exactly_one_split_and_reads_back_unchanged(tiny, source, tmp_path):
    folder, was_there = prepare.prepare(str(source), tmp_path / "data")
    splits = {split: decode(folder, split) for split in ("train", "val", "test")}
    assert not was_there and folder.name.startswith("text-")
    assert sorted(sum(splits.values(), [])) == sorted(documents())
    assert all(splits.values())


def test_meta_json_says_what_was_written(tiny, source, tmp_path):
    folder, _ = prepare.prepare(str(source), tmp_path / "data")
    meta = json.loads((folder / "meta.json").read_text())
    assert list(meta) == ["source", "fingerprint", *SIZES, "unigram_bpb", "splits", "digests"]
    assert folder.name == f"{meta['source']}-{meta['fingerprint']}"
    assert sum(facts["bytes"] for facts in meta["splits"].values()) == sum(
        len(text.encode()) for text in documents()
    )
    assert meta["splits"]["val"]["tokens"] * 2 == (folder / "val.bin").stat().st_size
    assert 1 < meta["unigram_bpb"] < 8
    assert not any(path.stat().st_mode & 0o222 for path in folder.iterdir())  # read-only


def test_the_tokenizer_is_in_the_rank_format_that_tiktoken_reads(tiny, source, tmp_path):
    folder, _ = prepare.prepare(str(source), tmp_path / "data")
    ranks = tiktoken.load.load_tiktoken_bpe(str(folder / "tokenizer.tiktoken"))
    assert sorted(ranks.values()) == list(range(SIZES["vocab_size"] - 1))
    encoding = tiktoken.Encoding("test", pat_str=prepare.PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert encoding.decode(encoding.encode("naïve 🙂\r\n")) == "naïve 🙂\r\n"


def test_the_vocabulary_never_sees_val_or_test(monkeypatch, source):
    trained_on = []

    class Tokenizer:
        def train_from_iterator(self, texts, *_, **__):
            trained_on.extend(texts)

        def get_mergeable_ranks(self):
            return [(b"a", 0)]

    monkeypatch.setattr("rustbpe.Tokenizer", Tokenizer)
    found = list(prepare.split_documents([source], whole=False))
    prepare.train_tokenizer(iter(found), dict(SIZES, vocab_size=2))
    assert trained_on == [text for split, text, _ in found if split == "train"] != []


def test_a_document_that_comes_twice_counts_once(tiny, tmp_path):
    source = write_jsonl(tmp_path / "text.jsonl", documents() * 2)
    folder, _ = prepare.prepare(str(source), tmp_path / "data")
    assert sum(facts["documents"] for facts in prepare.read_meta(folder)["splits"].values()) == len(
        documents()
    )


def test_the_same_text_gives_the_same_fingerprint_whatever_the_file_is_called(tiny, tmp_path):
    plain = write_jsonl(tmp_path / "a.jsonl", documents())
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(plain.read_text())
    fingerprints = [
        prepare.read_meta(prepare.prepare(str(path), tmp_path / "data")[0])["fingerprint"]
        for path in (plain, file.name)
    ]
    assert fingerprints[0] == fingerprints[1]
    assert len(list((tmp_path / "data").glob("*/meta.json"))) == 2


def test_a_folder_is_read_and_what_is_not_text_in_it_left_alone(tiny, tmp_path):
    folder = tmp_path / "books" / "deep"
    folder.mkdir(parents=True)
    for i, text in enumerate(documents()):
        (folder / f"{i}.txt").write_text(text, newline="")
    (folder / "cover.png").write_bytes(bytes(range(256)))
    made, _ = prepare.prepare(str(tmp_path / "books"), tmp_path / "data")
    assert sorted(sum((decode(made, split) for split in ("train", "val", "test")), [])) == sorted(documents())


TOOLS = [
    ".venv/lib/b.py",
    ".git/c.txt",
    "__MACOSX/._d.txt",
    "._e.txt",
    ".f.md",
    ".ipynb_checkpoints/g.py",
    "__pycache__/h.py",
]
TOOLS += ["venv/lib/python3.11/site-packages/i.py", "web/node_modules/j.md", "deep/.hidden/k.jsonl"]


def test_what_is_hidden_or_a_tools_is_left_out_and_counted(tmp_path, capsys):
    for name in (*TOOLS, "mine.txt", "deep/mine.md"):
        path = tmp_path / "f" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\5" if "._" in name else b"text\n")
    files = prepare.source_files(str(tmp_path / "f"))[1]
    assert [str(file.relative_to(tmp_path / "f")) for file in files] == ["deep/mine.md", "mine.txt"]
    assert capsys.readouterr().out == "left out: 10 hidden or a tool's\n"


def test_in_a_folder_files_are_told_apart_by_their_suffix_whatever_its_case_and_the_rest_is_counted(
    tmp_path, capsys
):
    folder, read = (
        tmp_path / "f",
        ["A.TXT", "b.Md", "c.JSONL", "d.ndjson", "e.txt.gz", "f.PY.GZ", "g.NDJSON.gz"],
    )
    folder.mkdir()
    for name in (*read, "h.csv", "i.json", "j.json", "k.zip", "l.pdf", "LICENSE", "n.tar.gz"):
        (folder / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "broken.txt").symlink_to(tmp_path / "gone")
    (folder / "o.txt").symlink_to(folder / "A.TXT")
    assert [file.name for file in prepare.source_files(str(folder))[1]] == sorted([*read, "o.txt"])
    said = {*capsys.readouterr().out.removeprefix("left out: ").strip().split(", ")}
    assert said == {
        "1 linked folders",
        "1 .csv",
        "2 .json",
        "1 .zip",
        "1 .pdf",
        "1 without a suffix",
        "1 .tar",
        "1 .txt",
    }


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "b.ndjson", "c.json", "d.JSONL.GZ", "e.json.gz"])
def test_json_is_read_as_such_whatever_the_case_of_its_suffix(tmp_path, name):
    lines = '{"text": "\\u00e9\\u00e9n caf\\u00e9"}\n\n{"text": "\\u00fcber"}\n'
    (tmp_path / name).write_bytes(
        gzip.compress(lines.encode()) if name.lower().endswith(".gz") else lines.encode()
    )
    files = prepare.source_files(str(tmp_path / name))[1]
    assert list(prepare.read_documents(files[0], whole=False)) == ["één café", "über"]


@pytest.mark.parametrize(
    "name", ["a.csv", "b.TSV", "c.ipynb", "d.html", "e.xml", "f.csv.gz", "g.zip", "h.docx", "i.parquet.zst"]
)
def test_a_file_of_another_kind_is_refused_by_name(call, tmp_path, name):
    (tmp_path / name).write_text("text,label\n" * 9000)
    code, message = call(tmp_path / name)
    assert code == 1 and "files aren't read; give .txt" in message and message.count("\n") == 1


def test_plain_text_is_read_without_a_suffix_and_compressed(tmp_path):
    (tmp_path / "enwik").write_text("one\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("zwölf\r\n".encode()))
    for name, text in {"enwik": "one\n", "b.txt.gz": "zwölf\r\n"}.items():
        (file,) = prepare.source_files(str(tmp_path / name))[1]
        assert list(prepare.read_documents(file, whole=False)) == [text]


def test_a_book_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    (tmp_path / "book.txt").write_text(text := "\n\n".join(words(50, seed) for seed in range(500)))
    cut = list(prepare.read_documents(tmp_path / "book.txt", whole=False))
    assert "".join(cut) == text and len(cut) > 5
    assert all(part.endswith("\n\n") for part in cut[:-1])


@pytest.mark.slow
def test_a_text_that_is_one_long_line_needs_little_memory(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("word " * 4_000_000)  # 20 MB
    tracemalloc.start()
    size = sum(len(text) for text in prepare.read_documents(path, whole=False))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 20_000_000 and peak < 2_000_000


@pytest.mark.slow
def test_a_file_of_mine_called_pytorch_is_cut_as_any_other(tiny, tmp_path):
    (tmp_path / "pytorch.txt").write_text("\n\n".join(words(50, seed) for seed in range(3000)))
    folder, _ = prepare.prepare(str(tmp_path / "pytorch.txt"), tmp_path / "data")
    assert prepare.read_meta(folder)["splits"]["train"]["documents"] > 50


def test_endoftext_lines_part_documents(tmp_path):
    (tmp_path / "stories.txt").write_text("one\n<|endoftext|>\ntwo\n")
    assert list(prepare.read_documents(tmp_path / "stories.txt", whole=False)) == ["one\n", "two\n"]


@pytest.mark.every(3)
@pytest.mark.parametrize("name", ["x" * 245, "字" * 80, "a b\n'c", ".hidden", "%s {}"])
def test_a_source_may_have_any_name(tiny, tmp_path, name):
    source = write_jsonl(tmp_path / f"{name}.jsonl", documents())
    folder, _ = prepare.prepare(str(source), tmp_path / "data")
    assert prepare.newest(tmp_path / "data") == folder


def test_half_a_surrogate_pair_in_json_is_survived(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert list(prepare.read_documents(tmp_path / "a.jsonl", whole=False)) == ["a?b"]


# ---- a second call


def test_a_second_call_does_nothing_and_says_so(tiny, call, source, tmp_path, monkeypatch):
    first, _ = prepare.prepare(str(source), tmp_path / "data")
    monkeypatch.setattr(prepare, "write_data_set", None)  # would raise if it were called
    assert prepare.prepare(str(source), tmp_path / "data") == (first, True)


def test_the_data_set_asked_for_last_is_the_newest(tiny, source, tmp_path):
    root = tmp_path / "data"
    first, _ = prepare.prepare(str(source), root)
    second, _ = prepare.prepare(str(write_jsonl(tmp_path / "other.jsonl", documents(300))), root)
    assert prepare.newest(root) == second
    prepare.prepare(str(source), root)
    assert prepare.newest(root) == first


def copied(source):
    source.write_bytes(source.read_bytes())


AGAIN = {
    "asked for again": lambda source: source,
    "touched": lambda source: os.utime(source, (1, 1)),
    "copied without its times": copied,
    "called otherwise": lambda source: source.rename(source.with_name("text.ndjson")),
    "moved": lambda source: source.rename(source.parent.parent / source.name),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("change", AGAIN.values(), ids=AGAIN)
def test_preparing_the_same_text_again_changes_nothing_in_its_folder(tiny, tmp_path, change):
    (tmp_path / "in").mkdir()
    source, root = write_jsonl(tmp_path / "in" / "text.jsonl", documents()), tmp_path / "data"
    folder, _ = prepare.prepare(str(source), root)
    before = {
        path: (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_ctime_ns)
        for path in folder.iterdir()
    }
    source = change(source) or source
    for _ in range(2):
        assert prepare.prepare(str(source), root)[0] == folder and prepare.newest(root) == folder
    assert before == {
        path: (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in before
    }
    assert left_over(root) == [folder.name]


@pytest.mark.every(2)
@pytest.mark.parametrize("text", [None, "", "gone", "\n"])
def test_without_a_note_of_what_was_asked_for_the_data_sets_are_there_all_the_same(
    tiny, source, tmp_path, text
):
    folder, _ = prepare.prepare(str(source), tmp_path / "data")
    (note,) = (tmp_path / "data" / "asked").iterdir()
    note.unlink()
    if text is not None:
        note.write_text(text)
    assert prepare.newest(tmp_path / "data") == folder
    assert prepare.prepare(str(source), tmp_path / "data") == (folder, False)


@pytest.mark.every(3)
@pytest.mark.parametrize("number", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL", "EACCES"])
def test_a_file_system_without_locks_is_no_reason_to_stop(
    tiny, source, tmp_path, monkeypatch, capsys, number
):
    def flock(*_):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(prepare.fcntl, "flock", flock)
    (tmp_path / "data" / ".partial-of-another").mkdir(parents=True)
    folder, _ = prepare.prepare(str(source), tmp_path / "data")
    assert (
        prepare.newest(tmp_path / "data") == folder
        and "no lock on this file system" in capsys.readouterr().err
    )
    assert (tmp_path / "data" / ".partial-of-another").is_dir()  # somebody may be at work there


def test_autoresearch_data_may_name_one_data_set(tiny, source, tmp_path):
    root = tmp_path / "data"
    first, _ = prepare.prepare(str(source), root)
    second, _ = prepare.prepare(str(write_jsonl(tmp_path / "other.jsonl", documents(300))), first)
    assert second.parent == root and prepare.newest(first) == first


@pytest.mark.slow
def test_preparing_anything_never_rewrites_the_files_of_another_data_set(tiny, source, tmp_path):
    root = tmp_path / "data"
    folder, _ = prepare.prepare(str(source), root)
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.bin")}
    prepare.prepare(str(write_jsonl(tmp_path / "other.jsonl", documents(300))), root)
    os.utime(source, (1, 1))  # the same text, but by its date it may be another
    assert prepare.prepare(str(source), root) == (folder, False)
    assert before == {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.bin")
    }
    assert prepare.prepare(str(source), root) == (folder, True)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", ["train.bin", "tokenizer.tiktoken", "meta.json"])
def test_a_damaged_data_set_is_made_again(tiny, source, tmp_path, name):
    folder, _ = prepare.prepare(str(source), tmp_path / "data")
    sound = (folder / name).read_bytes()
    (folder / name).unlink()
    (folder / name).write_bytes(sound[: len(sound) // 2])
    with pytest.raises(prepare.Problem, match="run: python prepare.py"):
        prepare.newest(tmp_path / "data")
    assert prepare.prepare(str(source), tmp_path / "data") == (folder, False)
    assert (folder / name).read_bytes() == sound
    assert sorted(left_over(tmp_path / "data")) == [folder.name]


def test_a_broken_neighbour_is_left_alone(tiny, source, tmp_path):
    (tmp_path / "data" / "other-1").mkdir(parents=True)
    (tmp_path / "data" / "other-1" / "meta.json").write_text("{")
    folder, _ = prepare.prepare(str(source), tmp_path / "data")
    assert prepare.newest(tmp_path / "data") == folder
    assert (tmp_path / "data" / "other-1" / "meta.json").read_text() == "{"


# ---- bad input: one sentence, exit 2, nothing lost

BAD = {
    "missing": (None, "no such file or folder"),
    "empty.txt": (b"", "too little text"),
    "short.txt": (b"A few words.", "add about"),
    "picture.txt": (b"\x89PNG\r\n\x1a\n\xff\xd8", "not UTF-8 text"),
    "latin.txt": ("naïve ".encode("latin-1") * 50, "not UTF-8 text"),
    "nul.txt": (b"text\0text" * 50, "NUL bytes"),
    "bad.jsonl": (b'{"text": "good"}\n{"text": \n', "line 2"),
    "list.jsonl": (b"[1, 2]\n", "line 1"),
    "number.jsonl": (b'{"text": 5}\n', "line 1"),
    "array.json": (b'[{"text": "one"}, {"text": "two"}]', "jq -c '.[]'"),
    "lines of an array.json": (b'[\n{"text": "one"},\n{"text": "two"}\n]', "line 1"),
    "pretty.json": (b'{\n "text": "one"\n}', "line 1"),
    "deep.jsonl": (b"[" * 200_000 + b"\n", "line 1"),
    "bad.jsonl.gz": (b"not gzip", "can't be read"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "cut short"}\n' * 50)[:-12], "can't be read"),
    "mangled.jsonl.gz": (gzip.compress(b"")[:10] + b"\xff" * 50, "can't be read"),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence_and_nothing_is_lost(call, source, tmp_path, name):
    content, reason = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert call(source)[0] == 0
    before = left_over(tmp_path / "data")
    code, message = call(tmp_path / name)
    assert code == 1 and reason in message
    assert str(tmp_path / name) in message or "too little text" in message
    assert message.count("\n") == 1
    assert left_over(tmp_path / "data") == before and prepare.newest(tmp_path / "data").name == before[0]


@pytest.mark.parametrize("source", ["", "Climbmix"])
def test_what_names_no_source_is_told_what_does(call, source):
    code, message = call(source)
    assert code == 1 and f"--source {source!r}: no such file or folder; " in message
    assert "the hub's are tinystories and climbmix" in message


def test_what_a_shell_pipes_in_is_refused_as_it_cannot_be_read_twice(call, source):
    for text in ("/dev/stdin", "/dev/fd/0"):
        read, write = os.pipe()
        held = os.dup(0)
        try:
            os.dup2(read, 0)
            code, message = call(text)
        finally:
            os.dup2(held, 0)
            for number in (read, write, held):
                os.close(number)
        assert code == 1 and f"--source {text}: a pipe can't be read twice; write" in message


def test_a_folder_without_text_files_says_which_it_looks_for(call, tmp_path):
    (tmp_path / "empty").mkdir()
    code, message = call(tmp_path / "empty")
    assert code == 1 and ".jsonl, .ndjson" in message


def test_too_little_text_for_a_split_says_how_much_more(call, tmp_path):
    code, message = call(write_jsonl(tmp_path / "short.jsonl", documents(10, 300)))
    assert code == 1 and "too little text: " in message and "add about 0.1 MB" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_a_file_or_folder_that_may_not_be_used_is_named(call, source, tmp_path):
    source.chmod(0)
    assert call(source)[0] == 1
    source.chmod(0o600)
    (tmp_path / "data").chmod(0o500)
    assert call(source)[0] == 1
    (tmp_path / "data").chmod(0o700)


def test_a_data_folder_that_cannot_be_made_is_named(call, source, tmp_path):
    (tmp_path / "data").write_text("a file")
    code, message = call(source)
    assert code == 1 and str(tmp_path / "data") in message and "AUTORESEARCH_DATA" in message


# ---- stopped in the middle


@pytest.fixture
def stuck(tmp_path):
    """A source that nobody writes to, so that prepare.py hangs in the middle of its work."""
    os.mkfifo(tmp_path / "stuck.jsonl")
    return tmp_path / "stuck.jsonl"


@pytest.fixture
def enough(tmp_path):
    """Text enough for the sizes of a machine without a GPU."""
    return write_jsonl(tmp_path / "enough.jsonl", documents(1500, 150))


@pytest.mark.slow
def test_a_killed_run_leaves_what_was_there_and_the_next_one_cleans_up(stuck, enough, tmp_path):
    root = tmp_path / "data"
    killed = spawn(stuck, root)
    with open(stuck, "w"):  # opens when prepare.py starts to read
        killed.kill()
    killed.communicate()
    assert list(root.glob(".partial-*"))
    with pytest.raises(prepare.Problem):
        prepare.newest(root)
    process = spawn(enough, root)
    assert process.communicate()[1] == "" and process.returncode == 0
    assert left_over(root) == [prepare.newest(root).name]


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_cleans_up_after_itself(stuck, tmp_path, sent):
    root = tmp_path / "data"
    process = spawn(stuck, root)
    with (
        contextlib.suppress(BrokenPipeError),
        open(stuck, "w") as source,
    ):  # opens when prepare.py starts to read
        process.send_signal(sent)
        for text in itertools.cycle(documents()):
            source.write(json.dumps({"text": text}) + "\n")
    message = process.communicate()[1]
    assert (process.returncode, message) == (1, "stopped; nothing is half-written\n")
    assert left_over(root) == []


@pytest.mark.slow
def test_a_second_prepare_waits_for_the_first(stuck, tmp_path):
    root = tmp_path / "data"
    first = spawn(stuck, root)
    with open(stuck, "w"):
        second = spawn(stuck, root)
        assert "waiting" in second.stderr.readline()
        assert len(list(root.glob(".partial-*"))) == 1
        for process in (second, first):
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_a_prepare_that_waits_can_be_stopped(stuck, tmp_path):
    first = spawn(stuck, tmp_path / "data")
    with open(stuck, "w"):
        second = spawn(stuck, tmp_path / "data")
        assert "waiting" in second.stderr.readline()
        second.send_signal(signal.SIGINT)
        assert (
            second.communicate(timeout=30)[1] == "stopped; nothing is half-written\n"
            and second.returncode == 1
        )
        first.kill()
        first.communicate()


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_leaves_nothing(enough, tmp_path):
    root = tmp_path / "data"
    limited = (
        f'ulimit -f 64; exec "{sys.executable}" "{SCRIPT}" --source "{enough}"'  # files of 64 KiB at the most
    )
    environment = {**os.environ, "AUTORESEARCH_DATA": str(root), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", "-c", limited], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "make room" in done.stderr and done.stderr.count("\n") == 1
    assert left_over(root) == []


def test_tokens_keep_their_raw_bytes(tmp_path):
    ranks = {bytes([i]): i for i in range(256)} | {b"\xc3\xa9": 256, b"\xf0\x9f": 257}
    (tmp_path / "t").write_bytes(
        b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
    )
    lengths = prepare.byte_lengths(prepare.read_tokenizer(tmp_path / "t"))
    assert lengths[0xC3] == 1 and lengths[256] == 2 and lengths[257] == 2 and lengths[258] == 0  # 258 is BOS
