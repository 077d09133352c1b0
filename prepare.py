"""The ruler: the text, the tokenizer, the clock, the seed and the metric. The agent never edits this file.

    python prepare.py                     the Python sources of the installed torch package; no download
    python prepare.py --source PATH       your own .txt, .md, .py, .jsonl, .ndjson (all .gz, too) or .parquet
                                          file, or a folder of them
    python prepare.py --source climbmix   web text, or tinystories: from the Hugging Face hub (pip install -e '.[hub]')
    python prepare.py --run               train.py, as the loop runs it; --check FILE and --facts are the loop's, too

Reads the source twice (vocabulary, then tokens) and writes ~/.cache/autoresearch/<source>-<fingerprint>/ (or below
$AUTORESEARCH_DATA): train.bin, val.bin and test.bin (uint16 tokens, a BOS before each document), tokenizer.tiktoken
(tiktoken's rank format) and meta.json, which never change; beside the folders asked/ says what they were made of. A
second call finds the folder and does nothing. train.py imports `Run` from here, and a ruler of your own `Ruler`.
"""

import argparse
import array
import ast
import atexit
import base64
import contextlib
import ctypes
import faulthandler
import fcntl
import gc
import gzip
import hashlib
import hmac
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import random
import re
import resource
import secrets
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
import traceback
import types
import warnings
import zlib
from collections import Counter, deque
from pathlib import Path
from time import monotonic, process_time, sleep, thread_time  # so time.monotonic may be replaced

import numpy as np

# The sizes of the ruler: sequence length, vocabulary, tokens evaluated, rows of one evaluation batch.
GPU_SIZES = dict(seq_len=2048, vocab_size=8192, eval_tokens=2**23, eval_rows=32)
CPU_SIZES = dict(seq_len=256, vocab_size=2048, eval_tokens=2**17, eval_rows=16)  # evaluates in about 3 s

FORMAT = 3  # of the files written; a new number makes every source be prepared again
HELD_OUT = 20  # one document in 20 is val and one is test, by content hash
DOCUMENT_CHARS = 8192  # a longer text file is cut at the next blank line: a book has documents to split
RECORD_CHARS = 2**20  # a longer text in a JSON line or a parquet row is cut: bounds memory
RECORDS = (".jsonl", ".ndjson")  # one JSON object a line
# Of the files that are read, in any case; all but .parquet with .gz, too:
SUFFIXES = (".txt", ".md", ".py", *RECORDS, ".parquet")
# Files and folders that nobody means by his text:
OTHERS = re.compile(r"\.|(__MACOSX|__pycache__|node_modules|site-packages)$")
# Data sets of the Hugging Face hub: repository, commit (the same text for everybody, always), files, how many
# without --shards.
HUB = {
    "tinystories": ("roneneldan/TinyStories", "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
                    ["TinyStoriesV2-GPT4-valid.txt", "TinyStoriesV2-GPT4-train.txt"], 2),  # 22 MB and 2.2 GB
    "climbmix": ("karpathy/climbmix-400b-shuffle", "915333b4f8b8684f39aeaafea600fea6f43fb703",
                 # 90 MB each, 250 million characters
                 [f"shard_{number:05d}.parquet" for number in range(6543)], 10),
}  # fmt: skip
# Of torch's sources: the first names the build, the second is a table of numbers that would be a third of all
# val tokens.
LEFT_OUT = ("version.py", "sparse/_triton_ops_meta.py")
# What a person does about a download that failed, by words of the reason.
HUB_STEPS = {
    "offline mode": "unset HF_HUB_OFFLINE",
    "free disk space|No space left|quota|too large": "make room or set HF_HOME",
    r"\b401\b|\b403\b": "set HF_TOKEN",
    r"\b429\b": "wait, or set HF_TOKEN",
    "": "check the network and HF_ENDPOINT",
}
VOCABULARY_CHARS = 200_000_000  # the BPE is trained on at most this much of the train split
BATCH_DOCUMENTS = 64  # tokenized at a time: bounds memory
# How text is cut before BPE: words with one leading sign, digits by two, punctuation, line ends, spaces
# (GPT-4's rule).
PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

BUDGET = 300  # seconds of wall clock for the whole process, when the loop doesn't say
TRAINING_SHARE = 3 / 4  # of the budget, for training on a GPU: a cold compile fits into the rest
# On a CPU a run takes a third of its budget: so it ends in time, with all of its training, beside a busy process
# on its core and one on the next, which together make it almost three times as slow.
CPU_SHARE, CPU_OVERHEAD = 1 / 3, 8
LEAST_SHARE = 1 / 5  # of the budget, for training on a CPU, where the budget is short
PACE_EVERY = 0.03  # seconds between two samples of the core's speed, each of which takes 1 to 2 ms
PACE_SECONDS = 4.0  # for measuring the pace of a machine: it changes from second to second
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of glibc's mallopt
HELD_UP = "held up by the machine"  # so begins the last line of a run that says nothing of its train.py
FULL_TRAINING = 0.98  # of the training's allowance: who gets less was held up by the machine, and says so
# A difference in speed to the file that was edited which the clock can't tell from none at the end of a run;
# before, it is divided by the square root of the share that is done. Equal runs scatter by 1 % on a quiet
# machine, but beside other work on the same core they are up to 8 % slower than the clock can see.
SAME_SPEED = {"cpu": 0.10, "mps": 0.10, "cuda": 0.003}
TOO_EARLY = 0.1  # share of the training before which nothing is said of the speed
SLOWNESS_SECONDS = 5.0  # wall clock over which it is seen how slow the machine is now
# Bits per byte: deviation of the difference of two runs on one seed, before a night has measured it. Seen on
# a CPU: 0.0018 at 60 s. Not yet on a GPU: there it is a third of what runs of the original scatter by.
NOISE = {"cpu": 0.0015, "mps": 0.0015, "cuda": 0.0003}
EXIT_SECONDS = 1.0  # kept free at the end, to print and exit
EVAL_RESERVE = 1.5  # times the measured evaluation time is kept free
USUAL_PASSES, MOST_PASSES = 4, 6  # evaluation passes of as many tokens that a step takes, and may take
FORGET = 0.02  # seconds by which the memory of a slow step fades in each second of training
FREE_START = 4.0  # seconds of work before the first step, on a CPU, without preflight's; more is training
OVERRUN = 0.02  # of the training time: more training than that is refused
OVERRUN_SECONDS = 1.0  # nothing shorter is refused: weights may be swapped between the last step and finish()
PROBES = 24  # for a leak from the future: copies of evaluated batches whose rows change somewhere
MOST_ROUNDS = 5  # of as many, while what they saw is odd, but not certain
# Chances that an honest model shows this: below the first there is another round, below the second a refusal.
ODD, CERTAIN = 1e-2, 1e-6
FAR = 4  # places before the change: a loss there isn't reached by looking a few tokens ahead
LEAK_NATS, LEAK_SIGMAS = 0.005, 4  # by which a loss may change when only what it mustn't see changed
# By which rows that were measured may become easier with another start: a scale that a model works out from
# the whole batch moved them by 0.04.
MEMORY_NATS = 0.1
WARM_START = 0.9  # times what the same tokens cost who knows their frequencies alone: below, it has learned
UNIGRAM_SPANS, UNIGRAM_SPAN = 256, 2**12  # of the train split, from which the frequencies are counted
LOSS_LOGITS = 2**25  # turned into float32 at a time: all of a batch would need more memory than training did
LN2 = math.log(2)  # here, so that a train.py which replaces math.log moves nothing
SANE_BPB = (0.05, 20)  # no honest model is outside
LOG_SECONDS = 1.0  # between two lines of run.log
# Dense bf16 peak, FLOP/s, by a word of the device's name (NVIDIA's data sheets); another device has no MFU.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip

# What torch.compile and copy.deepcopy() put there by rights.
PATCHED = ("torch.manual_seed", "Tensor.__slotnames__")
_outside = {}  # outside_names(), before an edited file could replace any
_sealed = set()  # real paths of the token files, while they may not be opened
_taken = {}  # by --run, before train.py's first line: the loop's secret and settings, and the text that is held out
# What a run or its ruler is told as AUTORESEARCH_NAME, and what holds otherwise: a text, a number, a whole number.
SETTINGS = dict(
    BUDGET=float(BUDGET),  # seconds of wall clock for the whole process
    SEED=0,
    SPLIT="val",  # test in the closing audit, whose metric is test_bpb
    PACE=0.0,  # of the branch's machine, on a CPU; from facts()
    WORK=0,  # tokens that the file which was edited trained on, with this seed
    MACHINE="",  # name of the branch's device
    FINGERPRINT="",  # of the branch's data
    SOURCE="",  # from which they can be prepared again
    SALT="",  # of a branch, for the numbers that a Trial draws
    STARTED=0.0,  # time.monotonic() at spawn; this one and the next two are no part of the result
    HELD_OUT=0,  # descriptor of the held-out text, in a cage
    TOKEN="",  # the secret that a result is signed with
)
API = """\
The file trains a language model; its metric is validation bits per byte after a fixed time of training. It must go on using the
ruler, prepare.py, which you can't change:
  run = prepare.Run()                      # seed, device, data, clock; run.device, run.seq_len, run.vocab_size, run.train_tokens
  batches = run.batches(batch_size)        # endless (x, y), int64 (B, T) on the device; optional seq_len= up to run.seq_len
  run.preflight(model)                     # once, before training: checks the model, times its evaluation
  while (progress := run.progress()) < 1:  # 0..1 over the training time; schedules are functions of it
      run.log(step, loss, tokens)          # at every step
  run.finish(model, ...)                   # evaluates, checks again and prints the result
model(x) returns logits (B, T, vocab_size); the ruler computes the loss from them, in eval() and without gradients.
The ruler refuses a model that sees later tokens or other rows, is random in eval(), changes during evaluation, starts from
trained weights, or trains before the first progress() or after it reached 1. The whole run has a hard limit, and start-up
counts. No other packages than torch, numpy and the standard library's plain ones, no other data, no files, no processes, no
network, no private names of others, no assignment to a module's names: such an edit is refused before it runs. The seed is
the ruler's."""


class Problem(SystemExit):
    """What a person has to mend, in one sentence."""


# ---------------------------------------------------------------------------------------------------------------- data


def data_root():
    return Path(os.environ.get("AUTORESEARCH_DATA") or "~/.cache/autoresearch").expanduser()


def read_meta(folder):
    """meta.json of a complete data set; None where it or what a run reads is missing, cut short or broken.

    Of the splits only train is looked at: a run in a cage sees no other.
    """
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        whole = len(read_tokenizer(folder / "tokenizer.tiktoken")) == meta["vocab_size"] - 1
        whole &= (folder / "train.bin").stat().st_size == 2 * meta["splits"]["train"]["tokens"]
        return meta if whole and meta["fingerprint"] == fingerprint_of(meta) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def fingerprint_of(meta):
    """The data set's name: a hash of its sizes and of the digests of its files, so of all that moves a number."""
    named = {key: meta[key] for key in (*CPU_SIZES, "unigram_bpb", "splits", "digests")}
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:12]


def digest_of(file):
    """SHA-256 of a file, by its path or open; about a second a GB."""
    return hashlib.sha256(np.memmap(file, mode="r")).hexdigest()


def check_digest(meta, path, file=None):
    """Ends the process where a file, by its path or open, isn't what meta.json describes."""
    if digest_of(file or path) != meta["digests"][path.name]:
        raise Problem(f"{path} is damaged, or not what was prepared; delete its folder, prepare anew")


def newest(root, wanted=""):
    """The folder of the data set to use: of this fingerprint, or the one that was asked for last.

    `root` holds data sets, or is one.
    """
    found = {path.parent: read_meta(path.parent) for path in (root / "meta.json", *root.glob("*/meta.json"))}
    fitting = [folder for folder, meta in found.items() if meta and wanted in ("", meta["fingerprint"])]
    if fitting:
        return max(fitting, key=lambda folder: folder.stat().st_mtime_ns)
    if wanted:
        raise Problem(f"this branch was measured on the data set {wanted}, not in {root}; bring it back, "
                      "or begin anew with --tag")  # fmt: skip
    raise Problem(f"no data of this version in {root}; run: python prepare.py")


def package(name, extra=""):
    """The folder of an installed package, which isn't imported."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise Problem(f"{name} is not installed here; run: pip install -e '.{extra}'")
    return Path(spec.origin).parent


def machine_sizes():
    """The sizes for the device that a run takes on this machine."""
    load_torch()
    return GPU_SIZES if pick_device().type == "cuda" else CPU_SIZES


def source_files(source, shards=None):
    """(name, files, what identifies them) of --source; files of the hub are still to be fetched."""
    if source in HUB:
        repository, commit, names, usual = HUB[source]
        if shards is not None and not 0 < shards <= len(names):
            raise Problem(f"--shards {shards}: {source} has {len(names):,} files on the hub")
        return source, [], [repository, commit, *names[: shards or usual]]
    if shards is not None:
        raise Problem(f"--shards {shards}: {source} isn't on the hub; only {' and '.join(HUB)} are")
    if source == "pytorch":
        folder = package("torch")
        files = sorted(path for path in folder.rglob("*.py") if str(path.relative_to(folder)) not in LEFT_OUT)
        return "pytorch", files, importlib.metadata.version("torch").partition("+")[0]
    path, kinds = Path(source).expanduser(), ", ".join(SUFFIXES)
    if not source or not path.exists():
        names = f"without --source it is pytorch's, and the hub's are {' and '.join(HUB)}"
        raise Problem(f"--source {source!r}: no such file or folder; {names}")
    if source.startswith(("/dev/", "/proc/")) and path.is_fifo():
        raise Problem(f"--source {source}: a pipe can't be read twice; write what comes out of it to a file")
    files = text_files(path) if path.is_dir() else [path]
    if not files:
        raise Problem(f"--source {source}: no {kinds} file in this folder; add one")
    if path.is_file() and kind_of(path) not in (*SUFFIXES, ".json", ""):
        instead = f"give {kinds}, or if it is plain text call it .txt"
        raise Problem(f"--source {source}: {kind_of(path)} files aren't read; {instead}")
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    stem = path.resolve().name.split(".")[0][:50]  # with the fingerprint, a name may have 255 bytes
    return re.sub(r"\W", "-", stem) or "text", files, stats


def text_files(folder):
    """The files below a folder that are read, in order; what else is there is counted, and said."""
    files, left_out = [], Counter()
    for path in folder.rglob("*"):  # doesn't follow links
        kind = kind_of(path) or "without a suffix"
        if path.is_dir():
            left_out["linked folders"] += path.is_symlink()
        elif any(OTHERS.match(part) for part in path.relative_to(folder).parts):
            left_out["hidden or a tool's"] += 1
        elif kind in SUFFIXES and path.is_file():
            files.append(path)
        else:
            left_out[kind] += 1
    if said := ", ".join(f"{count:,} {what}" for what, count in left_out.most_common() if count):
        print("left out:", said)
    return sorted(files)


def kind_of(path):
    """A file's suffix, in small letters, without the .gz of one that is compressed."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix == ".gz" else name.suffix


def open_text(path, **how):
    return (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", **how)


def download(repository, commit, *names):
    """Paths of files of a data set on the hub, from its cache or the network."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # no lines of the library's own about its retries
    package("pyarrow", "[hub]"), package("huggingface_hub", "[hub]")
    from huggingface_hub import hf_hub_download

    print(f"files of {repository} on the Hugging Face hub: {len(names):,}")
    how = dict(repo_type="dataset", revision=commit)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Not enough free disk space")  # known before the first byte
            return [Path(hf_hub_download(repository, name, **how)) for name in names]
    except Exception as error:  # the library, its HTTP client and its Rust part have no base in common
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0].partition(". ")[0].rstrip(".")
        step = next(step for words, step in HUB_STEPS.items() if re.search(words, reason))
        raise Problem(
            f"{repository} can't be downloaded ({reason}); {step}, and run it again: complete files are kept"
        ) from None


def read_records(path):
    """Yields the text of each line of a file of JSON objects, or row of a .parquet file."""
    if kind_of(path) == ".parquet":
        package("pyarrow", "[hub]")
        from pyarrow.parquet import ParquetFile

        a_little_at_a_time = dict(buffer_size=2**20, pre_buffer=False)  # else a whole row group
        try:
            with ParquetFile(path, **a_little_at_a_time) as file:
                for batch in file.iter_batches(BATCH_DOCUMENTS, columns=["text"]):
                    yield from (text.encode().decode() for text in batch["text"].drop_null().to_pylist())
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError):
            raise Problem(
                f'{path}: not a parquet file with a "text" column of strings; mend it or leave it out'
            ) from None
        return
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:  # a text may hold half a surrogate pair
                    yield json.loads(line)["text"].encode("utf-8", "replace").decode()
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    raise Problem(
                        f'{path}, line {number}: not a JSON object with a "text" string, one a line; mend it'
                        " (of an array, jq -c '.[]' makes such lines)"
                    ) from None


def read_documents(path, whole):
    """Yields the documents of one file, never holding more than one; a `whole` file is one document."""
    if kind_of(path) in (*RECORDS, ".json", ".parquet"):
        for text in read_records(path):
            yield from (text[start : start + RECORD_CHARS] for start in range(0, len(text), RECORD_CHARS))
        return
    with open_text(path, newline="") as file:
        lines, size = [], 0
        while line := file.readline(4 * DOCUMENT_CHARS):  # bounded: a text may be a single line
            if "\0" in line:
                raise Problem(f"{path} is not text, it has NUL bytes; leave it out")
            ends_here = line.strip() == "<|endoftext|>"  # how TinyStories and others part their documents
            lines += [] if ends_here else [line]
            size += len(line)
            most = 4 * DOCUMENT_CHARS if line.strip() else DOCUMENT_CHARS  # at a blank line, if there is one
            if ends_here or size >= most and not whole:
                yield "".join(lines)
                lines, size = [], 0
        yield "".join(lines)


def split_documents(files, whole):
    """Yields (split, text, bytes) for every different document; its content's hash chooses the split."""
    seen = set()
    for path in files:
        try:
            for text in read_documents(path, whole):
                raw = text.encode()
                digest = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
                if text.strip() and digest not in seen:
                    seen.add(digest)
                    yield {0: "val", 1: "test"}.get(digest % HELD_OUT, "train"), text, len(raw)
        except UnicodeDecodeError as error:
            found = f"{error.reason}, {error.object[error.start]:#04x}"
            raise Problem(f"{path} is not UTF-8 text ({found}); leave it out or convert it") from None
        except (OSError, EOFError, zlib.error) as error:  # gzip raises all three
            reason = getattr(error, "strerror", None) or error
            raise Problem(f"{path} can't be read ({reason}); mend it or leave it out") from None


def too_little_text(what, tokens):
    """A Problem: a held-out split needs `tokens` more, of about four bytes each."""
    megabytes = math.ceil(tokens * HELD_OUT * 4 / 1e5) / 10
    return Problem(f"too little text: {what}; add about {megabytes:.1f} MB of different text")


def train_tokenizer(documents, sizes):
    """A byte-pair encoding of the train split: {token's bytes: rank}; the last id of vocab_size is BOS."""
    import rustbpe

    def texts(left=VOCABULARY_CHARS):
        for split, text, _ in documents:
            if split == "train":
                left -= len(text)
                yield text
            if left <= 0:
                return

    vocab_size = sizes["vocab_size"]
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts(), vocab_size - 1, buffer_size=BATCH_DOCUMENTS, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in tokenizer.get_mergeable_ranks()}
    if len(ranks) != vocab_size - 1:
        gave = f"it gave a vocabulary of {len(ranks) + 1:,} and not of {vocab_size:,} tokens"
        raise too_little_text(gave, sizes["eval_rows"] * sizes["seq_len"])
    return ranks


def read_tokenizer(path):
    """{token's bytes: rank} from tiktoken's rank format, one `base64 rank` a line."""
    pairs = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def byte_lengths(ranks):
    """Bytes of each token id, from the raw tokens, never from decoded text; BOS counts nowhere: 0."""
    lengths = np.zeros(len(ranks) + 1, dtype=np.int64)
    for token, rank in ranks.items():
        lengths[rank] = len(token)
    return lengths


def write_tokens(folder, documents, ranks):
    """Writes each <split>.bin; returns {split: documents, bytes and tokens}, {split: counts by token}."""
    import tiktoken

    encoding = tiktoken.Encoding("ruler", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    splits = {split: Counter(documents=0, bytes=0, tokens=0) for split in ("train", "val", "test")}
    counts = {split: np.zeros(len(ranks) + 1, dtype=np.int64) for split in splits}
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open(folder / f"{split}.bin", "wb")) for split in splits}
        while batch := list(itertools.islice(documents, BATCH_DOCUMENTS)):
            texts = [text for _, text, _ in batch]
            encoded = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
            for (split, _, size), tokens in zip(batch, encoded, strict=True):
                tokens = np.array([len(ranks), *tokens], dtype=np.uint16)
                files[split].write(tokens.tobytes())
                np.add.at(counts[split], tokens, 1)
                splits[split].update(documents=1, bytes=size, tokens=len(tokens))
    return splits, counts


def unigram_bpb(splits, counts, ranks, sizes):
    """Bits per byte of val by the frequencies of train's tokens; a Problem where there is too little text."""
    lengths = byte_lengths(ranks)
    for split, facts in splits.items():
        assert counts[split] @ lengths == facts["bytes"], f"the tokens of {split} aren't its text"
        missing = sizes["eval_rows"] * sizes["seq_len"] + 1 - facts["tokens"]
        if missing > 0:
            raise too_little_text(f"{split} lacks {missing:,} tokens", missing)
    nats = -np.log((counts["train"] + 1) / (counts["train"] + 1).sum())
    nats[-1] = 0  # BOS
    return float(counts["val"] @ nats / LN2 / splits["val"]["bytes"])


def write_data_set(folder, source, sizes):
    """Writes tokenizer, token files and meta.json into `folder`, to the disk; returns the fingerprint."""
    from rich.progress import track

    name, files, identity = source
    whole = isinstance(identity, str)  # of a release of torch, each file is a document
    ranks = train_tokenizer(track(split_documents(files, whole), "reading for a vocabulary"), sizes)
    splits, counts = write_tokens(folder, track(split_documents(files, whole), "writing tokens"), ranks)
    by_rank = sorted(ranks, key=ranks.get)
    lines = [b"%s %d\n" % (base64.b64encode(token), ranks[token]) for token in by_rank]
    (folder / "tokenizer.tiktoken").write_bytes(b"".join(lines))

    meta = dict(source=name, fingerprint="", **sizes, unigram_bpb=unigram_bpb(splits, counts, ranks, sizes))
    meta |= dict(splits=splits, digests={path.name: digest_of(path) for path in sorted(folder.iterdir())})
    meta |= {"shards": len(files)} if name in HUB else {}
    meta["fingerprint"] = fingerprint_of(meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    for path in folder.iterdir():
        path.chmod(0o444)  # a train.py that opens one to write gets an error
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return meta["fingerprint"]


def prepare(source, root, shards=None):
    """Prepares `source` below `root` unless that was done before; returns (folder, whether it was there)."""
    name, files, identity = source_files(source, shards)
    root = root.parent if read_meta(root) else root  # AUTORESEARCH_DATA may name one data set
    sizes = machine_sizes()
    key = hashlib.sha256(json.dumps([FORMAT, sizes, PATTERN, name, identity]).encode()).hexdigest()
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "prepare.lock", "w") as lock:
        if take_lock(lock):  # so nobody is at work on these
            for killed in root.glob(".partial-*"):
                shutil.rmtree(killed)
        note = root / "asked" / key
        folder = root / (note.read_text() if note.exists() else "none")
        was_there = read_meta(folder) is not None
        if not was_there:
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as partial:
                made = Path(partial) / "made"
                made.mkdir()
                found = name, files or download(*identity), identity
                folder = root / f"{name}-{write_data_set(made, found, sizes)}"
                if not read_meta(folder):  # else it is the same text, moved or touched
                    if folder.exists():
                        folder.rename(made.with_name("damaged"))
                    made.rename(folder)
            note.parent.mkdir(exist_ok=True)
            note.write_text(folder.name)
        os.utime(folder)  # what was asked for last is the newest; its files stay as they are
    return folder, was_there


def take_lock(lock):
    """Waits until no other prepare.py holds the lock; False where the file system has none."""
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another prepare.py is at work here: waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        alone = "run one prepare.py at a time"
        print(f"no lock on this file system ({error.strerror}): {alone}", file=sys.stderr)
        return False
    return True


# --------------------------------------------------------------------------------------------------------------- ruler


def refuse(reason):
    """Ends the run without a result; the reason is the log's last line, and reaches the agent.

    Under --run the process ends at once, whatever train.py would catch, and whatever threads it has.
    """
    sentence = f"refused by the ruler: {reason}"
    if _taken:
        print(sentence, file=sys.stderr)
        end_process(1)
    raise SystemExit(sentence)


def end_process(code):
    """Ends this process with its threads; only what it has printed is kept."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def load_torch():
    """The language model's ruler needs torch; others do without its seconds."""
    package("torch")  # else a sentence
    global torch
    if "torch" not in globals():
        import torch

        _outside.update(outside_names())


def read_settings():
    """SETTINGS as the environment has them, by their names in small letters; the secrets are taken away.

    told: the texts of those that were set, as a result repeats them.
    """
    texts = {name: os.environ[key] for name in SETTINGS if (key := f"AUTORESEARCH_{name}") in os.environ}
    values = {name.lower(): type(usual)(texts.get(name) or usual) for name, usual in SETTINGS.items()}
    for name in ("TOKEN", "SALT"):
        os.environ.pop(f"AUTORESEARCH_{name}", None)
    told = {name: text for name, text in texts.items() if name not in ("STARTED", "HELD_OUT", "TOKEN")}
    return types.SimpleNamespace(**values | {"started": values["started"] or monotonic(), "told": told})


def held_out_files(folder):
    """{split: path} of what a data set holds out."""
    return {split: os.path.realpath(folder / f"{split}.bin") for split in ("val", "test")}


def open_held_out(settings, folder):
    """The held-out file of a data set: by its name, or in a cage, where it has none, as the loop opened it."""
    return open(settings.held_out or folder / f"{settings.split}.bin", "rb")


def eval_starts(meta, split):
    """(batches, rows) starts of the windows evaluated: spread evenly, and no row continues another."""
    T, rows = meta["seq_len"], meta["eval_rows"]
    count = meta["splits"][split]["tokens"] - 1
    windows = min(meta["eval_tokens"], count) // T // rows * rows
    starts = np.linspace(0, count - T, windows).astype(np.int64)
    return np.random.default_rng(0).permutation(starts).reshape(-1, rows)


def take_hold():
    """(settings, folder of the data, held-out windows (batches, rows, T + 1)); seals files."""
    settings, folder = read_settings(), newest(data_root())
    meta = read_meta(folder)
    with open_held_out(settings, folder) as file:
        tokens = np.memmap(file, dtype=np.uint16, mode="r")
        check_digest(meta, folder / f"{settings.split}.bin", file)
        places = np.arange(meta["seq_len"] + 1)
        windows = tokens[eval_starts(meta, settings.split)[..., None] + places]  # copied
    seal(folder)
    return settings, folder, windows


def seal(folder):
    """From here on nothing opens what a data set holds out."""
    if not _sealed:
        sys.addaudithook(_guard)
    _sealed.update(held_out_files(folder).values())


def run_train():
    """Runs train.py, which stands beside this file; the process ends with it.

    Secret, settings and held-out text are taken before its first line: nothing it does moves them.
    """
    path = Path(__file__).with_name("train.py")
    load_torch()
    _taken["hold"] = take_hold()
    if cache := os.environ.get("AUTORESEARCH_CACHE"):
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH"):
            os.environ[name] = str(Path(cache, name.partition("_")[0].lower()))
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__, sys.argv = str(path), [str(path)]
    to_the_end(exec, compile(path.read_bytes(), str(path), "exec"), vars(main))


def to_the_end(work, *arguments):
    """Does this, and ends the process with it: what fails prints its traceback, from where it began."""
    code = 0
    try:
        work(*arguments)
    except SystemExit as ended:
        code = ended.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        traceback.print_exception(error.with_traceback(error.__traceback__.tb_next))
        code = 1
    end_process(code)


def bits_per_byte(nats, targets, lengths):
    """Total bits over total bytes. nats, targets: same shape; lengths: bytes by token, or 0."""
    counted = lengths[targets]
    return float((nats.double() * (counted > 0)).sum() / (LN2 * counted.sum()))


def unigram_nats(tokens, vocab_size):
    """(vocab_size,) What each token costs who knows how frequent it is in a sample of `tokens`, in nats; none
    costs more than it does to know nothing."""
    span = min(UNIGRAM_SPAN, len(tokens))
    starts = np.linspace(0, len(tokens) - span, UNIGRAM_SPANS).astype(np.int64)
    counts = np.bincount(tokens[starts[:, None] + np.arange(span)].ravel(), minlength=vocab_size) + 1
    return torch.from_numpy(np.minimum(-np.log(counts / counts.sum()), math.log(vocab_size))).float()


def signed_line(secret, result):
    """`result: SIGNATURE JSON`, as the loop reads it: HMAC-SHA256 of the JSON, by the run's secret."""
    text = json.dumps(result)
    return f"result: {hmac.new(secret.encode(), text.encode(), 'sha256').hexdigest()} {text}"


def print_result(settings, summary, **result):
    """The summary for people, and where the loop listens the same signed: with what the run was told."""
    print("---", *(f"{key + ':':17} {value}" for key, value in summary.items()), sep="\n", flush=True)
    if settings.token:
        print(signed_line(settings.token, result | {"told": settings.told}), flush=True)


def peak_memory():
    """MiB that this process has had resident, at most (in bytes on macOS, KiB elsewhere)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def cores():
    """The CPU's devices: each core that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return ["cpu"]
    return [f"cpu:{core}" for core in sorted(os.sched_getaffinity(0))]


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, 1 thread" if device.type == "cpu" else device.type


def pick_device():
    """The device to run on. A GPU that torch can't use ends the process, where torch would take the CPU."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return torch.device("cuda")
    if said and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        reason = f"{said[-1].message}".partition(" (Triggered")[0].rstrip(". ")
        raise SystemExit(f"torch, built for CUDA {torch.version.cuda}, can't use the GPU here: {reason}. "
                         "To use the CPU instead: export CUDA_VISIBLE_DEVICES=")  # fmt: skip
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def check_compiler():
    """Ends the process where Triton, which torch.compile uses on a GPU, couldn't build its launchers."""
    headers = Path(sysconfig.get_paths("posix_prefix")["include"], "Python.h")
    if not (shutil.which("gcc") or shutil.which("clang")) or not headers.exists():
        packages = "as from apt install gcc python3-dev"
        raise SystemExit(f"compiling for a GPU needs a C compiler and {headers}, {packages}")


def facts():
    """What the loop must know of this ruler and this machine, as a line of JSON.

    noise: assumed deviation of the difference of two runs on one seed, bits per byte. settings: what a branch
    notes and tells each run as AUTORESEARCH_NAME. fixed: constants of train.py that a search leaves alone.
    """
    load_torch()
    device, known = pick_device(), read_settings()
    if device.type == "cuda":
        check_compiler()
    ones = torch.ones(8, 8, device=device)
    (ones @ ones).sum().item()  # does it compute?
    folder, name = find_data(known), device_name(device)
    meta = read_meta(folder)
    check_digest(meta, folder / "train.bin")
    if device.type == "cpu" and meta["seq_len"] == GPU_SIZES["seq_len"]:
        raise Problem(f"{folder} was prepared for a GPU, and torch finds none: does nvidia-smi show "
                      "it? If there is none, prepare the text again, in its smaller sizes for a CPU: "
                      "python prepare.py")  # fmt: skip
    devices, settings = [device.type], {"MACHINE": name}
    if meta["source"] in ("pytorch", *HUB):  # which another machine can prepare, too
        settings["SOURCE"] = f"{meta['source']} {meta.get('shards', '')}".strip()
    if device.type == "cuda":
        alike = (n for n in range(torch.cuda.device_count()) if torch.cuda.get_device_name(n) == name)
        devices = [f"cuda:{n}" for n in alike]
    if device.type == "cpu":
        devices, settings["PACE"] = cores(), known.told.get("PACE") or f"{measure_pace():.3g}"
    return json.dumps({
        "metric": "val_bpb", "better": "lower", "edits": "train.py", "api": API, "noise": NOISE[device.type],
        "devices": devices, "device": name, "software": f"torch {torch.__version__}", "settings": settings,
        "data": meta["fingerprint"], "folder": str(folder.resolve()),
        "held_out": held_out_files(folder),
        "fixed": ["CPU" if device.type == "cuda" else "GPU"], "budget": BUDGET,
    })  # fmt: skip


def find_data(known):
    """The folder of the branch's data set, or of the newest; what is missing is prepared, if it can be."""
    root, source = data_root(), known.source or ("" if known.fingerprint else "pytorch")
    try:
        return newest(root, known.fingerprint)
    except Problem:
        if not source:
            raise
    print(f"no such data of this version in {root}: preparing {source} (once)", file=sys.stderr)
    source, *shards = source.split()
    prepare(source, root, *map(int, shards))
    return newest(root, known.fingerprint)


class WorkClock(threading.Thread):
    """Counts what this process computes on a CPU: its CPU seconds, corrected by how fast the core is.

    A core that is shared with other machines (its other hyperthread, caches, memory) takes up to twice as
    long for equal work, from one tenth of a second to the next. So a thread times a small sample of
    training's kind of work on the same core, again and again, and CPU seconds count by the mean of its
    speeds. For equal training they varied by 5 % between windows of 16 s on a shared virtual machine, those
    corrected so by 0.5 %. The sample's own don't count; those of other threads do, and a child's when it was
    waited for. pace: CPU seconds of a sample; without one CPU seconds count as they are.
    """

    def __init__(self, pace=None):
        super().__init__(daemon=True)
        generator = torch.Generator().manual_seed(0)
        sizes = 2**16, CPU_SIZES["vocab_size"]
        self.table, self.matrix = (torch.randn(size, 128, generator=generator) for size in sizes)
        self.places = torch.randperm(len(self.table), generator=generator).split(256)
        self.pace, self.most, self.stopped = pace, 0.0, False
        # How many, the sum of their speeds (one over seconds), CPU seconds of this thread.
        self.samples = 0, 0.0, 0.0
        self.began = process_time() + children_time()
        self.start()
        atexit.register(self.stop)  # a thread that is still within torch when Python ends aborts the process

    def stop(self):
        self.stopped = True
        if self.is_alive():
            self.join()

    def run(self):
        torch.set_num_threads(1)
        with torch.inference_mode():
            while not self.stopped:
                sleep(PACE_EVERY)
                count, speeds, _ = self.samples
                began = thread_time()
                places = self.places[count % len(self.places)][:64]
                rows = self.table[places]  # gathered from 32 MB, as embeddings are
                rows.mm(self.matrix.mT).softmax(1).mm(self.matrix)  # as the output layer
                ended = thread_time()
                self.samples = count + 1, speeds + 1 / (ended - began), ended

    def speed(self):
        """Samples a CPU second."""
        count, speeds, _ = self.samples
        return speeds / count if count else 1 / (self.pace or 1)

    def __call__(self):
        """Seconds of work since the start; never fewer than before."""
        seconds = process_time() + children_time() - self.began - self.samples[2]
        self.most = max(self.most, seconds * self.speed() * self.pace if self.pace else seconds)
        return self.most


def children_time():
    """CPU seconds of the child processes that have ended and were waited for."""
    return sum(os.times()[2:4])


def keep_freed_memory():
    """Has glibc keep what is freed: clearing 4,000 pages a step anew took 13 % of it, and most scatter."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            libc.mallopt(option, 2**30)


def measure_pace():
    """CPU seconds of WorkClock's sample on this core, beside work that uses memory as training does."""
    torch.set_num_threads(1)
    clock, memory, end = WorkClock(), torch.ones(2**22), monotonic() + PACE_SECONDS
    while monotonic() < end:
        memory.mul_(1.0)
    clock.stop()
    return 1 / clock.speed()


def _guard(event, args):
    """Refuses to open a sealed file, also by a name that is relative to an open folder."""
    if event == "open" and _sealed and isinstance(args[0], (str, bytes, os.PathLike)):
        path = os.fsdecode(args[0])
        name = os.path.basename(path)
        if os.path.realpath(path) in _sealed or name in ("val.bin", "test.bin"):
            refuse(f"the file opened {name}, which is the ruler's: train.bin comes from one Run's batches()")


class Run:
    """One experiment: seeds everything, picks the device, opens the data and starts the clock.

    `device` (torch.device), `seq_len`, `vocab_size` and `train_tokens` (in the train split) are for train.py.
    The environment tells it SETTINGS. On a CPU a run is one thread, and its training is measured in its work
    (WorkClock).
    """

    def __init__(self):
        load_torch()
        self._settings, self._folder, self._held = _taken.get("hold") or take_hold()
        told = self._settings
        self._started, self._budget, self._seed = told.started, told.budget, told.seed
        self._read_sizes()
        name = device_name(self.device)
        if told.machine not in ("", name):  # torch falls back to the CPU when a GPU is lost
            raise SystemExit(f"{HELD_UP}: the device is {name} and was {told.machine}")
        random.seed(self._seed)
        np.random.seed(self._seed)
        torch.manual_seed(self._seed)
        self._train = np.memmap(self._folder / "train.bin", dtype=np.uint16, mode="r")
        _sealed.add(os.path.realpath(self._folder / "train.bin"))
        self._unigram = unigram_nats(self._train, self.vocab_size)
        self._iterators = self._tokens = 0  # made by batches(), drawn from them
        # Training's clock, and its seconds for training.
        self._work, self._allowance = monotonic, TRAINING_SHARE * self._budget
        if self.device.type == "cpu":
            torch.set_num_threads(1)
            keep_freed_memory()
            self._work = WorkClock(told.pace)
            self._allowance = max(CPU_SHARE * self._budget - CPU_OVERHEAD, LEAST_SHARE * self._budget)
        # By training's clock: the first batch, the start of training, when progress() said 1.
        self._first_batch = self._clock = self._told = None
        self._done, self._trained = 0.0, 1.0  # shares of the allowance: told last, given to training in all
        self._calls = self._first_step_tokens = 0  # of progress(); drawn in the first step
        self._last_call = self._slowest_step = 0.0  # time of the last progress(); seconds of work
        self._startup = 0.0  # wall clock from the start of the process to the end of the first step
        self._event = None  # the end of the step before, on CUDA
        self._marks = deque([(monotonic(), self._work())])  # of the last SLOWNESS_SECONDS: wall clock, work
        self._pass_seconds = self._eval_seconds = None  # of work: for a batch of evaluation, for all of it
        self._model = None  # from preflight() until training begins
        self._logged = -math.inf
        self._start = -self._work()  # becomes the seconds of work before the first step, without preflight's
        print(f"data: {self._folder.name}  device: {name}  torch: {torch.__version__}  seed: {self._seed}  "
              f"budget: {self._budget:g} s", flush=True)  # fmt: skip

    # ---- text

    def batches(self, batch_size, seq_len=None):
        """Endless (x, y), int64 (B, T) on the device; y is the next token. T: seq_len, or the ruler's.

        Windows of the train split without replacement; the seed draws order and offset anew each epoch.
        """
        T = self.seq_len if seq_len is None else seq_len
        if not 1 <= T <= self.seq_len or batch_size < 1:
            raise ValueError(f"batches of {batch_size} x {T}: the ruler has 1 x 1 up to any x {self.seq_len}")
        self._iterators += 1
        return self._serve(np.random.default_rng([self._seed, self._iterators]), batch_size, T)

    def _serve(self, rng, B, T):
        starts = _window_starts(rng, len(self._train), T)
        while True:
            drawn = np.fromiter(itertools.islice(starts, B), dtype=np.int64, count=B)
            x, y = self._windows(drawn, T)
            self._first_batch = self._first_batch or self._work()
            self._tokens += B * T
            yield x, y

    def _windows(self, starts, T):
        """(x, y), int64 (len(starts), T) on the device, from train's tokens at `starts`."""
        return self._place(self._train[starts[:, None] + np.arange(T + 1)])

    def _place(self, rows):
        """(x, y), int64 (B, T) on the device, of tokens (B, T + 1)."""
        # Of each its own copy: from a freed one of both, a model could read the last token.
        x, y = (torch.from_numpy(part.astype(np.int64)) for part in (rows[:, :-1], rows[:, 1:]))
        if self.device.type == "cuda":
            # New pinned tensors each time: torch hands their memory out again only once they are copied.
            x, y = x.pin_memory(), y.pin_memory()
        return tuple(part.to(self.device, non_blocking=self.device.type == "cuda") for part in (x, y))

    # ---- clock

    def _synchronize(self):
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def _wait_for_steps(self):
        """Waits for the steps so far; on CUDA one stays in flight, as waiting for it would idle the GPU."""
        if self.device.type != "cuda" or self._calls < 2:
            self._synchronize()
        if self.device.type == "cuda":
            before, self._event = self._event, torch.cuda.Event()
            self._event.record()
            if before is not None:
                before.synchronize()

    def progress(self):
        """Where training stands, 0 to 1, called once before each step; at 1, also for lack of time, stop.

        The clock starts when the first step ends, less what such a step takes without compiling; at the first
        batch if that step drew more than twice the tokens of the second one (twice is a prefetch).
        """
        if self._eval_seconds is None:
            raise RuntimeError("call run.preflight(model) before the first run.progress()")
        if self._told:
            return 1.0
        if self._model is not None:
            self._check_untrained(self._model)
            self._model = None
        self._wait_for_steps()
        now, self._calls = self._work(), self._calls + 1
        step = now - self._last_call if self._calls > 1 else 0.0
        if self._calls == 1:
            self._start += now
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # of what train.py tried before, and didn't fit
        if self._calls == 2:
            # The first step may have compiled: what the next ones take follows from the tokens it drew.
            passes = self._pass_seconds * self._tokens / (self._meta["eval_rows"] * self.seq_len)
            # On a CPU nothing compiles: there a long start is training.
            early = max(self._start - FREE_START, 0) if self.device.type == "cpu" else 0.0
            self._clock = now - min(step, USUAL_PASSES * passes) - early
            self._startup, self._first_step_tokens = monotonic() - self._started, self._tokens
            step = min(step, MOST_PASSES * passes)
        if self._calls == 3 and 3 * self._first_step_tokens > 2 * self._tokens:
            self._clock = self._first_batch
        # At the fourth call two steps are known, and nothing is guessed any more.
        self._slowest_step = max(step, self._slowest_step - FORGET * step if self._calls != 4 else 0.0)
        self._last_call = now
        done = 0.0
        if self._clock:
            done = self._done = max(self._done, self._as_rival((now - self._clock) / self._allowance))
            if done + step / self._allowance >= 1 + OVERRUN:  # one more step would be too much
                done = 1.0
        # The next step must end before evaluation has to start, and the one in flight before it.
        ahead = self._slowest_step * (2 if self.device.type == "cuda" else 1)
        if done >= 1 or self._left(ahead + self._eval_seconds) < 0:
            self._synchronize()
            self._told, self._trained = self._work(), min(done, 1.0)
            return 1.0
        return done

    def _as_rival(self, done):
        """The share of training that is done, by the tokens of the edited file if the speed is alike.

        So an edit that costs no time, as another learning rate, is compared at equal training, to the token,
        and not with what the clock is off by. Speeds can't drift so from keep to keep: alike is by this run's
        clock.
        """
        if not self._settings.work or done <= 0:
            return done
        share = self._tokens / self._settings.work
        same = abs(share / done - 1) < SAME_SPEED[self.device.type] / math.sqrt(done)
        return share if same or done < TOO_EARLY else done

    def _left(self, work):
        """Seconds that the budget leaves after so many of work, at the speed of the last SLOWNESS_SECONDS."""
        now = monotonic()
        self._marks.append((now, self._work()))
        while len(self._marks) > 2 and self._marks[1][0] < now - SLOWNESS_SECONDS:
            self._marks.popleft()
        (began, before), (_, after) = self._marks[0], self._marks[-1]
        slowness = (now - began) / (after - before) if after > before else 1.0
        return self._started + self._budget - EXIT_SECONDS - now - slowness * work

    def log(self, step, loss, tokens):
        """A line about once a second. loss: number or 0-dim tensor, read for a line only; tokens: so far."""
        now = monotonic()
        if now - self._logged < LOG_SECONDS:
            return
        loss = float(torch.as_tensor(loss).detach())
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}")
        self._logged = now
        seconds = self._work() - self._clock if self._clock else 0.0
        share, left = min(seconds / self._allowance, 1), max(self._started + self._budget - now, 0)
        speed = f"{tokens / seconds:,.0f}" if seconds >= LOG_SECONDS else "-"
        print(f"step {step}  {share:6.1%}  loss {loss:.4f}  {speed} tokens/s  {left:.0f} s left", flush=True)

    # ---- metric

    def _losses(self, model, x, y):
        """Cross-entropy in nats, float32 (B, T), from the logits and nothing else that the model returns."""
        logits, shape = model(x), (*x.shape, self.vocab_size)
        if type(logits) is not torch.Tensor or torch.Tensor.size(logits) != shape:
            refuse(f"model(x) must return logits {shape}, not {getattr(logits, 'shape', type(logits))}")
        logits = torch.Tensor.detach(logits)  # without what a model may have put on it
        rows = max(LOSS_LOGITS // (logits.shape[1] * logits.shape[2]), 1)
        parts = zip(logits.split(rows), y.split(rows), strict=True)
        losses = torch.cat([_cross_entropy(part.float(), targets) for part, targets in parts])
        if not torch.isfinite(losses).all():
            refuse("the logits are not finite")
        return losses

    def _train_rows(self):
        """(x, y) of the evaluation's shape, from anywhere in the train split: other ones each time."""
        last = len(self._train) - self.seq_len
        starts = np.random.default_rng().integers(last, size=self._meta["eval_rows"])
        return self._windows(starts, self.seq_len)

    def _held_rows(self):
        """The same from the held-out windows."""
        windows = self._held.reshape(-1, self.seq_len + 1)
        return self._place(np.random.default_rng().choice(windows, self._meta["eval_rows"], replace=False))

    def _other_tokens(self, x, replaced):
        """x (B, T) with random tokens where `replaced` is true."""
        tokens = torch.from_numpy(np.random.default_rng().integers(self.vocab_size - 1, size=x.shape))
        return torch.where(replaced, tokens.to(self.device), x)

    def _probe(self, model, x, y):
        """Refuses a model that is random in eval() or looks across rows; returns an empty ProbeRecord.

        Here and below all is drawn from the system's randomness: nobody can know the answers beforehand.
        """
        losses = self._losses(model, x, y)
        noise = (self._losses(model, x, y) - losses).abs().mean().item()
        if noise > LEAK_NATS:
            refuse(f"the same input gave different losses, by {noise:.3f} nats: dropout in eval(), or a "
                   "state that evaluation changes?")  # fmt: skip
        quarter = np.random.default_rng().permutation(self._meta["eval_rows"]) % 4
        record, changes = ProbeRecord(noise), []
        for kept in range(4):  # each row keeps its tokens once, where the others change
            kept = torch.from_numpy(quarter == kept).to(self.device)
            changed = self._losses(model, self._other_tokens(x, ~kept[:, None]), y) - losses
            changes.append(changed.mean(1)[kept])
            record.reacts |= bool(changed.any())
        if cost := clear_cost(torch.cat(changes), noise):
            refuse(f"the model looks at other rows of the batch: replacing them costs {cost}")
        return record

    def _probed_losses(self, model, x, y, copies, seen):
        """Losses of x, on the CPU; `seen` is told those of copies whose tokens change from somewhere on.

        The rows as they are come anywhere among their changed copies.
        """
        B, T = x.shape
        rng = np.random.default_rng()
        splits = rng.integers(1, T, size=(copies, B))
        splits[:, :2] = T - 1, 2 * rng.integers(T // 2) + 1  # the last one and an odd one always
        splits, found = torch.from_numpy(splits), {}
        for copy in rng.permutation(copies + 1):
            tokens = x
            if copy < copies:
                tokens = self._other_tokens(x, (torch.arange(T) >= splits[copy][:, None]).to(self.device))
            found[copy] = self._losses(model, tokens, y).cpu()
        for copy in range(copies):
            seen.add(found[copy] - found[copies], splits[copy])
        return found[copies]

    def _check_future(self, model, rows, seen):
        """Refuses a model that sees the future; what is odd, but not certain, is probed again, on rows()."""
        for left in reversed(range(MOST_ROUNDS)):
            chance, sentence = seen.verdict()
            if chance < CERTAIN:
                refuse(f"the model sees later tokens (the future): {sentence}")
            if chance > ODD or not left:
                return
            self._probed_losses(model, *rows(), PROBES, seen)

    def _check_untrained(self, model):
        """Refuses a model that has learned before the clock runs: from weights, batches or a lucky seed."""
        if torch.initial_seed() != self._seed:
            refuse(f"train.py set the seed to {torch.initial_seed()}; the ruler has set it, to {self._seed}")
        with _evaluating(model):
            x, y = self._train_rows()
            nats = self._losses(model, x, y), self._unigram.to(self.device)[y]
        bpb, unigram = (bits_per_byte(one.cpu(), y.cpu(), self._lengths) for one in nats)
        if bpb < WARM_START * unigram:
            refuse(f"before its first step the model has {bpb:.3f} bits per byte, token frequencies alone "
                   f"{unigram:.3f} on the same text: it starts from trained weights, or was trained before the "
                   "first run.progress()")  # fmt: skip

    def preflight(self, model):
        """Checks the untrained model as finish() will; returns the seconds kept for evaluation."""
        if not isinstance(model, torch.nn.Module):
            refuse(f"the model must be a torch.nn.Module, not {type(model)}")
        with _evaluating(model):
            self._losses(model, *self._train_rows())  # may compile
            self._synchronize()
            began = self._work()
            seen = self._probe(model, *self._train_rows())
            self._probed_losses(model, *self._train_rows(), 2, seen)
            self._pass_seconds = (self._work() - began) / (6 + 3)
            self._check_future(model, self._train_rows, seen)
        self._check_untrained(model)
        self._start -= (1 + 6 + 3 + 1) * self._pass_seconds  # so long it takes, and what is more was training
        self._model = model  # to be looked at once more when training begins
        seconds = self._pass_seconds * (6 + len(self._held) + PROBES + 4)
        self._eval_seconds = EVAL_RESERVE * seconds
        if self._eval_seconds + self._allowance > self._budget - EXIT_SECONDS:
            refuse(f"evaluation takes about {seconds:.1f} s and doesn't fit beside {self._allowance:.1f} s "
                   f"of training in a budget of {self._budget:g} s: make the model smaller")  # fmt: skip
        if self._left(self._eval_seconds) < 0:
            passed = f"{monotonic() - self._started:.0f} s of {self._budget:g}"
            raise SystemExit(f"{HELD_UP}: {passed} had passed before training")
        return self._eval_seconds

    def _evaluate(self, model):
        """Bits per byte over the held-out windows.

        Most checks are made between them, in an order that nobody knows: who would cheat when nobody looks
        can't tell when that is.
        """
        before, rng = state_of(model), np.random.default_rng()
        seen = self._probe(model, *self._held_rows())
        count, nats = len(self._held), {}
        copies, look = np.bincount(rng.integers(count, size=PROBES), minlength=count), rng.integers(count)
        for number in rng.permutation(count):
            nats[number] = self._probed_losses(model, *self._place(self._held[number]), copies[number], seen)
            self._check_ruler()
            if number == look:
                check_state(before, model)
        x, y = self._place(self._held[number])
        again = self._losses(model, x, y).cpu()
        easier = (nats[number] - again).mean().item()
        if easier > LEAK_NATS:
            refuse(f"the model learns during evaluation: a batch became easier by {easier:.3f} nats")
        gain = again - self._losses_of_other_starts(model, x, y)
        # What another start does by itself shows in rows that the model hasn't met, so they begin with it.
        x, y = self._train_rows()
        gain += self._losses_of_other_starts(model, x, y) - self._losses(model, x, y).cpu()
        if cost := clear_cost(gain[:, FAR:].mean(1), seen.noise + MEMORY_NATS):
            refuse(f"the model learns during evaluation: rows that begin otherwise became easier by {cost}")
        self._check_future(model, self._held_rows, seen)
        if not seen.reacts:
            refuse("the logits don't depend on the input")
        check_state(before, model)
        targets = torch.from_numpy(self._held[..., 1:].astype(np.int64))
        return bits_per_byte(torch.stack([nats[number] for number in range(count)]), targets, self._lengths)

    def _losses_of_other_starts(self, model, x, y):
        """Losses (B, T), on the CPU, of rows at whose start another token stands."""
        other = self._other_tokens(x, (torch.arange(self.seq_len) < 1).to(self.device))
        return self._losses(model, other, y).cpu()

    def _check_ruler(self):
        """Refuses to measure where train.py has put something of its own in the ruler's place."""
        replaced = replaced_names() + sorted(vars(self).keys() & vars(Run).keys())
        if _taken and type(self) is not Run:  # by hand, as tests time it, nothing is signed
            replaced.append(f"Run by {type(self).__name__}")
        if replaced:
            refuse(f"train.py replaced {', '.join(replaced)}, which the ruler uses")

    def _read_sizes(self):
        """What a number depends on beside the text: read at the start, and again before it is measured."""
        self.device, self._meta = pick_device(), read_meta(self._folder)
        self.seq_len, self.vocab_size = self._meta["seq_len"], self._meta["vocab_size"]
        self.train_tokens = self._meta["splits"]["train"]["tokens"]
        tokenizer = self._folder / "tokenizer.tiktoken"
        check_digest(self._meta, tokenizer)
        self._lengths = torch.from_numpy(byte_lengths(read_tokenizer(tokenizer)))

    def finish(self, model, depth=None, flops_per_token=None):
        """Evaluates, probes again and prints the summary. flops_per_token: both ways, for the MFU."""
        if self._eval_seconds is None:
            raise RuntimeError("call run.preflight(model) before training")
        model.eval()
        self._synchronize()
        now = self._work()
        if self.device.type == "cpu":
            self._work.stop()  # evaluation needs no samples
        clock = self._clock or self._first_batch or now
        late = now - (self._told or clock + self._allowance)
        if late > max(OVERRUN * self._allowance, OVERRUN_SECONDS):
            refuse(f"training went on for {late:.1f} s after its time: stop when run.progress() reaches 1")
        self._check_ruler()
        self._read_sizes()
        with torch.no_grad():
            bpb = self._evaluate(model)
        self._check_ruler()
        if not SANE_BPB[0] < bpb < SANE_BPB[1]:
            refuse(f"{bpb:.6f} bits per byte are not possible for a language model of text")
        training = (self._told or now) - clock
        on_gpu = self.device.type == "cuda"  # elsewhere there is no device memory of its own
        memory = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_memory()
        summary = {
            f"{self._settings.split}_bpb": f"{bpb:.6f}",
            "training_seconds": f"{training:.1f}",
            "trained_percent": f"{100 * self._trained:.1f}",
            "startup_seconds": f"{self._startup:.1f}",
            "total_seconds": f"{monotonic() - self._started:.1f}",
            "peak_vram_mb": f"{memory:.1f}",
            "total_tokens_M": f"{self._tokens / 1e6:.6f}",  # to the token: the next edit's AUTORESEARCH_WORK
            "epochs": f"{self._tokens / self.train_tokens:.3f}",
            "num_steps": f"{max(self._calls - 1, 0)}",
            "num_params_M": f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}",
        }
        peak = peak_flops(device_name(self.device))
        if peak and flops_per_token and training > 0:
            summary["mfu_percent"] = f"{100 * flops_per_token * self._tokens / training / peak:.2f}"
        if depth is not None:
            summary["depth"] = str(int(depth))
        if self._trained < FULL_TRAINING:
            print(f"{HELD_UP}: training got {self._trained:.1%} of its time, so the number says little")
        if self._tokens > self.train_tokens:
            print(f"the text was too short: it was met {summary['epochs']} times; prepare more")
        info = "{num_steps} steps, {total_tokens_M} M tokens, first step done at {startup_seconds} s"
        result = {"info": info.format(**summary), "trained": self._trained, "work": self._tokens}
        result |= {"metric": "val_bpb", "value": float(f"{bpb:.6f}"), "memory_mb": round(memory, 1)}
        print_result(self._settings, summary, data=self._meta["fingerprint"], **result)


# What train.py may import: modules, and of some of them only these names. Files, processes, other code and
# the frames of the callers are nothing that a model needs.
IMPORTS = {
    "prepare": {"Run"}, "types": {"SimpleNamespace"}, "operator": {"itemgetter", "mul", "add"},
    "zlib": {"crc32", "adler32"}, "gc": {"enable", "disable", "collect", "freeze"},
    # Not enumerate(), which has the clock's thread:
    "threading": {"Thread", "Lock", "RLock", "Event", "Condition", "Semaphore", "local"},
} | dict.fromkeys("""
    torch numpy math random time functools itertools collections dataclasses typing contextlib enum copy
    statistics heapq bisect abc hashlib queue warnings einops triton __future__
""".split())  # fmt: skip
# Built-in names that reach outside, or around the rules below:
BUILTINS = set("""
    open exec eval compile globals locals vars setattr delattr input breakpoint memoryview
""".split())  # fmt: skip
# Attributes, of whatever: files, processes, other modules that a module holds, frames, text that is run or
# names attributes, and what replaces torch's own functions.
ATTRIBUTES = set("""
    * load save open from_file fromfile tofile memmap open_memmap loadtxt savetxt genfromtxt savez fromregex
    DataSource load_library load_inline cpp_extension hub package ctypeslib f2py library overrides classes
    multiprocessing DataLoader ProcessPoolExecutor os sys builtins importlib ctypes inspect subprocess socket
    shutil pathlib pickle io tempfile traceback signal mmap glob platform runpy atexit types weakref copyreg
    tb_frame tb_next f_back f_locals f_globals gi_frame cr_frame ag_frame with_traceback func_globals mro
    TorchFunctionMode TorchDispatchMode monitor inductor register_module_forward_hook
    register_module_forward_pre_hook format format_map get_type_hints ForwardRef testing benchmark threading
    operator gc bltns asyncio concurrent logging unittest linecache pkgutil zipfile urllib http resource getattr
    attrgetter methodcaller singledispatch singledispatchmethod
""".split())  # fmt: skip
# Modules that start programs, open files, run text, or read memory that isn't theirs:
CLOSED = re.compile(r"\btorch\.(utils\.(?!checkpoint\b|flop_counter\b)|distributed|fx|onnx|profiler|export)\b"
                    r"|\bnumpy\.(lib|core|f2py|distutils)\b")  # fmt: skip
# Names between underscores that are everyday ones:
FREE = re.compile(r"_foreach_\w+|_(modules|parameters|buffers)"
                  r"|__(init|name|len|call|iter|next|getitem|setitem|contains|enter|exit|post_init|repr|new|class"
                  r"|version)__")  # fmt: skip
# Beside these a class may have operators; other such methods tell a library where memory is.
OPERATORS = re.compile(r"__([ir]?(add|sub|mul|matmul|truediv|floordiv|mod|pow|and|or|xor)|eq|ne|lt|le|gt|ge|hash"
                       r"|bool|neg|pos|abs|invert|str|float|int|index|missing|reversed|delitem|getattr)__")  # fmt: skip
RULE = "a train.py uses torch, numpy and prepare.Run()'s public names alone"


def reaches_outside(source, imports=IMPORTS, rule=RULE):
    """What in an edited file reaches outside what the ruler offers, a sentence for the model; empty: nothing.

    It reads the code and doesn't run it: so it finds what is written in the open, before it costs a run.
    """
    try:
        nodes = [*ast.walk(ast.parse(source))]
        paths = {"run": "a Run"} if "prepare" in imports else {}  # of what names are bound to
        for node in nodes:
            for name in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
                path = f"{node.module}.{name.name}" if isinstance(node, ast.ImportFrom) else name.name
                first, *rest = path.split(".")
                listed = first in imports and (imports[first] is None or imports[first] >= {*rest})
                if not listed or any(map(_closed, rest)) or CLOSED.match(path):
                    return f"line {node.lineno}, import {path}: {rule}"
                whole = isinstance(node, ast.Import) and not name.asname  # `import a.b` binds a
                paths[first if whole else name.asname or name.name] = first if whole else path
        for node in nodes:
            match node:  # another name for what a module holds
                case ast.Assign(targets, ast.Attribute(attr=name) as value):
                    path = paths.get(_root(value), "prepare")
                    bound = (target.id for target in targets if isinstance(target, ast.Name))
                    if path != "prepare":  # of which only Run is offered
                        paths |= dict.fromkeys(bound, f"{path}.{name}")
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        called = {node.func for node in calls}
        looked_in = {node.value for node in nodes if isinstance(node, ast.Attribute)}
        looked_in |= {node.args[0] for node in calls if _by_name(node) and node.args}
        own = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        own = (own | {"self", "cls"}) - paths.keys()
        named = {*_names(nodes)}
        for node in nodes:
            found = _reach(node, paths, called, own, named, imports)
            if isinstance(node, ast.Name) and paths.get(node.id) in imports and node not in looked_in:
                found = f"{node.id}, a module by another name"
            if found:
                return f"line {node.lineno}, {found}: {rule}"
        return ""
    except RecursionError:
        return "line 1, code that is nested too deeply to be checked"
    except (SyntaxError, ValueError, MemoryError) as error:
        return f"it doesn't compile: {error}"  # with its line


def _names(nodes):
    """The names that a file gives: to functions, variables, attributes and what a module registers."""
    for node in nodes:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
            case ast.Call(ast.Attribute(attr=method), [ast.Constant(str(name)), *_]):
                if method.startswith(("register_", "add_module")):
                    yield name


def _root(node):
    """The name at which a chain of attributes and indices begins; empty where it is none."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return getattr(node, "id", "")


def _by_name(call):
    """Whether a call looks for an attribute by its name."""
    return ast.unparse(call.func) in ("getattr", "hasattr")


def _special(name):
    """Whether a name between underscores isn't an everyday one."""
    return re.fullmatch(r"__\w+__", name) and not FREE.fullmatch(name)


def _closed(name):
    """Whether an attribute of this name is none of an edited file's business."""
    return name in ATTRIBUTES or name.startswith("_") and not FREE.fullmatch(name)


def _reach(node, paths, called, own, named, imports):
    """What one node of the syntax tree reaches for, or nothing."""
    if isinstance(node, ast.Name):
        special = node.id == "getattr" or paths.get(node.id) == "prepare.Run"  # no other name for them
        dunder = node.id.startswith("__") and not FREE.fullmatch(node.id)
        if node.id in BUILTINS or dunder or special and node not in called:
            return node.id
    elif isinstance(node, ast.Call) and _by_name(node):
        match node.args:
            case [value, ast.Constant(value=str(name)), *_]:
                return _reach(ast.Attribute(value, name, ast.Load()), paths, called, own, named, imports)
        return ast.unparse(node)[:60]
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "type" and len(node.args) != 1:
        return ast.unparse(node)[:60]
    elif isinstance(node, ast.FunctionDef) and _special(node.name) and not OPERATORS.fullmatch(node.name):
        return node.name
    elif isinstance(node, ast.keyword) and _special(node.arg or ""):
        return node.arg
    elif isinstance(node, ast.Constant) and _special(f"{node.value}") and node.value != "__main__":
        return node.value
    elif isinstance(node, ast.MatchClass) and node.patterns + node.kwd_patterns:
        return f"attributes in a pattern, {ast.unparse(node)[:60]}"
    elif isinstance(node, ast.Attribute):
        text, root, direct = ast.unparse(node), _root(node), isinstance(node.value, ast.Name)
        whole, path = text[:60], paths.get(root, "")
        if CLOSED.search(path + text.removeprefix(root)):
            return whole
        listed = not direct or imports.get(path) is None or node.attr in imports[path]
        special = node.attr in ATTRIBUTES or re.fullmatch(r"__\w+__", node.attr)
        given = node.attr in named and not special or node.attr == "__dict__"
        mine = direct and root in own and given
        kernel = node.attr == "load" and path.startswith("triton")
        handed_on = f"{path}.{node.attr}" == "prepare.Run" and node not in called
        if _closed(node.attr) and not mine and not kernel or not listed or handed_on:
            return whole
        backend = path.startswith("torch.backends") or whole.startswith("torch.backends")
        of_class = re.search(r"\btype\(|\b__class__\.", whole)
        if (path and not backend or of_class) and not isinstance(node.ctx, ast.Load):
            return f"an assignment to {whole}"
    return None


def peak_flops(device):
    """Dense bf16 FLOP/s of the device of this name, None where it isn't known."""
    for name, flops in PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b(?! (Ti|D|Laptop))", device):
            return flops
    return None


@contextlib.contextmanager
def _evaluating(model):
    """In eval() and without gradients; then every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        yield
    for module, training in modes:
        module.training = training


def _cross_entropy(logits, targets):
    """(B, T, vocab), (B, T) -> nats (B, T); not torch's own function, which a train.py could have replaced.

    Less their maximum, so that no constant which is added to all of them makes float32 round the loss.
    """
    logits = logits - logits.amax(-1, keepdim=True)
    return logits.exp().sum(-1).log() - logits.gather(-1, targets[..., None]).squeeze(-1)


def clear_cost(changes, noise):
    """By how much losses rise, in words; empty where that may be chance. changes: independent ones."""
    mean, error = changes.mean().item(), changes.std().item() / math.sqrt(len(changes))
    clear = mean > LEAK_NATS + noise + LEAK_SIGMAS * error
    return f"{mean:.3f} +- {error:.3f} nats" if clear else ""


class ProbeRecord:
    """What losses did at places that a causal model can't let react: just before a change, and far before it.

    An honest model doesn't react at all, but for one whose rounding depends on a whole batch: that reacts at
    both in the same way, up as often as down. Who sees the next token loses where that is another one: just
    before the change, by more than what happens far before it. So each limit that the far places exceed at a
    known rate is exceeded by the near ones too often, if the model leaks at some of the positions; and if it
    leaks a little at all, the near ones lose on average.
    """

    def __init__(self, noise):
        self.noise, self.near, self.far = noise, [], []
        self.reacts = False  # whether a loss depends on what the model sees, at all

    def add(self, changes, splits):
        """changes: of the losses (B, T), where row b has other tokens from splits[b] on."""
        places, splits = torch.arange(changes.shape[1]), splits[:, None]
        self.near.append(changes.gather(1, splits - 1)[:, 0])
        self.far.append(changes[places < splits - FAR])

    def verdict(self):
        """(the chance that an honest model shows this or more, a sentence that says what was seen)."""
        near, far = torch.cat(self.near), torch.cat(self.far).abs()
        if cost := clear_cost(near, self.noise):
            return 0.0, f"replacing them costs {cost}"
        chances = {}
        for share in (0.9, 0.99, 0.999, 1.0):
            limit = max(far.quantile(share).item() if len(far) else 0.0, LEAK_NATS + 10 * self.noise)
            rate = ((far > limit).sum().item() + 1) / (len(far) + 1)
            count = int((near > limit).sum())
            sentence = f"{count} of {len(near)} losses rise by more than {limit:.3f} nats"
            chances[poisson_tail(count, rate * len(near))] = sentence
        return min(chances.items())


def poisson_tail(count, mean):
    """The chance of `count` or more events where `mean` are expected (Poisson's distribution)."""
    return max(1 - sum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(count)), 0.0)


def state_of(model):
    """{name: checksum} of all that can remember something: what the model and train.py's globals hold."""
    found, left = {}, [("model", model)]
    # By id, and held, so that no other value gets the same id. What modules hold is not looked at.
    modules = [getattr(module, "__dict__", None) for module in [*sys.modules.values()]]
    seen = {id(names): names for names in modules}
    if _taken:
        left += [item for item in vars(sys.modules["__main__"]).items() if item[0] != "__builtins__"]
    while left:
        name, value = left.pop()
        if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
            found[name] = hash(value)
        elif id(value) not in seen:
            seen[id(value)] = value
            found[name], parts = _parts(value)
            left += [(f"{name}.{part}", item) for part, item in parts]
    return found


def _parts(value):
    """(a checksum of what a value holds itself, [(name, what else it holds)])."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    if isinstance(value, (np.ndarray, bytearray, array.array)):
        return (np.shape(value), zlib.crc32(np.ascontiguousarray(value).view(np.uint8).data)), []
    if isinstance(value, (dict, types.MappingProxyType)):
        return len(value), [(f"{key!r:.40}", item) for key, item in list(value.items())]
    if read := STATES.get(f"{type(value).__module__}.{type(value).__name__}"):
        return 0, [("state", read(value))]
    is_type, is_function = isinstance(value, type), isinstance(value, types.FunctionType)
    home = f"{(value if is_type or is_function else type(value)).__module__}"
    # What is a library's or the ruler's has caches, which may change; but a compiled module holds the file's.
    others = home.startswith(("torch._", "prepare")) and not isinstance(value, torch.nn.Module)
    others |= home.startswith(("torch", "numpy")) and is_function
    if others or is_type and home != "__main__" or isinstance(value, (types.ModuleType, types.CodeType)):
        return 0, []
    parts = [*vars(value).items()] if hasattr(value, "__dict__") else []
    return len(parts), parts + [*enumerate(gc.get_referents(value))]


# How what is kept in C, where nothing refers to it, is read.
STATES = {
    "torch.storage.UntypedStorage": lambda one: torch.empty(0, dtype=torch.uint8).set_(one.cpu()),
    "torch._C.Generator": lambda one: one.get_state(),
    "numpy.random._generator.Generator": lambda one: one.bit_generator.state,
    "numpy.random.mtrand.RandomState": lambda one: one.get_state(),
    "random.Random": lambda one: one.getstate(),
}
BITS = "_pcg64.PCG64 _pcg64.PCG64DXSM _mt19937.MT19937 _philox.Philox _sfc64.SFC64".split()
STATES |= {f"numpy.random.{name}": lambda one: one.state for name in BITS}


def check_state(before, model):
    """Refuses a model when anything has changed since state_of(model) was `before`."""
    after = state_of(model)
    if changed := [name for name in (*before, *after) if before.get(name) != after.get(name)]:
        refuse(f"evaluation changed {changed[0]}: a model must not learn or remember anything in eval()")


def outside_names():
    """{name: value} of what the ruler calls of modules and classes: an edited file could put another there."""
    own, found = [*globals().values()], {}
    owners = [value for value in own if isinstance(value, types.ModuleType)] + [np.random]
    owners += [torch.Tensor] if "torch" in globals() else []
    owners += [value for value in own if getattr(value, "__module__", "") == __name__ and value is not Run]
    for owner in owners:
        called = {name: value for name, value in [*vars(owner).items()] if callable(value)}
        found |= {f"{owner.__name__}.{name}": value for name, value in called.items()}
    return found


def replaced_names():
    """Which of them, and of the ruler's own names, are others now; or new, where the ruler finds these first."""
    now, names = outside_names(), {"torch", "_as_imported", *_as_imported[0]}
    changed = sorted(globals().keys() - names)
    changed += [name for name in now if name.startswith("Tensor.") and name not in _outside]
    for here, before in (globals(), _as_imported[0]), (vars(Run), _as_imported[1]), (now, _outside):
        changed += [name for name, value in before.items() if here.get(name) is not value]
    return [name for name in changed if name not in PATCHED]


def _window_starts(rng, tokens, T):
    """Endless starts of windows of T + 1 tokens: each epoch, at an offset of its own, has each token once."""
    while True:
        offset = rng.integers(T)
        yield from rng.permutation((tokens - 1 - offset) // T) * T + offset


class Trial:
    """One run of a Ruler: its seed and split, its share of the held-out data, and the edited file."""

    def __init__(self, path, settings, data):
        self.seed, self.split, self.data, self.summary = settings.seed, settings.split, data, {}
        # What is drawn from it can't be known to the edited file: a branch has a salt of its own.
        known = f"{settings.salt} {self.split} {self.seed}".encode()
        self.rng = np.random.default_rng([*hashlib.sha256(known).digest()])
        self._path = path
        random.seed(self.seed)
        np.random.seed(self.seed)

    def load(self):
        """The edited file as a module. Draw and copy what it must not know or change before."""
        module = types.ModuleType(self._path.stem)
        exec(compile(self._path.read_bytes(), str(self._path), "exec"), vars(module))
        return module


class Ruler:
    """A ruler of your own: RULER = Ruler(measure, ...), and RULER.main() where it is __main__. It needs no torch.

    measure(trial) gives the number: it calls trial.load(), and refuse(sentence) where a rule is broken. The keywords
    edits, metric, better, api and noise are a must; imports: modules that the file may use; budget: seconds of wall clock;
    held_out(source): {"val": bytes, "test": bytes}, of --source or, for None, of its own. MANUAL.md explains them all.
    """

    def __init__(
        self, measure, *, metric, better, edits, api, noise, imports="math", budget=60, held_out=None
    ):
        if better not in ("lower", "higher"):
            raise ValueError(f'better is "lower" or "higher", and not {better!r}')
        if metric.split() != [metric]:
            raise ValueError(f"metric is one word, a column of results.tsv, and not {metric!r}")
        self.measure, self.held_out = measure, held_out
        self.imports = dict.fromkeys(imports.split())
        self.rule = f"{edits} uses plain built-ins and {imports} alone"
        self.path = Path(sys.argv[0]).resolve().with_name(edits)
        self.said = dict(metric=metric, better=better, edits=edits, api=api, noise=noise, budget=budget)

    def facts(self):
        """What the loop must know, as a line of JSON."""
        settings = read_settings()
        told, files, folder = {"SALT": settings.salt or secrets.token_hex(8)}, {}, self.path.parent
        if self.held_out:
            folder = self.data_set(settings.fingerprint)
            files, told["FINGERPRINT"] = held_out_files(folder), folder.name
        return json.dumps(self.said | {
            "devices": cores(), "device": "cpu, 1 thread", "settings": told, "held_out": files,
            "software": f"Python {sys.version.split()[0]}, numpy {np.__version__}",
            "folder": str(folder), "data": told.get("FINGERPRINT", "none"), "fixed": [],
        })  # fmt: skip

    @property
    def kind(self):
        """How its data sets' names begin: another ruler, or this one once it has changed, has others."""
        return f"{self.path.stem}-{hashlib.sha256(Path(sys.argv[0]).read_bytes()).hexdigest()[:8]}"

    def prepare(self, source):
        """The folder of a source's data set, named by its content and written once."""
        parts = self.held_out(source)
        for split in ("val", "test"):
            if not parts.get(split) or not isinstance(parts[split], bytes):
                raise Problem(f'held_out({source!r}) gives no bytes as "{split}": {parts.get(split)!r:.80}')
        digests = (hashlib.sha256(parts[split]).hexdigest()[:8] for split in ("val", "test"))
        folder = data_root().resolve() / "-".join([self.kind, *digests])
        folder.mkdir(parents=True, exist_ok=True)
        for split, part in parts.items():
            new = folder / f".{split}.{os.getpid()}"
            new.write_bytes(part)
            new.replace(folder / f"{split}.bin")
        os.utime(folder)  # a new branch takes what was asked for last
        print(f"prepared: {folder}", file=sys.stderr)
        return folder

    def data_set(self, wanted):
        """The folder of the data set of this name, or of the newest; where there is none, of the ruler's own."""
        root, kind = data_root().resolve(), wanted or f"{self.kind}-*"
        found = [root] if root.match(kind) else [*root.glob(kind)]
        folder = max(found, key=lambda found: found.stat().st_mtime_ns) if found else self.prepare(None)
        if wanted and folder.name != wanted:
            raise Problem(f"{wanted}, this branch's data, is not in {root}; or begin anew with --tag")
        return folder

    def run(self):
        """Measures the file once. All that it must not reach is taken before its first line."""
        settings = _taken["hold"] = read_settings()
        data, name = b"", "none"
        if self.held_out:
            folder = self.data_set(settings.fingerprint)
            with open_held_out(settings, folder) as file:
                data, name = file.read(), folder.name
            if hashlib.sha256(data).hexdigest()[:8] not in name:
                raise Problem(f"{folder} is damaged; delete it")
            seal(folder)
        if not settings.token:  # by hand nobody else ends it, nor looks at it before
            faulthandler.dump_traceback_later(settings.budget, exit=True)
            if found := reaches_outside(self.path.read_bytes(), self.imports, self.rule):
                print(f"the loop would refuse a model's edit like this: {found}", file=sys.stderr)
        trial = Trial(self.path, settings, data)
        try:
            value, metric = float(self.measure(trial)), self.said["metric"]
        except Problem:
            raise
        except SystemExit:
            refuse(f"{self.path.name} ended the run by itself")
        if replaced := ", ".join(replaced_names()):
            refuse(f"{self.path.name} replaced {replaced}, which the ruler uses")
        if not math.isfinite(value):
            refuse(f"{metric} is {value}")
        seconds, memory = f"{monotonic() - settings.started:.1f}", round(peak_memory(), 1)
        info = ", ".join(f"{key} {text}" for key, text in trial.summary.items())
        summary = {metric: f"{value:.6f}", **trial.summary, "total_seconds": seconds, "peak_mb": memory}
        result = {"metric": metric, "value": round(value, 6), "memory_mb": memory, "info": info}
        print_result(settings, summary, **result, trained=1.0, work=1, data=name)

    def main(self):
        parser = argparse.ArgumentParser(description=f"Measures {self.path.name} once, by hand.")
        parser.add_argument("--source", metavar="PATH", help="data of your own, for new branches")
        args = parse_arguments(parser, self.path.name, self.imports, self.rule)
        if args.facts:
            print(self.facts())
        elif args.source:
            self.prepare(args.source)
        else:
            to_the_end(self.run)


def parse_arguments(parser, edits, imports=IMPORTS, rule=RULE):
    """The command line, with what the loop asks every ruler; a --check is answered here."""
    parser.add_argument("--run", action="store_true", help=f"{edits}, as the loop runs it")
    parser.add_argument("--facts", action="store_true", help="what a number depends on, as a line of JSON")
    parser.add_argument("--check", metavar="FILE", type=Path, help=f"what in a {edits} isn't allowed")
    args = parser.parse_args()
    if args.check:
        found = reaches_outside(args.check.read_bytes(), imports, rule)
        print(found or "ok")
        parser.exit(1 if found else 0)
    return args


def main():
    parser = argparse.ArgumentParser(description="Prepares the text that train.py learns from, once.")
    parser.add_argument("--source", default="pytorch", metavar="NAME|PATH",
                        help="pytorch (the installed torch's Python sources, the default), tinystories or "
                             "climbmix (from Hugging Face's hub), or a file or folder of yours")  # fmt: skip
    parser.add_argument("--shards", type=int, metavar="N",
                        help="only the first N files: of climbmix's 6,543 of 90 MB each (default: 10), or of "
                             "tinystories' two, of 22 MB and 2.2 GB")  # fmt: skip
    args = parse_arguments(parser, "train.py")
    if args.run or args.facts:
        import prepare as ruler  # this file, as train.py imports it: with torch

        return ruler.run_train() if args.run else print(ruler.facts())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        folder, was_there = prepare(args.source, data_root(), args.shards)
    except KeyboardInterrupt:
        raise Problem("stopped; nothing is half-written") from None
    except OSError as error:
        where = f"{error.strerror}: {error.filename or data_root()}"
        raise Problem(f"{where}; make room or set AUTORESEARCH_DATA (what was prepared is intact)") from None
    print(f"{'already prepared' if was_there else 'prepared'}: {folder}")


_as_imported = dict(globals()), dict(vars(Run))  # which an edited file must leave as they are
_outside.update(outside_names())

if __name__ == "__main__":
    main()
