"""The shipped train.py: through the real ruler and the real loop, and the parts that only a GPU uses as far as a CPU can show."""

import dataclasses
import json
import shutil
from functools import partial

import pytest
import torch
from conftest import ROOT

import loop
import train

T, VOCABULARY = 16, 300
CPU = torch.device("cpu")
TINY = dataclasses.replace(train.CPU, heads=2, head_dim=8, ngram_rows=64, memory_rows=256, short_window=4, long_every=2, depth=3)


def make(sizes=TINY):
    torch.manual_seed(0)
    model = train.GPT(sizes, VOCABULARY, T, CPU)
    if model.memory:
        text = torch.randint(VOCABULARY, (8, T + 1))
        model.memory.read(text[:, :-1], text[:, 1:])
    return model, train.make_optimizers(model, sizes, lambda function: function)


def steps(model, optimizers, count=5):
    x = torch.randint(VOCABULARY, (4, T), generator=torch.Generator().manual_seed(1))
    for step in range(count):
        loss = train.learn_by_rows(model, x, x, 1.0)
        train.optimize(optimizers, model, step / count)
    return loss.item()


def test_the_loop_measures_the_shipped_baseline_with_the_real_ruler(project, data):
    for name in ("train.py", "prepare.py"):
        shutil.copy(ROOT / name, project.folder)
    source = project.read("train.py")
    for label, node in loop.numbers(source, "GPU"):
        if label in ("CPU.ngram_rows", "CPU.memory_rows"):  # smaller tables, for a quick start
            source = source.replace(f"{label.removeprefix('CPU.')}={node.value:_}", f"{label.removeprefix('CPU.')}=4096")
    project.write("train.py", source)
    project.commit("real")
    project.run("--offline", "--budget", "20", "--tag", "t", "--hours", "0.000001", AUTORESEARCH_DATA=str(data))
    (row,) = project.rows()
    assert row["status"] == "keep" and float(row["val_bpb"]) < json.loads((data / "meta.json").read_text())["unigram_bpb"]
    log = next(project.folder.glob("runs/0000-*/run.log")).read_text()
    assert log.startswith("data: ") and "\nsignature: " in log and project.status() == ""


def test_training_learns(capsys):
    model, optimizers = make()
    untrained = train.mean_loss(model, *[torch.zeros(1, T, dtype=torch.int64)] * 2).item()
    assert untrained == pytest.approx(torch.tensor(float(VOCABULARY)).log().item(), rel=1e-5)  # a zero head: all tokens alike
    assert steps(model, optimizers) < untrained


def test_every_parameter_is_trained():
    model, optimizers = make()
    steps(model, optimizers, count=1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    steps(model, optimizers, count=2)
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]


def test_no_logit_sees_a_later_token():
    model, optimizers = make()
    steps(model, optimizers)  # trained: untrained output layers are zero and would hide a leak
    x = torch.randint(VOCABULARY, (2, T), generator=torch.Generator().manual_seed(2))
    changed = x.clone()
    changed[:, 9:] = 7
    model.eval()
    with torch.no_grad():
        difference = (model(x) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:9].max() == 0 and difference[9:].min() > 0


def knobs():
    return [label for label, _ in loop.numbers((ROOT / "train.py").read_text(), "GPU")]


@pytest.mark.parametrize("factor", [0.5, 2])
@pytest.mark.parametrize("label", knobs())
def test_every_knob_may_be_halved_or_doubled(label, factor, monkeypatch):
    sizes, name = TINY, label.removeprefix("CPU.")
    value = getattr(train, label) if name == label else getattr(train.CPU, name)
    value = type(value)(max(value * factor, 1) if isinstance(value, int) else value * factor)
    if name == label:
        monkeypatch.setattr(train, label, value)
    elif name not in ("ngram_rows", "memory_rows", "short_window"):
        sizes = dataclasses.replace(TINY, **{name: value})
    assert steps(*make(sizes), count=2) < 50


def test_learning_by_rows_gives_the_gradients_of_the_whole_batch():
    model, optimizers = make()
    steps(model, optimizers)  # a head of zeros passes no gradient on
    model.eval()  # the memory's random guesses would differ
    x, y = torch.randint(VOCABULARY, (2, 4, T), generator=torch.Generator().manual_seed(3))
    gradients = []
    for learn in (partial(train.learn, train.mean_loss), train.learn_by_rows):
        loss = learn(model, x, y, 0.5)
        gradients.append([loss, *(p.grad.to_dense() for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    torch.testing.assert_close(*gradients)


def remembering(text, rows=2**12):
    """A memory that has read `text`, a list of tokens; and its guesses after each position of another list."""
    memory = train.Memory(rows, VOCABULARY, 8)
    ids = torch.tensor([text])
    memory.read(ids[:, :-1], ids[:, 1:])

    def guesses(ids):
        keys = train.ngram_keys(torch.tensor([ids]), train.READ_NGRAM)
        return [memory.token[n][key % rows][0, -1].item() for n, key in enumerate(keys[1:])]

    return memory, guesses


def test_the_memory_guesses_what_mostly_followed():
    _, guesses = remembering([1, 2, 3, 9, 1, 2, 4, 9])
    assert guesses([1, 2])[0] in (3, 4)
    memory, guesses = remembering([1, 2, 3])
    for following in (4, 4, 4, 3, 5):
        memory.read(torch.tensor([[1, 2]]), torch.tensor([[2, following]]))
    assert guesses([1, 2])[0] == 4
    assert guesses([2, 1])[0] == VOCABULARY  # never read: none


def test_the_memory_knows_longer_ngrams_apart():
    _, guesses = remembering([1, 2, 3, 4, 9, 8, 2, 3, 5])
    assert guesses([1, 2, 3])[1] == 4 and guesses([8, 2, 3])[1] == 5


def test_the_memory_doubts_its_guesses_in_training_only():
    memory, _ = remembering(list(range(200)))
    ids = torch.arange(200)[None]
    keys = train.ngram_keys(ids, train.READ_NGRAM)
    assert not torch.equal(memory(ids, keys), memory(ids, keys))
    memory.eval()
    assert torch.equal(memory(ids, keys), memory(ids, keys))


def test_what_followed_the_same_ngram_in_the_sequence_is_found():
    ids = torch.tensor([[5, 6, 7, 5, 8, 6, 5]])
    one, two = train.ngram_keys(ids, 2)
    assert train.followed_before(ids, one, -1).tolist() == [[-1, -1, -1, 6, -1, 7, 8]]  # the latest 5 before the last one came before 8
    ids = torch.tensor([[5, 6, 7, 4, 6, 9, 5, 6]])
    one, two = train.ngram_keys(ids, 2)
    assert train.followed_before(ids, one, -1)[0, -1] == 9 and train.followed_before(ids, two, -1)[0, -1] == 7


@dataclasses.dataclass
class Reading:
    """As much of a prepare.Run as reading needs: every token of its text has a number of its own."""

    train_tokens: int = 40 * 32 * T
    calls_until_time_is_over: int = 10**6
    calls: int = 0

    def batches(self, rows):
        text = torch.arange(self.train_tokens).view(-1, rows, T)
        while True:
            yield from zip(text, text + 1, strict=True)

    def progress(self):
        self.calls += 1
        return float(self.calls > self.calls_until_time_is_over)


def read_ahead(run, progress, batches_drawn):
    """(tokens read, tokens that may be drawn in all, what is drawn after it) where so many batches of T tokens came first."""
    memory, read, batches = train.Memory(64, VOCABULARY, 8), [], run.batches(1)
    memory.read = lambda x, y: read.extend(x.flatten().tolist())
    drawn = [token for _ in range(batches_drawn) for token in next(batches)[0].flatten().tolist()]
    most = train.read_ahead(run, memory, batches, progress, len(drawn))
    while len(drawn) < most and batches_drawn < 10**4:
        drawn += next(batches)[0].flatten().tolist()
        batches_drawn += 1
    return read, most, drawn


@pytest.mark.parametrize("calls", [3, 10**6])
def test_no_text_is_met_twice_by_training_or_after_reading(calls, capsys):
    read, most, drawn = read_ahead(run := Reading(calls_until_time_is_over=calls), 0.05, 32)
    assert len(set(read + drawn)) == len(read) + len(drawn) and run.train_tokens - len(read) - len(drawn) <= 32 * T
    # At 0.05 it has drawn 1 of 40 draws, so 20 are to be expected, and a tenth more may be: 18 are left to read.
    assert len(read) == (3 if calls == 3 else 18) * 32 * T


@pytest.mark.parametrize("progress, share", [(0.001, 0), (0.9, train.READ_SHARE)])
def test_what_training_will_reach_is_not_read_nor_more_than_the_share(progress, share, capsys):
    read, most, _ = read_ahead(run := Reading(), progress, 8)
    assert len(read) == share * run.train_tokens and (most < run.train_tokens if read else most == float("inf"))


def test_the_graph_compiles_in_one_piece():
    model, _ = make(dataclasses.replace(TINY, memory_rows=0, logit_cap=15.0))  # as on a GPU
    compiled = torch.compile(train.mean_loss, backend="eager", fullgraph=True, dynamic=False)
    x = torch.zeros(2, T, dtype=torch.int64)
    torch.testing.assert_close(compiled(model, x, x), train.mean_loss(model, x, x))


def test_other_learning_rates_compile_nothing_anew():
    def compiled_code(sizes):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph.code)
            return graph.forward

        torch.compiler.reset()
        compiled = partial(torch.compile, backend=backend, fullgraph=True, dynamic=False)
        model, _ = make(sizes)
        optimizers, loss_of = train.make_optimizers(model, sizes, compiled), compiled(train.mean_loss)
        x = torch.zeros(2, T, dtype=torch.int64)
        for progress in (0.0, 0.5, 0.9):
            train.learn(loss_of, model, x, x, 1.0)
            train.optimize(optimizers, model, progress)
        return graphs

    sizes = dataclasses.replace(TINY, memory_rows=0, logit_cap=15.0)  # as on a GPU
    code = compiled_code(sizes)
    other = compiled_code(dataclasses.replace(sizes, matrix_lr=0.1, embed_lr=0.1, ngram_lr=0.1, head_lr=0.1, scalar_lr=0.1))
    assert code == other and len(code) == 2  # the loss and Muon's iteration: what inductor's cache knows them by is the same


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(capsys):
    model, _ = make()
    sizes = dataclasses.replace(TINY, micro_batch=8, accumulation=3)

    def loss_of(model, x, y):
        if len(x) > 3:
            raise torch.OutOfMemoryError("too many")
        return train.mean_loss(model, x, y)

    assert train.fitting_micro_batch(model, loss_of, sizes, T, CPU) == 2  # 24 sequences a step: a divisor of them
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: flex_attention's blocks against a dense mask")
def test_on_a_gpu_windows_are_what_a_dense_mask_gives():
    q, k, v = torch.randn(3, 2, 2, 256, 64, device="cuda", dtype=torch.bfloat16).unbind()
    blocks = train.window_mask(32, 256, torch.device("cuda"))
    dense = train.window_mask(32, 256, CPU).cuda()
    torch.testing.assert_close(torch.compile(train.attend)(q, k, v, blocks), train.attend(q, k, v, dense), atol=2e-2, rtol=2e-2)
