"""Elements: the pieces that real models are made of, as source code over `x`, hidden states `[B, S, D]`.

`$name` is replaced by one of the choices of an element, `$i` by a number that makes names unique, and a line
`BODY` by other elements.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

D = 8
Choices = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Element:
    """A piece of a model. The first value of each choice is the plainest."""

    forward: str
    setup: str = ""
    choices: Choices = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "forward", textwrap.dedent(self.forward).strip())
        object.__setattr__(self, "setup", textwrap.dedent(self.setup).strip())


LINEAR = f"self.l$i = nn.Linear({D}, {D})"
AT = "at = torch.arange(x.shape[1], device=x.device)"

# Runs on each token by itself; `x` may have any leading dims.
LOCAL = {
    "linear": Element("x = self.l$i(x)", LINEAR),
    "product": Element(
        "x = x @ self.w$i + self.b$i",
        "self.w$i = nn.Parameter(torch.randn(8, 8) / 3)\nself.b$i = nn.Parameter(torch.randn(8))",
    ),
    "activation": Element(
        "x = $f(x)",
        choices={
            "f": ("F.gelu", "F.silu", "F.relu", "torch.tanh", "torch.sigmoid", "F.softplus", "torch.cos", "torch.exp")
        },
    ),
    "gate": Element(
        "x, gate = self.g$i(x).$split\nx = x * torch.sigmoid(gate)",
        "self.g$i = nn.Linear(8, 16)",
        {
            "split": (
                "chunk(2, -1)",
                "split(8, -1)",
                "split([8, 8], dim=-1)",
                "tensor_split(2, -1)",
                "unflatten(-1, (2, 8)).unbind(-2)",
            )
        },
    ),
    "norm": Element("x = self.n$i(x)", "self.n$i = nn.$norm(8)", {"norm": ("LayerNorm", "RMSNorm")}),
    "norm by hand": Element(
        "x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.p$i",
        "self.p$i = nn.Parameter(torch.randn(8))",
    ),
    "standardise": Element(
        "x = (x - x.mean(-1, keepdim=True)) / (x.$spread(-1, keepdim=True) + 0.5)", choices={"spread": ("std", "var")}
    ),
    "softmax": Element("x = x.$f(-1)", choices={"f": ("softmax", "log_softmax", "logcumsumexp", "cumsum")}),
    "normalise": Element("x = F.normalize(x, dim=-1)"),
    "clamp": Element(
        "x = x.$f",
        choices={"f": ("clamp(-0.5, 0.5)", "clamp(min=-1.0)", "abs()", "neg()", "sign() + x", "round() + x")},
    ),
    "join": Element(
        "x = self.j$i(torch.cat([x, $f], -1))",
        "self.j$i = nn.Linear(16, 8)",
        {"f": ("x * 2", "x.tanh()", "torch.ones_like(x)", "x.detach()")},
    ),
    "stack": Element(
        "x = torch.stack([x, x.tanh()], $dim).$sum",
        choices={"dim": ("-1", "-2", "0"), "sum": ("sum($dim)", "mean($dim)")},
    ),
    "groups": Element(
        "x = x.unflatten(-1, (2, 4)).$f.flatten(-2)",
        choices={"f": ("tanh()", "flip(-1)", "softmax(-1)", "transpose(-1, -2).contiguous()", "roll(1, -1)")},
    ),
    "repeat": Element(
        "x = x.$f",
        choices={
            "f": (
                "repeat_interleave(2, -1)[..., :8]",
                "tile((2,))[..., 4:12]",
                "expand_as(x)",
                "flip(-1)",
                "roll(3, -1)",
                "index_select(-1, torch.arange(7, -1, -1))",
                "gather(-1, x.argsort(-1))",
                "sort(-1).values",
                "topk(3, -1).values.sum(-1, keepdim=True) + x",
                "contiguous().clone()",
                "type_as(x)",
                "to(torch.float64)",
            )
        },
    ),
    "in place": Element(
        "x = x.clone()\nx$f",
        choices={
            "f": (
                " += 1",
                ".mul_(2)",
                "[..., 0] = 0",
                "[..., :3] *= 2",
                ".tanh_()",
                ".masked_fill_(x > 1, 0.5)",
                "[..., 1:3] = x[..., 3:5].clone()",
            )
        },
    ),
    "detached": Element(
        "with torch.no_grad():\n    s$i = $f\nx = x * s$i", choices={"f": ("x.sigmoid()", "self.l$i(x)")}, setup=LINEAR
    ),
    "experts": Element(
        """
        weights = self.router$i(x).softmax(-1)
        $choose
        x = sum(gates[..., e : e + 1] * self.experts$i[e](x) for e in range(3))
        """,
        "self.router$i = nn.Linear(8, 3)\nself.experts$i = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))",
        {
            "choose": (
                "gates = weights",
                "best, chosen = weights.topk(2, -1)\ngates = (F.one_hot(chosen, 3) * best[..., None]).sum(-2)",
                "best, chosen = weights.max(-1)\ngates = F.one_hot(chosen, 3).to(x.dtype) * best.unsqueeze(-1)",
                "best, chosen = weights.topk(2, -1)\n"
                "gates = torch.zeros_like(weights).scatter(-1, chosen, best / best.sum(-1, keepdim=True))",
            )
        },
    ),
    "bilinear": Element(
        "x = torch.einsum($f)",
        "self.w$i = nn.Parameter(torch.randn(8, 8) / 3)",
        {"f": ("'...d,de->...e', x, self.w$i", "'...d,de,...e->...d', x, self.w$i, x")},
    ),
}

# Each token knows its place, or meets another input of the same tokens.
PLACED = {
    "learned positions": Element(
        "x = x + $f",
        "self.t$i = nn.Embedding(64, 8)\nself.p$i = nn.Parameter(torch.randn(1, 64, 8))",
        {
            "f": (
                "self.t$i(torch.arange(x.shape[1]))",
                "self.p$i[:, : x.shape[1]]",
                "self.t$i.weight[: x.size(1)]",
                "self.t$i(position_ids)",
                "self.t$i(torch.arange(x.shape[1]).expand(x.shape[0], -1))",
                "self.t$i(torch.arange(x.shape[1] - 1, -1, -1))",
            )
        },
    ),
    "sinusoids": Element(
        f"{AT}\nangles = at[:, None] / 10.0 ** torch.arange(4)\nx = x $op torch.cat([angles.sin(), angles.cos()], -1)",
        choices={"op": ("+", "*")},
    ),
    "table": Element(
        "x = x * self.table$i[: x.shape[1]]", "self.register_buffer('table$i', torch.randn(64, 8), persistent=False)"
    ),
    "where": Element(
        "x = $f",
        choices={
            "f": (
                "x * mask[..., None]",
                "x.masked_fill(mask[..., None] == 0, 0.0)",
                "torch.where(input_ids[..., None] > 5, x, -x)",
                "x * (input_ids != 3).unsqueeze(-1)",
                "x / mask.sum(1)[:, None, None]",
                "x * (documents == documents[:, :1])[..., None]",
            )
        },
    ),
    "second lookup": Element(
        "x = x + self.e$i($f)",
        "self.e$i = nn.Embedding(13, 8)",
        {
            "f": (
                "input_ids",
                "(input_ids * 7) % 13",
                "F.pad(input_ids, (1, 0))[:, :-1]",
                "input_ids.flip(1)",
                "input_ids.roll(1, 1)",
                "input_ids.cumsum(1) % 13",
                "input_ids.argmax(-1, keepdim=True) % 13",
                "position_ids.clamp(max=12)",
            )
        },
    ),
}

# Run other elements in another form. In `FLAT`, only elements of single tokens.
AROUND = {
    "residual": Element("r$i = x\nBODY\nx = r$i + x"),
    "checkpoint": Element("def block$i(x):\n    BODY\n    return x\nx = checkpoint(block$i, x, use_reentrant=False)"),
    "twice": Element("for _ in range(2):\n    BODY"),
    "chosen": Element("r$i = x\nBODY\nx = torch.where(input_ids[..., None] > 6, x, r$i)"),
    "halves": Element("r$i, x = x.chunk(2, -1)\nx = torch.cat([x, r$i], -1)\nBODY"),
}
FLAT = {
    "merged": Element(
        "b$i, s$i, d$i = x.shape\nx = x.$into\nBODY\nx = x.reshape(b$i, s$i, d$i)",
        choices={
            "into": (
                "contiguous().view(b$i * s$i, d$i)",
                "contiguous().view(-1, d$i)",
                "reshape(-1, 8)",
                "flatten(0, 1)",
            )
        },
    ),
    "tokens first": Element(
        "x = x.$into\nBODY\nx = x.$back",
        choices={"into": ("transpose(0, 1)",), "back": ("transpose(0, 1)", "permute(1, 0, 2)")},
    ),
    "tokens first, merged": Element(
        "b$i, s$i, d$i = x.shape\nx = x.transpose(0, 1).reshape(-1, d$i)\nBODY\nx = x.reshape(s$i, b$i, d$i).transpose(0, 1)"
    ),
    "one more dim": Element("x = x.unsqueeze($at)\nBODY\nx = x.squeeze($at)", choices={"at": ("1", "2", "0")}),
    "flattened": Element(
        "b$i, s$i, d$i = x.shape\nx = x[:, 1:].reshape(-1, d$i)\nBODY\nx = F.pad(x.reshape(b$i, s$i - 1, d$i), (0, 0, 1, 0))"
    ),
}

SETUP = ("self.embed = nn.Embedding(13, 8)", "self.head = nn.Linear(8, 13)")
START = Element(
    "x = $f",
    choices={
        "f": (
            "self.embed(input_ids)",
            "F.embedding(input_ids, self.embed.weight)",
            "self.embed.weight[input_ids]",
            "F.one_hot(input_ids, 13).double() @ self.embed.weight",
            "self.embed(input_ids.flatten()).view(*input_ids.shape, -1)",
        )
    },
)
