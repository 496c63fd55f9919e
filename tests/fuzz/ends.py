"""Ends: what a model returns, after hidden states `x`."""

from __future__ import annotations

from tests.fuzz.elements import Element

LOGITS = "logits = self.head(x)"
CROSS = "F.cross_entropy(logits.flatten(0, 1), labels.flatten()"
ENDS = {
    "hidden": Element("return x"),
    "logits": Element(
        f"{LOGITS}\nreturn $f",
        choices={
            "f": (
                "logits",
                "{'logits': logits}",
                "logits[:, -2:]",
                "logits[:, -1]",
                "logits[:, :-1]",
                "logits[:, 1:]",
                "logits[:, -1:].argmax(-1), logits",
                "logits.argmax(-1), x",
                "logits[torch.arange(x.shape[0]), mask.sum(1) - 1]",
                "logits[:, : x.shape[1] // 2]",
                "logits[:, 0], logits",
            )
        },
    ),
    "cross entropy": Element(
        f"{LOGITS}\nreturn $f",
        choices={
            "f": (
                f"{CROSS})",
                f"{CROSS}, reduction='sum')",
                f"{CROSS}, reduction='none').sum() / (labels != -100).sum()",
                f"{CROSS}, reduction='none').view_as(labels)",
                f"{CROSS}, label_smoothing=0.1)",
                f"{CROSS}, weight=torch.linspace(1, 2, 13, dtype=x.dtype))",
                "F.cross_entropy(logits.transpose(1, 2), labels)",
                "F.cross_entropy(logits.reshape(-1, 13), labels.view(-1), ignore_index=-100)",
                "F.nll_loss(logits.log_softmax(-1).flatten(0, 1), labels.flatten())",
                f"{{'loss': {CROSS}), 'logits': logits}}",
                f"{CROSS}) + 0.1 * logits.logsumexp(-1).pow(2).mean()",
                f"(({CROSS}, reduction='none').view_as(labels) * mask).sum(1) / mask.sum(1)).mean()",
            )
        },
    ),
    "shifted cross entropy": Element(
        f"{LOGITS}\n$shift\nreturn F.cross_entropy(logits.reshape(-1, 13), labels.reshape(-1)$options)",
        choices={
            "shift": (
                "labels = F.pad(labels, (0, 1), value=-100)[:, 1:]",
                "logits, labels = logits[:, :-1], labels[:, 1:]",
                "logits, labels = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()",
                "labels = torch.cat([labels[:, 1:], labels.new_full((labels.shape[0], 1), -100)], 1)",
                "labels = labels.roll(-1, 1)",
                "logits, labels = logits[:, :-2], labels[:, 2:]",
            ),
            "options": ("", ", reduction='sum'", ", label_smoothing=0.2"),
        },
    ),
    "likelihood": Element(
        f"""
        {LOGITS}
        given = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        valid = labels != -100
        return $f
        """,
        choices={
            "f": (
                "-(given * valid).sum() / valid.sum()",
                "(given * valid).sum(1)",
                "torch.exp(given).masked_fill(~valid, 0.0)",
                "given[:, 1:].mean()",
                "-(given * valid).sum(-1) / valid.sum(-1).clamp(min=1)",
                "torch.where(valid, given, 0).mean()",
            )
        },
    ),
    "regression": Element(
        "return $f",
        choices={
            "f": (
                "F.mse_loss(x, targets)",
                "F.mse_loss(x, targets, reduction='sum')",
                "F.smooth_l1_loss(x, targets)",
                "F.l1_loss(x, targets)",
                "F.huber_loss(x, targets)",
                "(x - targets).pow(2).mean()",
                "(x - targets).norm()",
                "1 - F.cosine_similarity(x, targets, dim=-1).mean()",
                "F.kl_div(x.log_softmax(-1), targets.softmax(-1), reduction='batchmean')",
                "F.binary_cross_entropy_with_logits(x, targets.sigmoid())",
                "F.mse_loss(x[:, 1:], targets[:, :-1])",
                "F.soft_margin_loss(x, targets.sign())",
                "((x - targets) ** 2).sum(-1).mean(1).max()",
            )
        },
    ),
    "classifier": Element(
        "pooled = $f\nreturn F.cross_entropy(self.head(pooled), classes)",
        choices={
            "f": (
                "x.mean(1)",
                "x.sum(1)",
                "x.amax(1)",
                "x.max(1)[0]",
                "x[:, 0]",
                "x[:, -1]",
                "(x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)",
                "x[torch.arange(x.shape[0]), mask.sum(-1) - 1]",
                "x[:, 1:].mean(1)",
                "torch.cat([x[:, 0], x.mean(1)], -1)[:, 4:12]",
                "F.adaptive_avg_pool1d(x.transpose(1, 2), 1).squeeze(-1)",
                "torch.tanh(self.head.weight[:8] @ x.mean(1).T).T",
            )
        },
    ),
    "accuracy": Element(
        f"{LOGITS}\nloss = {CROSS})\nright = (logits.argmax(-1) == labels) & (labels != -100)\nreturn $f",
        choices={
            "f": (
                "loss, right.sum()",
                "loss, right.double().mean()",
                "loss, right.sum() / (labels != -100).sum()",
                "loss, right",
                "loss, right.any(), right.all()",
            )
        },
    ),
    "contrastive": Element(
        "pooled = F.normalize(x.mean(1), dim=-1)\nreturn F.cross_entropy(pooled @ pooled.T, torch.arange(x.shape[0]))"
    ),
    "penalty": Element(f"{LOGITS}\nreturn {CROSS}) + 0.01 * sum(p.pow(2).sum() for p in self.parameters())"),
}
