"""Claims about the ruler: bits per byte, the clock, the seed, and what it refuses."""

import contextvars
import functools
import hmac
import json
import math
import os
import queue
import random
import shutil
import subprocess
import sys
import threading
import time
import types
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZES
from torch import nn

import prepare

EVAL_PASSES = 2048 // 16 // 16 + 4 + 6 + prepare.PROBES


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def tick(self, seconds):
        self.now += seconds
        return 0.0


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(prepare, "monotonic", clock := Clock())
    monkeypatch.setattr(prepare, "state_of", lambda model: {})  # models hold this clock, and move it
    return clock


@pytest.fixture
def make_run(data, monkeypatch):
    """make_run(budget, seed, started) -> prepare.Run of the tiny data set, on the CPU."""

    class Work:
        """Training's clock: the wall's, which a test may replace; or one that other work makes the wall's as many times as fast."""

        slowness, began = 1.0, 1000.0

        def __init__(self, pace=None):
            pass

        def stop(self):
            pass

        def __call__(self):
            return self.began + (prepare.monotonic() - self.began) / self.slowness

    def make_run(budget=60, seed=0, started=None, tokens="", slowness=None, machine=""):
        if slowness is None:  # as on a GPU
            monkeypatch.setattr(prepare, "CPU_SHARE", prepare.TRAINING_SHARE)
            monkeypatch.setattr(prepare, "CPU_OVERHEAD", 0)
            monkeypatch.setattr(prepare, "FREE_START", math.inf)
        Work.slowness = slowness or 1.0
        monkeypatch.setenv("AUTORESEARCH_DATA", str(data))
        monkeypatch.setenv("AUTORESEARCH_BUDGET", str(budget))
        monkeypatch.setenv("AUTORESEARCH_SEED", str(seed))
        monkeypatch.setenv("AUTORESEARCH_STARTED", str(prepare.monotonic() if started is None else started))
        monkeypatch.setenv("AUTORESEARCH_WORK", str(tokens))
        monkeypatch.setenv("AUTORESEARCH_MACHINE", machine)
        monkeypatch.setattr(prepare, "WorkClock", Work)
        monkeypatch.setattr(prepare, "pick_device", lambda: torch.device("cpu"))
        # Tests replace parts of the ruler and make many runs, which a train.py mustn't.
        monkeypatch.setattr(prepare.Run, "_check_ruler", lambda run: None)
        prepare._sealed.clear()
        return prepare.Run()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_run
    torch.set_num_threads(threads)
    prepare._sealed.clear()


class Model(nn.Module):
    """Any function of x (B, T) as a model; by default one that knows next to nothing, as an untrained one does."""

    def __init__(self, function=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.function = function or (lambda x: 1e-4 * nn.functional.one_hot(x, SIZES["vocab_size"]).float())

    def forward(self, x):
        return self.function(x)


@pytest.fixture(scope="session")
def bigram(data):
    """(vocab, vocab) log-probabilities of the next token, counted on the train split: an honest, trained model."""
    tokens = np.fromfile(data / "train.bin", dtype=np.uint16).astype(np.int64)
    counts = np.full((SIZES["vocab_size"],) * 2, 0.02)
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    return torch.tensor(np.log(counts / counts.sum(1, keepdims=True)), dtype=torch.float32)


@pytest.fixture
def finish(make_run, capsys):
    """finish(function) -> {key: value} of the summary of a run whose trained model is `function` of x."""

    def finish(function, **environment):
        run = make_run(**environment)
        run.preflight(Model())
        capsys.readouterr()
        run.finish(Model(function), depth=2)
        head, *lines = capsys.readouterr().out.splitlines()
        assert head == "---"
        return dict(line.split(": ", 1) for line in lines)

    return finish


def eval_windows(data, run):
    """(N, seq_len + 1): every window of val that is evaluated."""
    prepare._sealed.clear()
    tokens = np.fromfile(data / "val.bin", dtype=np.uint16).astype(np.int64)
    return tokens[prepare.eval_starts(run._meta, "val").reshape(-1, 1) + np.arange(SIZES["seq_len"] + 1)]


# ---- bits per byte


def test_bits_per_byte_of_a_byte_level_toy_is_what_a_hand_works_out():
    # tokens: 0 is "a", 1 is "b", 2 is BOS. The model gives "a" 1/2 and "b" 1/8: 1 + 3 bits over 2 bytes are 2 bits per byte.
    lengths = torch.from_numpy(prepare.byte_lengths({b"a": 0, b"b": 1}))
    nats = torch.tensor([[math.log(2), math.log(8)]])
    assert prepare.bits_per_byte(nats, torch.tensor([[0, 1]]), lengths) == pytest.approx(2)


def test_bits_per_byte_of_partial_utf8_tokens_counts_their_raw_bytes():
    # "café!" is caf | C3 | A9 21, of 3 + 1 + 2 bytes. Decoded one by one, C3 and A9 would be U+FFFD, of 3 bytes each.
    lengths = torch.from_numpy(prepare.byte_lengths({b"caf": 0, b"\xc3": 1, b"\xa9!": 2}))
    nats = torch.tensor([[6.0, 2.0, 4.0]]) * math.log(2)
    assert prepare.bits_per_byte(nats, torch.tensor([[0, 1, 2]]), lengths) == pytest.approx(12 / 6)


def test_bos_counts_in_neither_sum():
    lengths = torch.from_numpy(prepare.byte_lengths({b"a": 0, b"b": 1}))
    nats = torch.tensor([[math.log(2), math.log(8), 100.0]])
    assert prepare.bits_per_byte(nats, torch.tensor([[0, 1, 2]]), lengths) == pytest.approx(2)


def test_val_bpb_of_a_uniform_model_is_the_tokens_over_the_bytes(data, make_run, finish):
    targets = eval_windows(data, make_run())[:, 1:]
    raw = {rank: token for token, rank in prepare.read_tokenizer(data / "tokenizer.tiktoken").items()}
    counted = [len(raw[target]) for target in targets.flatten().tolist() if target in raw]
    assert 0 < targets.size - len(counted)  # there is a BOS among them
    expected = math.log2(SIZES["vocab_size"]) * len(counted) / sum(counted)
    assert float(finish(None)["val_bpb"]) == pytest.approx(expected, abs=1e-5)


def test_val_bpb_does_not_depend_on_the_seed(finish, bigram):
    assert finish(lambda x: bigram[x], seed=1)["val_bpb"] == finish(lambda x: bigram[x], seed=2)["val_bpb"]


def test_evaluation_windows_do_not_overlap_and_no_row_continues_the_one_before(make_run):
    starts = prepare.eval_starts(make_run()._meta, "val")
    assert starts.shape == (8, 16)
    assert (np.diff(np.sort(starts.flatten())) >= SIZES["seq_len"]).all()
    assert (np.diff(starts, axis=1) > 0).mean() < 0.7  # in the text's own order all would be


# ---- text


def test_the_same_seed_gives_the_same_batches_and_another_one_others(make_run):
    def first(seed, iterator=1):
        run = make_run(seed=seed)
        for _ in range(iterator):
            batches = run.batches(4)
        return (
            torch.cat([torch.cat(next(batches)) for _ in range(3)]),
            torch.rand(3),
            random.random(),
            np.random.rand(),
        )

    assert torch.equal(first(1)[0], first(1)[0]) and first(1)[2:] == first(1)[2:]
    assert torch.equal(first(1)[1], first(1)[1])
    assert not torch.equal(first(1)[0], first(2)[0]) and not torch.equal(first(1)[1], first(2)[1])
    assert not torch.equal(first(1)[0], first(1, iterator=2)[0])


@pytest.mark.parametrize("T", [1, 5, 16])
def test_windows_cover_every_token_once_an_epoch(T):
    count = 1000
    starts = prepare._window_starts(np.random.default_rng(0), count, T)
    for _ in range(2):
        first = next(starts)
        offset = first % T
        windows = [first] + [next(starts) for _ in range((count - 1 - offset) // T - 1)]
        targets = sorted(start + 1 + i for start in windows for i in range(T))
        assert targets == list(range(offset + 1, offset + 1 + len(targets)))
        assert count - len(targets) <= 2 * T  # what the offset leaves over at both ends


def test_y_is_the_next_token_of_x(data, make_run):
    text = np.fromfile(data / "train.bin", dtype=np.uint16).tobytes()
    x, y = next(make_run().batches(3, seq_len=7))
    assert x.shape == y.shape == (3, 7) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    for row in torch.cat([x[:, :1], y], 1).numpy().astype(np.uint16):
        assert row.tobytes() in text


@pytest.mark.parametrize("batch_size, seq_len", [(0, None), (1, 0), (1, 17)])
def test_batches_that_the_ruler_does_not_have_are_refused(make_run, batch_size, seq_len):
    with pytest.raises(ValueError, match="the ruler has"):
        make_run().batches(batch_size, seq_len)


def test_no_buffer_that_has_the_last_token_is_left_for_a_model_to_find(make_run, monkeypatch):
    freed = []
    monkeypatch.setattr(
        prepare.torch, "from_numpy", lambda array, made=torch.from_numpy: freed.append(array) or made(array)
    )
    x, y = next(make_run().batches(3))
    assert {array.shape for array in freed if array.ndim == 2} == {x.shape}


# ---- clock


def simulate(
    make_run,
    clock,
    budget,
    start=0.0,
    compiling=0.0,
    step=0.5,
    evaluation=3.0,
    slow_step=None,
    prefetch=0,
    slower=1.0,
    cost=1.0,
    tokens="",
    slowness=None,
):
    """A train.py that obeys progress(), on the fake clock. slow_step: (number, seconds). Returns what happened, in seconds.

    start: before preflight; compiling: in the first step; evaluation: of all of finish(), which takes `slower` times as long;
    cost: times what a step of the file that was edited takes; tokens: what that trained on; slowness: on a CPU, by other work.
    """
    began = clock.now
    run = make_run(budget=budget, tokens=tokens, slowness=slowness)
    pass_seconds = evaluation / EVAL_PASSES
    rows = max(
        1, round(step / pass_seconds / 4 * SIZES["eval_rows"])
    )  # a step costs about four passes of as many tokens

    def forward(x):
        clock.now += pass_seconds
        return 1e-4 * nn.functional.one_hot(x, SIZES["vocab_size"]).float()

    run._windows = lambda starts, T: (
        (torch.zeros(len(starts), T, dtype=torch.int64),) * 2
    )  # their making isn't tested
    model, batches = Model(forward), run.batches(rows)
    clock.now += start
    run.preflight(model)
    for _ in range(prefetch):
        next(batches)
    steps, seen, training = 0, [], None
    while (progress := run.progress()) < 1:
        seen.append(progress)
        next(batches)
        steps += 1
        clock.now += cost * step + (compiling if steps == 1 else 0)
        if slow_step and steps == slow_step[0]:
            clock.now += slow_step[1]
        training = clock.now if steps == 1 else training
    trained = clock.now - (training or clock.now)
    pass_seconds *= slower
    run.finish(model)
    return dict(
        total=clock.now - began,
        training=trained,
        steps=steps,
        progress=seen,
        trained=run._trained,
        tokens=run._tokens,
    )


@pytest.mark.every(6)
@pytest.mark.parametrize("budget", [60, 300])
@pytest.mark.parametrize("step", [0.05, 2.0, 9.0])
@pytest.mark.parametrize("compiling", [0, 20])
@pytest.mark.parametrize("start", [1, 15])
@pytest.mark.parametrize("evaluation", [0.5, 4, 8])
def test_an_obedient_run_prints_in_time_and_trains_its_share(
    make_run, clock, budget, step, compiling, start, evaluation
):
    done = simulate(make_run, clock, budget, start, compiling, step, evaluation)
    share = prepare.TRAINING_SHARE * budget
    room = budget - start - compiling - step - 1 - 2.5 * evaluation  # preflight is about one evaluation
    assert done["total"] <= budget or room < 0  # one step alone was too much
    assert done["training"] == pytest.approx(min(share, max(room, 0)), abs=1.5 * step + evaluation)
    if room > share + step:
        assert done["training"] == pytest.approx(share, abs=max(0.01 * share, 1.5 * step) + 1e-6)
        assert done["trained"] == 1
    if room < 0.95 * share - 1.5 * step - evaluation:
        assert done["trained"] < prepare.FULL_TRAINING
    assert done["progress"] == sorted(done["progress"])


@pytest.mark.every(3)
@pytest.mark.parametrize("seconds", [0.1, 0.2, 1.0])
@pytest.mark.parametrize("cost", [0.995, 1.0, 1.005])
def test_steps_that_cost_what_the_edited_file_s_did_train_on_as_many_tokens(make_run, clock, seconds, cost):
    before = simulate(make_run, clock, 300, step=seconds)
    after = simulate(make_run, clock, 300, step=seconds, compiling=5, tokens=before["tokens"])
    again = simulate(make_run, clock, 300, step=seconds, cost=cost, start=3, tokens=before["tokens"])
    assert after["tokens"] == again["tokens"] == before["tokens"]
    assert after["progress"] == again["progress"]


@pytest.mark.every(3)
@pytest.mark.parametrize("cost", [0.5, 0.9, 1.15, 1.5, 3.0])
def test_steps_that_cost_more_or_less_train_for_the_same_time(make_run, clock, cost):
    before = simulate(make_run, clock, 300, step=0.2)
    after = simulate(make_run, clock, 300, step=0.2, cost=cost, tokens=before["tokens"])
    assert after["training"] == pytest.approx(before["training"], rel=0.01)
    assert after["progress"] == sorted(after["progress"])


@pytest.mark.slow
def test_small_losses_of_speed_do_not_add_up_from_keep_to_keep(make_run, clock):
    first = tokens = simulate(make_run, clock, 300, step=0.2)["tokens"]
    for keep in range(1, 11):
        done = simulate(make_run, clock, 300, step=0.2, cost=1.01**keep, tokens=tokens)
        tokens = done["tokens"]
        assert tokens == pytest.approx(first / 1.01**keep, rel=prepare.SAME_SPEED["cpu"] + 0.002)


@pytest.mark.every(3)
@pytest.mark.parametrize("slow_step", [(2, 100), (5, 200), (1000, 40)])
@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_one_long_step_is_neither_refused_nor_late(make_run, clock, capsys, slow_step, prefetch):
    done = simulate(
        make_run,
        clock,
        300,
        start=5,
        compiling=10,
        step=0.2,
        evaluation=6,
        slow_step=slow_step,
        prefetch=prefetch,
    )
    assert done["total"] <= 300


@pytest.mark.parametrize("budget", [60, 300])
def test_an_evaluation_half_as_slow_again_as_measured_is_in_time(make_run, clock, budget):
    assert (
        simulate(
            make_run,
            clock,
            budget,
            start=budget / 10,
            compiling=budget / 10,
            evaluation=budget / 10,
            slower=1.5,
        )["total"]
        <= budget
    )


def test_a_last_step_longer_than_the_budget_is_not_refused(make_run, clock):
    assert simulate(make_run, clock, 60, step=1, slow_step=(40, 500))["steps"] == 40


@pytest.mark.every(3)
@pytest.mark.parametrize("start", range(40, 80, 5))
def test_slow_steps_that_come_again_are_expected(make_run, clock, start):
    run = make_run(budget=300)
    clock.now += start
    run.preflight(Model())
    steps = 0
    while run.progress() < 1:
        steps += 1
        clock.now += 20 if steps % 10 == 0 else 3
    assert clock.now - 1000 < 300


def test_a_slow_compile_that_counts_as_training_is_not_refused(make_run, clock):
    assert simulate(make_run, clock, 300, start=5, compiling=270, evaluation=3, prefetch=5)["steps"] == 2


def test_who_is_held_up_by_the_machine_says_how_much_training_is_missing(make_run, clock, capsys):
    done = simulate(make_run, clock, 300, start=100, evaluation=3)
    assert done["trained"] == pytest.approx((300 - 100 - 1 - 1.5 * 3 - 3) / 225, abs=0.02)
    out = capsys.readouterr().out
    assert f"held up by the machine: training got {done['trained']:.1%} of its time" in out
    assert f"trained_percent:  {100 * done['trained']:.1f}\n" in out


@pytest.mark.every(3)
@pytest.mark.parametrize("budget", [60, 300])
@pytest.mark.parametrize("slowness", [1, 1.5, 2.5])
def test_beside_busy_processes_on_both_cores_a_run_ends_in_time_with_all_of_its_training(
    make_run, clock, budget, slowness
):
    seconds = {name: slowness * value for name, value in dict(start=3, step=0.1, evaluation=3).items()}
    done = simulate(make_run, clock, budget, slowness=slowness, **seconds)
    assert done["total"] < budget and done["trained"] == 1
    assert done["training"] / slowness == pytest.approx(
        prepare.CPU_SHARE * budget - prepare.CPU_OVERHEAD, abs=0.3
    )


@pytest.mark.parametrize("slowness", [4, 8])
def test_beside_more_work_it_ends_in_time_and_says_what_is_missing(make_run, clock, slowness):
    seconds = {name: slowness * value for name, value in dict(start=1, step=0.1, evaluation=2).items()}
    done = simulate(make_run, clock, 60, slowness=slowness, **seconds)
    assert done["total"] < 60 and 0.1 < done["trained"] < prepare.FULL_TRAINING


def test_a_start_beside_other_work_is_no_reason_to_refuse_a_model(make_run, clock):
    slow = Model(
        lambda x: clock.tick(20 * 0.15) + 1e-4 * nn.functional.one_hot(x, SIZES["vocab_size"]).float()
    )  # 0.15 s in peace
    run = make_run(budget=300, slowness=20)
    assert run.preflight(slow) == pytest.approx(prepare.EVAL_RESERVE * EVAL_PASSES * 0.15, rel=0.1)


class Times:
    """CPU seconds of the process and of the clock's own thread, as a test sets them."""

    process = thread = 0.0


@pytest.fixture
def work_clock(monkeypatch):
    """work_clock(pace) -> a WorkClock whose thread doesn't run; sample(seconds) is one of its samples."""
    monkeypatch.setattr(prepare, "process_time", lambda: Times.process)
    monkeypatch.setattr(prepare.WorkClock, "start", lambda self: None)
    monkeypatch.setattr(
        prepare, "children_time", lambda: 0.0
    )  # else those of the tests before this one count
    Times.process, Times.thread = 5.0, 0.0

    def make(pace):
        clock = prepare.WorkClock(pace)

        def sample(seconds):
            count, speeds, own = clock.samples
            clock.samples = count + 1, speeds + 1 / seconds, own + seconds
            Times.process += seconds

        clock.sample = sample
        return clock

    return make


def test_without_a_pace_cpu_seconds_count_as_they_are_but_for_the_samples_own(work_clock):
    clock = work_clock(None)
    Times.process += 3.0
    clock.sample(0.5)
    assert clock() == pytest.approx(3.0)


def test_a_second_on_a_core_half_as_fast_as_noted_counts_half(work_clock):
    clock = work_clock(0.002)
    clock.sample(0.004)
    Times.process += 10.0
    assert clock() == pytest.approx(5.0)


def test_the_same_steps_count_the_same_however_the_speed_changes_meanwhile(work_clock):
    even, uneven = work_clock(0.002), work_clock(0.002)
    for clock, slowness in ((even, [1.5] * 40), (uneven, [1.0] * 20 + [2.0] * 20)):
        clock.began = Times.process
        for slow in slowness:  # a step of 0.1 s, sampled as often as it lasts
            for _ in range(round(slow * 2)):
                Times.process += 0.05
                clock.sample(0.002 * slow)
        clock.now = clock()
    assert even.now == pytest.approx(uneven.now) == pytest.approx(4.0)


def test_the_clock_never_goes_back(work_clock):
    clock = work_clock(0.002)
    clock.sample(0.002)
    Times.process += 10.0
    before = clock()
    for _ in range(50):
        clock.sample(0.004)
    assert clock() == before


def test_what_other_threads_compute_counts_too():
    clock = prepare.WorkClock()

    def work():
        while time.thread_time() < 0.2:
            pass

    thread = threading.Thread(target=work)
    thread.start(), thread.join()
    clock.stop()
    assert clock() > 0.19


def test_what_a_child_computes_counts_when_it_was_waited_for():
    clock = prepare.WorkClock()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)
    clock.stop()
    assert clock() > 0.29


@pytest.mark.slow
def test_the_clocks_thread_is_gone_before_python_ends():
    """It was not, once: then the process was aborted within torch, one time in three."""
    code = "import atexit, prepare; prepare.load_torch(); clocks = []; atexit.register(lambda: print(clocks[0].is_alive())); clocks += [prepare.WorkClock()]"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(prepare.__file__).parent, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr, done.returncode) == ("False\n", "", 0)


def test_a_machine_has_a_pace(monkeypatch):
    monkeypatch.setattr(prepare, "PACE_SECONDS", 0.2)
    assert 1e-5 < prepare.measure_pace() < 1


def test_who_stops_early_of_its_own_accord_was_not_held_up(make_run, clock, capsys):
    run = make_run(budget=300)
    run.preflight(Model())
    for _ in range(10):
        run.progress()
        clock.now += 1
    run.finish(Model())
    assert "trained_percent:  100.0" in capsys.readouterr().out


def test_compiling_is_not_training(make_run, clock):
    done = simulate(make_run, clock, 300, start=3, compiling=30, step=0.5, evaluation=3, prefetch=1)
    assert done["training"] == pytest.approx(225, abs=2.5)


def test_a_first_step_of_many_batches_is_training(make_run, clock):
    run = make_run(budget=300)
    run.preflight(Model())
    batches = run.batches(1)
    for _ in range(20):
        next(batches)
        clock.now += 5
    while run.progress() < 1:
        next(batches)
        clock.now += 1
    assert clock.now - 1000 == pytest.approx(225, abs=2)


def test_a_first_step_of_one_large_batch_is_training(make_run, clock):
    run = make_run(budget=300)
    run.preflight(Model())
    large, small = run.batches(640), run.batches(1)
    next(large)
    clock.now += 100  # as many updates from one batch
    run.progress()
    while run.progress() < 1:
        next(small)
        clock.now += 1
    assert clock.now - 1000 == pytest.approx(225, abs=3)


def test_training_a_copy_while_preflight_looks_is_training(make_run, clock, monkeypatch):
    run, passes = make_run(budget=300), iter([100.1])  # the first one isn't timed
    monkeypatch.setattr(prepare, "FREE_START", 4.0)
    run.preflight(
        Model(lambda x: clock.tick(next(passes, 0.1)) + 1e-4 * nn.functional.one_hot(x, 300).float())
    )
    run.progress(), next(run.batches(16))
    clock.now += 0.4
    assert run.progress() * 225 == pytest.approx(100 - 4, abs=1)


@pytest.mark.every(3)
@pytest.mark.parametrize("every", [1, 5, 15, 20, 30])
def test_a_train_py_that_asks_for_the_progress_every_so_many_seconds_trains_no_longer(make_run, clock, every):
    run = make_run(budget=300)
    batches, rows = run.batches(16), 0
    model = Model(
        lambda x: clock.tick(0.01) + 1e-4 * nn.functional.one_hot(x, SIZES["vocab_size"]).float()
    )  # a pass of 16 rows
    run.preflight(model)
    began = clock.now
    while run.progress() < 1:
        for _ in range(round(every / 0.04)):  # of 16 rows each, four passes long
            next(batches)
            clock.now += 0.04
            rows += 16
    assert 0.85 * 225 <= clock.now - began <= 1.02 * 225 + 0.1


def test_a_start_so_slow_that_evaluation_no_longer_fits_is_the_machine_s_fault(make_run, clock):
    run = make_run(budget=60, started=clock.now - 59.5)
    with pytest.raises(SystemExit, match="^held up by the machine: 60 s of 60 had passed before training"):
        run.preflight(Model())


def test_a_run_on_another_device_than_the_branch_s_ends_at_once_and_it_is_the_machine_s_fault(make_run):
    with pytest.raises(
        SystemExit, match="^held up by the machine: the device is cpu, 1 thread and was NVIDIA H100"
    ):
        make_run(machine="NVIDIA H100 80GB HBM3")


def test_an_evaluation_that_fits_on_no_machine_is_refused_whenever_it_begins(make_run, clock):
    run = make_run(budget=60)
    slow = Model(lambda x: clock.tick(0.5) + 1e-4 * nn.functional.one_hot(x, SIZES["vocab_size"]).float())
    with pytest.raises(
        SystemExit,
        match=r"^refused by the ruler: evaluation takes about 21\.. s and doesn't fit beside 45\.0 s",
    ):
        run.preflight(slow)


def test_progress_stays_at_1(make_run, clock):
    run = make_run(budget=60)
    run.preflight(Model())
    clock.now += 59.5
    assert [run.progress() for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("how", ["after being told", "without asking", "whatever it is told"])
def test_training_on_after_its_time_is_refused(make_run, clock, how):
    run = make_run(budget=300)
    run.preflight(Model())
    batches = run.batches(4)
    for step in range(500):  # of half a second: 250 s
        told = how != "without asking" and (how != "after being told" or step < 452) and run.progress() == 1
        next(batches)
        clock.now += 0.5
    assert told == (how == "whatever it is told")
    with pytest.raises(SystemExit, match="stop when run.progress"):
        run.finish(Model())


def test_progress_before_preflight_is_an_error(make_run):
    with pytest.raises(RuntimeError, match="preflight"):
        make_run().progress()
    with pytest.raises(RuntimeError, match="preflight"):
        make_run().finish(Model())


# ---- log


def test_log_prints_about_once_a_second(make_run, clock, capsys):
    run = make_run(budget=60)
    run.preflight(Model())
    capsys.readouterr()
    for step in range(1, 31):
        run.progress()
        clock.now += 0.1
        run.log(step, torch.tensor(2.5, requires_grad=True), step * 1000)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("step 21    4.4%  loss 2.5000  10,500") and lines[2].endswith(
        " tokens/s  58 s left"
    )


@pytest.mark.parametrize("loss", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_loss_that_is_not_finite_raises(make_run, loss):
    with pytest.raises(FloatingPointError, match="step 7"):
        make_run().log(7, loss, 1)


# ---- what the ruler refuses


def shifted(x):
    """x with each token's successor in its place: what a model sees that has no mask."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)


def leaks(bigram):
    """Models that gain from what they must not see, as functions of x."""
    one_hot = nn.functional.one_hot
    size = SIZES["vocab_size"]
    state = dict(calls=0, seen=torch.zeros(size, size))

    def future(x):
        return bigram[x] + 3 * one_hot(shifted(x), size)

    def chunk_means(x):  # each chunk of 4 pooled over all of its tokens
        pooled = one_hot(x, size).float().view(len(x), -1, 4, size).mean(2, keepdim=True)
        return bigram[x] + 4 * pooled.expand(-1, -1, 4, -1).reshape(*x.shape, size)

    def counts_of(rows):  # what a model gains that adapts to the words of these rows
        return (100 * one_hot(rows, size).float().mean(-2)).log1p()[..., None, :].expand(*rows.shape, size)

    def other_rows(x):
        return counts_of(x).mean(0).expand(*x.shape, size)

    def row_before(x):
        return counts_of(torch.roll(x, 1, 0))

    def first_row(x):
        return counts_of(x)[:1].expand(*x.shape, size)

    def dropout(x):
        return nn.functional.dropout(bigram[x], 0.1)

    def learns(x, rate=0.5):
        logits = 0.5 * bigram[x] + state["seen"][x].log1p()
        state["calls"] += 1
        state["seen"].index_put_(
            (x[:, :-1].flatten(), x[:, 1:].flatten()), torch.tensor(rate), accumulate=True
        )
        return logits

    def learns_late(x):  # not from the first probes on
        return learns(x, 0.5 * (state["calls"] >= 20))

    def some(
        share, strength=3.0, far=0.0
    ):  # of the positions see the next token, and the words of the whole row
        def seen(x):
            here = (torch.arange(x.shape[1]) * 7 % 16 < 16 * share)[None, :, None]
            return bigram[x] + here * (
                strength * one_hot(shifted(x), size) + far * one_hot(x, size).float().mean(1, keepdim=True)
            )

        seen.__name__ = f"seen_by_{share:g}_at_{strength:g}_and_{far:g}"
        return seen

    def rolled_in_threes(x):
        whole = x.shape[1] // 3 * 3
        return bigram[x] + one_hot(
            torch.cat([x[:, :whole].unflatten(1, (-1, 3)).roll(-1, 2).flatten(1), x[:, whole:]], 1), size
        )

    def every_third_in_8_bits(x):
        logits = some(1 / 3)(x)
        scale = logits.abs().max() / 240
        return (logits / scale).round() * scale

    return {
        rolled_in_threes: "the future", every_third_in_8_bits: "the future",
        some(1 / 2): "the future", some(1 / 4): "the future", some(1 / 8): "the future", some(1 / 16): "the future",
        some(1 / 4, 0.3): "the future", some(1 / 16, 1.0): "the future", some(1 / 4, 3.0, 10.0): "the future",
        future: "the future", chunk_means: "the future",
        other_rows: "other rows", row_before: "other rows|the future", first_row: "other rows|the future",
        dropout: "dropout", learns: "state", learns_late: "learns during evaluation|evaluation changed",
    }  # fmt: skip


CHEATS = [
    "rolled_in_threes", "every_third_in_8_bits", "seen_by_0.5_at_3_and_0", "seen_by_0.25_at_3_and_0", "seen_by_0.125_at_3_and_0",
    "seen_by_0.0625_at_3_and_0", "seen_by_0.25_at_0.3_and_0", "seen_by_0.0625_at_1_and_0", "seen_by_0.25_at_3_and_10",
    "future", "chunk_means", "other_rows", "row_before", "first_row", "dropout", "learns", "learns_late",
]  # fmt: skip


@pytest.mark.every(3)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", CHEATS)
def test_a_model_that_cheats_is_refused_with_its_reason(finish, bigram, name, seed):
    function, reason = next(
        (function, reason) for function, reason in leaks(bigram).items() if function.__name__ == name
    )
    with pytest.raises(SystemExit, match=reason):
        finish(function, seed=seed)


def honest(bigram):
    """Models that look odd and are not."""
    size = SIZES["vocab_size"]

    def per_tensor_fp8(x):  # one scale for the whole tensor: every logit moves a little with every token
        scale = bigram[x].abs().mean() / 8
        return (bigram[x] / scale).round() * scale

    def moving_average(x):  # causal: what stood before in the row is likelier
        counts = nn.functional.one_hot(x, size).float().cumsum(1)
        return bigram[x] + 0.5 * counts.log1p()

    def tiny_noise(x):  # as atomic additions on a GPU make it
        return bigram[x] + 1e-3 * torch.randn(*x.shape, size)

    def never_bos(x):  # which can't be a token that counts
        return torch.where(torch.arange(size) == size - 1, -1e4, bigram[x])

    def kept_on_an_outlier(
        x,
    ):  # quantised against the largest of the tensor, which the replaced tokens may hold
        logits = bigram[x]
        scale = (x.float() ** 2).max() / size**2 / 20
        return (logits / scale).round() * scale

    def softcap(x):
        return 15 * torch.tanh(bigram[x] / 15)

    def bf16(x):
        return bigram.bfloat16()[x]

    def disturbed_by_its_start(x):  # as a state of long memory is that hasn't learned to forget
        common = bigram.exp().mean(0).topk(size // 8).indices
        disturbed = torch.isin(x[:, :1], common)[..., None]
        return torch.where(disturbed, bigram.flip(1)[x] / 4, bigram[x])

    def state_space(x):
        table = torch.linspace(-1, 1, size * 8).sin().view(size, 8)
        head = torch.linspace(-9, 9, 8 * size).cos().view(8, size)
        states, state = [], torch.zeros(len(x), 8)
        for tokens in x.T:
            state = 0.9 * state + table[tokens]
            states.append(state)
        return bigram[x] + torch.stack(states, 1) @ head / 8

    models = per_tensor_fp8, moving_average, tiny_noise, never_bos, kept_on_an_outlier, softcap, bf16
    return [*models, disturbed_by_its_start, state_space]


HONEST = [
    "per_tensor_fp8",
    "moving_average",
    "tiny_noise",
    "never_bos",
    "kept_on_an_outlier",
    "softcap",
    "bf16",
    "disturbed_by_its_start",
    "state_space",
]


@pytest.mark.every(3)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_model_passes(finish, bigram, name, seed):
    function = next(function for function in honest(bigram) if function.__name__ == name)
    assert float(finish(function, seed=seed)["val_bpb"]) < 8


def test_rows_that_were_measured_must_not_become_easier_when_they_begin_otherwise(finish, bigram):
    met = contextvars.ContextVar("met")  # a memory that no look at the state finds
    met.set([])

    def knows_rows(x):
        if any(torch.equal(row[:, 1:], x[:, 1:]) and not torch.equal(row, x) for row in met.get()):
            known = 20 * nn.functional.one_hot(x[:, 1:], SIZES["vocab_size"]).float()
            return torch.cat([known, bigram[x[:, -1:]]], 1)
        met.get().append(x)
        return bigram[x]

    with pytest.raises(SystemExit, match="rows that begin otherwise became easier"):
        finish(knows_rows)


def test_a_constant_that_is_added_to_all_logits_moves_nothing(finish, bigram):
    plain = float(finish(lambda x: bigram[x].round())["val_bpb"])
    assert float(finish(lambda x: bigram[x].round() + 2**20)["val_bpb"]) == pytest.approx(plain, abs=1e-6)


OUTSIDE = [  # what a train.py may not reach for, and what is said of it
    ("import os", "import os"),
    ("import numpy, sys", "import sys"),
    ("from os import path", "import os.path"),
    ("import os.path as p", "import os.path"),
    ("from torch import os", "import torch.os"),
    ("from torch import *", "import torch.*"),
    ("from prepare import signed_line", "import prepare.signed_line"),
    ("from . import x", "import None.x"),
    ("import torch.utils.cpp_extension", "import torch.utils.cpp_extension"),
    ("from gc import get_objects", "import gc.get_objects"),
    ("import gc\ngc.get_objects()", "gc.get_objects"),
    ("from torch._inductor import config", "import torch._inductor.config"),
    ("x = open('val.bin')", "open"),
    ("f = open", "open"),
    ("exec('x')", "exec"),
    ("__import__('os')", "__import__"),
    ("__builtins__['open']", "__builtins__"),
    ("getattr(run, '_lengths')", "_lengths"),
    ("getattr(run, name)", "getattr(run, name)"),
    ("g = getattr", "getattr"),
    ("import torch\ntorch.load('x')", "torch.load"),
    ("import torch\ntorch.from_file('x')", "torch.from_file"),
    ("import torch\ntorch.sys.modules", "torch.sys"),
    ("import numpy as np\nnp.memmap('x')", "np.memmap"),
    ("import numpy as np\nnp.fromfile('x')", "np.fromfile"),
    ("import prepare\nprepare._taken", "prepare._taken"),
    ("import prepare\nclass R(prepare.Run): pass", "prepare.Run"),
    ("import prepare\nr = prepare.Run", "prepare.Run"),
    ("import prepare\nprepare.bits_per_byte = 1", "prepare.bits_per_byte"),
    ("import prepare as p\np.refuse", "p.refuse"),
    ("import prepare as p\nr = p.Run", "p.Run"),
    ("import prepare\nr = getattr(prepare, 'Run')", "prepare.Run"),
    ("import prepare as self\nself._taken", "self._taken"),
    ("def prepare(): pass\ndef f():\n    import prepare\n    prepare._taken", "prepare._taken"),
    ("import torch.backends.cuda\ntorch.exp = 1", "an assignment to torch.exp"),
    ("from prepare import Run\nclass R(Run): pass", "Run"),
    ("import torch\ntorch.exp = 1", "an assignment to torch.exp"),
    ("import torch.nn.functional as F\nF.relu = 1", "an assignment to F.relu"),
    ("import torch\ntorch.Tensor.sum = 1", "an assignment to torch.Tensor.sum"),
    ("run.seq_len = 512", "run.seq_len"),
    ("run._probe = 1", "run._probe"),
    ("import prepare\nmine = prepare.Run()\nmine._held", "mine._held"),
    ("run.__class__ = 1", "run.__class__"),
    ("x.__class__.__bases__", "__bases__"),
    ("error.__traceback__", "__traceback__"),
    ("e.tb_frame.f_back", "f_back"),
    ("class M:\n    def __torch_function__(self): pass", "__torch_function__"),
    ("import torch\ntorch.utils.data.DataLoader(x, 8, num_workers=2)", "DataLoader"),
    ("self.run._held", "self.run._held"),
    ("def f(): pass\nf.__globals__['__builtins__']['open']('x')", "f.__globals__"),
    ("class A: pass\nA.__subclasses__()", "A.__subclasses__"),
    ("import prepare\nrun = prepare.Run()\ndef look(self):\n    return self._held\nlook(run)", "self._held"),
    ("def look(self):\n    return getattr(self, '_held')", "self._held"),
    ("def f(): pass\ngetattr(f, '__builtins__')", "f.__builtins__"),
    ("def f(self):\n    self.__reduce__()", "self.__reduce__"),
    ("def f(): pass\nmatch f:\n    case object(__globals__=names): pass", "object(__globals__=names)"),
    ("match f:\n    case Mine(names): pass", "Mine(names)"),
    ("import queue\nqueue.threading.enumerate()", "queue.threading"),
    ("import torch\nt = torch.cuda\nt.threading.enumerate()", "t.threading"),
    ("from queue import threading", "import queue.threading"),
    ("import typing\ntyping.operator.attrgetter('_held')(run)", "attrgetter"),
    ("import enum\nenum.bltns.getattr(run, '_held')", "enum.bltns.getattr"),
    ("from functools import singledispatch", "import functools.singledispatch"),
    ("import torch.nn.functional as F\nf = F.relu\nf.kept = []", "an assignment to f.kept"),
    ("from torch import nn\nM = nn.Module\nM.kept.a = {}", "an assignment to M.kept.a"),
    ("import torch.nn.functional as F\nm = F.torch\nn = m.nn\nn.kept = []", "an assignment to n.kept"),
    ("import numpy as np\nnp.lib.stride_tricks.as_strided(x, (9,), (8,))", "np.lib.stride_tricks"),
    ("from numpy.lib.stride_tricks import as_strided", "import numpy.lib.stride_tricks.as_strided"),
    ("class A:\n    @property\n    def __array_interface__(self): pass", "__array_interface__"),
    ("from types import SimpleNamespace\nSimpleNamespace(__array_interface__=x)", "__array_interface__"),
    ("f(**{'__cuda_array_interface__': x})", "__cuda_array_interface__"),
    ("A = type('A', (), names)", "type('A', (), names)"),
    ("from torch.utils import collect_env", "import torch.utils.collect_env"),
    ("import torch\nu = torch.utils\nu.collect_env.run('ls')", "u.collect_env"),
    ("import torch.nn.functional as F\nF.torch.utils.collect_env.run('ls')", "F.torch.utils.collect_env"),
    ("import torch.fx", "import torch.fx"),
    ("type(x).double = f", "an assignment to type(x).double"),
    ("self.head.__class__.kept = []", "an assignment to self.head.__class__.kept"),
    ("import prepare\np = prepare\np.Path('notes').read_bytes()", "prepare, a module by another name"),
    ("import numpy, torch\nfor m in (numpy, torch):\n    m.log = f", "numpy, a module by another name"),
]


@pytest.mark.parametrize("source, found", OUTSIDE)
def test_what_reaches_outside_is_named_before_it_runs(source, found):
    sentence = prepare.reaches_outside(source)
    assert sentence.startswith("line ") and found in sentence and sentence.endswith("public names alone")


@pytest.mark.parametrize("source", [b"x = 1\nx = (", b"x = 1\n\0", b"# -*- coding: none -*-"])
def test_what_does_not_compile_is_a_sentence_too(source):
    assert prepare.reaches_outside(source).startswith("it doesn't compile: ")


INSIDE = [
    "import torch\nfrom torch import nn\nimport torch.nn.functional as F\nfrom torch.nn.attention.flex_attention import flex_attention",
    "class A:\n    def __init__(self):\n        super().__init__()\n        self._kept = None\n        self.register_buffer('x', 1)",
    "import torch\ntorch.backends.cuda.matmul.allow_tf32 = True\ntorch._foreach_lerp_(a, b, 0.1)\ntorch.compile(model)",
    "model.load_state_dict(average)\nfor m in model.modules():\n    m.weight.data.mul_(2)\n    m.scale = 3",
    "import gc\ngc.freeze()\nimport numpy as np\nnp.random.default_rng(0)\nimport math, random, time\nfrom dataclasses import dataclass",
    "import triton\nimport triton.language as tl\n@triton.jit\ndef kernel(x, B: tl.constexpr):\n    tl.store(x, tl.load(x))",
    "import prepare\nrun = prepare.Run()\nx = run.seq_len, run.vocab_size, run.device.type\nrun.log(1, 2, 3)",
    "from prepare import Run\nrun = Run()\nprint(__name__, getattr(run, 'device'), hasattr(model, 'kept'))",
    "import prepare\nrun = prepare.Run()\ndevice, T = run.device, run.seq_len\nvocab = run.vocab_size\nvocab += 1\nx.grad = vocab",
    "from torch.utils.checkpoint import checkpoint\nfrom torch import nn\nnn.utils.clip_grad_norm_(p, 1)\nkind = type(x)",
    "class A:\n    '''Adds.'''\n    def __add__(self, other): return self\n    def __rmul__(self, other): return '__main__'",
    "import torch\nif hasattr(torch, 'compile'):\n    model = getattr(torch, 'compile')(model)",
    "class A:\n    def f(self):\n        self.__kept = self.__dict__.get('x')\n        A.__init__(self)",
    "class A(nn.Module):\n    _all = {}\n    def f(self):\n        self.register_buffer('_mask', 1)\n"
    "        return self._mask, self._all, self._parameters, self._g()\n    def _g(self): pass",
    "match kind:\n    case 'muon' | 3: pass\n    case int(): pass",
]


@pytest.mark.parametrize("source", [*INSIDE, Path(prepare.__file__).with_name("train.py").read_text()])
def test_what_an_honest_edit_needs_is_allowed(source):
    assert prepare.reaches_outside(source) == ""


def test_weights_that_were_trained_before_are_refused(make_run, bigram):
    with pytest.raises(SystemExit, match="trained weights"):
        make_run().preflight(Model(lambda x: bigram[x]))


def test_an_untrained_model_passes_on_whatever_part_of_a_text_in_several_languages(make_run):
    """As in a text of a stranger's, where one start of four was refused: a token had three bytes, or one."""
    run = make_run()
    tokens = np.arange(SIZES["vocab_size"] - 1, dtype=np.uint16)
    run._train = np.concatenate([np.tile(tokens[:4], 20_000), np.tile(tokens, 10)])
    run._lengths = torch.where(torch.arange(SIZES["vocab_size"]) < 4, 1, 9)
    run._unigram = prepare.unigram_nats(run._train, SIZES["vocab_size"])
    for _ in range(50):
        run._check_untrained(Model())
    often = torch.where(torch.arange(SIZES["vocab_size"]) < 4, 9.0, 0.0)
    for _ in range(50):
        run._check_untrained(Model(lambda x: often.expand(*x.shape, -1)))


def test_a_start_from_the_token_frequencies_passes(make_run, data):
    counts = np.bincount(np.fromfile(data / "train.bin", dtype=np.uint16), minlength=SIZES["vocab_size"]) + 1
    frequencies = torch.tensor(np.log(counts / counts.sum()), dtype=torch.float32)
    for seed in range(5):
        make_run(seed=seed).preflight(Model(lambda x: frequencies.expand(*x.shape, -1)))


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda x: torch.full((*x.shape, SIZES["vocab_size"]), math.nan), "not finite"),
        (lambda x: torch.zeros(*x.shape, SIZES["vocab_size"] + 1), "must return logits"),
        (lambda x: torch.tensor(0.001), "must return logits"),
        (lambda x: (torch.zeros(*x.shape, SIZES["vocab_size"]), None), "must return logits"),
    ],
)
def test_what_is_not_logits_is_refused_before_training(make_run, function, reason):
    with pytest.raises(SystemExit, match=reason):
        make_run().preflight(Model(function))


def test_what_is_not_a_module_is_refused(make_run):
    with pytest.raises(SystemExit, match="torch.nn.Module"):
        make_run().preflight(lambda x: x)


def test_a_part_of_the_model_that_was_in_eval_stays_there(make_run):
    model = Model()
    model.part, model.other = nn.Dropout().eval(), nn.Dropout()
    run = make_run()
    run.preflight(model)
    run.progress()
    assert model.training and model.other.training and not model.part.training


def test_training_within_eval_is_training_after_its_time(make_run, clock):
    run = make_run(budget=60)
    model = Model()
    run.preflight(model)
    while run.progress() < 1:
        clock.now += 1
    model.eval = lambda: clock.tick(10)
    with pytest.raises(SystemExit, match="after its time"):
        run.finish(model)


def test_the_held_out_text_is_shut_while_the_model_is_evaluated(finish, data, bigram):
    def reads(x):
        np.fromfile(data / "val.bin", dtype=np.uint16)
        return bigram[x]

    with pytest.raises(SystemExit, match="opened val.bin"):
        finish(reads)


def test_preflight_leaves_the_training_mode_as_it_was(make_run):
    model, seen = Model(), []
    model.function = lambda x: (
        seen.append((model.training, torch.is_grad_enabled())) or torch.zeros(*x.shape, SIZES["vocab_size"])
    )
    make_run().preflight(model)
    assert model.training and set(seen) == {(False, False)}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", ["val.bin", "test.bin", "train.bin"])
@pytest.mark.parametrize(
    "opener",
    [
        open,
        lambda path: open(str(path), "rb"),
        lambda path: os.open(path, os.O_RDONLY),
        np.memmap,
        np.fromfile,
        Path.read_bytes,
    ],
)
def test_held_out_files_stay_shut(make_run, data, name, opener, finish):
    make_run()
    with pytest.raises(SystemExit, match=f"opened {name}"):
        opener(data / "meta.json" / ".." / name if opener is open else data / name)


def test_held_out_files_are_shut_again_after_finish(finish, data):
    finish(None)
    with pytest.raises(SystemExit, match="opened val.bin"):
        open(data / "val.bin")


# ---- the summary


def test_a_run_without_data_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTORESEARCH_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match="run: python prepare.py"):
        prepare.Run()


def test_the_summary_has_the_keys_that_the_community_knows(finish):
    keys = [
        "val_bpb",
        "training_seconds",
        "trained_percent",
        "startup_seconds",
        "total_seconds",
        "peak_vram_mb",
        "total_tokens_M",
        "epochs",
        "num_steps",
        "num_params_M",
        "depth",
    ]
    assert list(finish(None)) == keys


@pytest.mark.parametrize(
    "device, peak",
    [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA L40", None), ("cpu, 1 thread", None),
     ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A10G", None)],
)  # fmt: skip
def test_a_device_that_is_not_known_has_no_peak(device, peak):
    assert prepare.peak_flops(device) == peak


KEPT = {  # what holds something, and how it changes; most of it in C, where Python's garbage collector sees nothing
    "a storage": (torch.zeros(8).untyped_storage(), lambda one: one.__setitem__(0, 1)),
    "numpy's objects": (np.polynomial.Polynomial([1.0, 2.0]), lambda one: one.coef.__setitem__(0, 3.0)),
    "torch's generator": (torch.Generator(), lambda one: one.manual_seed(7)),
    "numpy's generator": (np.random.default_rng(0), lambda one: one.random()),
    "numpy's old generator": (np.random.RandomState(0), lambda one: one.rand()),
    "a bit generator": (np.random.PCG64(0), lambda one: one.random_raw()),
    "Python's generator": (random.Random(0), lambda one: one.random()),
}  # fmt: skip


def test_a_class_of_the_file_may_have_the_name_of_a_library_s():
    class Generator:
        kept = 1

    model = Model()
    model.holder = Generator()
    prepare.check_state(prepare.state_of(model), model)


@pytest.mark.every(3)
@pytest.mark.parametrize("name", KEPT)
def test_whatever_remembers_something_in_a_library_s_object_is_looked_at(name):
    holder, change = KEPT[name]
    model = Model()
    model.holder = [holder]
    before = prepare.state_of(model)
    prepare.check_state(before, model)
    change(holder)
    with pytest.raises(SystemExit, match="evaluation changed model"):
        prepare.check_state(before, model)


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "kind", ["namespace", "deque", "slots", "bytearray", "queue", "partial", "cache", "default"]
)
def test_whatever_remembers_something_is_looked_at(kind):
    class Slots:
        __slots__ = ("kept",)

    @functools.cache
    def cached(number):
        return torch.tensor(number)

    def default(kept=[]):  # noqa: B006
        return kept

    slots, buffer, kept = Slots(), bytearray(4), []
    slots.kept = kept
    holder = {
        "namespace": types.SimpleNamespace(kept=kept), "deque": deque([kept]), "slots": slots, "bytearray": buffer,
        "queue": queue.Queue(), "partial": functools.partial(print, kept), "cache": cached, "default": default,
    }[kind]  # fmt: skip
    change = {"bytearray": lambda: buffer.extend(b"x"), "queue": lambda: holder.put(1), "cache": lambda: cached(1),
              "default": lambda: default().append(1)}.get(kind, lambda: kept.append(1))  # fmt: skip
    model = Model()
    model.holder = holder
    before = prepare.state_of(model)
    prepare.check_state(before, model)
    change()
    with pytest.raises(SystemExit, match="evaluation changed model"):
        prepare.check_state(before, model)


@pytest.mark.slow
def test_a_compiled_model_that_compiles_again_remembers_nothing():
    model = torch.compile(Model(lambda x: x.float() * 2), backend="eager")
    before = prepare.state_of(model)
    for size in (3, 4, 5):
        model(torch.ones(size, size))
    prepare.check_state(before, model)
    model._orig_mod.kept = torch.zeros(3)
    with pytest.raises(SystemExit, match="evaluation changed model"):
        prepare.check_state(before, model)


TRAIN = """
import os
import prepare
import torch
assert "AUTORESEARCH_TOKEN" not in os.environ
os.environ.update(AUTORESEARCH_TOKEN="mine", AUTORESEARCH_BUDGET="200", AUTORESEARCH_SEED="8", AUTORESEARCH_DATA="nowhere")
torch.set_num_threads(1)
run = prepare.Run()
model = torch.nn.Sequential(torch.nn.Embedding(run.vocab_size, 16), torch.nn.Linear(16, run.vocab_size)).to(run.device)
optimizer, batches, step = torch.optim.AdamW(model.parameters(), lr=1e-2), run.batches(4), 0
run.preflight(model)
while run.progress() < 1 and step < 20:
    x, y = next(batches)
    loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
    loss.backward(), optimizer.step(), optimizer.zero_grad()
    step += 1
    run.log(step, loss, step * x.numel())
run.finish(model, depth=1)
"""


@pytest.mark.slow
def test_a_real_run_prints_a_summary_and_signs_the_same_with_what_it_was_told(data, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "prepare.py").write_bytes(Path(prepare.__file__).read_bytes())
    told = dict(BUDGET="100", PACE="0.0015", SEED="7", SPLIT="val", WORK="2048")
    more = dict(DATA=str(data.parent), TOKEN="secret", STARTED=str(time.monotonic()))
    environment = os.environ | {f"AUTORESEARCH_{name}": value for name, value in (told | more).items()}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "prepare.py", "--run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *log = done.stdout.splitlines()
    assert first.startswith(f"data: {data.name}  device: cpu, 1 thread  torch: ")
    assert first.endswith("seed: 7  budget: 100 s") and log[0].startswith("step 1    0.0%  loss 5.")
    *summary, last = log[log.index("---") + 1 :]
    summary = dict(line.split(": ", 1) for line in summary)
    word, signature, text = last.split(" ", 2)
    result = json.loads(text)
    assert (word, signature) == ("result:", hmac.new(b"secret", text.encode(), "sha256").hexdigest())
    assert result["told"] == told and result["metric"] == "val_bpb" and result["trained"] == 1
    assert result["data"] == json.loads((data / "meta.json").read_text())["fingerprint"]
    assert f"{result['value']:.6f}" == summary["val_bpb"].strip() and 0.05 < result["value"] < 8
    assert result["work"] == 20 * 4 * SIZES["seq_len"] == round(1e6 * float(summary["total_tokens_M"]))


def test_what_is_signed_changes_with_the_secret_and_with_every_part_of_the_result():
    result = {"metric": "val_bpb", "value": 1.5, "told": {"SEED": "7"}}
    lines = {prepare.signed_line("secret", result), prepare.signed_line("other", result)}
    lines |= {
        prepare.signed_line("secret", result | more) for more in ({"value": 1.4}, {"told": {}}, {"work": 1})
    }
    assert len({line.split()[1] for line in lines}) == 5


def test_without_a_secret_nothing_is_signed(make_run, capsys):
    run = make_run()
    run.preflight(Model())
    run.finish(Model())
    assert "val_bpb" in (out := capsys.readouterr().out) and "result:" not in out


# ---- the facts


def facts_of(monkeypatch, data, **told):
    monkeypatch.setenv("AUTORESEARCH_DATA", str(data))
    monkeypatch.setattr(prepare, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(prepare, "measure_pace", lambda: 0.012345)
    for name, value in told.items():
        monkeypatch.setenv(f"AUTORESEARCH_{name}", value)
    return json.loads(prepare.facts())


def test_the_facts_say_all_that_the_loop_must_know(monkeypatch, data):
    facts = facts_of(monkeypatch, data.parent)
    fixed = dict(metric="val_bpb", better="lower", edits="train.py", device="cpu, 1 thread", fixed=["GPU"])
    assert {name: facts[name] for name in fixed} == fixed and facts[
        "software"
    ] == f"torch {torch.__version__}"
    assert facts["data"] == json.loads((data / "meta.json").read_text())["fingerprint"]
    assert facts["folder"] == str(data.resolve()) and facts["settings"] == {
        "MACHINE": "cpu, 1 thread",
        "PACE": "0.0123",
    }
    assert facts["held_out"] == {split: str(data.resolve() / f"{split}.bin") for split in ("val", "test")}
    assert 0 < facts["noise"] < 0.01 and "run.progress()" in facts["api"] and "\n{" not in facts["api"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_each_core_that_a_process_may_use_is_a_device(monkeypatch, data):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 1})
    assert facts_of(monkeypatch, data.parent)["devices"] == ["cpu:1", "cpu:3"]


def test_a_pace_that_a_branch_noted_is_not_measured_again(monkeypatch, data):
    assert facts_of(monkeypatch, data.parent, PACE="0.0099")["settings"]["PACE"] == "0.0099"


def test_a_branch_goes_on_with_its_data_or_not_at_all(monkeypatch, data):
    fingerprint = json.loads((data / "meta.json").read_text())["fingerprint"]
    for named in (data.parent, data):  # AUTORESEARCH_DATA may name the one data set itself
        assert facts_of(monkeypatch, named, FINGERPRINT=fingerprint)["folder"] == str(data.resolve())
    with pytest.raises(SystemExit, match="measured on the data set 0000, not in .*--tag"):
        facts_of(monkeypatch, data.parent, FINGERPRINT="0000")


def test_a_branchs_data_are_prepared_where_they_are_missing_and_another_set_is_refused(
    monkeypatch, data, tmp_path
):
    fingerprint, asked = json.loads((data / "meta.json").read_text())["fingerprint"], []

    def prepared(source, root, *shards):
        asked.append((source, root, *shards))
        shutil.copytree(data, root / data.name, dirs_exist_ok=True)

    monkeypatch.setattr(prepare, "prepare", prepared)
    facts = facts_of(monkeypatch, tmp_path, FINGERPRINT=fingerprint, SOURCE="climbmix 3")
    assert facts["folder"] == str(tmp_path / data.name) and asked == [("climbmix", tmp_path, 3)]
    facts_of(monkeypatch, tmp_path, FINGERPRINT=fingerprint, SOURCE="climbmix 3")
    assert len(asked) == 1
    with pytest.raises(SystemExit, match="measured on the data set 0000"):
        facts_of(monkeypatch, tmp_path, FINGERPRINT="0000", SOURCE="pytorch")


def test_the_source_of_a_data_set_is_told_where_another_machine_has_it_too(monkeypatch, data, tmp_path):
    meta = json.loads((data / "meta.json").read_text())
    shutil.copytree(data, tmp_path / "copy")
    (tmp_path / "copy" / "meta.json").unlink()
    for more, told in (
        ({"source": "pytorch"}, "pytorch"),
        ({"source": "climbmix", "shards": 3}, "climbmix 3"),
    ):
        (tmp_path / "copy" / "meta.json").write_text(json.dumps(meta | more))
        assert facts_of(monkeypatch, tmp_path)["settings"]["SOURCE"] == told
    assert "SOURCE" not in facts_of(monkeypatch, data.parent)["settings"]  # a file of one's own


@pytest.fixture
def copied(data, tmp_path, monkeypatch):
    """A copy of the data set, which a test may change; no file of it is sealed."""
    folder = Path(shutil.copytree(data, tmp_path / "copy"))
    for path in folder.iterdir():
        path.chmod(0o644)
    monkeypatch.setenv("AUTORESEARCH_DATA", str(folder))
    prepare._sealed.clear()
    yield folder
    prepare._sealed.clear()


@pytest.mark.parametrize(
    "key, value", [("eval_tokens", 256), ("eval_rows", 8), ("unigram_bpb", 99.0), ("seq_len", 8)]
)
def test_a_meta_json_with_other_sizes_is_no_data_set(copied, key, value):
    meta = json.loads((copied / "meta.json").read_text())
    (copied / "meta.json").write_text(json.dumps(meta | {key: value}))
    assert prepare.read_meta(copied) is None
    with pytest.raises(SystemExit, match="run: python prepare.py"):
        prepare.take_hold()


@pytest.mark.parametrize("name", ["val.bin", "tokenizer.tiktoken"])
def test_a_file_that_is_not_what_was_prepared_ends_a_run(copied, name):
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content.replace(b" 0\n", b" X\n").replace(b" 1\n", b" 0\n").replace(b" X\n", b" 1\n")
                                if name.startswith("token") else content[:2] + content[:-2])  # fmt: skip
    with pytest.raises(SystemExit, match=f"{name} is damaged, or not what was prepared; delete its folder"):
        prepare.Run()


def test_a_train_file_that_is_not_what_was_prepared_has_no_facts(copied, monkeypatch):
    content = (copied / "train.bin").read_bytes()
    (copied / "train.bin").write_bytes(content[2:] + content[:2])
    with pytest.raises(SystemExit, match="train.bin is damaged"):
        facts_of(monkeypatch, copied)


def test_a_machine_that_does_not_compute_has_no_facts(monkeypatch, data):
    def fails(*args, **kwargs):
        raise RuntimeError("CUDA error: busy")

    monkeypatch.setattr(torch, "ones", fails)
    with pytest.raises(RuntimeError, match="busy"):
        facts_of(monkeypatch, data.parent)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_batches_are_right_while_copies_are_in_flight(data, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_DATA", str(data))
    run = prepare.Run()
    on_gpu, later = run.batches(64), []
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        busy = busy @ busy / 64  # keeps the stream behind the copies
        later.append(torch.cat(next(on_gpu)))
    monkeypatch.setattr(prepare, "pick_device", lambda: torch.device("cpu"))
    on_cpu = prepare.Run().batches(64)
    assert all(torch.equal(batch.cpu(), torch.cat(next(on_cpu))) for batch in later)
    run.preflight(Model(lambda x: torch.zeros(*x.shape, SIZES["vocab_size"], device="cuda")).cuda())
    progress = [run.progress() for _ in range(5)]
    assert progress == sorted(progress) and 0 <= progress[-1] < 1
    prepare._sealed.clear()
