"""Streams: several streams in one sequence, tokens shifted inside the model, and losses of fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile.zoo.inputs import BATCH, LENGTH, Sampler
from cpcompile.zoo.programs.decoders import language
from cpcompile.zoo.programs.parts import MLP, VOCABULARY, WIDTH, Block, token_loss
from cpcompile.zoo.programs.registry import Program, program


class Language(nn.Module):
    """A language model that gives logits, or hidden states."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(128, WIDTH)
        self.blocks, self.head = nn.Sequential(Block(causal=causal), Block(causal=causal)), nn.Linear(WIDTH, VOCABULARY)

    def hidden(self, input_ids: Tensor) -> Tensor:
        return self.blocks(self.embed(input_ids) + self.position.weight[: input_ids.shape[1]])

    def logits(self, input_ids: Tensor) -> Tensor:
        return self.head(self.hidden(input_ids))


class ShiftInside(Language):
    """The text without its last token says the text without its first."""

    def forward(self, input_ids: Tensor) -> Tensor:
        inputs, targets = input_ids[:, :-1], input_ids[:, 1:]
        return F.cross_entropy(self.logits(inputs).transpose(1, 2), targets)


@program("handwritten")
def shift_inside(sampler: Sampler) -> Program:
    return Program(ShiftInside(), {"input_ids": sampler.tokens()})


class BeginByPad(Language):
    """A padded id begins the text; the last token falls off."""

    def forward(self, input_ids: Tensor) -> Tensor:
        shifted = F.pad(input_ids, (1, 0), value=1)[:, :-1]
        return token_loss(self.logits(shifted), input_ids)


@program("handwritten")
def begin_of_text_by_pad(sampler: Sampler) -> Program:
    return Program(BeginByPad(), {"input_ids": sampler.tokens()})


class BeginAndEnd(Language):
    """A token is put before the text and one behind: one more position than tokens."""

    def forward(self, input_ids: Tensor) -> Tensor:
        inputs, targets = F.pad(input_ids, (1, 0), value=1), F.pad(input_ids, (0, 1), value=2)
        return token_loss(self.logits(inputs), targets)


@program("handwritten")
def begin_and_end_of_text(sampler: Sampler) -> Program:
    return Program(BeginAndEnd(), {"input_ids": sampler.tokens()})


class SeveralTokens(Language):
    """Each head says a token further ahead; the losses are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.ModuleList(MLP() for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x, loss = self.hidden(input_ids), input_ids.new_zeros((), dtype=self.embed.weight.dtype)
        for ahead, extra in enumerate(self.extra, start=1):
            logits = self.head(extra(x)[:, :-ahead])
            loss = loss + token_loss(logits, input_ids[:, ahead:]) / len(self.extra)
        return loss


@program("handwritten")
def several_tokens_ahead(sampler: Sampler) -> Program:
    return Program(SeveralTokens(), {"input_ids": sampler.tokens()})


class ChainedHeads(Language):
    """DeepSeek: the module for a token further ahead reads the embedding of the one before it, and has its own block."""

    def __init__(self) -> None:
        super().__init__()
        self.join, self.block = nn.Linear(2 * WIDTH, WIDTH), Block(causal=True)
        self.norm_1, self.norm_2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.hidden(input_ids)
        loss = token_loss(self.head(x[:, :-1]), input_ids[:, 1:])
        joined = torch.cat([self.norm_1(x[:, :-1]), self.norm_2(self.embed(input_ids[:, 1:]))], dim=-1)
        further = self.block(self.join(joined))
        return loss + 0.3 * token_loss(self.head(further[:, :-1]), input_ids[:, 2:])


@program("handwritten")
def chained_token_heads(sampler: Sampler) -> Program:
    return Program(ChainedHeads(), {"input_ids": sampler.tokens()})


class DecisionTransformer(nn.Module):
    """Returns, states and actions in turn; actions are said at the places of states."""

    def __init__(self) -> None:
        super().__init__()
        self.reward, self.state, self.action = nn.Linear(1, WIDTH), nn.Linear(5, WIDTH), nn.Linear(3, WIDTH)
        self.time, self.norm = nn.Embedding(64, WIDTH), nn.LayerNorm(WIDTH)
        self.blocks, self.head = nn.Sequential(Block(causal=True), Block(causal=True)), nn.Linear(WIDTH, 3)

    def forward(self, states: Tensor, actions: Tensor, returns: Tensor, timesteps: Tensor) -> Tensor:
        batch, length, _ = states.shape
        time = self.time(timesteps)
        parts = (self.reward(returns) + time, self.state(states) + time, self.action(actions) + time)
        x = torch.stack(parts, dim=1).permute(0, 2, 1, 3).reshape(batch, 3 * length, WIDTH)
        x = self.blocks(self.norm(x)).reshape(batch, length, 3, WIDTH).permute(0, 2, 1, 3)
        return F.mse_loss(self.head(x[:, 1]), actions)


@program("handwritten")
def decision_transformer(sampler: Sampler) -> Program:
    inputs = {"states": sampler.normal(BATCH, 13, 5), "actions": sampler.normal(BATCH, 13, 3)}
    inputs |= {"returns": sampler.normal(BATCH, 13, 1), "timesteps": torch.arange(13).repeat(BATCH, 1)}
    return Program(DecisionTransformer(), inputs, {"token_dims": dict.fromkeys(inputs, 1)})


class Codebooks(nn.Module):
    """MusicGen: embeddings of all codebooks are added, each has a head, and later ones are delayed by the trainer."""

    def __init__(self, delayed_inside: bool) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(VOCABULARY, WIDTH) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, VOCABULARY) for _ in range(3))
        self.blocks, self.delayed_inside = nn.Sequential(Block(causal=True), Block(causal=True)), delayed_inside

    def forward(self, codes: Tensor) -> Tensor:
        if self.delayed_inside:
            length = codes.shape[2]
            codes = torch.stack([F.pad(codes[:, k], (k, 0), value=1)[:, :length] for k in range(3)], dim=1)
        x = sum(embed(codes[:, k, :-1]) for k, embed in enumerate(self.embed))
        x = self.blocks(x)
        logits = torch.stack([head(x) for head in self.heads], dim=1)
        losses = [token_loss(logits[:, k], codes[:, k, 1:]) for k in range(3)]
        return torch.stack(losses).mean()


@program("handwritten")
def codebook_streams(sampler: Sampler) -> Program:
    codes = sampler.tokens(3 * LENGTH).view(BATCH, 3, LENGTH)
    return Program(Codebooks(delayed_inside=False), {"codes": codes}, {"token_dims": {"codes": 2}})


@program("handwritten")
def codebook_streams_delayed(sampler: Sampler) -> Program:
    codes = sampler.tokens(3 * LENGTH).view(BATCH, 3, LENGTH)
    return Program(Codebooks(delayed_inside=True), {"codes": codes}, {"token_dims": {"codes": 2}})


class DepthTransformer(Codebooks):
    """A small transformer over the codebooks of each frame, behind a large one over the frames."""

    def __init__(self) -> None:
        super().__init__(delayed_inside=False)
        self.depth = Block(causal=True)

    def forward(self, codes: Tensor) -> Tensor:
        batch, books, length = codes.shape
        parts = torch.stack([embed(codes[:, k]) for k, embed in enumerate(self.embed)], dim=2)
        frames = self.blocks(parts.sum(dim=2))
        before = torch.cat([torch.zeros_like(frames[:, :1]), frames[:, :-1]], dim=1)
        inside = torch.cat([before[:, :, None], parts[:, :, :-1]], dim=2).reshape(batch * length, books, WIDTH)
        y = self.depth(inside).view(batch, length, books, WIDTH)
        return torch.stack([token_loss(head(y[:, :, k]), codes[:, k]) for k, head in enumerate(self.heads)]).mean()


@program("handwritten")
def depth_transformer(sampler: Sampler) -> Program:
    codes = sampler.tokens(3 * LENGTH).view(BATCH, 3, LENGTH)
    return Program(DepthTransformer(), {"codes": codes}, {"token_dims": {"codes": 2}})


class MaskedDiffusion(Language):
    """Tokens are hidden where a random number is below a time of each row; the loss is weighed by that time."""

    def __init__(self) -> None:
        super().__init__(causal=False)

    def forward(self, input_ids: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        hidden = noise < times[:, None]
        logits = self.logits(torch.where(hidden, 0, input_ids))
        losses = F.cross_entropy(logits.flatten(0, 1), input_ids.flatten(), reduction="none").view_as(input_ids)
        return (losses * hidden / times[:, None]).sum() / input_ids.numel()


@program("handwritten")
def masked_diffusion(sampler: Sampler) -> Program:
    inputs = {"input_ids": sampler.tokens(), "noise": sampler.normal(BATCH, LENGTH).sigmoid()}
    return Program(MaskedDiffusion(), {**inputs, "times": torch.tensor([0.4, 0.7])})


class MaskedRows(Language):
    """BERT with its loss of the hidden tokens only: rows of a mask are picked before the head."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = labels != -100
        return F.cross_entropy(self.head(self.hidden(input_ids)[hidden]), labels[hidden])


@program("handwritten")
def head_of_masked_rows(sampler: Sampler) -> Program:
    return language(MaskedRows(causal=False), sampler)


class Distilled(Language):
    """A teacher without gradients; the divergence of its logits, at a temperature, over the text."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Language()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.softmax(self.teacher.logits(input_ids) / 2, dim=-1)
        logits = self.logits(input_ids)
        divergence = F.kl_div(F.log_softmax(logits / 2, dim=-1), target, reduction="none").sum(-1)
        weight = (labels != -100).to(divergence.dtype)
        return token_loss(logits, labels) + 4 * (divergence * weight).sum() / weight.sum()


@program("handwritten")
def distillation(sampler: Sampler) -> Program:
    return language(Distilled(), sampler)


class Preference(Language):
    """DPO: sums of log probabilities of both answers, against those of a frozen model that are given."""

    def forward(self, input_ids: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        logits, labels = self.logits(input_ids)[:, :-1], labels[:, 1:].clone()
        mask = labels != -100
        labels[labels == -100] = 0
        picked = torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
        sums = (picked * mask).sum(-1)
        chosen, rejected = (sums - reference).chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


@program("handwritten")
def direct_preference(sampler: Sampler) -> Program:
    inputs = {"input_ids": sampler.tokens(), "labels": sampler.labels(), "reference": sampler.normal(BATCH)}
    return Program(Preference(), inputs)


class PolicyGradient(Language):
    """GRPO: clipped ratios of probabilities, times advantages, averaged over the tokens of each answer."""

    def forward(self, input_ids: Tensor, mask: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        logits = self.logits(input_ids)[:, :-1] / 0.9
        picked = logits.gather(-1, input_ids[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)
        ratio = torch.exp((picked - old[:, 1:]).clamp(-3, 3))
        gain = torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
        weight = mask[:, 1:]
        return -((gain * weight).sum(-1) / weight.sum(-1).clamp(min=1)).mean()


@program("handwritten")
def policy_gradient(sampler: Sampler) -> Program:
    mask = torch.ones(BATCH, LENGTH)
    mask[0, :12], mask[1, :5] = 0, 0
    inputs = {"input_ids": sampler.tokens(), "mask": mask, "old": sampler.normal(BATCH, LENGTH) - 4}
    return Program(PolicyGradient(), {**inputs, "advantages": torch.tensor([0.7, -1.1])})


class Reward(Language):
    """A reward of the last token that is no padding; the better answer's should be larger."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        scores = self.score(self.hidden(input_ids)).squeeze(-1)
        last = attention_mask.sum(dim=1) - 1
        rewards = scores[torch.arange(scores.shape[0], device=scores.device), last]
        return -F.logsigmoid(rewards[0] - rewards[1])


@program("handwritten")
def reward_of_last_token(sampler: Sampler) -> Program:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, 22:] = 0
    return Program(Reward(), {"input_ids": sampler.tokens(), "attention_mask": mask})


class Sentences(Language):
    """Means over the tokens of both texts, which have lengths of their own; similar pairs are on the diagonal."""

    def forward(self, query: Tensor, query_mask: Tensor, passage: Tensor, passage_mask: Tensor) -> Tensor:
        a, b = self.pooled(query, query_mask), self.pooled(passage, passage_mask)
        scores = a @ b.T / 0.2
        target = torch.arange(scores.shape[0], device=scores.device)
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2

    def pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        weight = mask.unsqueeze(-1).to(self.embed.weight.dtype)
        return F.normalize((self.hidden(ids) * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=-1)


@program("handwritten")
def sentence_embeddings(sampler: Sampler) -> Program:
    masks = torch.ones(BATCH, 19, dtype=torch.long), torch.ones(BATCH, LENGTH, dtype=torch.long)
    masks[0][1, 14:], masks[1][0, 30:] = 0, 0
    inputs = {"query": sampler.tokens(19), "query_mask": masks[0]}
    inputs |= {"passage": sampler.tokens(), "passage_mask": masks[1]}
    return Program(Sentences(causal=False), inputs, {"token_dims": {"query": 1, "passage": 1}})


class LateInteraction(Sentences):
    """ColBERT: each token of the query takes its most similar token of a passage."""

    def forward(self, query: Tensor, query_mask: Tensor, passage: Tensor, passage_mask: Tensor) -> Tensor:
        q, d = (F.normalize(self.hidden(x), dim=-1) for x in (query, passage))
        similar = torch.einsum("aid,bjd->abij", q, d).masked_fill(~passage_mask[None, :, None].bool(), -1e4)
        scores = (similar.max(dim=-1).values * query_mask[:, None]).sum(-1)
        return F.cross_entropy(scores, torch.arange(scores.shape[0], device=scores.device))


@program("handwritten")
def late_interaction(sampler: Sampler) -> Program:
    made = sentence_embeddings(sampler)
    return Program(LateInteraction(causal=False), made.inputs, made.options)


class Spans(Language):
    """Question answering: logits of where the answer begins and ends, a softmax over the tokens."""

    def __init__(self) -> None:
        super().__init__(causal=False)
        self.ends = nn.Linear(WIDTH, 2)

    def forward(self, input_ids: Tensor, start: Tensor, end: Tensor) -> Tensor:
        first, last = self.ends(self.hidden(input_ids)).split(1, dim=-1)
        return (F.cross_entropy(first.squeeze(-1), start) + F.cross_entropy(last.squeeze(-1), end)) / 2


@program("handwritten")
def answer_spans(sampler: Sampler) -> Program:
    inputs = {"input_ids": sampler.tokens(), "start": torch.tensor([3, 20]), "end": torch.tensor([7, 31])}
    return Program(Spans(), inputs)


class Copying(Language):
    """A pointer-generator: weights of attention to the text are added up by word, and mixed with the softmax of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.pointer, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.hidden(input_ids)
        scores = self.pointer(x) @ x.transpose(1, 2) / 4
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        index = input_ids[:, None, :].expand_as(weights)
        copied = torch.zeros(*x.shape[:2], VOCABULARY, device=x.device, dtype=x.dtype).scatter_add(2, index, weights)
        gate = self.gate(x).sigmoid()
        mixed = gate * self.head(x).softmax(-1) + (1 - gate) * copied
        return F.nll_loss((mixed + 1e-9).log().flatten(0, 1), labels.flatten())


@program("handwritten")
def pointer_generator(sampler: Sampler) -> Program:
    return language(Copying(), sampler)


class Auxiliary(Language):
    """Label smoothing, the square of the log-partition, and a load-balancing loss of a router over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.hidden(input_ids)
        routed = self.router(x).softmax(-1)
        used = F.one_hot(routed.argmax(-1), 4).to(x.dtype).mean(dim=(0, 1))
        balance = 4 * (used * routed.mean(dim=(0, 1))).sum()
        logits = self.head(x * routed.max(-1, keepdim=True).values)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        partition = logits.logsumexp(-1).pow(2).mean()
        return {"loss": loss + 0.01 * balance + 1e-4 * partition, "balance": balance}


@program("handwritten")
def auxiliary_losses(sampler: Sampler) -> Program:
    return language(Auxiliary(), sampler)


class VectorQuantised(nn.Module):
    """Tokens become the nearest vectors of a table, with the gradient passed straight through, and a commitment loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.table, self.decode = nn.Linear(6, WIDTH), nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 6)
        self.first, self.last = Block(), Block()

    def forward(self, frames: Tensor) -> Tensor:
        x = self.first(self.encode(frames))
        distances = x.pow(2).sum(-1, keepdim=True) - 2 * x @ self.table.weight.T + self.table.weight.pow(2).sum(-1)
        codes = self.table(distances.argmin(-1))
        commitment = F.mse_loss(codes, x.detach()) + 0.25 * F.mse_loss(x, codes.detach())
        return F.mse_loss(self.decode(self.last(x + (codes - x).detach())), frames) + commitment


@program("handwritten")
def vector_quantised(sampler: Sampler) -> Program:
    return Program(VectorQuantised(), {"frames": sampler.normal(BATCH, LENGTH, 6)}, {"token_dims": {"frames": 1}})
