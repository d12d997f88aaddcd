"""A dense layer fitted to what a mixture really does with real tokens.

Merged weights (KS, KA, KC) ignore the GELU, the gates and the order of neurons. Here one FFN is
regressed on the RMoE layer's own outputs, measured after the block's second LayerNorm, where a
per-token scale no longer counts: the second matrix by ridge regression, then both by gradient
descent. The parent answers for any input, so that tokens between the real ones serve as well.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import cos, pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.merge import FFN

Tokens = dict[str, Tensor]
"""Modality -> (T, D) tokens."""
Answer = Callable[[Tokens], Tensor]
"""What a layer says about tokens: -> (ΣT, D), the modalities one after another."""

RIDGE = 1e-3
"""Penalty of the ridge regression, over the mean square of its inputs."""
BETWEEN = 4
"""One in so many tokens of a batch is mixed with another."""
CHECKED = 1 / 8
"""Share of the tokens that only check."""
CHECKS = 10
"""Of the error on them, during a descent."""


@dataclass(frozen=True)
class FitSettings:
    """How long and how fast."""

    steps: int = 600
    """Of gradient descent, per layer."""
    batch: int = 2048
    """Tokens of a step; never more than a quarter of the tokens."""
    rate: float = 0.1
    """Largest step of Adam, over the spread of each matrix; it falls to 0 as a cosine."""
    between: float = 0.3
    """Weight of tokens between two real ones, where the parent is asked anew."""
    seed: int = 0
    """Of the order of tokens."""


@dataclass(frozen=True)
class Task:
    """One layer to be imitated."""

    norm: nn.LayerNorm
    """The block's second LayerNorm."""
    gelu: str
    """Form of the GELU, "tanh" or "erf"."""
    parent: Answer
    """The RMoE layer."""
    kept: Answer | None
    """The routed experts that stay beside the fitted FFN, if any."""

    def run(self, ffn: FFN, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D), the FFN alone."""
        return F.linear(hidden(ffn, x_TD, self.gelu), ffn.fc2_weight, ffn.fc2_bias)

    def output(self, ffn: FFN, tokens: Tokens, beside: Tensor | None = None) -> Tensor:
        """What the fitted layer says after the LayerNorm; `beside`: `kept`, if known already."""
        y_TD = self.run(ffn, joined(tokens))
        if beside is None and self.kept is not None:
            beside = self.kept(tokens)
        normed: Tensor = self.norm(y_TD if beside is None else y_TD + beside)
        return normed


def hidden(ffn: FFN, x_TD: Tensor, gelu: str) -> Tensor:
    """Activations (T, F) between the matrices."""
    form = "tanh" if gelu == "tanh" else "none"
    return F.gelu(F.linear(x_TD, ffn.fc1_weight, ffn.fc1_bias), approximate=form)


def joined(tokens: Tokens) -> Tensor:
    """The tokens of all modalities, one after another."""
    return torch.cat(list(tokens.values()))


def feature_error(found: Tensor, wanted: Tensor) -> float:
    """Squared error of (T, D) features over their variance; 1 = as good as their mean."""
    spread = (wanted - wanted.mean(0)).square().sum()
    return float((found - wanted).square().sum() / spread)


def ridge(inputs_TF: Tensor, outputs_TD: Tensor, penalty: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Weight (D, F) and bias (D,) of the linear map with the least penalised squared error."""
    ones = inputs_TF.new_ones(len(inputs_TF), 1)
    x_TF = torch.cat([inputs_TF, ones], dim=1)
    gram = (x_TF.T @ x_TF).double()
    gram += penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram, (x_TF.T @ outputs_TD).double()).to(inputs_TF.dtype)
    return solution[:-1].T.contiguous(), solution[-1]


def refitted(ffn: FFN, tokens: Tokens, task: Task) -> FFN:
    """The FFN with its second matrix replaced by ridge regression on the parent's outputs."""
    x_TD, y_TD = joined(tokens), task.parent(tokens)
    if task.kept is not None:
        y_TD = y_TD - task.kept(tokens)
    return FFN(ffn.fc1_weight, ffn.fc1_bias, *ridge(hidden(ffn, x_TD, task.gelu), y_TD))


def fit(
    starts: Mapping[str, FFN],
    tokens: Tokens,
    wanted: Tensor,
    task: Task,
    settings: FitSettings,
) -> FFN:
    """The dense FFN that imitates a layer on its tokens.

    The last tokens of each modality (chips of their own) are not learnt from: they say which start
    is the best after the ridge regression, and when the descent has gone far enough.

    Args:
        starts: candidates for the first matrix.
        tokens: modality -> (T, D), as the student sees them.
        wanted: (ΣT, D), what the layer should say after the LayerNorm.
        task: the layer.
        settings: how long and how fast.
    """
    learnt, unseen = split(tokens, wanted, task)
    with torch.no_grad():
        refits = [refitted(ffn, learnt.tokens, task) for ffn in starts.values()]
        best = min(refits, key=lambda ffn: unseen.error(ffn, task))
    return descend(best, learnt, unseen, task, settings)


@dataclass(frozen=True)
class Lesson:
    """Tokens and what the layer should say about them."""

    tokens: Tokens
    """Modality -> (T, D)."""
    wanted: Tensor
    """(ΣT, D) after the LayerNorm."""
    beside: Tensor | None
    """(ΣT, D) from the experts that stay."""

    def error(self, ffn: FFN, task: Task) -> float:
        """Feature error of a dense layer on these tokens."""
        with torch.no_grad():
            return feature_error(task.output(ffn, self.tokens, self.beside), self.wanted)


def split(tokens: Tokens, wanted: Tensor, task: Task) -> tuple[Lesson, Lesson]:
    """Tokens to learn from, and the last ones of each modality to check with."""
    cuts = {m: max(1, len(t) - round(CHECKED * len(t))) for m, t in tokens.items()}
    first = {m: torch.arange(cut) for m, cut in cuts.items()}
    last = {m: torch.arange(cuts[m], len(t)) for m, t in tokens.items()}
    last = {m: rows if len(rows) else first[m] for m, rows in last.items()}
    lessons = []
    for rows in (first, last):
        own = {m: tokens[m][index] for m, index in rows.items()}
        with torch.no_grad():
            beside = None if task.kept is None else task.kept(own)
        lessons.append(Lesson(own, wanted[places(rows, tokens)], beside))
    return lessons[0], lessons[1]


def descend(start: FFN, learnt: Lesson, unseen: Lesson, task: Task, settings: FitSettings) -> FFN:
    """Both matrices by Adam on the squared error after the LayerNorm; the best on `unseen`."""
    parameters = FFN(*(p.detach().float().clone().requires_grad_() for p in start))
    scales = [float(p.std()) for p in (start.fc1_weight, start.fc2_weight)]
    rates = [settings.rate * scales[i // 2] for i in range(4)]
    groups = [{"params": [p], "lr": r} for p, r in zip(parameters, rates, strict=True)]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(settings.seed)
    best, least = start, unseen.error(start, task)
    for step, rows in enumerate(batches(learnt.tokens, settings), start=1):
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + cos(pi * (step - 1) / settings.steps)) / 2
        optimiser.zero_grad()
        miss(parameters, rows, learnt, task, settings, generator).backward()
        optimiser.step()
        if step % -(-settings.steps // CHECKS) == 0 or step == settings.steps:
            error = unseen.error(parameters, task)
            if error < least:
                best, least = FFN(*(p.detach().clone() for p in parameters)), error
    return best


def miss(
    ffn: FFN,
    rows: Mapping[str, Tensor],
    lesson: Lesson,
    task: Task,
    settings: FitSettings,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error on some real tokens, and on tokens between them."""
    real = {name: lesson.tokens[name][own] for name, own in rows.items()}
    place = places(rows, lesson.tokens)
    beside = None if lesson.beside is None else lesson.beside[place]
    loss = (task.output(ffn, real, beside) - lesson.wanted[place]).square().mean()
    if settings.between:
        few = {name: x[: -(-len(x) // BETWEEN)] for name, x in real.items()}
        halfway = mixed(few, generator)
        with torch.no_grad():
            answer = task.norm(task.parent(halfway))
        guess = task.output(ffn, halfway)
        loss = loss + settings.between * (guess - answer).square().mean()
    return loss


def batches(tokens: Tokens, settings: FitSettings) -> Iterator[dict[str, Tensor]]:
    """Rows of each modality for every step: shuffled passes, all modalities in their shares."""
    total = sum(len(t) for t in tokens.values())
    share = min(settings.batch / total, 0.25)
    sizes = {m: max(1, round(share * len(t))) for m, t in tokens.items()}
    generator = torch.Generator().manual_seed(settings.seed)
    left: dict[str, Tensor] = {m: torch.empty(0, dtype=torch.long) for m in tokens}
    for _ in range(settings.steps):
        for name, size in sizes.items():
            if len(left[name]) < size:
                left[name] = torch.randperm(len(tokens[name]), generator=generator)
        yield {m: left[m][:size] for m, size in sizes.items()}
        left = {m: left[m][size:] for m, size in sizes.items()}


def places(rows: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
    """Rows of each modality's tokens, as rows of all tokens one after another."""
    first, found = 0, []
    for name, own in rows.items():
        found.append(own + first)
        first += len(tokens[name])
    return torch.cat(found)


def mixed(tokens: Tokens, generator: torch.Generator) -> Tokens:
    """Tokens at random places between pairs of real ones of the same modality."""
    result = {}
    for name, x_TD in tokens.items():
        share = torch.rand(len(x_TD), 1, generator=generator)
        other = x_TD[torch.randperm(len(x_TD), generator=generator)]
        result[name] = share * x_TD + (1 - share) * other
    return result
