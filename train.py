"""The model and how it learns: the one file that the researcher edits.

    python train.py        prepare the text first, once: python prepare.py

Trains a GPT until the ruler's clock runs out, then lets the ruler measure val_bpb: bits per byte of unseen
text, lower is better. Reads batches from prepare.Run, prints the ruler's summary, writes no file.
"""

import zlib
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import prepare

# Knobs: plain numbers, each of which may be halved or doubled and still gives a run that works.
WARM_DOWN = 0.5  # share of the training time, at its end, over which all learning rates fall
FINAL_LR = 0.05  # share of the learning rates that is left at the end
MUON_MEAN = 19.0  # steps that Muon's running mean of gradients looks back
ADAM_MEAN = 4.0  # steps that AdamW's running mean of gradients looks back
ADAM_SQUARE = 19.0  # steps that AdamW's running mean of their squares looks back
NGRAM = 3  # tokens in the longest n-gram that has an embedding; the shortest has 2

# Sizes: what depends on the machine. The width of the model is heads x head_dim.
GPU = dict(
    depth=9,  # layers
    heads=4,
    head_dim=128,  # even, for the rotary pairs
    mlp_ratio=4,  # hidden width of the MLP over the model's width
    ngram_rows=262_144,  # of the table that n-grams are hashed into
    short_window=256,  # tokens that a layer with a short window looks back
    long_every=5,  # every n-th layer and the last one look back over the whole sequence
    rope_base=200_000.0,  # radians: about the longest rotary wavelength, in tokens
    logit_cap=15.0,  # logits are bent smoothly into plus or minus this; 0: they aren't
    micro_batch=128,  # sequences in one forward pass; halved until they fit in memory
    accumulation=1,  # forward passes in one optimizer step
    matrix_init=0.68,  # deviation of the random matrices, times the square root of their input's width
    matrix_lr=0.04,  # Muon: the spectral norm of one update
    embed_lr=0.9,  # AdamW: token and value embeddings
    head_lr=0.005,  # AdamW: output layer
    scalar_lr=0.02,  # AdamW: gates and mixes
    ngram_lr=0.3,  # row-wise Adagrad: the n-gram table
)
# One core trains on a hundredth of what a GPU does in the same time. What isn't said here is as above.
CPU = dict(
    GPU,
    depth=1,
    heads=2,
    head_dim=64,
    mlp_ratio=1,
    ngram_rows=524_288,
    rope_base=10_000.0,
    logit_cap=0.0,  # tanh of 2,048 logits a token would cost a fifth of a step
    micro_batch=4,
    accumulation=1,
    matrix_init=1.0,
    matrix_lr=0.02,
    embed_lr=0.3,
    head_lr=0.01,
    ngram_lr=1.0,
)

# ---- model


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def earlier(x, by=1):
    """x (B, T, ...) moved `by` places later along T, zeros in front: each position sees its predecessor."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (by, 0))[:, : x.size(1)]


def rotate(x, cos, sin):
    """Rotary position embedding (Su et al., arXiv 2104.09864) of x (B, T, heads, head_dim)."""
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin  # half of the signs are in sin


def window_mask(window, T, device):
    """flex_attention's blocks, for each position to see itself and the window - 1 before it."""
    return create_block_mask(lambda b, h, q, k: (k <= q) & (q - k < window), None, None, T, T, device)


def attend(q, k, v, mask):
    """Attention over (B, heads, T, head_dim) to all earlier positions, or those that the mask shows."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return flex_attention(q, k, v, block_mask=mask)


class Linear(nn.Linear):
    """Weights stay float32 for the optimizer and take the activations' type where they are used."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, sizes, vocab_size):
        super().__init__()
        self.heads, width = sizes.heads, sizes.heads * sizes.head_dim
        self.qkv = Linear(width, 3 * width, bias=False)
        self.out = Linear(width, width, bias=False)
        self.values = nn.Embedding(vocab_size, width)  # what a token says when it is attended to
        self.value_gate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, ids, rotary, mask):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).unbind(2)  # each (B, T, heads, head_dim)
        v = v + self.value_gate * self.values(ids).to(x.dtype).view_as(v)
        # Half of the heads look for what came before a token and read the token: "what followed, last time?"
        # Usually that takes two layers (induction heads, Olsson et al., arXiv 2209.11895); here one.
        q, k, half = norm(q), norm(k), self.heads // 2
        k = torch.cat((earlier(k[:, :, :half]), k[:, :, half:]), dim=2)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        y = attend(*(z.transpose(1, 2) for z in (q, k, v)), mask)  # (B, heads, T, head_dim)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        width = sizes.heads * sizes.head_dim
        self.up = Linear(width, sizes.mlp_ratio * width, bias=False)
        self.down = Linear(sizes.mlp_ratio * width, width, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, sizes, vocab_size):
        super().__init__()
        self.attention = Attention(sizes, vocab_size)
        self.mlp = MLP(sizes)
        self.mix = nn.Parameter(torch.tensor([1.0, 0.1]))  # of the stream so far, of the embeddings again

    def forward(self, x, x0, ids, rotary, mask):
        x = self.mix[0] * x + self.mix[1] * x0
        x = x + self.attention(norm(x), ids, rotary, mask)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """ids (B, T) -> logits (B, T, vocab), or the mean loss where targets (B, T) are given. T is fixed."""

    def __init__(self, sizes, vocab_size, T, device):
        super().__init__()
        width = sizes.heads * sizes.head_dim
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # of the activations
        self.tokens = nn.Embedding(vocab_size, width)
        self.ngrams = nn.Parameter(torch.zeros(sizes.ngram_rows, width))
        # On a CPU a step touches few rows, and a dense gradient of the table would cost more than the model.
        self.sparse = device.type == "cpu"
        self.blocks = nn.ModuleList(Block(sizes, vocab_size) for _ in range(sizes.depth))
        self.head = Linear(width, vocab_size, bias=False)
        self.logit_cap = sizes.logit_cap
        frequency = sizes.rope_base ** -torch.linspace(0, 1, sizes.head_dim // 2)
        angle = torch.outer(torch.arange(T), frequency)[:, None]  # (T, 1, head_dim / 2)
        cos, sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
        self.rotary = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # each (T, 1, head_dim)
        short = min(sizes.short_window, T) if device.type == "cuda" else T  # elsewhere a window saves nothing
        self.windows = [short if i % sizes.long_every else T for i in range(1, sizes.depth + 1)]
        self.windows[-1] = T
        self.masks = [window_mask(window, T, device) if window < T else None for window in self.windows]
        self.initialize(sizes)

    @torch.no_grad()
    def initialize(self, sizes):
        """Draws each matrix from a generator of its own, by seed and name: adding one changes no other."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                generator = torch.Generator().manual_seed(torch.initial_seed() + zlib.crc32(name.encode()))
                weight = torch.randn(module.weight.shape, generator=generator, device="cpu")
                if isinstance(module, nn.Linear):
                    weight *= sizes.matrix_init * module.in_features**-0.5
                if name.endswith(("out", "down", "head")):
                    weight *= 0  # at first a block adds nothing, and all tokens are equally likely
                module.weight.copy_(weight)

    def forward(self, ids, targets=None):
        x, key = self.tokens(ids), ids  # (B, T, width), (B, T)
        for back in range(1, NGRAM):
            key = 1_000_003 * key + earlier(ids, back) + 1  # of the n-gram ending here; may wrap at 64 bits
            x = x + F.embedding(key % len(self.ngrams), self.ngrams, sparse=self.sparse)
        x = x0 = norm(x.to(self.dtype))
        for block, mask in zip(self.blocks, self.masks, strict=True):
            x = block(x, x0, ids, self.rotary, mask)
        logits, cap = self.head(norm(x)).float(), self.logit_cap  # (B, T, vocab)
        logits = cap * torch.tanh(logits / cap) if cap else logits
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def flops_per_token(self):
        """Forward and backward: 6 a weight of a matrix product, 12 x width a token that attention sees."""
        matrices = sum(module.weight.numel() for module in self.modules() if isinstance(module, Linear))
        return 6 * matrices + 12 * self.tokens.embedding_dim * sum(self.windows)


# ---- optimizers


def orthogonalize(x):
    """About the nearest orthogonal matrix of each in x (N, n, n): Polar Express (arXiv 2505.16932)."""
    margin = 1.02  # bfloat16 rounding takes singular values past the range that the coefficients are made for
    x = x / (margin * x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    ):
        a, b, c = a / margin, b / margin**3, c / margin**5
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is orthogonalised (Jordan et al., https://kellerjordan.github.io/posts/muon/).

    Each matrix has the model's width as one side and a multiple of it as the other. All are cut into squares
    of that width, which are orthogonalised as one batch.
    """

    def __init__(self, matrices, lr, dtype, orthogonalize):
        super().__init__(matrices, dict(lr=lr))
        self.width, self.dtype, self.orthogonalize = min(matrices[0].shape), dtype, orthogonalize
        self.mean = torch.zeros_like(self.squares(matrices))

    def cut(self, matrix):
        """A view of (rows, columns) as (rows / width, columns / width, width, width)."""
        return matrix.unflatten(0, (-1, self.width)).unflatten(2, (-1, self.width)).transpose(1, 2)

    def squares(self, matrices):
        return torch.cat([self.cut(matrix).flatten(0, 1) for matrix in matrices])  # (N, width, width)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        gradient = self.squares([matrix.grad for matrix in group["params"]])
        self.mean.lerp_(gradient, 1 / (1 + MUON_MEAN))
        update = gradient.lerp(self.mean, 1 - 1 / (1 + MUON_MEAN))  # Nesterov: as if a step ahead
        update = group["lr"] * self.orthogonalize(update.to(self.dtype)).float()
        views = [self.cut(matrix) for matrix in group["params"]]
        for view, part in zip(views, update.split([len(view.flatten(0, 1)) for view in views]), strict=True):
            view -= part.view_as(view)


class RowAdagrad(torch.optim.Optimizer):
    """Adagrad (Duchi et al., 2011) with one sum of squares a row: rare n-grams take larger steps."""

    def __init__(self, table, lr):
        super().__init__([table], dict(lr=lr))
        self.squares = torch.zeros_like(table[:, :1])  # (rows, 1)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        (table,) = group["params"]
        if table.grad is None:  # NGRAM = 1: none is looked up
            return
        rows, gradient = slice(None), table.grad
        if gradient.is_sparse:  # only the rows of this step's n-grams
            gradient = gradient.coalesce()
            rows, gradient = gradient.indices()[0], gradient.values()
        self.squares[rows] += gradient.square().mean(1, keepdim=True)
        table[rows] -= group["lr"] * gradient * (self.squares[rows] + 1e-30).rsqrt()  # no gradient, no step


def make_optimizers(model, sizes, compiled):
    matrices = [module.weight for module in model.blocks.modules() if isinstance(module, Linear)]
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    others = {*model.parameters()} - {*matrices, *embeddings, model.head.weight, model.ngrams}
    groups = [
        dict(params=embeddings, lr=sizes.embed_lr),
        dict(params=[model.head.weight], lr=sizes.head_lr),
        dict(params=[p for p in model.parameters() if p in others], lr=sizes.scalar_lr),
    ]
    betas = 1 - 1 / (1 + ADAM_MEAN), 1 - 1 / (1 + ADAM_SQUARE)
    return [
        torch.optim.AdamW(groups, betas=betas, eps=1e-10, weight_decay=0.0, fused=True),
        RowAdagrad(model.ngrams, sizes.ngram_lr),
        Muon(matrices, sizes.matrix_lr, model.dtype, compiled(orthogonalize)),
    ]


def optimize(optimizers, model, progress):
    """One step of all, at the learning rates of this point of the training time, 0 to 1."""
    share = FINAL_LR + (1 - FINAL_LR) * min(1.0, (1 - progress) / WARM_DOWN)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group.setdefault("peak_lr", group["lr"])
        optimizer.step()
    model.zero_grad()


# ---- training


def learn(model, x, y, micro_batch):
    """Adds the gradients of the mean loss over x, y (rows, T), so many rows at a time; returns the loss."""
    total = 0.0
    for x_part, y_part in zip(x.split(micro_batch), y.split(micro_batch), strict=True):
        loss = len(x_part) / len(x) * model(x_part, y_part)
        loss.backward()
        total += loss.detach()
    return total


def fits(model, rows, T, device):
    """Whether forward and backward of so many sequences fit in memory."""
    x, y = (torch.zeros(rows, T, dtype=torch.int64, device=device) for _ in range(2))
    try:
        model(x, y).backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad()


def main():
    run = prepare.Run()
    on_gpu = run.device.type == "cuda"
    sizes = SimpleNamespace(**(GPU if on_gpu else CPU))
    # Without graph breaks on a GPU; on a CPU a cold compile costs more than it brings at these budgets.
    compiled = partial(torch.compile, dynamic=False, fullgraph=True) if on_gpu else lambda code: code
    if on_gpu:  # on a CPU float32 products stay float32
        torch.set_float32_matmul_precision("high")
    with torch.device(run.device):
        model = GPT(sizes, run.vocab_size, run.seq_len, run.device)
    optimizers = make_optimizers(model, sizes, compiled)
    model = compiled(model)
    run.preflight(model)  # compiles the graph of the logits; training compiles that of the loss
    micro_batch = sizes.micro_batch
    while micro_batch > 1 and not fits(model, micro_batch, run.seq_len, run.device):
        micro_batch //= 2
        print(f"out of memory: {micro_batch} sequences at a time instead", flush=True)

    batches = run.batches(sizes.micro_batch * sizes.accumulation)  # a step's, however many at a time
    step, tokens = 0, 0
    while (progress := run.progress()) < 1:
        x, y = next(batches)  # (rows, T) each
        loss = learn(model, x, y, micro_batch)
        optimize(optimizers, model, progress)
        step, tokens = step + 1, tokens + x.numel()
        run.log(step, loss, tokens)
    run.finish(model, depth=sizes.depth, flops_per_token=model.flops_per_token())


if __name__ == "__main__":
    main()
