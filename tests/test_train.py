"""The shipped train.py: through the real ruler and the real loop, and the GPU's parts as far as a CPU can."""

import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, reply_of
from night.edits import EDITS

import loop
import prepare
import train

T, VOCABULARY = 16, 300
CPU = torch.device("cpu")
TINY = dict(train.CPU, depth=3, heads=2, head_dim=8, ngram_rows=64)


def make(compiled=lambda code: code, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = SimpleNamespace(**dict(TINY, **changes))
    model = train.GPT(sizes, VOCABULARY, T, CPU)
    return model, train.make_optimizers(model, sizes, compiled)


def text(rows=4, seed=1):
    return torch.randint(VOCABULARY, (rows, T), generator=torch.Generator().manual_seed(seed))


def steps(model, optimizers, count=5):
    x = text()
    for step in range(count):
        loss = train.learn(model, x, x, micro_batch=2)
        train.optimize(optimizers, model, step / count)
    return loss.item()


@pytest.mark.slow
def test_the_loop_measures_the_shipped_baseline_with_the_real_ruler(project, data):
    for name in ("train.py", "prepare.py"):
        shutil.copy(ROOT / name, project.folder)
    project.commit("real")
    once = "--offline", "--budget", "60", "--tag", "t", "--hours", "0.000001"
    project.run(*once, AUTORESEARCH_DATA=str(data))
    (row,) = project.rows()
    assert row["status"] == "keep"
    assert float(row["val_bpb"]) < json.loads((data / "meta.json").read_text())["unigram_bpb"]
    log = next(project.folder.glob("runs/0000-*/0/run.log")).read_text()
    assert log.startswith("data: ") and "\nresult: " in log and project.status() == ""


def test_training_learns():
    model, optimizers = make()
    x = text()
    untrained = model(x, x).item()
    assert untrained == pytest.approx(math.log(VOCABULARY), rel=1e-5)  # all tokens alike
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
    x = text(rows=2, seed=2)
    changed = x.clone()
    changed[:, 9:] = 7
    with torch.no_grad():
        difference = (model(x) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:9].max() == 0 and difference[9:].min() > 0


def test_what_rotary_embedding_does_to_a_query_and_a_key_depends_on_their_distance_alone():
    model, _ = make()
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    q, k = (train.rotate(z.expand(1, T, 1, 8), *model.rotary)[0, :, 0] for z in (q, k))
    products = q @ k.T
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1])
    assert products[:, 0].std() > 0.01


def start(seed=0, **changes):
    return dict(make(seed=seed, **changes)[0].named_parameters())


def test_a_seed_gives_the_same_start_to_a_parameter_whatever_an_edit_adds(monkeypatch):
    before = start(depth=2)
    deeper = start(depth=3)

    class Gated(train.MLP):
        def __init__(self, sizes):
            super().__init__(sizes)
            self.gate = train.Linear(16, 16, bias=False)

    monkeypatch.setattr(train, "MLP", Gated)
    gated = start(depth=2)
    for more in (deeper, gated):
        assert len(more) > len(before) and all(torch.equal(more[name], before[name]) for name in before)


def test_another_seed_gives_another_start_and_no_two_matrices_share_one():
    one, other = start(seed=0), start(seed=1)
    drawn = [name for name, parameter in one.items() if parameter.dim() == 2 and parameter.std() > 0]
    assert "blocks.0.mlp.up.weight" in drawn
    assert not [name for name in drawn if torch.equal(one[name], other[name])]
    up, up_above = (one[f"blocks.{layer}.mlp.up.weight"] for layer in (0, 1))
    assert not torch.equal(up, up_above)


def knobs(other_device):
    return [label for label, _ in loop.constants((ROOT / "train.py").read_text(), [other_device])]


@pytest.mark.every(5)
@pytest.mark.parametrize("factor", [0.5, 2])
@pytest.mark.parametrize("label", knobs("GPU"))
def test_every_knob_may_be_halved_or_doubled(label, factor, monkeypatch):
    name = label.removeprefix("CPU.")
    value = train.CPU[name] if name != label else getattr(train, label)
    value = type(value)(max(value * factor, 1) if isinstance(value, int) else value * factor)
    if name == label:
        monkeypatch.setattr(train, label, value)
    changes = {} if name in (label, "ngram_rows") else {name: value}
    assert steps(*make(**changes), count=2) < 50


def test_every_size_is_a_knob_of_the_gpu_and_the_cpu_has_no_other():
    assert {f"GPU.{name}" for name in train.GPU} <= set(knobs("CPU"))
    assert train.CPU.keys() == train.GPU.keys()


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_step_is_the_same_however_many_sequences_go_at_a_time(micro_batch):
    model, optimizers = make()
    steps(model, optimizers)  # a head of zeros passes no gradient on
    x, y = text(seed=2), text(seed=3)
    gradients = []
    for rows in (4, micro_batch):
        loss = train.learn(model, x, y, rows)
        gradients.append([loss, *(parameter.grad.to_dense() for parameter in model.parameters())])
        model.zero_grad()
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_the_graph_compiles_in_one_piece():
    model, _ = make(logit_cap=15.0)  # as on a GPU
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    x = text()
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(compiled(x, x), model(x, x))


@pytest.mark.slow
def test_other_learning_rates_compile_nothing_anew():
    def compiled_code(**changes):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph.code)
            return graph.forward

        torch.compiler.reset()
        compiled = partial(torch.compile, backend=backend, fullgraph=True, dynamic=False)
        model, optimizers = make(compiled, logit_cap=15.0, **changes)
        model = compiled(model)
        train.fits(model, 4, T, CPU)
        for progress in (0.0, 0.5, 0.9):
            train.learn(model, text(), text(), micro_batch=4)
            train.optimize(optimizers, model, progress)
        return graphs

    code = compiled_code()
    other = compiled_code(matrix_lr=0.1, embed_lr=0.1, ngram_lr=0.1, head_lr=0.1, scalar_lr=0.1)
    assert len(code) == 2  # the loss and Muon's iteration
    assert code == other  # what inductor's cache knows them by


def test_what_does_not_fit_in_memory_leaves_no_gradients():
    def needs_memory(model, inputs):
        if len(inputs[0]) > 3:
            raise torch.OutOfMemoryError("too many")

    model, _ = make()
    model.register_forward_pre_hook(needs_memory)
    assert train.fits(model, 3, T, CPU) and not train.fits(model, 4, T, CPU)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, for flex_attention's kernel")
def test_on_a_gpu_windows_are_what_a_dense_mask_gives():
    q, k, v = torch.randn(3, 2, 2, 256, 64, device="cuda", dtype=torch.bfloat16).unbind()
    at = torch.arange(256, device="cuda")
    visible = (at <= at[:, None]) & (at[:, None] - at < 32)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    blocks = train.window_mask(32, 256, torch.device("cuda"))
    torch.testing.assert_close(torch.compile(train.attend)(q, k, v, blocks), dense, atol=2e-2, rtol=2e-2)


@pytest.mark.every(5)
@pytest.mark.parametrize("edit", EDITS, ids=[idea for idea, *_ in EDITS])
def test_an_edit_written_for_a_night_fits_the_shipped_file_and_the_ruler_lets_it_run(edit):
    idea, reason, blocks = edit
    reply = reply_of(idea, reason, *blocks)
    source = loop.apply_edit((ROOT / "train.py").read_text(), loop.parse_reply(reply))
    assert not prepare.reaches_outside(source)
