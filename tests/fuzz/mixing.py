"""Elements that mix tokens: attention in every form, and everything else."""

from __future__ import annotations

from tests.fuzz.elements import AT, LINEAR, Element

HEADS = "q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in self.qkv$i(x).split([8, $kv, $kv], -1))"
QKV = "self.qkv$i = nn.Linear(8, 8 + 2 * $kv)\nself.o$i = nn.Linear(8, 8)"
MERGE = "x = self.o$i(y.transpose(1, 2).flatten(2))"

ATTENTION = {
    "sdpa": Element(
        f"{HEADS}\n{AT}\n$rotate\ny = F.scaled_dot_product_attention($call)\n{MERGE}",
        f"{QKV}\nself.slope$i = nn.Parameter(torch.randn(2))",
        {
            "kv": ("8",),
            "rotate": ("pass", "q, k = q * at[:, None].cos(), k * at[:, None].sin()"),
            "call": (
                "q, k, v, is_causal=True",
                "q, k, v",
                "q, k, v, None, 0.0, True",
                "query=q, value=v, key=k, is_causal=True, scale=0.7",
                "q, k, v, attn_mask=(at[:, None] >= at) & (at[:, None] - at < 3)",
                "q, k, v, attn_mask=(at[:, None] - at).abs() < 2",
                "q, k, v, torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None]",
                "q, k, v, attn_mask=(documents[:, None, :, None] == documents[:, None, None, :])",
                "q, k, v, attn_mask=(documents[:, None, :, None] == documents[:, None, None, :]) & (at[:, None] >= at)",
                "q, k, v, attn_mask=mask[:, None, None, :].bool()",
                "q, k, v, attn_mask=(mask[:, None, None, :] > 0) & (at[:, None] >= at)",
                "q, k, v, attn_mask=(1.0 - mask[:, None, None, :].to(q.dtype)) * -1e9",
                "q, k, v, attn_mask=torch.full((x.shape[1], x.shape[1]), float('-inf')).triu(1).to(q.dtype)",
                "q, k, v, attn_mask=-0.3 * (at[:, None] - at).abs().to(q.dtype)",
                "q, k, v, attn_mask=self.slope$i[:, None, None] * (at - at[:, None]).tril()",
                "q, k, v, attn_mask=(at[None, :] <= at[:, None]) | (at[None, :] < 3)",
            ),
        },
    ),
    "grouped sdpa": Element(
        f"{HEADS}\n$repeat\n{MERGE}",
        QKV,
        {
            "kv": ("4",),
            "repeat": (
                "y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)",
                "k, v = (t.repeat_interleave(2, 1) for t in (k, v))\ny = F.scaled_dot_product_attention(q, k, v, is_causal=True)",
                "k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))\n"
                "y = F.scaled_dot_product_attention(q, k, v, is_causal=True)",
            ),
        },
    ),
    "by hand": Element(
        f"{HEADS}\n{AT}\nscores = q @ k.$t / 2.0\n$cap\n$mask\ny = scores.softmax(-1) @ v\n{MERGE}",
        QKV,
        {
            "kv": ("8",),
            "t": ("transpose(-1, -2)", "mT", "transpose(2, 3)"),
            "cap": (
                "pass",
                "scores = 3.0 * torch.tanh(scores / 3.0)",
                "scores = scores - 0.2 * (at[:, None] - at).abs()",
            ),
            "mask": (
                "pass",
                "scores = scores.masked_fill(at[:, None] < at, float('-inf'))",
                "scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e9)",
                "scores = scores + torch.full_like(scores, float('-inf')).triu(1)",
                "scores = torch.where(documents[:, None, :, None] == documents[:, None, None], scores, float('-inf'))",
            ),
        },
    ),
    "one head": Element(
        "y = ((x @ x.$t) * 0.3).softmax(-1)\nx = y @ $v",
        choices={"t": ("transpose(1, 2)", "mT"), "v": ("x", "self.l$i(x)")},
        setup=LINEAR,
    ),
    "linear attention": Element(
        f"{HEADS}\nk = k.softmax(-1)\ny = q.softmax(-1) @ (k.transpose(-1, -2) @ v)\n{MERGE}", QKV, {"kv": ("8",)}
    ),
    "torch attention": Element(
        "x = self.a$i(x, x, x, need_weights=$w)[0]",
        "self.a$i = nn.MultiheadAttention(8, 2, batch_first=True)",
        {"w": ("False", "True")},
    ),
    "cross attention": Element(
        """
        q = self.q$i(x).unflatten(-1, (2, 4)).transpose(1, 2)
        k, v = self.kv$i($source).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        $attend
        x = y.transpose(1, 2).flatten(2)
        """,
        "self.q$i = nn.Linear(8, 8)\nself.kv$i = nn.Linear(8, 16)\nself.m$i = nn.Embedding(13, 8)",
        {
            "source": ("memory", "self.m$i(memory_ids)"),
            "attend": ("y = F.scaled_dot_product_attention(q, k, v)", "y = (q @ k.mT / 2).softmax(-1) @ v"),
        },
    ),
}

# Mixes tokens in another way than by attention.
MIXING = {
    "token shift": Element(
        "x = x $op $f",
        choices={
            "op": ("+", "-", "*"),
            "f": (
                "torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)",
                "F.pad(x, (0, 0, 1, -1))",
                "F.pad(x[:, 1:], (0, 0, 0, 1))",
                "F.pad(x, (0, 0, 2, 0))[:, : x.shape[1]]",
                "torch.cat([x[:, :1], x[:, :-1]], 1)",
                "F.pad(x[:, 1:] - x[:, :-1], (0, 0, 1, 0))",
            ),
        },
    ),
    "roll": Element("x = x + x.roll($f)", choices={"f": ("1, 1", "-1, 1", "shifts=(2,), dims=(1,)", "-3, -2")}),
    "flip": Element("x = x + x.flip(1)"),
    "running sum": Element(
        "x = x.cumsum(1)$f", choices={"f": ("", " / torch.arange(1, x.shape[1] + 1)[:, None]", " - x")}
    ),
    "causal convolution": Element(
        "x = self.c$i(F.pad(x.transpose(1, 2), ($k - 1, 0))).transpose(1, 2)",
        "self.c$i = nn.Conv1d(8, 8, $k, groups=$groups)",
        {"k": ("3", "1", "2", "4"), "groups": ("8", "1")},
    ),
    "trimmed convolution": Element(
        "x = self.c$i(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)",
        "self.c$i = nn.Conv1d(8, 8, 4, padding=3, groups=8)",
    ),
    "centred convolution": Element(
        "x = self.c$i(x.transpose(1, 2)).transpose(1, 2)",
        "self.c$i = nn.Conv1d(8, 8, $k, groups=8)",
        {"k": ("3, padding=1", "3, padding='same'", "5, padding=2", "3, padding=2, dilation=2")},
    ),
    "strided convolution": Element(
        "y = F.gelu(self.c$i(x.transpose(1, 2))).transpose(1, 2)\nx = x + y.$f(1, keepdim=True)",
        "self.c$i = nn.Conv1d(8, 8, $k)",
        {
            "k": ("3, stride=2", "3, stride=2, padding=1", "2, stride=2", "5, stride=3, padding=2, dilation=2"),
            "f": ("mean", "amax"),
        },
    ),
    "pool": Element(
        "x = x + F.$f.transpose(1, 2).mean(1, keepdim=True)",
        choices={
            "f": (
                "max_pool1d(x.transpose(1, 2), 3, 2, 1)",
                "avg_pool1d(x.transpose(1, 2), 3, 2)",
                "adaptive_avg_pool1d(x.transpose(1, 2), 2)",
            )
        },
    ),
    "patches of tokens": Element(
        """
        y = F.unfold(x.transpose(1, 2).unsqueeze(-1), [$k, 1], padding=[$k // 2, 0])
        x = x + y.transpose(1, 2).unflatten(-1, (8, $k)).mean(-1)
        """,
        choices={"k": ("3", "5")},
    ),
    "first state": Element(
        """
        decay = F.pad(-F.softplus(self.l$i(x)), (0, 0, 1, 0)).cumsum(1)
        values = torch.cat([self.s$i.expand(x.shape[0], -1, -1), x.abs().add(0.1).log()], 1)
        x = x + (decay + (values - decay).logcumsumexp(1)).exp()$f
        """,
        LINEAR + "\nself.s$i = nn.Parameter(torch.rand(1, 1, 8))",
        {"f": ("[:, -x.shape[1] :]", "[:, 1:]", "[:, -1:]")},
    ),
    "chunks": Element(
        """
        rest = -x.shape[1] % 4
        y = F.pad(self.l$i(x), (0, 0, 0, rest)).unflatten(1, (-1, 4))
        $mix
        x = x + y.flatten(1, 2)[:, : x.shape[1]]
        """,
        LINEAR,
        {
            "mix": (
                "y = y.cumsum(2)",
                "y = y + y.sum(2).cumsum(1)[:, :, None] / 9",
                "y = y + torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)",
                "y = (y @ y.transpose(-1, -2)).softmax(-1).tril() @ y",
            )
        },
    ),
    "associative scan": Element(
        """
        y = associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), ($gate, x), 1, combine_mode="generic")[1]
        x = x + y
        """,
        LINEAR,
        {"gate": ("self.l$i(x).sigmoid()", "torch.full_like(x, 0.5)")},
    ),
    "written loop": Element(
        """
        state, y = torch.zeros_like(x[:, 0]), torch.zeros_like(x)
        for t in range(x.shape[1]):
            state = x[:, t] + $decay * state
            y[:, t] = state
        x = y.tanh()
        """,
        LINEAR,
        {"decay": ("0.5", "self.l$i(x)[:, t].sigmoid()", "x.tanh()[:, t]")},
    ),
    "global context": Element(
        "x = x $op x.$f",
        choices={
            "op": ("+", "-", "*"),
            "f": (
                "mean(1, keepdim=True)",
                "sum(1, keepdim=True)",
                "amax(1, keepdim=True)",
                "max(1, keepdim=True).values",
                "mean(1)[:, None]",
                "mean(dim=(0, 1))",
                "sum()",
                "mean()",
                "logsumexp(1, keepdim=True)",
                "std(1, keepdim=True)",
                "norm(dim=1, keepdim=True)",
            ),
        },
    ),
    "masked mean": Element("x = x - (x * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]"),
    "attention pooling": Element("x = x + (x * self.l$i(x)[..., :1].softmax(1)).sum(1, keepdim=True)", LINEAR),
    "one token": Element(
        "x = x + $f",
        choices={
            "f": (
                "x[:, -1:]",
                "x[:, :1]",
                "x[:, 0].unsqueeze(1)",
                "x[:, -1][:, None]",
                "x.select(1, 1)[:, None]",
                "x[torch.arange(x.shape[0]), mask.sum(1) - 1][:, None]",
                "x.gather(1, (mask.sum(1) - 1)[:, None, None].expand(-1, 1, 8))",
                "x.narrow(1, 0, 1)",
            )
        },
    ),
    "token norm": Element(
        "x = self.n$i(x.transpose(1, 2)).transpose(1, 2)",
        "self.n$i = nn.$norm",
        {"norm": ("BatchNorm1d(8)", "InstanceNorm1d(8)", "GroupNorm(2, 8)")},
    ),
    "mixer": Element(
        "x = (x.transpose(1, 2) @ self.w$i[: x.shape[1], : x.shape[1]]).transpose(1, 2)",
        "self.w$i = nn.Parameter(torch.randn(64, 64) / 5)",
    ),
    "spectrum": Element(
        "x = torch.fft.$f",
        choices={"f": ("fft(x, dim=1).real", "fft2(x).real", "irfft(torch.fft.rfft(x, dim=1), n=x.shape[1], dim=1)")},
    ),
    "long convolution": Element(
        """
        n = 2 * x.shape[1]
        y = torch.fft.irfft(torch.fft.rfft(x.mT, n=n) * torch.fft.rfft(self.k$i[:, : x.shape[1]], n=n), n=n)
        x = x $op y[..., : x.shape[1]].mT
        """,
        "self.k$i = nn.Parameter(torch.randn(8, 64) / 5)",
        {"op": ("+", "*")},
    ),
    "joined": Element(
        """
        y = torch.cat($parts, 1)
        $mix
        x = x + $cut
        """,
        "self.p$i = nn.Parameter(torch.randn(1, 3, 8))\nself.a$i = nn.MultiheadAttention(8, 2, batch_first=True)",
        {
            "parts": (
                "[self.p$i.expand(x.shape[0], -1, -1), x]",
                "[self.p$i.expand(x.shape[0], -1, -1), x, self.p$i[:, :1].expand(x.shape[0], -1, -1)]",
                "[x, self.p$i.expand(x.shape[0], -1, -1), x.flip(1)]",
                "[memory, x]",
            ),
            "mix": (
                "y = y + self.a$i(y, y, y, need_weights=False)[0]",
                "y = y.sigmoid()",
                "z = y[:, None]\ny = y + F.scaled_dot_product_attention(z, z, z, is_causal=True)[:, 0]",
                "y = y.cumsum(1)",
                "y = y - y.mean(1, keepdim=True)",
                "y = y + y.roll(1, 1)",
                "y = y + self.a$i(x, y, y, need_weights=False)[0].mean(1, keepdim=True)",
            ),
            "cut": (
                "y[:, -x.shape[1] :]",
                "y[:, : x.shape[1]]",
                "y.split([y.shape[1] - x.shape[1], x.shape[1]], 1)[1]",
                "y[:, :1]",
                "y[:, 2][:, None]",
                "y.narrow(1, 1, x.shape[1])",
            ),
        },
    ),
    "streams": Element(
        """
        y = torch.stack([x, self.l$i(x)], 2).flatten(1, 2)
        $mix
        x = x + y.unflatten(1, (x.shape[1], 2))$f
        """,
        LINEAR,
        {
            "mix": (
                "z = y[:, None]\ny = F.scaled_dot_product_attention(z, z, z, is_causal=$causal)[:, 0]",
                "y = y.tanh().cumsum(1) / y.shape[1]",
                "y = y + y.roll(-1, 1)",
            ),
            "causal": ("True", "False"),
            "f": ("[:, :, 0]", ".sum(2)", "[:, :, -1]"),
        },
    ),
    "groups": Element(
        """
        y = torch.cat([x, self.l$i(x)], 1).reshape(x.shape[0], x.shape[1], 16)
        x = x + (y$f)[..., :8]
        """,
        LINEAR,
        {"f": (".tanh()", ".cumsum(1) / 9", ".softmax(1)", ".unflatten(-1, (2, 8)).mean(2)")},
    ),
    "repeated": Element(
        "x = x + x.repeat_interleave(2, 1)$f",
        choices={"f": (".unfold(1, 2, 2).mean(-1)", ".unflatten(1, (-1, 2)).sum(2)", "[:, : x.shape[1]]")},
    ),
    "windows": Element(
        "x = x + F.pad(x, (0, 0, $k, 0)).unfold(1, $k + 1, 1)$f",
        choices={"k": ("2", "1", "4"), "f": (".mean(-1)", ".amax(-1)", "[..., 0]")},
    ),
    "pairs": Element(
        "y = self.l$i(x)[:, :, None] $op x[:, None]\nx = x + $f",
        LINEAR,
        {
            "op": ("+", "*", "-"),
            "f": (
                "y.tanh().mean(2)",
                "y.tanh().mean(1)",
                "(y + y.transpose(1, 2)).sigmoid().mean(2)",
                "(y.softmax(2) * x[:, None]).sum(2)",
                "torch.einsum('bikc,bjkc->bijc', y.tanh(), y).mean(2)",
            ),
        },
    ),
    "write a token": Element(
        "x = x.clone()\nx$f",
        choices={
            "f": ("[:, 0] = 0", "[:, -1] += 1", "[:, 1:] = x[:, :-1].clone()", "[:, :2] *= 2", "[mask == 0] = 0.0")
        },
    ),
    "reorder": Element(
        "x = $f",
        choices={
            "f": (
                "x[:, torch.arange(x.shape[1] - 1, -1, -1)]",
                "x.index_select(1, position_ids[0])",
                "x.gather(1, position_ids[..., None].expand(-1, -1, 8))",
                "x[:, input_ids[0].argsort()]",
                "x.sort(1).values",
                "torch.zeros_like(x).scatter_add(1, position_ids[..., None].expand(-1, -1, 8), x)",
                "torch.zeros_like(x).index_add(1, position_ids[0], x)",
            )
        },
    ),
    "strided": Element(
        "x = F.pad(x, (0, 0, 0, 1))[:, : x.shape[1]]\nx = x.clone()\nx = x + x[:, ::$n].mean(1, keepdim=True)",
        choices={"n": ("2", "3")},
    ),
    "blocks": Element(
        "x = x.$f",
        choices={
            "f": (
                "reshape(x.shape[0], -1, 4).tanh().reshape(x.shape)",
                "reshape(x.shape[0], -1).tanh().view(x.shape)",
                "reshape(-1, 4).softmax(-1).view_as(x)",
                "flatten(1).softmax(-1).view_as(x)",
                "flatten().tanh().view(x.shape)",
                "transpose(1, 2).reshape(x.shape) ",
            )
        },
    ),
    "loop": Element(
        """
        state = torch.zeros_like(x[:, 0])
        out = []
        for t in range(x.shape[1]):
            state = 0.5 * state + x[:, t]
            out.append(state)
        x = torch.stack(out, 1)
        """
    ),
    "recurrent": Element("x = self.r$i(x)[0]", "self.r$i = nn.GRU(8, 8, batch_first=True)"),
}
