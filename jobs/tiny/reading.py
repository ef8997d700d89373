"""What a caption says, as questions with few answers, and the read-outs that teach text encoders to tell it.

Every caption of scenes.py answers all of these questions, since what it leaves open has one natural answer. The
read-outs are thrown away after training: what stays is that T5's tokens hold, ready to be looked up, what a transformer
must know to draw, and CLIP's one vector as much of it as fits.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from jobs.tiny.scenes import COLOURS, RADII, SHAPES, SIZE

PATCH = 16  # pixels a side of an image token
MARGIN = 4  # pixels around an object that count as its own, since a place is only known to about that much
# The questions of `facts`: the background's colour; then of either object its shape, colour, column, row and size.
QUESTIONS, ANSWERS = 11, 8  # the most answers that any question has
LOOKS = (1, 2, 3, 4, 6, 7, 8, 9)  # shape, colour, column and row of both
PATCH_ANSWERS = len(COLOURS) * (1 + len(SHAPES))


def facts(rows: torch.Tensor) -> torch.Tensor:
    """Rows of scenes.place [N, 11] -> answers, int64 [N, 11] in the rows' order; of a missing object all are 0."""
    answers = []
    for start in (1, 6):
        shape, colour, x, y, radius = rows[:, start : start + 5].unbind(1)
        thirds = [((at - SIZE / 4) / (SIZE / 4)).round().clamp(0, 2) for at in (x, y)]
        size = sum((radius > least - 1).float() for least, _ in (RADII["medium"], RADII["large"]))
        answers += [shape + 1, colour, *thirds, size]
    return torch.stack([rows[:, 0], *answers], 1).long()


def layout(rows: torch.Tensor) -> torch.Tensor:
    """Rows [N, 11] -> what is at each image token, row by row, int64 [N, 64]: a background's or an object's look."""
    centres = torch.arange(PATCH // 2, SIZE, PATCH, device=rows.device)
    look = rows[:, :1, None].expand(-1, len(centres), len(centres))
    for start in (1, 6):
        shape, colour, x, y, radius = rows[:, start : start + 5, None, None].unbind(1)
        near = torch.hypot(centres[None, None, :] - x, centres[None, :, None] - y) < radius + MARGIN
        look = torch.where(near, (1 + shape) * len(COLOURS) + colour, look)  # a missing object is near nothing
    return look.flatten(1).long()


class TokenReader(nn.Module):
    """Learned queries that attend once to all tokens, padding too, as image tokens do: [B, L, D] -> [B, Q, answers]."""

    def __init__(self, queries: int, answers: int, width: int, heads: int = 4):
        super().__init__()
        self.query = nn.Parameter(torch.randn(heads, queries, width // heads))
        self.key_value = nn.Linear(width, 2 * width)
        self.answer = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, answers)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        heads, _, size = self.query.shape
        key, value = self.key_value(tokens).unflatten(-1, (2, heads, size)).permute(2, 0, 3, 1, 4)  # [B, heads, L, D]
        weights = (self.query @ key.mT * size**-0.5).softmax(-1)
        return self.answer((weights @ value + self.query).transpose(1, 2).flatten(2))


def readers(text_width: int, pooled_width: int) -> dict[str, nn.Module]:
    """Fresh read-outs: the facts and the layout from T5's tokens, the facts from CLIP's vector."""
    return {
        "facts": TokenReader(QUESTIONS, ANSWERS, text_width),
        "layout": TokenReader((SIZE // PATCH) ** 2, PATCH_ANSWERS, text_width),
        "pooled_facts": nn.Sequential(
            nn.Linear(pooled_width, QUESTIONS * ANSWERS), nn.Unflatten(1, (QUESTIONS, ANSWERS))
        ),
    }


def reading_loss(networks: nn.ModuleDict, txt: torch.Tensor, vec: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sum of the three read-outs' mean cross-entropies; txt [B, L, 128], vec [B, 96], rows [B, 11]."""
    said, seen = facts(rows), layout(rows)
    pairs = ((networks["facts"](txt), said), (networks["layout"](txt), seen), (networks["pooled_facts"](vec), said))
    return sum(cross_entropy(logits.float().flatten(0, 1), answers.flatten()) for logits, answers in pairs)


@torch.no_grad()
def reading_score(
    networks: nn.ModuleDict, txt: torch.Tensor, vec: torch.Tensor, rows: torch.Tensor, whole: torch.Tensor
) -> dict[str, float]:
    """The share of captions read right, from T5's tokens and from CLIP's vector of the captions that are `whole` [B].

    pairs: of two objects, both shapes, colours and places; all: the background and every size, too.
    """
    said = facts(rows)
    is_pair = said[:, 6] > 0
    scores = {}
    for name, logits, counts in (
        ("t5", networks["facts"](txt), torch.ones_like(whole)),
        ("clip", networks["pooled_facts"](vec), whole),
    ):
        right = logits.argmax(-1) == said
        scores[f"{name}_pairs"] = right[is_pair & counts][:, LOOKS].all(1).float().mean().item()
        scores[f"{name}_all"] = right[counts].all(1).float().mean().item()
    scores["layout"] = (networks["layout"](txt).argmax(-1) == layout(rows)).float().mean().item()
    scores["t5_deviation"], scores["clip_deviation"] = txt.std(-1).mean().item(), vec.std(-1).mean().item()
    return {name: round(value, 4) for name, value in scores.items()}
