"""The GPU's path of train.py, the ruler and the loop, on a build of torch that knows no CUDA.

main() runs as on a GPU, with small tensors of the CPU, and its graphs are counted. At its true sizes the model and
a step of the optimizers run on fake CUDA tensors, which have shapes, types and devices but no numbers. Mutations that
fail here, each tried:

    fits() hands the same tensor over twice; main() trains with another number of sequences than it tried; a learning
    rate is an argument of the compiled iteration; preflight gets the model before it is compiled; the rotary tables,
    the windows' blocks, Muon's mean or Adagrad's squares are made on the CPU; Muon's mean is bfloat16; the rotary
    tables or values stay float32; weights aren't cast; logits stay bfloat16; 128 sequences are accumulated four times;
    the peak of memory isn't reset; a GPU that torch can't use is replaced by the CPU; the compiler isn't looked for; a
    text that is met twice isn't told of; the last line of CUDA's error, or one below an earlier traceback, is its cause.
"""

import shutil
import sysconfig
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import SIZES
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import loop
import prepare
import train

SMALL = dict(train.GPU, depth=3, heads=2, head_dim=8, ngram_rows=64, short_window=8, micro_batch=4)


# ---- main(), in its order


class LikeCuda(str):
    """A device of the CPU by its name, that says it is CUDA."""

    type = "cuda"


class StandIn:
    """What main() asks of a prepare.Run, in three steps; batches are zeros."""

    def __init__(self, device, seq_len, vocab_size, eval_rows):
        self.device, self.seq_len, self.vocab_size, self.eval_rows = device, seq_len, vocab_size, eval_rows
        self.progress = iter([0.0, 0.4, 0.9, 1.0]).__next__
        self.losses = []

    def rows(self, count):
        return tuple(
            torch.zeros(count, self.seq_len, dtype=torch.int64, device=self.device) for _ in range(2)
        )

    def batches(self, rows):
        while True:
            yield self.rows(rows)

    def preflight(self, model):
        with torch.no_grad():
            self.logits = model(self.rows(self.eval_rows)[0])

    def log(self, step, loss, tokens):
        self.losses.append(loss.item())

    def finish(self, model, **facts):
        self.preflight(model)


def causal(q, k, v, block_mask):
    """In flex_attention's place, whose backward pass no CPU has; all tensors must be where the queries are."""
    tensors = [k, v, *(value for value in vars(block_mask).values() if isinstance(value, torch.Tensor))]
    assert {tensor.device for tensor in tensors} == {q.device} and q.dtype == k.dtype == v.dtype
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.fixture
def run_main(monkeypatch):
    """run_main(most_rows) -> (a StandIn that main() trained with, the rows of each graph that was compiled, in order)."""
    precision = torch.get_float32_matmul_precision()

    def run_main(most_rows=99):
        run, graphs = StandIn(LikeCuda("cpu"), seq_len=16, vocab_size=300, eval_rows=8), []

        def backend(graph, inputs):
            rows = [
                len(value)
                for value in inputs
                if isinstance(value, torch.Tensor) and value.dtype == torch.int64
            ]
            graphs.append(rows)

            def call(*args):
                if any(count > most_rows for count in rows[1:]):  # ids and targets: training
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                return graph(*args)

            return call

        torch.compiler.reset()
        compile_ = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda code, **options: compile_(code, backend=backend, **options)
        )
        monkeypatch.setattr(train, "flex_attention", causal)
        monkeypatch.setattr(train, "GPU", SMALL)
        monkeypatch.setattr(train, "prepare", SimpleNamespace(Run=lambda: run))
        train.main()
        return run, graphs

    yield run_main
    torch.set_float32_matmul_precision(precision)
    torch.compiler.reset()


@pytest.mark.slow
def test_each_graph_is_compiled_once(run_main):
    run, graphs = run_main()
    assert graphs == [[8], [4, 4], []]  # the ruler's logits, the loss, Muon's iteration
    assert run.losses[-1] < run.losses[0] and run.logits.dtype == torch.float32


@pytest.mark.slow
def test_a_card_with_less_memory_compiles_the_loss_once_for_each_number_of_sequences_tried(run_main):
    run, graphs = run_main(most_rows=1)
    assert graphs == [[8], [4, 4], [2, 2], [1, 1], []]
    assert run.losses[-1] < run.losses[0]


# ---- true sizes, on fake CUDA tensors


def item_of_fake(x, index):
    """Tensor.__getitem__ without the look at the device that needs a build with CUDA."""
    dim = 0
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, slice):
            x, dim = torch.ops.aten.slice(x, dim, part.start, part.stop, part.step or 1), dim + 1
        elif part is None:
            x, dim = x.unsqueeze(dim), dim + 1
        else:
            x = x.select(dim, part)
    return x


@pytest.fixture
def fake_cuda(monkeypatch):
    """Tensors are fake, and may be CUDA's; no gradients, as autograd needs a build with CUDA."""
    item, put, blocks = torch.Tensor.__getitem__, torch.Tensor.__setitem__, train.create_block_mask

    def create_block_mask(visible, B, H, T, S, device):
        with unset_fake_temporarily():
            mask = blocks(visible, B, H, T, S, "cpu")
        for name, value in vars(mask).items():
            if isinstance(value, torch.Tensor):
                setattr(mask, name, torch.empty(value.shape, dtype=value.dtype, device=device))
        return mask

    def getitem(x, index):
        return item_of_fake(x, index) if x.device.type == "cuda" else item(x, index)

    def setitem(x, index, value):
        if x.device.type != "cuda":
            return put(x, index, value)
        part = item_of_fake(x, index)
        assert part.shape == value.shape and part.device == value.device

    for kind in (torch.nn.Linear, torch.nn.Embedding):
        monkeypatch.setattr(kind, "reset_parameters", lambda self: None)
    monkeypatch.setattr(train.GPT, "initialize", lambda self, sizes: None)  # numbers, which aren't there
    monkeypatch.setattr(torch.Tensor, "__getitem__", getitem)
    monkeypatch.setattr(torch.Tensor, "__setitem__", setitem)
    monkeypatch.setattr(train, "create_block_mask", create_block_mask)
    monkeypatch.setattr(train, "flex_attention", causal)
    with FakeTensorMode(), torch.no_grad():
        yield torch.device("cuda")


@pytest.mark.slow
def test_at_true_sizes_all_tensors_are_on_the_gpu_and_of_the_right_type(fake_cuda):
    sizes, ruler = SimpleNamespace(**train.GPU), prepare.GPU_SIZES
    run = StandIn(fake_cuda, ruler["seq_len"], ruler["vocab_size"], ruler["eval_rows"])
    with torch.device(fake_cuda):  # as main() does
        model = train.GPT(sizes, run.vocab_size, run.seq_len, fake_cuda)
    optimizers = train.make_optimizers(model, sizes, lambda code: code)
    run.preflight(model)
    assert (run.logits.shape, run.logits.dtype) == ((32, 2048, 8192), torch.float32)
    x, y = run.rows(sizes.micro_batch)
    loss = model(x, y)
    assert (loss.shape, loss.dtype) == ((), torch.float32) and loss.device.type == "cuda"
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    train.optimize(optimizers, model, 0.5)
    assert {(parameter.device.type, parameter.dtype) for parameter in model.parameters()} == {
        ("cuda", torch.float32)
    }


def test_a_step_has_the_tokens_that_the_learning_rates_were_chosen_for():
    assert train.GPU["micro_batch"] * train.GPU["accumulation"] * prepare.GPU_SIZES["seq_len"] == 2**18


# ---- the ruler


TOO_OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 12040). Please update. (Triggered internally at x)"


def test_a_gpu_that_torch_cannot_use_is_named_and_not_replaced_by_the_cpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: warnings.warn(TOO_OLD, stacklevel=1))
    with pytest.raises(
        SystemExit,
        match=r"driver on your system is too old \(found version 12040\)\. Please update\. To use the CPU",
    ):
        prepare.pick_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a person who wants the CPU
    assert prepare.pick_device().type != "cuda"


def test_a_text_that_was_prepared_for_a_gpu_is_not_measured_on_a_cpu(monkeypatch, data):
    monkeypatch.setenv("AUTORESEARCH_DATA", str(data))
    monkeypatch.setattr(prepare, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setitem(prepare.GPU_SIZES, "seq_len", SIZES["seq_len"])
    with pytest.raises(SystemExit, match="prepared for a GPU, and torch finds none: does nvidia-smi show it"):
        prepare.facts()


@pytest.mark.parametrize("compiler, headers", [("", True), ("gcc", False)])
def test_what_compiling_for_a_gpu_needs_is_said_at_the_start(monkeypatch, tmp_path, compiler, headers):
    monkeypatch.setattr(prepare, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(shutil, "which", lambda name: name if name == compiler else None)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    if headers:
        (tmp_path / "Python.h").touch()
    with pytest.raises(
        SystemExit, match="needs a C compiler and .*Python.h, as from apt install gcc python3-dev"
    ):
        prepare.facts()


@pytest.fixture
def run(monkeypatch, data):
    monkeypatch.setenv("AUTORESEARCH_DATA", str(data))
    monkeypatch.setattr(prepare, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(prepare.Run, "_check_ruler", lambda run: None)  # other tests have replaced parts
    run = prepare.Run()
    run._work.stop()
    yield run
    prepare._sealed.clear()


class Uniform(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.one_hot(x, SIZES["vocab_size"]) * 1e-4


def test_the_peak_of_memory_is_that_of_training_and_not_of_what_was_tried_before(run, monkeypatch):
    calls = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: 0, synchronize=lambda: 0))
    run.preflight(Uniform())
    run._model, run.device = None, torch.device("cuda")
    for _ in range(4):
        run.progress()
    assert (
        calls.count("reset_peak_memory_stats") == 1 and calls.index("reset_peak_memory_stats") == 1
    )  # after one wait


def test_a_text_that_was_met_twice_is_too_short_and_the_run_says_so(run, capsys):
    run.preflight(Uniform())
    batches = run.batches(64)
    while run._tokens <= run.train_tokens:
        run.progress(), next(batches)
    run.finish(Uniform())
    out = capsys.readouterr().out
    epochs = float(out.partition("epochs: ")[2].split()[0])
    assert epochs > 1 and f"the text was too short: it was met {epochs:.3f} times; prepare more\n---" in out


# ---- what CUDA says when it fails

TRACEBACK = 'Traceback (most recent call last):\n  File "train.py", line 1, in main\n    loss.backward()\n'
ADVICE = (
    "Search for `cudaError' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more information.\n"
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.\n"
    "For debugging consider passing CUDA_LAUNCH_BLOCKING=1\n\n"
)
VERBOSE = "\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace (please do this especially if you're reporting a bug to PyTorch). \n\n"


@pytest.mark.parametrize(
    "error, advice",
    [
        ("torch.AcceleratorError: CUDA error: an illegal memory access was encountered", ADVICE),
        ("torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered", ADVICE),
        ("torch._inductor.exc.InductorError: RuntimeError: Failed to find C compiler. Please specify via CC environment variable.", VERBOSE),
        ("torch._dynamo.exc.TorchRuntimeError: RuntimeError when making fake tensor call", "  Explanation: Dynamo failed\n" + VERBOSE),
    ],
)  # fmt: skip
def test_the_cause_of_a_failed_run_is_the_error_and_not_the_advice_below_it(error, advice):
    first = f"{TRACEBACK}RuntimeError: something else\n\nThe above exception was the direct cause of the following exception:\n\n"
    assert loop.cause_of(f"step 1\n{first}{TRACEBACK}{error}\n{advice}", 1) == error


def test_a_gpu_without_memory_left_is_out_of_memory():
    text = f"{TRACEBACK}torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. See documentation for Memory\n"
    assert loop.cause_of(text, 1) == "out of memory"
