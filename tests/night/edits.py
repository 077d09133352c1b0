"""Thirty edits of train.py that change more than a number, as a model would send them, for `python tests/bench.py written`.

Each is (idea, reason, [(lines that are there, lines in their place), ...]), written against the shipped file. Before the night
that stands beside this each had made three steps, to see that it runs (one doesn't, as a model's sometimes), and no run.
"""

EDITS = [
    (
        "a learned bias of the logits, the unigram",
        "The frequency of a token needn't be spelled by every position's vector.",
        [
            (
                "        self.logit_cap = sizes.logit_cap",
                "        self.unigram = nn.Parameter(torch.zeros(vocab_size))\n        self.logit_cap = sizes.logit_cap",
            ),
            (
                "        logits, cap = self.head(norm(x)).float(), self.logit_cap  # (B, T, vocab)",
                "        logits, cap = self.head(norm(x)).float() + self.unigram, self.logit_cap  # (B, T, vocab)",
            ),
        ],
    ),
    (
        "the output layer sees the embeddings again, by a learned share",
        "A bigram and trigram model needs no attention: let it reach the logits directly.",
        [
            (
                "        self.head = Linear(width, vocab_size, bias=False)",
                "        self.head = Linear(width, vocab_size, bias=False)\n        self.skip = nn.Parameter(torch.tensor(0.5))",
            ),
            (
                "            x = block(x, x0, ids, self.rotary, mask)\n",
                "            x = block(x, x0, ids, self.rotary, mask)\n        x = x + self.skip * x0\n",
            ),
        ],
    ),
    (
        "each order of n-gram has a learned scale",
        "Long n-grams are rarer and surer; one scale for all can't fit both.",
        [
            (
                "        self.ngrams = nn.Parameter(torch.zeros(sizes.ngram_rows, width))",
                "        self.ngrams = nn.Parameter(torch.zeros(sizes.ngram_rows, width))\n        self.order_scale = nn.Parameter(torch.ones(8))",
            ),
            (
                "            x = x + F.embedding(key % len(self.ngrams), self.ngrams, sparse=self.sparse)",
                "            x = x + self.order_scale[back] * F.embedding(key % len(self.ngrams), self.ngrams, sparse=self.sparse)",
            ),
        ],
    ),
    (
        "SwiGLU in place of squared ReLU",
        "Gated units are the usual choice of larger models.",
        [
            (
                "        self.up = Linear(width, sizes.mlp_ratio * width, bias=False)",
                "        self.up = Linear(width, sizes.mlp_ratio * width, bias=False)\n        self.gate = Linear(width, sizes.mlp_ratio * width, bias=False)",
            ),
            (
                "        return self.down(F.relu(self.up(x)).square())",
                "        return self.down(F.silu(self.gate(x)) * self.up(x))",
            ),
        ],
    ),
    (
        "no MLP",
        "At one layer most of what is learned sits in the tables; the time of the MLP buys more steps.",
        [
            (
                "        x = x + self.attention(norm(x), ids, rotary, mask)\n        return x + self.mlp(norm(x))",
                "        return x + self.attention(norm(x), ids, rotary, mask)",
            ),
            ("        self.mlp = MLP(sizes)\n", ""),
        ],
    ),
    (
        "attention and MLP side by side",
        "One norm and one addition fewer a layer.",
        [
            (
                "        x = x + self.attention(norm(x), ids, rotary, mask)\n        return x + self.mlp(norm(x))",
                "        seen = norm(x)\n        return x + self.attention(seen, ids, rotary, mask) + self.mlp(seen)",
            )
        ],
    ),
    (
        "keys of all heads stand one place later",
        "If half of the heads gain by reading what followed, all of them may.",
        [
            (
                "        k = torch.cat((earlier(k[:, :, :half]), k[:, :, half:]), dim=2)",
                "        k = earlier(k)",
            ),
            ("        q, k, half = norm(q), norm(k), self.heads // 2", "        q, k = norm(q), norm(k)"),
        ],
    ),
    (
        "a learned sharpness of attention",
        "Normed queries and keys bound the scores; a head that copies wants them larger.",
        [
            (
                "        self.value_gate = nn.Parameter(torch.tensor(0.5))",
                "        self.value_gate = nn.Parameter(torch.tensor(0.5))\n        self.sharpness = nn.Parameter(torch.tensor(1.5))",
            ),
            (
                "        q, k, half = norm(q), norm(k), self.heads // 2",
                "        q, k, half = self.sharpness * norm(q), norm(k), self.heads // 2",
            ),
        ],
    ),
    (
        "attention's output is gated by its input",
        "A head that found nothing should be able to say nothing.",
        [
            (
                "        self.out = Linear(width, width, bias=False)",
                "        self.out = Linear(width, width, bias=False)\n        self.valve = nn.Linear(width, self.heads)",
            ),
            (
                "        return self.out(y.transpose(1, 2).reshape(B, T, C))",
                "        y = 2 * torch.sigmoid(self.valve(x)).mT[..., None] * y\n        return self.out(y.transpose(1, 2).reshape(B, T, C))",
            ),
        ],
    ),
    (
        "cosine in place of a straight warm-down",
        "It stays high for longer and ends more softly.",
        [
            (
                "    share = FINAL_LR + (1 - FINAL_LR) * min(1.0, (1 - progress) / WARM_DOWN)",
                "    left = min(1.0, (1 - progress) / WARM_DOWN)\n    share = FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 - math.cos(math.pi * left))",
            ),
            ("import zlib\n", "import math\nimport zlib\n"),
        ],
    ),
    (
        "the warm-down falls as a square root",
        "Published schedules of this form end lower than the straight line.",
        [
            (
                "    share = FINAL_LR + (1 - FINAL_LR) * min(1.0, (1 - progress) / WARM_DOWN)",
                "    share = FINAL_LR + (1 - FINAL_LR) * min(1.0, (1 - progress) / WARM_DOWN) ** 0.5",
            )
        ],
    ),
    (
        "the embeddings learn at their full rate to the end",
        "Adagrad has a schedule of its own; the table needn't fall twice.",
        [
            (
                '            group["lr"] = share * group.setdefault("peak_lr", group["lr"])',
                '            peak = group.setdefault("peak_lr", group["lr"])\n            group["lr"] = peak if isinstance(optimizer, RowAdagrad) else share * peak',
            )
        ],
    ),
    (
        "gradients of more than norm 1 are cut",
        "The first steps are the largest.",
        [
            (
                "        optimizer.step()\n",
                "        for group in optimizer.param_groups:\n            dense = [p for p in group['params'] if p.grad is not None and not p.grad.is_sparse]\n            torch.nn.utils.clip_grad_norm_(dense, 1.0)\n        optimizer.step()\n",
            )
        ],
    ),
    (
        "the embedding of a token is mixed with its predecessor's",
        "A smear of one place gives every layer the bigram for a multiplication.",
        [
            (
                "        self.blocks = nn.ModuleList(Block(sizes, vocab_size) for _ in range(sizes.depth))",
                "        self.smear = nn.Parameter(torch.tensor(0.1))\n        self.blocks = nn.ModuleList(Block(sizes, vocab_size) for _ in range(sizes.depth))",
            ),
            (
                "        x = x0 = norm(x.to(self.dtype))",
                "        x = x0 = norm((x + self.smear * earlier(x)).to(self.dtype))",
            ),
        ],
    ),
    (
        "values are the n-grams' embedding, too",
        "What a position says when it is attended to may depend on its bigram.",
        [
            (
                "        v = v + self.value_gate * self.values(ids).to(x.dtype).view_as(v)",
                "        v = v + self.value_gate * (self.values(ids).to(x.dtype) + x).view_as(v)",
            )
        ],
    ),
    (
        "no table of values",
        "A third of the parameters for what attention could compute from its input.",
        [
            (
                "        v = v + self.value_gate * self.values(ids).to(x.dtype).view_as(v)\n",
                "",
            ),
            (
                "        self.values = nn.Embedding(vocab_size, width)  # what a token says when it is attended to\n        self.value_gate = nn.Parameter(torch.tensor(0.5))\n",
                "",
            ),
        ],
    ),
    (
        "the stream doesn't see the embeddings again",
        "With one layer it has just seen them.",
        [
            ("        x = self.mix[0] * x + self.mix[1] * x0\n", ""),
            (
                "        self.mix = nn.Parameter(torch.tensor([1.0, 0.1]))  # of the stream so far, of the embeddings again\n",
                "",
            ),
        ],
    ),
    (
        "n-grams of the table are normed before they are added",
        "A frequent n-gram's row grows and drowns its token's.",
        [
            (
                "            x = x + F.embedding(key % len(self.ngrams), self.ngrams, sparse=self.sparse)",
                "            row = F.embedding(key % len(self.ngrams), self.ngrams, sparse=self.sparse)\n            x = x + row / (1 + row.norm(dim=-1, keepdim=True) / 8)",
            )
        ],
    ),
    (
        "each n-gram is looked up in two places",
        "Where two n-grams share a row, the other place tells them apart.",
        [
            (
                "            x = x + F.embedding(key % len(self.ngrams), self.ngrams, sparse=self.sparse)",
                "            for place in (key, 7_919 * key + 104_729):\n                x = x + F.embedding(place % len(self.ngrams), self.ngrams, sparse=self.sparse)",
            )
        ],
    ),
    (
        "the token before last, alone, has rows in the table as well",
        "A pattern with a gap: what came two places before, whatever stands between.",
        [
            (
                "        x = x0 = norm(x.to(self.dtype))",
                "        gap = 998_244_353 * (earlier(ids, 2) + 1)\n        x = x + F.embedding(gap % len(self.ngrams), self.ngrams, sparse=self.sparse)\n        x = x0 = norm(x.to(self.dtype))",
            )
        ],
    ),
    (
        "AdamW with a decay on the output layer",
        "The head is the only dense matrix that Muon doesn't hold in check.",
        [
            (
                "        dict(params=[model.head.weight], lr=sizes.head_lr),",
                "        dict(params=[model.head.weight], lr=sizes.head_lr, weight_decay=0.1),",
            )
        ],
    ),
    (
        "Muon's matrices decay",
        "Decoupled decay keeps their updates large beside them.",
        [
            (
                "            view -= part.view_as(view)",
                '            view *= 1 - 0.1 * group["lr"]\n            view -= part.view_as(view)',
            )
        ],
    ),
    (
        "the loss counts the second half of each row twice",
        "Late positions are the ones with context to learn from.",
        [
            (
                "        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())",
                '        if targets is None:\n            return logits\n        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)\n        weight = torch.linspace(2 / 3, 4 / 3, targets.size(1), device=losses.device)\n        return (losses * weight).mean()',
            )
        ],
    ),
    (
        "a penalty on large log-sums (z-loss)",
        "Logits without a cap may drift.",
        [
            (
                "        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())",
                "        if targets is None:\n            return logits\n        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())\n        return loss + 1e-4 * logits.logsumexp(-1).square().mean()",
            )
        ],
    ),
    (
        "batches grow: half as many sequences in the first fifth",
        "Early gradients agree; smaller steps cost less then.",
        [
            (
                "        loss = learn(model, x, y, micro_batch)",
                "        rows = len(x) // 2 if progress < 0.2 and len(x) > 1 else len(x)\n        loss = learn(model, x[:rows], y[:rows], micro_batch)",
            )
        ],
    ),
    (
        "queries, keys and values cut by heads first",
        "Each head's three parts then lie side by side in memory.",
        [
            (
                "        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).unbind(2)  # each (B, T, heads, head_dim)",
                "        q, k, v = self.qkv(x).reshape(B, T, 3, -1).chunk(self.heads, dim=-2)  # each (B, T, heads, head_dim)",
            )
        ],
    ),
    (
        "GELU in place of squared ReLU",
        "Smoother, and as cheap on a CPU.",
        [
            (
                "        return self.down(F.relu(self.up(x)).square())",
                "        return self.down(F.gelu(self.up(x)))",
            )
        ],
    ),
    (
        "logits half as large again",
        "The output layer starts at zero; this way it gets anywhere sooner.",
        [
            (
                "        logits, cap = self.head(norm(x)).float(), self.logit_cap  # (B, T, vocab)",
                "        logits, cap = self.head(1.5 * norm(x)).float(), self.logit_cap  # (B, T, vocab)",
            )
        ],
    ),
    (
        "momentum of the matrices warms up",
        "A long mean of the first gradients points where the weights were.",
        [
            (
                "        self.mean.lerp_(gradient, 1 / (1 + MUON_MEAN))",
                "        self.steps = getattr(self, 'steps', 0) + 1\n        self.mean.lerp_(gradient, 1 / (1 + min(MUON_MEAN, self.steps)))",
            )
        ],
    ),
    (
        "a short convolution over the stream before attention",
        "Three learned taps a channel: what a head would spend on its neighbours.",
        [
            (
                "        self.mlp = MLP(sizes)\n",
                "        self.mlp = MLP(sizes)\n        self.taps = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]).repeat(sizes.heads * sizes.head_dim, 1).T)\n",
            ),
            (
                "        x = x + self.attention(norm(x), ids, rotary, mask)\n",
                "        near = norm(x)\n        near = sum(tap * earlier(near, back) for back, tap in enumerate(self.taps))\n        x = x + self.attention(near, ids, rotary, mask)\n",
            ),
        ],
    ),
]
