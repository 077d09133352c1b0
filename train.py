"""The model and how it learns: the one file that the researcher edits.

    python train.py        prepare the text first, once: python prepare.py

Trains a GPT until the ruler's clock runs out, then lets the ruler measure it. Reads batches from prepare.Run and prints the
ruler's summary; writes no file. The number that counts is val_bpb, bits per byte of unseen text: lower is better.
"""

import itertools
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import prepare

# Knobs: plain numbers, each of which may be halved or doubled and still gives a run that works.
WARM_DOWN = 0.5  # share of the training time, at its end, over which the learning rates fall
FINAL_LR = 0.05  # share of the learning rates that is left at the end
MUON_MEAN = 20.0  # steps that Muon's running mean of gradients looks back
ADAM_MEAN = 5.0  # steps that AdamW's running mean of gradients looks back
ADAM_SQUARE = 20.0  # steps that AdamW's running mean of their squares looks back
NGRAM = 3  # tokens in the longest n-gram that has an embedding; the shortest has 2
SEEN_NGRAM = 3  # tokens in the longest n-gram that is looked for in the sequence itself; the shortest has 1
READ_NGRAM = 7  # tokens in the longest n-gram that the memory knows; the shortest has 2
MOST_LEAD = 7  # votes that a guess of the memory is ahead by, from which on more say no more
READ_AT = 0.03  # share of the training time after which it is known what training won't reach, and the memory reads that
READ_TIME = 0.05  # share of the training time, at most, for reading
READ_SHARE = 0.8  # of the text, at most, for the memory
DOUBT = 0.15  # share of the memory's guesses that are replaced by chance in training


@dataclass(frozen=True)
class Sizes:
    """What depends on the machine. The width of the model is heads x head_dim."""

    depth: int  # layers
    heads: int
    head_dim: int  # even, for the rotary pairs
    mlp_ratio: int  # hidden width of the MLP over the model's width
    ngram_rows: int  # of the table which n-grams are hashed into
    memory_rows: int  # for each length of n-gram in the memory; 0: no memory
    short_window: int  # tokens that a layer with a short window looks back
    long_every: int  # every n-th layer and the last one look back over the whole sequence
    rope_base: float  # radians: about the longest rotary wavelength, in tokens
    logit_cap: float  # logits are bent smoothly into plus or minus this; 0: they aren't, which on a CPU saves a fifth of a step
    micro_batch: int  # sequences in one forward pass
    accumulation: int  # forward passes in one optimizer step
    matrix_lr: float  # Muon: the spectral norm of one update
    embed_lr: float  # AdamW: token and value embeddings
    ngram_lr: float  # row-wise Adagrad: the n-gram table
    head_lr: float  # AdamW: output layer
    scalar_lr: float  # AdamW: scales, gates and how far each guess of the memory is trusted


GPU = Sizes(
    depth=9,
    heads=4,
    head_dim=128,
    mlp_ratio=4,
    ngram_rows=262_144,
    memory_rows=0,  # the text is read many times over: nothing in it is new for long
    short_window=256,
    long_every=5,
    rope_base=200_000.0,
    logit_cap=15.0,
    micro_batch=32,
    accumulation=4,
    matrix_lr=0.04,
    embed_lr=0.9,
    ngram_lr=0.3,
    head_lr=0.005,
    scalar_lr=0.02,
)
CPU = Sizes(
    depth=2,
    heads=2,
    head_dim=64,
    mlp_ratio=1,
    ngram_rows=524_288,
    memory_rows=4_194_304,
    short_window=256,
    long_every=1,
    rope_base=10_000.0,
    logit_cap=0.0,
    micro_batch=8,
    accumulation=1,
    matrix_lr=0.02,
    embed_lr=0.3,
    ngram_lr=1.0,
    head_lr=0.01,
    scalar_lr=0.02,
)

# ---- model


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def earlier(x, by=1):
    """x (B, T, ...) moved `by` places later along T, zeros in front: each position sees its predecessor."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (by, 0))[:, : x.size(1)]


def rotate(x, cos, sin):
    """Rotary position embedding (Su et al., arXiv 2104.09864) of x (B, heads, T, head_dim)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def ngram_keys(ids, longest):
    """A number for each n-gram that ends at a position of ids (B, T): one (B, T) for each n from 1 to `longest`."""
    keys = [ids]
    for back in range(1, longest):
        keys.append(1_000_003 * keys[-1] + earlier(ids, back) + 1)  # products wrap at 64 bits, which is fine
    return keys


def followed_before(ids, key, none):
    """(B, T): what followed the latest earlier position of the sequence with the same key; `none` where there is no such."""
    after = torch.arange(1, ids.size(1) + 1, device=ids.device, dtype=torch.int16)  # as int64 this takes seven times as long
    same = (key[:, :, None] == key[:, None, :]) & (after < after[:, None])  # (B, T, T), the earlier positions last
    latest = (same * after).amax(2).long()
    return torch.where(latest > 0, ids.gather(1, latest), none)


class Linear(nn.Linear):
    """No bias. Weights stay float32 for the optimizer and take the activations' type where they are used."""

    def __init__(self, inputs, outputs, std=None):
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight, std=inputs**-0.5 if std is None else std)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, sizes, vocab_size):
        super().__init__()
        self.heads, self.head_dim = sizes.heads, sizes.head_dim
        width = self.heads * self.head_dim
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width, std=0)
        self.values = nn.Embedding(vocab_size, width)  # what a token says when it is attended to, whatever its context
        self.value_gate = nn.Parameter(torch.tensor(0.5))
        self.qk_scale = nn.Parameter(torch.ones(self.heads))  # length of queries and keys: how sharp attention is

    def forward(self, x, ids, rotary, mask):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, self.head_dim).unbind(2)  # each (B, T, heads, head_dim)
        v = v + self.value_gate.to(x.dtype) * self.values(ids).to(x.dtype).view_as(v)
        # Half of the heads look for what came before a token and read the token: "what followed, the last time?"
        # Usually that takes two layers (induction heads, Olsson et al., arXiv 2209.11895); here one.
        half = self.heads // 2
        k = torch.cat((earlier(k[:, :, :half]), k[:, :, half:]), dim=2)
        scale = self.qk_scale.to(x.dtype)[:, None]
        q, k = (rotate((scale * norm(z)).transpose(1, 2), *rotary) for z in (q, k))  # (B, heads, T, head_dim)
        y = attend(q, k, v.transpose(1, 2), mask)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        width = sizes.heads * sizes.head_dim
        self.up = Linear(width, sizes.mlp_ratio * width)
        self.down = Linear(sizes.mlp_ratio * width, width, std=0)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, sizes, vocab_size):
        super().__init__()
        self.attention = Attention(sizes, vocab_size)
        self.mlp = MLP(sizes)
        self.mix = nn.Parameter(torch.tensor([1.0, 0.1]))  # of the stream so far, of the embeddings again

    def forward(self, x, x0, ids, rotary, mask):
        x = self.mix[0].to(x.dtype) * x + self.mix[1].to(x.dtype) * x0
        x = x + self.attention(norm(x), ids, rotary, mask)
        return x + self.mlp(norm(x))


class Memory(nn.Module):
    """Guesses the next token: it is what followed the same n-gram before, in the sequence or in a part of the text that was read once.

    The first needs no weights and no second layer to find it (n-gram heads: Akyurek et al., arXiv 2401.12973). For the second, each
    slot holds the token that won a majority vote (Boyer and Moore, 1991) among those that followed, and its lead. Reading is a hundred
    times as fast as training. But what is trained on shares documents with what was read, and new text doesn't: guesses are better in
    training than they will be. Random ones among them keep the model from trusting them too much.
    """

    def __init__(self, rows, vocab_size, width):
        super().__init__()
        self.vocab_size = vocab_size
        self.guess = nn.Embedding(vocab_size + 1, width)  # of the guessed token; the last row stands for none
        nn.init.normal_(self.guess.weight, std=0.02)
        self.trust_seen = nn.Parameter(torch.ones(SEEN_NGRAM))
        self.trust_read = nn.Parameter(torch.full((READ_NGRAM - 1, MOST_LEAD + 1), 0.3))
        self.register_buffer("token", torch.full((READ_NGRAM - 1, rows), vocab_size, dtype=torch.int16))
        self.register_buffer("lead", torch.zeros((READ_NGRAM - 1, rows), dtype=torch.int8))

    def read(self, ids, following):
        """Each n-gram in ids (B, T) votes for the token that follows it, (B, T); of several votes for one slot, one counts."""
        for n, key in enumerate(ngram_keys(ids, READ_NGRAM)[1:], 2):
            slot, voted = (key % self.token.size(1))[:, n - 1 :].flatten(), following[:, n - 1 :].flatten().short()
            token, lead = self.token[n - 2], self.lead[n - 2]
            before, agrees = lead[slot], token[slot] == voted
            won = ~agrees & (before == 0)
            token[slot[won]] = voted[won]
            lead[slot] = torch.where(agrees | won, before + 1, before - 1).clamp(0, 127)

    def forward(self, ids, keys):
        """(B, T, width)"""
        total = 0
        for trust, key in zip(self.trust_seen, keys, strict=False):
            total = total + trust * self.guess(followed_before(ids, key, self.vocab_size))
        for trust, token, lead, key in zip(self.trust_read, self.token, self.lead, keys[1:READ_NGRAM], strict=True):
            slot = key % token.numel()
            guess = token[slot].long()
            if self.training:
                doubtful = torch.rand_like(guess, dtype=torch.float32) < DOUBT
                guess = torch.where(doubtful, torch.randint_like(guess, self.vocab_size), guess)
            total = total + trust[lead[slot].long().clamp(max=MOST_LEAD)][..., None] * self.guess(guess)
        return total


class GPT(nn.Module):
    """ids (B, T) -> logits (B, T, vocab). T is fixed: masks and rotary angles are made once, for that length."""

    def __init__(self, sizes, vocab_size, T, device):
        super().__init__()
        width = sizes.heads * sizes.head_dim
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # of the activations
        self.tokens = nn.Embedding(vocab_size, width)
        # On a CPU a step touches few rows, and a dense gradient of the table would cost more than the model.
        self.ngrams = nn.Embedding(sizes.ngram_rows, width, sparse=device.type == "cpu", _weight=torch.zeros(sizes.ngram_rows, width))
        self.memory = Memory(sizes.memory_rows, vocab_size, width) if sizes.memory_rows else None
        self.blocks = nn.ModuleList(Block(sizes, vocab_size) for _ in range(sizes.depth))
        self.head = Linear(width, vocab_size, std=0)
        self.logit_cap = sizes.logit_cap
        frequency = sizes.rope_base ** -torch.linspace(0, 1, sizes.head_dim // 2)
        angle = torch.outer(torch.arange(T), frequency)  # (T, head_dim / 2)
        self.rotary = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
        self.windows = [min(sizes.short_window, T)] * sizes.depth  # tokens that each layer looks back
        self.windows[sizes.long_every - 1 :: sizes.long_every] = [T] * (sizes.depth // sizes.long_every)
        self.windows[-1] = T
        self.masks = [window_mask(window, T, device) for window in self.windows]

    def hidden(self, ids):
        """ids (B, T) -> what the output layer reads, (B, T, width)."""
        x = self.tokens(ids)  # (B, T, width)
        keys = ngram_keys(ids, max(NGRAM, SEEN_NGRAM, READ_NGRAM) if self.memory else NGRAM)
        for key in keys[1:NGRAM]:
            x = x + self.ngrams(key % self.ngrams.num_embeddings)
        if self.memory:
            x = x + self.memory(ids, keys)
        x = x0 = norm(x.to(self.dtype))
        for block, mask in zip(self.blocks, self.masks, strict=True):
            x = block(x, x0, ids, self.rotary, mask)
        return norm(x)

    def logits(self, hidden):
        """(..., width) -> (..., vocab), float32."""
        logits, cap = self.head(hidden).float(), self.logit_cap
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, ids):
        return self.logits(self.hidden(ids))

    def flops_per_token(self):
        """Forward and backward: 6 a weight of a matrix product, and 12 x width a token that attention looks back."""
        matrices = sum(module.weight.numel() for module in self.modules() if isinstance(module, Linear))
        return 6 * matrices + 12 * self.tokens.embedding_dim * sum(self.windows)


def window_mask(window, T, device):
    """What `attend` needs to look back over `window` tokens of T: nothing, blocks for flex_attention, or a (T, T) mask."""
    if window >= T:
        return None

    def visible(b, h, q, k):
        return (k <= q) & (q - k < window)

    if device.type == "cuda":
        return create_block_mask(visible, None, None, T, T, device=device)
    at = torch.arange(T)
    return visible(None, None, at[:, None], at)


def attend(q, k, v, mask):
    """Causal attention over (B, heads, T, head_dim)."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if isinstance(mask, torch.Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return flex_attention(q, k, v, block_mask=mask)


def mean_loss(model, x, y):
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


# ---- optimizers


def orthogonalize(x):
    """About the nearest orthogonal matrix of each in x (N, width, width), by Polar Express (Amsel et al., arXiv 2505.16932)."""
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


class Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980) by torch.optim's kernel, ten times as fast as its parts; torch.optim takes 1.4 s to load."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr = parameters, lr
        self.mean, self.square = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        self.steps = [torch.zeros((), device=p.device) for p in parameters]

    def step(self, share):
        gradients = [p.grad for p in self.parameters]
        torch._foreach_add_(self.steps, 1)
        torch._fused_adamw_(self.parameters, gradients, self.mean, self.square, [], self.steps, lr=share * self.lr, beta1=1 - 1 / ADAM_MEAN,
                            beta2=1 - 1 / ADAM_SQUARE, weight_decay=0.0, eps=1e-10, amsgrad=False, maximize=False)  # fmt: skip


class Muon:
    """Momentum whose every update is orthogonalised (Jordan et al., https://kellerjordan.github.io/posts/muon/).

    Every matrix of the blocks has the model's width as one side and a multiple of it as the other: all are cut into squares
    of that width, which are orthogonalised as one batch.
    """

    def __init__(self, matrices, lr, dtype, compiled):
        self.matrices, self.lr, self.dtype, self.orthogonalize = matrices, lr, dtype, compiled(orthogonalize)
        self.mean = [torch.zeros_like(matrix) for matrix in matrices]

    def step(self, share):
        gradients = [matrix.grad for matrix in self.matrices]
        torch._foreach_lerp_(self.mean, gradients, 1 / MUON_MEAN)
        updates = torch._foreach_lerp(gradients, self.mean, 1 - 1 / MUON_MEAN)  # Nesterov: as if the mean were a step ahead
        width = min(updates[0].shape)
        # (rows, columns) -> (rows / width, columns / width, width, width)
        squares = [update.unflatten(0, (-1, width)).unflatten(2, (-1, width)).transpose(1, 2) for update in updates]
        flat = self.orthogonalize(torch.cat([square.flatten(0, 1) for square in squares]).to(self.dtype)).float()
        flat = flat.split([square.shape[:2].numel() for square in squares])
        updates = [
            part.view(square.shape).transpose(1, 2).reshape(update.shape)
            for part, square, update in zip(flat, squares, updates, strict=True)
        ]
        torch._foreach_add_(self.matrices, updates, alpha=-share * self.lr)


class RowAdagrad:
    """Adagrad (Duchi et al., 2011) with one sum of squares a row: rare n-grams take large steps, frequent ones small."""

    def __init__(self, table, lr):
        self.table, self.lr = table, lr
        self.squares = torch.zeros_like(table[:, :1])  # (rows, 1)

    def step(self, share):
        rows, gradient = slice(None), self.table.grad
        if gradient is None:
            return
        if gradient.is_sparse:  # only the rows of this step's n-grams
            gradient = gradient.coalesce()
            rows, gradient = gradient.indices()[0], gradient.values()
        self.squares[rows] += gradient.square().mean(1, keepdim=True)
        self.table[rows] -= share * self.lr * gradient * (self.squares[rows] + 1e-30).rsqrt()  # a row without a gradient stays


def make_optimizers(model, sizes, compiled):
    linear = [module.weight for module in model.blocks.modules() if isinstance(module, Linear)]
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding) and module is not model.ngrams]
    others = {*model.parameters()} - {*linear, *embeddings, model.head.weight, model.ngrams.weight}
    return [
        Adam(embeddings, sizes.embed_lr),
        Adam([model.head.weight], sizes.head_lr),
        Adam([p for p in model.parameters() if p in others], sizes.scalar_lr),
        RowAdagrad(model.ngrams.weight, sizes.ngram_lr),
        Muon(linear, sizes.matrix_lr, model.dtype, compiled),
    ]


@torch.no_grad()
def optimize(optimizers, model, progress):
    """One step of all, at the learning rates of this point of the training time, 0 to 1."""
    share = FINAL_LR + (1 - FINAL_LR) * min(1.0, (1 - progress) / WARM_DOWN)
    for optimizer in optimizers:
        optimizer.step(share)
    model.zero_grad()


# ---- training


def learn(loss_of, model, x, y, share):
    """Adds the gradients of `share` of the mean loss to the parameters; returns that much of the loss."""
    loss = share * loss_of(model, x, y)
    loss.backward()
    return loss.detach()


def learn_by_rows(model, x, y, share):
    """The same for a CPU: the logits of one row (T, vocab) stay in its caches, those of a batch would go through memory ten times."""
    hidden = model.hidden(x)
    leaf = hidden.detach().requires_grad_()
    total = 0.0
    for row, targets in zip(leaf, y, strict=True):
        loss = share / len(x) * F.cross_entropy(model.logits(row), targets)
        loss.backward()
        total += loss.detach()
    hidden.backward(leaf.grad)
    return total


def read_ahead(run, memory, batches, progress, tokens):
    """The memory reads text that training won't reach, which at `progress` has drawn `tokens`. Returns how many it may draw in all.

    No text is met twice. A second time the n-gram table knows it by heart and is believed ever after: 147 repeated steps at the end of
    2,689 cost 0.03 bits per byte.
    """
    read, end = 0, progress + READ_TIME
    spare = min(READ_SHARE * run.train_tokens, run.train_tokens - 1.1 * tokens / progress)
    while read < spare and run.progress() < end:
        x, y = map(torch.cat, zip(*itertools.islice(batches, 32), strict=True))
        memory.read(x, y)
        read += x.numel()
    print(f"read {read / 1e6:.2f} M tokens of {run.train_tokens / 1e6:.2f} M", flush=True)
    return run.train_tokens - read - x.numel() if read else math.inf  # the last draw may reach into the text's next round


def fitting_micro_batch(model, loss_of, sizes, T, device):
    """Sequences that fit in memory at once: sizes.micro_batch, halved until forward and backward pass."""
    rows = sizes.micro_batch * sizes.accumulation
    micro_batch = sizes.micro_batch
    while True:
        try:
            blank = torch.zeros(micro_batch, T, dtype=torch.int64, device=device)
            loss_of(model, blank, blank).backward()
            fits = True
        except torch.OutOfMemoryError:
            if micro_batch == 1:
                raise
            fits = False
        model.zero_grad()
        if fits:
            return micro_batch
        torch.cuda.empty_cache()  # outside of `except`, whose traceback keeps the failed step's tensors alive
        micro_batch = next(n for n in range(micro_batch // 2, 0, -1) if rows % n == 0)
        print(f"out of memory: {micro_batch} sequences at a time instead", flush=True)


def main():
    run = prepare.Run()
    on_gpu = run.device.type == "cuda"
    sizes = GPU if on_gpu else CPU
    # Compiled without graph breaks on a GPU; on a CPU a cold compile costs more than it brings at these budgets.
    compiled = partial(torch.compile, dynamic=False, fullgraph=True) if on_gpu else lambda function: function
    if on_gpu:  # on a CPU float32 products stay float32
        torch.set_float32_matmul_precision("high")
    with torch.device(run.device):
        model = GPT(sizes, run.vocab_size, run.seq_len, run.device)
    optimizers = make_optimizers(model, sizes, compiled)
    loss_of, model_for_ruler = compiled(mean_loss), compiled(model)
    learn_part = partial(learn, loss_of) if on_gpu else learn_by_rows
    run.preflight(model_for_ruler)  # compiles the graph without gradients; training compiles its own
    micro_batch = fitting_micro_batch(model, loss_of, sizes, run.seq_len, run.device) if on_gpu else sizes.micro_batch

    rows = sizes.micro_batch * sizes.accumulation  # a step's, however many at a time
    batches = run.batches(rows)
    step, tokens, most, unread = 0, 0, math.inf, model.memory is not None
    while (progress := max(run.progress(), tokens / most)) < 1:
        if unread and progress > READ_AT:
            most, unread = read_ahead(run, model.memory, batches, progress, tokens), False
        x, y = next(batches)  # (rows, T) each
        total = 0.0
        for x_part, y_part in zip(x.split(micro_batch), y.split(micro_batch), strict=True):
            total += learn_part(model, x_part, y_part, micro_batch / rows)
        optimize(optimizers, model, progress)
        step, tokens = step + 1, tokens + x.numel()
        run.log(step, total, tokens)
    run.finish(model_for_ruler, depth=sizes.depth, flops_per_token=model.flops_per_token())


if __name__ == "__main__":
    main()
