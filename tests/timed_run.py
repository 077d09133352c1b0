"""Runs train.py as `python train.py` does and times its parts from outside, for speed.py; writes what it found as JSON to a file.

    AUTORESEARCH_STARTED=... python tests/timed_run.py FILE

Of train.py it knows main() and GPT, of the ruler the methods of Run. Where the device works on its own (CUDA), parts end when it is done.
"""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

LOADER_SECONDS = 2  # in which batches are drawn and nothing else is done


class Clock:
    """Seconds by part, each from the end of the one before; and the sums of what happens within the steps."""

    def __init__(self):
        self.last, self.parts, self.within = (
            float(os.environ["AUTORESEARCH_STARTED"]),
            {},
            {"batches": 0.0, "log": 0.0},
        )
        self.calls, self.tokens, self.batch_size, self.run = 0, 0, None, None

    def mark(self, part, wait=lambda: None):
        wait()
        now = time.monotonic()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now

    def spend(self, kind, function, *args, **kwargs):
        began = time.monotonic()
        value = function(*args, **kwargs)
        self.within[kind] += time.monotonic() - began
        return value


def timed(prepare, train, clock, wait):
    """Run and GPT as train.py calls them, with marks between."""

    class Run(prepare.Run):
        def __init__(self):
            super().__init__()
            clock.run = self
            clock.mark("prepare.Run(): device, data, tokenizer")

        def batches(self, batch_size, *args, **kwargs):
            clock.batch_size, serve = batch_size, super().batches(batch_size, *args, **kwargs)
            while True:
                x, y = clock.spend("batches", next, serve)
                clock.tokens += x.numel()
                yield x, y

        def preflight(self, model):
            clock.mark("optimizers")
            seconds = super().preflight(model)
            clock.mark("preflight (compiles on a GPU)", wait)
            return seconds

        def progress(self):
            if clock.calls < 2:
                clock.mark(("before the first step", "the first step")[clock.calls], wait)
            clock.calls += 1
            return super().progress()

        def log(self, *args, **kwargs):
            clock.spend("log", super().log, *args, **kwargs)

        def finish(self, *args, **kwargs):
            clock.mark("the other steps", wait)
            super().finish(*args, **kwargs)
            clock.mark("evaluation, with its probes")

    class GPT(train.GPT):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            clock.mark("the model, on its device", wait)

    return Run, GPT


def loader_speed(batches, wait):
    """Tokens per second of batches alone."""
    tokens, began = 0, time.monotonic()
    while time.monotonic() - began < LOADER_SECONDS:
        tokens += next(batches)[0].numel()
    wait()
    return tokens / (time.monotonic() - began)


def main():
    clock = Clock()
    clock.mark("the interpreter")
    import torch

    clock.mark("import torch")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import prepare
    import train

    clock.mark("the other imports")
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    run, train.GPT = timed(prepare, train, clock, wait)
    train.prepare = SimpleNamespace(
        **vars(prepare) | {"Run": run}
    )  # the ruler itself stays as it is, else it refuses the result
    train.main()
    found = dict(parts=clock.parts, within=clock.within, steps=clock.calls - 1, tokens=clock.tokens)
    found["ended"] = time.monotonic()
    found["loader"] = loader_speed(clock.run.batches(clock.batch_size), wait)
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
