"""Science: proteins, genomes, molecules and physics."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile.zoo.inputs import BATCH, Sampler
from cpcompile.zoo.programs.parts import HEADS, MLP, WIDTH, Attention, Block, join_heads, split_heads, token_loss
from cpcompile.zoo.programs.registry import Program, program

RESIDUES = 25
AMINO_ACIDS = 22


def residues(s: Sampler, length: int = RESIDUES) -> Tensor:
    """Return residues `[B, length]` as numbers."""
    return s.tokens(length) % AMINO_ACIDS


def protein(model: nn.Module, s: Sampler) -> Program:
    """Return a model of residues whose labels are residues."""
    labels = residues(s)
    labels[0, :9] = -100
    return Program(model, {"residues": residues(s), "labels": labels}, {"token_dims": {"residues": 1}})


class BiasedAttention(nn.Module):
    """Attention of `[..., S, D]` with a bias of pairs `[..., S, S, P]`, and a gate."""

    def __init__(self, pair_width: int) -> None:
        super().__init__()
        self.qkv, self.bias = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(pair_width, HEADS, bias=False)
        self.gate, self.out, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(pair_width)

    def forward(self, x: Tensor, pair: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in self.qkv(x).chunk(3, dim=-1))
        scores = torch.einsum("...ihd,...jhd->...hij", q, k) / 2
        scores = scores + self.bias(self.norm(pair)).movedim(-1, -3)
        if mask is not None:
            scores = scores + (mask[:, None, None, :].to(scores.dtype) - 1) * 1e9
        y = torch.einsum("...hij,...jhd->...ihd", scores.softmax(dim=-1), v).flatten(-2)
        return self.out(y * self.gate(x).sigmoid())


class Folding(nn.Module):
    """A language model of proteins whose attention has a bias of pairs: products of residues, and their distance."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.distance = nn.Embedding(AMINO_ACIDS, WIDTH), nn.Embedding(17, 8)
        self.left, self.right = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.attention, self.mlp, self.head = BiasedAttention(8), MLP(), nn.Linear(WIDTH, AMINO_ACIDS)

    def forward(self, residues: Tensor, labels: Tensor) -> Tensor:
        x, mask = self.embed(residues), residues != 0
        place = torch.arange(residues.shape[1], device=residues.device)
        distance = (place[None, :] - place[:, None]).clamp(-8, 8) + 8
        pair = self.left(x)[:, :, None] + self.right(x)[:, None, :] + self.distance(distance)
        x = x + self.attention(x, pair, mask)
        return token_loss(self.head(x + self.mlp(x)), labels)


@program("science")
def esm_with_pair_bias(s: Sampler) -> Program:
    made = protein(Folding(), s)
    made.inputs["residues"][1, 20:] = 0
    return made


class Contacts(nn.Module):
    """Contacts from the weights of attention: made symmetric, less the product of their means, and a regression."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qk, self.head = (
            nn.Embedding(AMINO_ACIDS, WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(HEADS, 1),
        )

    def forward(self, residues: Tensor, contacts: Tensor) -> Tensor:
        q, k = (split_heads(t) for t in self.qk(self.embed(residues)).chunk(2, dim=-1))
        weights = (q @ k.mT / 2).softmax(-1)
        weights = weights + weights.mT
        product = weights.sum(-1, keepdim=True) * weights.sum(-2, keepdim=True)
        weights = weights - product / weights.sum((-1, -2), keepdim=True)
        logits = self.head(weights.permute(0, 2, 3, 1)).squeeze(-1)
        return F.binary_cross_entropy_with_logits(logits, contacts)


@program("science")
def contacts_of_weights(s: Sampler) -> Program:
    inputs = {"residues": residues(s), "contacts": (s.normal(BATCH, RESIDUES, RESIDUES) > 0).float()}
    return Program(Contacts(), inputs, {"token_dims": {"residues": 1}})


class TriangleProduct(nn.Module):
    """Each pair is updated by the pairs that close a triangle with it: outgoing edges, or incoming ones."""

    def __init__(self, outgoing: bool) -> None:
        super().__init__()
        self.equation = "bikc,bjkc->bijc" if outgoing else "bkic,bkjc->bijc"
        self.norm, self.ab, self.gates = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.norm_out, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, z: Tensor) -> Tensor:
        z = self.norm(z)
        gates = self.gates(z).sigmoid()
        a, b = (self.ab(z) * gates[..., : 2 * WIDTH]).chunk(2, dim=-1)
        return self.out(self.norm_out(torch.einsum(self.equation, a, b))) * gates[..., 2 * WIDTH :]


class TriangleAttention(nn.Module):
    """Rows of pairs attend to themselves, biased by the third edge; `ending` takes columns."""

    def __init__(self, ending: bool) -> None:
        super().__init__()
        self.ending, self.norm, self.attention = ending, nn.LayerNorm(WIDTH), BiasedAttention(WIDTH)

    def forward(self, z: Tensor) -> Tensor:
        z = self.norm(z.transpose(1, 2) if self.ending else z)
        y = self.attention(z, z[:, None])
        return y.transpose(1, 2) if self.ending else y


class PairStack(nn.Module):
    """AlphaFold's stack of pairs, and a histogram of distances."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(AMINO_ACIDS, WIDTH), nn.Embedding(AMINO_ACIDS, WIDTH)
        self.products = nn.ModuleList(TriangleProduct(outgoing) for outgoing in (True, False))
        self.attentions = nn.ModuleList(TriangleAttention(ending) for ending in ((False, True) if attention else ()))
        self.transition, self.head = MLP(), nn.Linear(WIDTH, 6)

    def forward(self, residues: Tensor, bins: Tensor) -> Tensor:
        z = self.left(residues)[:, :, None] + self.right(residues)[:, None, :]
        for update in (*self.products, *self.attentions):
            z = z + update(z)
        z = z + self.transition(z)
        logits = self.head(z + z.transpose(1, 2))
        return F.cross_entropy(logits.flatten(0, 2), bins.flatten())


def pairs(model: nn.Module, s: Sampler) -> Program:
    """Return a model of residues whose labels are bins of distances."""
    bins = s.tokens(13 * 13).view(BATCH, 13, 13) % 6
    return Program(model, {"residues": residues(s, 13), "bins": bins}, {"token_dims": {"residues": 1}})


@program("science")
def triangle_products(s: Sampler) -> Program:
    return pairs(PairStack(attention=False), s)


@program("science")
def pair_stack(s: Sampler) -> Program:
    return pairs(PairStack(attention=True), s)


class Alignment(nn.Module):
    """Rows and columns of an alignment `[B, rows, residues]`, a bias of pairs, and the mean of outer products."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(AMINO_ACIDS, WIDTH), nn.LayerNorm(WIDTH)
        self.rows, self.columns, self.mlp = BiasedAttention(8), Attention(), MLP()
        self.left, self.right, self.pair = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3), nn.Linear(9, 8)
        self.head = nn.Linear(WIDTH, AMINO_ACIDS)

    def forward(self, alignment: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(alignment)
        outer = torch.einsum("bsic,bsjd->bijcd", self.left(x), self.right(x)).flatten(-2) / x.shape[1]
        pair = self.pair(outer)
        x = x + self.rows(self.norm(x), pair[:, None])
        columns = x.transpose(1, 2)
        x = x + self.columns(columns.flatten(0, 1)).view_as(columns).transpose(1, 2)
        return token_loss(self.head(x + self.mlp(x)).flatten(0, 1), labels.flatten(0, 1))


@program("science")
def alignment_attention(s: Sampler) -> Program:
    alignment, labels = (s.tokens(4 * 17).view(BATCH, 4, 17) % AMINO_ACIDS for _ in range(2))
    return Program(Alignment(), {"alignment": alignment, "labels": labels}, {"token_dims": {"alignment": 2}})


class TiedRows(nn.Module):
    """MSA Transformer: one softmax for all rows, of the sum of their scores."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(AMINO_ACIDS, WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.mlp, self.head = nn.Linear(WIDTH, 3 * WIDTH), MLP(), nn.Linear(WIDTH, AMINO_ACIDS)

    def forward(self, alignment: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(alignment)
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        weights = (torch.einsum("brihd,brjhd->bhij", q, k) / math.sqrt(4 * x.shape[1])).softmax(-1)
        x = x + torch.einsum("bhij,brjhd->brihd", weights, v).flatten(-2)
        return token_loss(self.head(x + self.mlp(x)).flatten(0, 1), labels.flatten(0, 1))


@program("science")
def tied_row_attention(s: Sampler) -> Program:
    made = alignment_attention(s)
    return Program(TiedRows(), made.inputs, made.options)


class PointAttention(nn.Module):
    """Invariant point attention: scores less squared distances of points in space, in frames of residues."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.points = (
            nn.Embedding(AMINO_ACIDS, WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, 36),
        )
        self.out, self.weight = nn.Linear(WIDTH + HEADS * 4, 3), nn.Parameter(torch.randn(HEADS))

    def forward(self, residues: Tensor, rotations: Tensor, translations: Tensor) -> Tensor:
        x = self.embed(residues)
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in self.qkv(x).chunk(3, dim=-1))
        points = self.points(x).unflatten(-1, (3 * HEADS, 3))
        points = torch.einsum("bsij,bspj->bspi", rotations, points) + translations[:, :, None]
        pq, pk, pv = points.chunk(3, dim=2)
        squared = (pq[:, :, None] - pk[:, None]).pow(2).sum(-1)
        scores = torch.einsum("bihd,bjhd->bijh", q, k) / 2 - F.softplus(self.weight) * squared / 10
        weights = scores.softmax(dim=2)
        found = torch.einsum("bijh,bjhp->bihp", weights, pv) - translations[:, :, None]
        found = torch.einsum("bsji,bspj->bspi", rotations, found)
        seen = torch.einsum("bijh,bjhd->bihd", weights, v).flatten(2)
        y = self.out(torch.cat([seen, found.flatten(2), found.norm(dim=-1)], dim=-1))
        return F.mse_loss(torch.einsum("bsij,bsj->bsi", rotations, y) + translations, translations.roll(1, dims=1))


@program("science")
def invariant_point_attention(s: Sampler) -> Program:
    rotations = torch.linalg.qr(s.normal(BATCH, RESIDUES, 3, 3)).Q
    inputs = {"residues": residues(s), "rotations": rotations, "translations": s.normal(BATCH, RESIDUES, 3)}
    return Program(PointAttention(), inputs, {"token_dims": {"residues": 1}})


class Genome(nn.Module):
    """Enformer: convolutions and pooling of bases, attention with relative positions, a crop, counts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv1d(4, WIDTH, 5, padding=2), nn.Conv1d(WIDTH, WIDTH, 1)
        self.tower, self.blocks, self.head = (
            nn.Conv1d(WIDTH, WIDTH, 3, padding=1),
            nn.Sequential(Block(), Block()),
            nn.Linear(WIDTH, 3),
        )

    def forward(self, bases: Tensor, counts: Tensor) -> Tensor:
        x = self.stem(bases.transpose(1, 2))
        for layer in (self.pool, self.tower):
            pairs = (x + layer(F.gelu(x))).unflatten(-1, (-1, 2))
            x = (pairs * pairs.softmax(dim=-1)).sum(-1)
        x = self.blocks(x.transpose(1, 2))[:, 4:-4]
        return F.poisson_nll_loss(F.softplus(self.head(x)), counts, log_input=False)


@program("science")
def enformer(s: Sampler) -> Program:
    bases = F.one_hot(s.tokens(4 * 35) % 4, 4).float()
    return Program(Genome(), {"bases": bases, "counts": s.normal(BATCH, 27, 3).abs()}, {"token_dims": {"bases": 1}})


class Cells(nn.Module):
    """A model of single cells: genes and their values; values of hidden genes are said, the cell is a token before them."""

    def __init__(self) -> None:
        super().__init__()
        self.gene, self.value = nn.Embedding(128, WIDTH), nn.Sequential(nn.Linear(1, WIDTH), nn.ReLU())
        self.cell, self.blocks, self.head = (
            nn.Parameter(torch.randn(1, 1, WIDTH)),
            nn.Sequential(Block(), Block()),
            nn.Linear(WIDTH, 1),
        )

    def forward(self, genes: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
        shown = values.masked_fill(hidden, -2.0)
        x = self.gene(genes) + self.value(shown.unsqueeze(-1))
        x = self.blocks(torch.cat([self.cell.expand(x.shape[0], -1, -1), x], dim=1))
        said = self.head(x[:, 1:]).squeeze(-1)
        by_cell = torch.einsum("bd,bsd->bs", x[:, 0], self.gene(genes)) / 4
        weight = hidden.to(said.dtype)
        errors = (said - values).pow(2) + (by_cell - values).pow(2)
        return (errors * weight).sum() / weight.sum()


@program("science")
def single_cells(s: Sampler) -> Program:
    inputs = {"genes": s.tokens(), "values": s.normal(BATCH, 37).abs(), "hidden": s.normal(BATCH, 37) > 0.3}
    return Program(Cells(), inputs)


class Graph(nn.Module):
    """Graphormer: biases by the distance of nodes in the graph, degrees, and a virtual node that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.atom, self.degree, self.path = nn.Embedding(128, WIDTH), nn.Embedding(8, WIDTH), nn.Embedding(10, HEADS)
        self.graph, self.virtual = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(HEADS))
        self.block, self.head = Block(), nn.Linear(WIDTH, 1)

    def forward(self, atoms: Tensor, degrees: Tensor, paths: Tensor, energy: Tensor) -> Tensor:
        x = self.atom(atoms) + self.degree(degrees)
        x = torch.cat([self.graph.expand(x.shape[0], -1, -1), x], dim=1)
        bias = x.new_zeros(x.shape[0], HEADS, x.shape[1], x.shape[1])
        bias[:, :, 1:, 1:] = self.path(paths).permute(0, 3, 1, 2)
        bias[:, :, 1:, 0] += self.virtual[None, :, None]
        bias[:, :, 0, :] += self.virtual[None, :, None]
        return F.l1_loss(self.head(self.block(x, None, bias)[:, 0]).squeeze(-1), energy)


@program("science")
def graphormer(s: Sampler) -> Program:
    inputs = {"atoms": s.tokens(RESIDUES), "degrees": s.tokens(RESIDUES) % 8}
    paths = s.tokens(RESIDUES * RESIDUES).view(BATCH, RESIDUES, RESIDUES) % 10
    inputs |= {"paths": paths, "energy": torch.tensor([0.3, -0.8])}
    return Program(Graph(), inputs, {"token_dims": {"atoms": 1, "degrees": 1}})


class Molecule(nn.Module):
    """Uni-Mol: Gaussians of distances bias the scores, which are the bias of the next layer; distances are said."""

    def __init__(self) -> None:
        super().__init__()
        self.atom, self.means, self.project = (
            nn.Embedding(128, WIDTH),
            nn.Parameter(torch.randn(6)),
            nn.Linear(6, HEADS),
        )
        self.qkv, self.head = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2)), nn.Linear(HEADS, 1)

    def forward(self, atoms: Tensor, coordinates: Tensor, truth: Tensor) -> Tensor:
        x, distances = self.atom(atoms), torch.cdist(coordinates, coordinates)
        gaussians = torch.exp(-0.5 * (distances[..., None] - self.means).pow(2))
        bias = self.project(gaussians).permute(0, 3, 1, 2)
        first = bias
        for qkv in self.qkv:
            q, k, v = (split_heads(t) for t in qkv(x).chunk(3, dim=-1))
            bias = q @ k.transpose(-1, -2) / 2 + bias
            x = x + join_heads(bias.softmax(-1) @ v)
        change = self.head((bias - first).permute(0, 2, 3, 1)).squeeze(-1)
        apart = coordinates[:, :, None] - coordinates[:, None]
        moved = coordinates + (apart * change[..., None]).mean(dim=2)
        return F.mse_loss(moved, truth) + x.pow(2).mean()


@program("science")
def unimol(s: Sampler) -> Program:
    inputs = {
        "atoms": s.tokens(RESIDUES),
        "coordinates": s.normal(BATCH, RESIDUES, 3),
        "truth": s.normal(BATCH, RESIDUES, 3),
    }
    return Program(Molecule(), inputs, {"token_dims": {"atoms": 1, "coordinates": 1}})


class Points(nn.Module):
    """A point transformer: the nearest points of each, by a sort of distances, and attention by vectors over them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.place, self.weigh, self.head = nn.Linear(3, WIDTH), MLP(), nn.Linear(WIDTH, 5)

    def forward(self, points: Tensor, labels: Tensor) -> Tensor:
        nearest = torch.cdist(points, points).topk(4, dim=-1, largest=False).indices
        rows = torch.arange(points.shape[0], device=points.device)[:, None, None]
        q, k, v = self.qkv(self.embed(points)).chunk(3, dim=-1)
        place = self.place(points[:, :, None] - points[rows, nearest])
        weights = self.weigh(q[:, :, None] - k[rows, nearest] + place).softmax(dim=2)
        return token_loss(self.head((weights * (v[rows, nearest] + place)).sum(dim=2)), labels)


@program("science")
def point_transformer(s: Sampler) -> Program:
    inputs = {"points": s.normal(BATCH, RESIDUES, 3), "labels": s.tokens(RESIDUES) % 5}
    return Program(Points(), inputs, {"token_dims": {"points": 1}})


class SetTransformer(nn.Module):
    """Induced points read the set and are read by it; a seed pools it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.induced, self.seed = (
            nn.Linear(3, WIDTH),
            nn.Parameter(torch.randn(1, 4, WIDTH)),
            nn.Parameter(torch.randn(1, 1, WIDTH)),
        )
        self.read, self.write, self.pool, self.head = Attention(), Attention(), Attention(), nn.Linear(WIDTH, 2)

    def forward(self, points: Tensor, target: Tensor) -> Tensor:
        x = self.embed(points)
        h = self.read(self.induced.repeat(x.shape[0], 1, 1), x)
        x = x + self.write(x, h)
        return F.mse_loss(self.head(self.pool(self.seed.repeat(x.shape[0], 1, 1), x)).squeeze(1), target)


@program("science")
def set_transformer(s: Sampler) -> Program:
    inputs = {"points": s.normal(BATCH, 37, 3), "target": s.normal(BATCH, 2)}
    return Program(SetTransformer(), inputs, {"token_dims": {"points": 1}})


class Slices(nn.Module):
    """Transolver: points of a mesh are dealt to slices by a softmax, slices attend to each other, and go back."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.deal, self.block, self.head = (
            nn.Linear(3, WIDTH),
            nn.Linear(WIDTH, 5),
            Block(),
            nn.Linear(WIDTH, 1),
        )

    def forward(self, mesh: Tensor, pressure: Tensor) -> Tensor:
        x = self.embed(mesh)
        weights = self.deal(x).softmax(dim=-1)
        slices = torch.einsum("bnk,bnd->bkd", weights, x) / (weights.sum(dim=1)[..., None] + 1e-5)
        y = x + torch.einsum("bnk,bkd->bnd", weights, self.block(slices))
        error = (self.head(y).squeeze(-1) - pressure).norm(dim=1) / pressure.norm(dim=1)
        return error.mean()


@program("science")
def transolver(s: Sampler) -> Program:
    inputs = {"mesh": s.normal(BATCH, 37, 3), "pressure": s.normal(BATCH, 37)}
    return Program(Slices(), inputs, {"token_dims": {"mesh": 1}})


class Galerkin(nn.Module):
    """Attention without a softmax: keys and values are normalised, and their product over the mesh comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 1)
        self.norm_k, self.norm_v = nn.LayerNorm(4), nn.LayerNorm(4)

    def forward(self, mesh: Tensor, pressure: Tensor) -> Tensor:
        x = self.embed(mesh)
        q, k, v = (split_heads(t) for t in self.qkv(x).chunk(3, dim=-1))
        product = self.norm_k(k).transpose(-2, -1) @ self.norm_v(v) / x.shape[1]
        return F.mse_loss(self.head(x + join_heads(q @ product)).squeeze(-1), pressure)


@program("science")
def galerkin_attention(s: Sampler) -> Program:
    made = transolver(s)
    return Program(Galerkin(), made.inputs, made.options)


class Axial(nn.Module):
    """A field on a grid `[B, rows, columns, variables]`: attention along rows, then along columns."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.along_columns, self.along_rows, self.head = (
            nn.Linear(3, WIDTH),
            Block(),
            Block(),
            nn.Linear(WIDTH, 3),
        )

    def forward(self, field: Tensor, later: Tensor) -> Tensor:
        x = self.embed(field)
        batch, rows, columns, width = x.shape
        x = self.along_columns(x.reshape(batch * rows, columns, width)).view(batch, rows, columns, width)
        x = x.transpose(1, 2).reshape(batch * columns, rows, width)
        x = self.along_rows(x).view(batch, columns, rows, width).transpose(1, 2)
        latitude = torch.linspace(-1.5, 1.5, rows, device=x.device).cos()[None, :, None, None]
        return ((field + self.head(x) - later).pow(2) * latitude).mean()


@program("science")
def axial_attention(s: Sampler) -> Program:
    inputs = {"field": s.normal(BATCH, 13, 7, 3), "later": s.normal(BATCH, 13, 7, 3)}
    return Program(Axial(), inputs, {"token_dims": {"field": 1}})


class FourierOperator(nn.Module):
    """AFNO: a transform of the grid in two dims, a small network of each frequency, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3)
        self.weight = nn.Parameter(torch.randn(2, WIDTH, WIDTH) * 0.2)

    def forward(self, field: Tensor, later: Tensor) -> Tensor:
        x = self.embed(field)
        modes = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
        real = modes.real @ self.weight[0] - modes.imag @ self.weight[1]
        imaginary = modes.imag @ self.weight[0] + modes.real @ self.weight[1]
        modes = torch.view_as_complex(F.softshrink(torch.stack([real, imaginary], dim=-1), 0.01))
        x = x + torch.fft.irfft2(modes, s=x.shape[1:3], dim=(1, 2), norm="ortho")
        return F.mse_loss(self.head(x), later)


@program("science")
def fourier_operator(s: Sampler) -> Program:
    made = axial_attention(s)
    return Program(FourierOperator(), made.inputs, made.options)
