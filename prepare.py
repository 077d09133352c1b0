"""The ruler: the text, the tokenizer, the clock, the seed and the metric. The agent never edits this file.

    python prepare.py                     the Python sources of the installed torch package; no download
    python prepare.py --source PATH       your own .txt, .md, .py, .jsonl or .jsonl.gz file, or a folder of them

Reads the source twice (vocabulary, then tokens) and writes ~/.cache/autoresearch/<source>-<fingerprint>/ (or below
$AUTORESEARCH_DATA): train.bin, val.bin and test.bin (uint16 tokens, a BOS before each document), tokenizer.tiktoken
(tiktoken's rank format) and meta.json. A second call finds the folder and does nothing. train.py imports `Run` from here.
"""

import argparse
import base64
import ctypes
import fcntl
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
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from time import monotonic  # bound here, so that a train.py which replaces time.time or time.monotonic moves nothing

import numpy as np

if __name__ != "__main__":  # only the ruler needs torch; `python prepare.py` answers a second call without its seconds
    import torch

# The sizes of the ruler: sequence length, vocabulary, tokens evaluated, rows of one evaluation batch.
GPU_SIZES = dict(seq_len=2048, vocab_size=8192, eval_tokens=2**23, eval_rows=32)
CPU_SIZES = dict(seq_len=256, vocab_size=2048, eval_tokens=2**17, eval_rows=16)  # evaluates in about 3 s on two cores

FORMAT = 1  # of the files written; a new number makes every source be prepared again
HELD_OUT = 20  # one document in 20 is val and one is test, by content hash
DOCUMENT_CHARS = 8192  # a longer text file is cut at the next blank line, so that a book has documents to split
TEXT_SUFFIXES = (".txt", ".md", ".py")
VOCABULARY_CHARS = 200_000_000  # the BPE is trained on at most this much of the train split
BATCH_DOCUMENTS = 64  # tokenized at a time: bounds memory
# How text is cut before BPE: words with one leading sign, digits by two, punctuation, line ends, spaces (GPT-4's rule).
PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

BUDGET = 300  # seconds of wall clock for the whole process, when the loop doesn't say
TRAINING_SHARE = 5 / 6  # of the budget, for training; the rest pays start-up, compiling and evaluation
EXIT_SECONDS = 1.0  # kept free at the end, to print and exit
EVAL_RESERVE = 1.5  # times the measured evaluation time is kept free
OVERRUN = 0.02  # of the training time, or one step: more training than that is refused
PROBES = 4  # replaced copies of the probe batch that look for a leak from the future
LEAK_NATS, LEAK_SIGMAS = 0.005, 4  # what the loss at a position may change by, when only what it mustn't see changed
SANE_BPB = (0.05, 20)  # no honest model is outside
LOG_SECONDS = 1.0  # between two lines of run.log
# Dense bf16 peak, FLOP/s, by a part of the device's name; NVIDIA's data sheets. A device not listed has no MFU.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "GH200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip

# The one thing read at import: the loop's one-time secret, taken away before train.py's own lines can see it.
_secret = os.environ.pop("AUTORESEARCH_TOKEN", None)
_sealed = set()  # real paths of the held-out files, while they may not be opened


class Problem(Exception):
    """What a person did or has to mend, in one sentence; exit 2."""


# ---------------------------------------------------------------------------------------------------------------- data


def data_root():
    return Path(os.environ.get("AUTORESEARCH_DATA") or "~/.cache/autoresearch").expanduser()


def newest(root):
    """The data set to use: `root` itself if it is one, else the one prepared (or asked for) last."""
    found = [root] if (root / "meta.json").exists() else [path.parent for path in root.glob("*/meta.json")]
    if not found:
        raise Problem(f"no data in {root}; run: python prepare.py")
    return max(found, key=lambda path: (path / "meta.json").stat().st_mtime_ns)


def machine_sizes(torch_folder):
    """The sizes for this machine, without the seconds that importing torch takes."""
    count = ctypes.c_int(0)
    if (torch_folder / "lib" / "libtorch_cuda.so").exists():
        try:
            driver = ctypes.CDLL("libcuda.so.1")
            driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
        except OSError:
            pass  # a build for CUDA on a machine without its driver: torch falls back to the CPU, too
    return GPU_SIZES if count.value else CPU_SIZES


def torch_package():
    spec = importlib.util.find_spec("torch")
    if spec is None:
        raise Problem("torch is not installed here; run: pip install -e .")
    return Path(spec.origin).parent


def source_files(source):
    """(name, files, what identifies them) of --source: `pytorch`, or the path of a text file or a folder."""
    if source == "pytorch":
        folder = torch_package()
        files = sorted(path for path in folder.rglob("*.py") if path != folder / "version.py")  # it names the build
        return "pytorch", files, importlib.metadata.version("torch").partition("+")[0]
    path = Path(source).expanduser()
    if not path.exists():
        raise Problem(f"--source {source}: no such file or folder (the source that needs none is pytorch)")
    suffixes = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(suffixes) and file.is_file())
    if not files:
        raise Problem(f"--source {source}: no {', '.join(suffixes)} file in this folder")
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = "".join(c if c.isalnum() or c in "_." else "-" for c in path.resolve().name.split(".")[0]) or "text"
    return name, files, stats


def read_documents(path, whole):
    """Yields the documents of one file, never holding more than a document (a `whole` file is one document)."""
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        text = json.loads(line)["text"]
                        yield text.encode("utf-8", "replace").decode()  # JSON can escape half a surrogate pair
                    except (ValueError, KeyError, TypeError, AttributeError):
                        raise Problem(f'{path}, line {number}: not a JSON object with a "text" string') from None
        return
    with open(path, encoding="utf-8", newline="") as file:
        text, size = [], 0
        while line := file.readline(4 * DOCUMENT_CHARS):  # bounded: a text may be a single line
            ends_here = line.strip() == "<|endoftext|>"  # how TinyStories and others part their documents
            if not ends_here:
                text.append(line)
                size += len(line)
            if ends_here or not whole and (size >= DOCUMENT_CHARS and not line.strip() or size >= 4 * DOCUMENT_CHARS):
                yield "".join(text)
                text, size = [], 0
        yield "".join(text)


def split_documents(files, whole):
    """Yields (split, text, bytes) for every different document; its content's hash chooses the split."""
    seen = set()
    for path in files:
        try:
            for text in read_documents(path, whole):
                raw = text.encode()
                digest = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
                if text.strip() and digest not in seen:
                    if "\0" in text:
                        raise Problem(f"{path} is not text: it has NUL bytes")
                    seen.add(digest)
                    yield {0: "val", 1: "test"}.get(digest % HELD_OUT, "train"), text, len(raw)
        except UnicodeDecodeError as error:
            raise Problem(f"{path} is not UTF-8 text: {error.reason} ({error.object[error.start]:#04x})") from None
        except gzip.BadGzipFile:
            raise Problem(f"{path} is not a gzip file") from None


def train_tokenizer(texts, vocab_size):
    """A byte-pair encoding: {token's bytes: rank}, one fewer than vocab_size (the last id is BOS)."""
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, vocab_size - 1, buffer_size=BATCH_DOCUMENTS, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in tokenizer.get_mergeable_ranks()}
    if len(ranks) != vocab_size - 1:
        raise Problem(f"too little text for a vocabulary of {vocab_size}: it gave {len(ranks) + 1} tokens")
    return ranks


def read_tokenizer(path):
    """{token's bytes: rank} from tiktoken's rank format, one `base64 rank` a line."""
    pairs = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def byte_lengths(ranks):
    """Bytes of each token id, from the raw tokens, never from decoded text; 0 for BOS, which counts nowhere."""
    lengths = np.zeros(len(ranks) + 1, dtype=np.int64)
    for token, rank in ranks.items():
        lengths[rank] = len(token)
    return lengths


def count_tokens(path, vocab_size):
    """How often each token stands in a token file, in bounded memory."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    for start in range(0, len(tokens), 2**22):
        counts += np.bincount(tokens[start : start + 2**22], minlength=vocab_size)
    return counts


def write_data_set(folder, name, key, files, sizes, progress):
    """Writes the token files, the tokenizer and meta.json into `folder`; returns the meta data."""
    import tiktoken

    vocab_size, whole = sizes["vocab_size"], name == "pytorch"
    total = None if any(path.suffix == ".gz" for path in files) else sum(path.stat().st_size for path in files)

    def documents(task, end):
        task = progress.add_task(task, total=min(total, end) if total else None)
        for split, text, size in split_documents(files, whole):
            progress.advance(task, size)
            yield split, text, size
        progress.update(task, total=1, completed=1)

    def train_texts():
        left = VOCABULARY_CHARS
        for split, text, _ in documents(f"vocabulary of {vocab_size:,}", VOCABULARY_CHARS):
            if split == "train" and left > 0:
                left -= len(text)
                yield text
            if left <= 0:
                return

    ranks = train_tokenizer(train_texts(), vocab_size)
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in sorted(ranks.items(), key=lambda i: i[1])]
    (folder / "tokenizer.tiktoken").write_bytes(b"".join(lines))
    encoding = tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    bos = vocab_size - 1
    splits = {split: dict(documents=0, bytes=0) for split in ("train", "val", "test")}
    outputs = {split: open(folder / f"{split}.bin", "wb") for split in splits}
    stream = documents("tokens", math.inf)
    while batch := list(itertools.islice(stream, BATCH_DOCUMENTS)):
        encoded = encoding.encode_ordinary_batch([text for _, text, _ in batch], num_threads=os.cpu_count() or 1)
        for (split, _, size), tokens in zip(batch, encoded, strict=True):
            outputs[split].write(np.array([bos, *tokens], dtype=np.uint16).tobytes())
            splits[split]["documents"] += 1
            splits[split]["bytes"] += size
    for output in outputs.values():
        output.flush()
        os.fsync(output.fileno())
        output.close()

    # Check what was written, as read back from the disk: the tokens' bytes must be the documents' bytes, all of them.
    lengths = byte_lengths(read_tokenizer(folder / "tokenizer.tiktoken"))
    counts = {}
    for split, facts in splits.items():
        needed = (sizes["eval_rows"] if split != "train" else 2) * sizes["seq_len"] + 1
        facts["tokens"] = (folder / f"{split}.bin").stat().st_size // 2
        if facts["tokens"] < needed:
            raise Problem(f"too little text: {split} got {facts['tokens']:,} tokens and needs {needed:,}")
        counts[split] = count_tokens(folder / f"{split}.bin", vocab_size)
        if counts[split] @ lengths != facts["bytes"] or counts[split][bos] != facts["documents"]:
            raise Problem(f"{folder / split}.bin doesn't hold the text that was written: is the disk sound?")
    nats = -np.log((counts["train"] + 1) / (counts["train"] + 1).sum())
    nats[bos] = 0
    unigram_bpb = float(counts["val"] @ nats / math.log(2) / (counts["val"] @ lengths))

    digest = hashlib.sha256(json.dumps(sizes).encode())
    for file in ("tokenizer.tiktoken", *(f"{split}.bin" for split in splits)):
        with open(folder / file, "rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    meta = dict(source=name, fingerprint=digest.hexdigest()[:12], **sizes, unigram_bpb=unigram_bpb, splits=splits, key=key)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return meta


def prepare(source, root):
    """Prepares `source` below `root` unless that was done before; returns (folder, whether it was there)."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    name, files, identity = source_files(source)
    sizes = machine_sizes(torch_package())
    key = hashlib.sha256(json.dumps([FORMAT, sizes, PATTERN, name, identity]).encode()).hexdigest()
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "prepare.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one at a time, so that whatever is half-made is a killed run's
        for partial in root.glob(".partial-*"):
            shutil.rmtree(partial)
        for path in root.glob("*/meta.json"):
            meta = json.loads(path.read_text())
            complete = all(
                (path.parent / f"{split}.bin").exists() and (path.parent / f"{split}.bin").stat().st_size == 2 * facts["tokens"]
                for split, facts in meta["splits"].items()
            )
            if meta["key"] == key and complete:
                os.utime(path)  # asked for again: the newest is what a new branch takes
                return path.parent, True
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
        try:
            columns = TextColumn("{task.description:>20}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
            with Progress(*columns) as progress:
                meta = write_data_set(partial, name, key, files, sizes, progress)
            folder = root / f"{name}-{meta['fingerprint']}"
            shutil.rmtree(folder, ignore_errors=True)  # the same content under another key, or a damaged copy of it
            partial.chmod(0o755)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder, False


# --------------------------------------------------------------------------------------------------------------- ruler


def refuse(reason):
    """Ends the run without a result; the reason is the log's last line, and reaches the agent."""
    raise SystemExit(f"refused by the ruler: {reason}")


def bits_per_byte(nats, targets, lengths):
    """Total bits over total bytes. nats, targets: same shape; lengths: bytes by token id; a target of 0 bytes counts in neither."""
    counted = lengths[targets]
    return float((nats.double() * (counted > 0)).sum() / (math.log(2) * counted.sum()))


def sign(secret, lines, seed, budget, fingerprint):
    """HMAC-SHA256 of the summary's lines and of what the loop set; the loop computes it from its own values."""
    text = "\n".join([*lines, f"seed: {seed}", f"budget: {budget:g}", f"data: {fingerprint}"])
    return hmac.new(secret.encode(), text.encode(), "sha256").hexdigest()


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def pick_device():
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def facts():
    """What a number depends on beside the code, as the loop writes it on a branch: a JSON line."""
    return json.dumps({"Device": device_name(pick_device()), "Torch": torch.__version__})


def _guard(event, args):
    if event == "open" and _sealed and isinstance(args[0], (str, bytes)) and os.path.realpath(os.fsdecode(args[0])) in _sealed:
        refuse(f"train.py opened {os.path.basename(os.fsdecode(args[0]))}, which is held out")


class Run:
    """One experiment: seeds everything, picks the device, opens the data and starts the clock.

    `device` (torch.device), `seq_len` and `vocab_size` are the ruler's facts. Reads AUTORESEARCH_BUDGET (300 s of wall
    clock for the whole process), _STARTED (time.monotonic() at spawn), _SEED (0) and _DATA (~/.cache/autoresearch).
    """

    def __init__(self):
        self._started = float(os.environ.get("AUTORESEARCH_STARTED") or monotonic())
        self._budget = float(os.environ.get("AUTORESEARCH_BUDGET") or BUDGET)
        self._seed = int(os.environ.get("AUTORESEARCH_SEED") or 0)
        try:
            folder = newest(data_root())
        except Problem as problem:
            raise SystemExit(str(problem)) from None
        meta = json.loads((folder / "meta.json").read_text())
        self._folder, self._fingerprint, self._unigram_bpb = folder, meta["fingerprint"], meta["unigram_bpb"]
        self.seq_len, self.vocab_size = meta["seq_len"], meta["vocab_size"]
        self._eval_tokens, self._eval_rows = meta["eval_tokens"], meta["eval_rows"]
        self.device = pick_device()
        random.seed(self._seed)
        np.random.seed(self._seed)
        torch.manual_seed(self._seed)
        self._lengths = torch.from_numpy(byte_lengths(read_tokenizer(folder / "tokenizer.tiktoken"))).to(self.device)
        self._train = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")
        if not _sealed:
            sys.addaudithook(_guard)
        _sealed.update(os.path.realpath(folder / name) for name in ("val.bin", "test.bin"))
        self._iterators = self._batches = self._tokens = 0  # iterators made, batches and tokens drawn from them
        self._first_batch = self._clock = self._ended = None  # monotonic times: first batch, training's start and end
        self._calls = self._first_step_batches = 0  # of progress(); batches of the first step
        self._step_seconds, self._last_call, self._event = 0.0, 0.0, None
        self._reserve = self._eval_limit = None  # seconds for evaluation; monotonic time by which it must start
        self._logged = -math.inf
        print(f"data: {folder.name}  device: {device_name(self.device)}  torch: {torch.__version__}  "
              f"seed: {self._seed}  budget: {self._budget:g} s", flush=True)  # fmt: skip

    # ---- text

    def batches(self, batch_size, seq_len=None):
        """Endless (x, y), int64 (B, T) on the device; y is the next token. T is seq_len, at most (and by default) the ruler's.

        Windows of the train split without replacement, in an order and from an offset that the seed draws anew each epoch.
        """
        T = seq_len or self.seq_len
        if not 1 <= T <= self.seq_len or batch_size < 1:
            raise ValueError(f"batches of {batch_size} x {T}: the ruler has 1 x 1 up to any x {self.seq_len}")
        self._iterators += 1
        return self._serve(np.random.default_rng([self._seed, self._iterators]), batch_size, T)

    def _serve(self, rng, B, T):
        starts = _window_starts(rng, len(self._train), T)
        while True:
            rows = self._rows(np.fromiter(itertools.islice(starts, B), dtype=np.int64, count=B), T)
            self._first_batch = self._first_batch or monotonic()
            self._batches += 1
            self._tokens += B * T
            yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _rows(self, starts, T, tokens=None):
        tokens = self._train if tokens is None else tokens
        rows = torch.from_numpy(tokens[starts[:, None] + np.arange(T + 1)].astype(np.int64))  # (B, T + 1)
        if self.device.type != "cuda":
            return rows.to(self.device)
        # A new pinned tensor each time: torch's host allocator hands its memory out again only once the copy is done.
        return rows.pin_memory().to(self.device, non_blocking=True)

    # ---- clock

    def _synchronize(self):
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def progress(self):
        """Where training stands, 0 to 1, called once before each step; at 1 (or when evaluation would no longer fit), stop.

        The clock starts when the first step ends, so that compiling isn't training; it starts at the first batch if that
        step drew more batches than the next one did. On CUDA one step stays in flight: waiting for it would idle the GPU.
        """
        if self._reserve is None:
            raise RuntimeError("call run.preflight(model) before the first run.progress()")
        self._calls += 1
        if self._calls == 1:
            return 0.0
        if self.device.type == "cuda" and self._calls > 2:
            event, self._event = self._event, torch.cuda.Event()
            self._event.record()
            event.synchronize()
        else:
            self._synchronize()
            self._event = torch.cuda.Event() if self.device.type == "cuda" else None
            if self._event:
                self._event.record()
        now = monotonic()
        if self._calls == 2:
            self._clock, self._first_step_batches = now, self._batches
        else:
            # The longest of the recent steps: one more of them must fit before evaluation has to start.
            self._step_seconds = max(now - self._last_call, 0.9 * self._step_seconds)
            if self._calls == 3 and 2 * self._first_step_batches > self._batches:
                self._clock = self._first_batch
        self._last_call = now
        done = (now - self._clock) / max(self._allowance(), 1e-9)
        if done >= 1 or now + self._step_seconds > self._eval_limit:
            self._synchronize()
            self._ended = self._ended or monotonic()
            return 1.0
        return done

    def _allowance(self):
        """Seconds of training: its share of the budget, or what is left before evaluation has to start."""
        return min(TRAINING_SHARE * self._budget, self._eval_limit - self._clock)

    def log(self, step, loss, tokens):
        """A line about once a second. loss: a number or a 0-dim tensor (read only when a line is due); tokens: so far, in all."""
        now = monotonic()
        if now - self._logged < LOG_SECONDS:
            return
        loss = float(loss)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}")
        self._logged = now
        seconds = now - (self._clock or now)
        share = min(seconds / self._allowance(), 1) if self._clock and self._allowance() > 0 else 0
        speed = f"{tokens / seconds:,.0f}" if seconds >= LOG_SECONDS else "-"
        print(f"step {step}  {share:6.1%}  loss {loss:.4f}  {speed} tokens/s  "
              f"{max(self._started + self._budget - now, 0):.0f} s left", flush=True)  # fmt: skip

    # ---- metric

    def _losses(self, model, x, y):
        """Cross-entropy in nats, float32 (B, T), from the logits and nothing else that the model returns."""
        logits = model(x)
        if not torch.is_tensor(logits) or logits.shape != (*x.shape, self.vocab_size):
            refuse(f"model(x) must return logits {(*x.shape, self.vocab_size)}, not {getattr(logits, 'shape', type(logits))}")
        logits = logits.float()
        losses = logits.logsumexp(-1) - logits.gather(-1, y[..., None]).squeeze(-1)
        if not torch.isfinite(losses).all():
            refuse("the logits are not finite")
        return losses

    def _probe(self, model):
        """Refuses a model that is random in eval(), sees the future or looks across rows; returns its bits per byte on train text."""
        rng = np.random.default_rng([self._seed, 0])  # stream 0: batches() counts from 1
        B, T = self._eval_rows, self.seq_len
        rows = self._rows(rng.integers(len(self._train) - T, size=B), T)
        x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        losses = self._losses(model, x, y)
        noise = (self._losses(model, x, y) - losses).abs().mean().item()
        if noise > LEAK_NATS:
            refuse(f"the same input gave different losses (by {noise:.3f} nats): is dropout active in eval()?")

        def random_tokens():
            return torch.from_numpy(rng.integers(self.vocab_size - 1, size=(B, T))).to(self.device)

        def check(changes, kind):
            # changes: loss with what mustn't be seen replaced, minus loss without; around 0 unless it was seen.
            mean, error = changes.mean().item(), changes.std().item() / math.sqrt(len(changes))
            if mean > LEAK_NATS + noise + LEAK_SIGMAS * error:
                refuse(f"{kind}: replacing it costs {mean:.3f} +- {error:.3f} nats")

        changes = []
        for _ in range(PROBES):
            split = rng.integers(1, T, size=B)
            split[:2] = T - 1, 2 * rng.integers(T // 2) + 1  # the last one and an odd one always
            split = torch.from_numpy(split).to(self.device)
            future = torch.arange(T, device=self.device) >= split[:, None]  # (B, T)
            before = (split - 1)[:, None]
            changed = self._losses(model, torch.where(future, random_tokens(), x), y)
            changes.append((changed - losses).gather(1, before)[:, 0])
        check(torch.cat(changes), "the model sees later tokens (the future)")
        others = (torch.arange(B, device=self.device) % 2 == 1)[:, None]
        changed = self._losses(model, torch.where(others, random_tokens(), x), y)
        check((changed - losses).mean(1)[::2], "the model looks at other rows of the batch")
        return bits_per_byte(losses, y, self._lengths)

    def preflight(self, model):
        """Checks the untrained model as finish() will and times its evaluation; returns the seconds kept for it."""
        rows = self._rows(np.arange(self._eval_rows) * 7, self.seq_len)
        x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for _ in range(2):  # the first call may compile; the second one counts
                self._synchronize()
                began = monotonic()
                self._losses(model, x, y)
                self._synchronize()
                seconds = monotonic() - began
            untrained_bpb = self._probe(model)
        model.train(was_training)
        if untrained_bpb < 0.98 * self._unigram_bpb:
            refuse(f"untrained, the model has {untrained_bpb:.3f} bits per byte, and token frequencies alone {self._unigram_bpb:.3f}: "
                   "it starts from weights that were trained")  # fmt: skip
        val_tokens = (self._folder / "val.bin").stat().st_size // 2
        passes = len(_eval_batches(val_tokens, self._eval_tokens, self._eval_rows, self.seq_len)) + 1 + 3 + PROBES
        self._reserve = EVAL_RESERVE * seconds * passes
        self._eval_limit = self._started + self._budget - EXIT_SECONDS - self._reserve
        if monotonic() > self._eval_limit:
            refuse(f"evaluation takes about {seconds * passes:.0f} s and no longer fits in a budget of {self._budget:g} s: make the model smaller")
        return self._reserve

    def finish(self, model, depth=None, flops_per_token=None):
        """Evaluates, probes again and prints the summary. flops_per_token: of forward and backward, for the MFU."""
        self._synchronize()
        ended = monotonic()
        if self._reserve is None:
            raise RuntimeError("call run.preflight(model) before training")
        clock = self._clock or self._first_batch or ended
        over = ended - clock - min(TRAINING_SHARE * self._budget, max(self._eval_limit - clock, 0))
        if over > max(OVERRUN * TRAINING_SHARE * self._budget, self._step_seconds, LOG_SECONDS) and (self._batches > 1):
            refuse(f"training went on for {over:.1f} s after its time: stop when run.progress() reaches 1")
        model.eval()
        with torch.no_grad():
            val_bpb = self._evaluate(model)
            self._probe(model)
        if not SANE_BPB[0] < val_bpb < SANE_BPB[1]:
            refuse(f"val_bpb {val_bpb:.6f} is not possible for a language model of text")
        training = (self._ended or ended) - clock
        peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device_name(self.device)), None)
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**20
        else:  # no device memory of its own: the process's resident peak (bytes on macOS, KiB elsewhere)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        summary = {
            "val_bpb": f"{val_bpb:.6f}",
            "training_seconds": f"{training:.1f}",
            "total_seconds": f"{monotonic() - self._started:.1f}",
            "peak_vram_mb": f"{memory:.1f}",
            "total_tokens_M": f"{self._tokens / 1e6:.3f}",
            "num_steps": f"{max(self._calls - 1, 0)}",
            "num_params_M": f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}",
        }
        if peak and flops_per_token and training > 0:
            summary["mfu_percent"] = f"{100 * flops_per_token * self._tokens / training / peak:.2f}"
        if depth is not None:
            summary["depth"] = str(int(depth))
        lines = [f"{key + ':':17} {value}" for key, value in summary.items()]
        if _secret:
            lines.append(f"{'signature:':17} {sign(_secret, lines, self._seed, self._budget, self._fingerprint)}")
        print("---", *lines, sep="\n", flush=True)

    def _evaluate(self, model):
        """Bits per byte over the fixed evaluation tokens of the val split."""
        _sealed.discard(path := os.path.realpath(self._folder / "val.bin"))
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        _sealed.add(path)
        batches = _eval_batches(len(tokens), self._eval_tokens, self._eval_rows, self.seq_len)
        nats = torch.zeros(len(batches), dtype=torch.float64, device=self.device)
        count = torch.zeros_like(nats)
        for i, starts in enumerate([*batches, batches[0]]):
            rows = self._rows(starts, self.seq_len, tokens)
            x, y = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
            losses = self._losses(model, x, y)
            if i == len(batches):
                easier = first - losses.mean().item()
                if easier > LEAK_NATS:
                    refuse(f"the model learns during evaluation: the first batch became easier by {easier:.3f} nats")
                break
            first = losses.mean().item() if i == 0 else first
            lengths = self._lengths[y]
            nats[i] = (losses.double() * (lengths > 0)).sum()
            count[i] = lengths.sum()
        return (nats.sum() / (math.log(2) * count.sum())).item()


def _window_starts(rng, tokens, T):
    """Endless starts of windows of T + 1 tokens: each epoch has its own offset and order, and covers every token once."""
    while True:
        offset = rng.integers(T)
        yield from rng.permutation((tokens - 1 - offset) // T) * T + offset


def _eval_batches(tokens, wanted, B, T):
    """(batches, B) starts: whole batches of rows spread evenly over the split, the same for every train.py."""
    rows = min(wanted, tokens - 1) // T // B * B
    return np.linspace(0, tokens - T - 1, rows).astype(np.int64).reshape(-1, B)


def main():
    parser = argparse.ArgumentParser(description="Prepares the text that train.py learns from. A second call does nothing.")
    parser.add_argument("--source", default="pytorch", metavar="NAME|PATH",
                        help="pytorch (the installed torch package's Python sources, the default), or a text file or folder")  # fmt: skip
    args = parser.parse_args()
    try:
        folder, was_there = prepare(args.source, data_root())
    except Problem as problem:
        sys.exit(f"prepare.py: {problem}")
    except OSError as error:
        sys.exit(f"prepare.py: {error.strerror}: {error.filename or data_root()} (nothing that was there is lost)")
    except KeyboardInterrupt:
        sys.exit("prepare.py: stopped; nothing is half-written")
    meta = json.loads((folder / "meta.json").read_text())
    sizes = ", ".join(f"{split} {facts['tokens'] / 1e6:.2f} M" for split, facts in meta["splits"].items())
    print(f"{'already prepared' if was_there else 'prepared'}: {folder}")
    print(f"tokens: {sizes}; vocabulary {meta['vocab_size']:,}, sequence {meta['seq_len']:,}")


if __name__ == "__main__":
    main()
