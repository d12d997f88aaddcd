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


@dataclass(frozen=True)
class FitSettings:
    """How long and how fast."""

    steps: int = 600
    """Of gradient descent, per layer."""
    batch: int = 2048
    """Tokens of a step; never more than a quarter of the tokens."""
    rate: float = 0.02
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

    Args:
        starts: candidates for the first matrix; the best after the ridge regression is taken.
        tokens: modality -> (T, D), as the student sees them.
        wanted: (ΣT, D), what the layer should say after the LayerNorm.
        task: the layer.
        settings: how long and how fast.
    """
    with torch.no_grad():
        beside = None if task.kept is None else task.kept(tokens)
        refits = [refitted(ffn, tokens, task) for ffn in starts.values()]
        errors = [feature_error(task.output(f, tokens, beside), wanted) for f in refits]
    best = refits[errors.index(min(errors))]
    return descend(best, tokens, wanted, beside, task, settings)


def descend(
    start: FFN,
    tokens: Tokens,
    wanted: Tensor,
    beside: Tensor | None,
    task: Task,
    settings: FitSettings,
) -> FFN:
    """Both matrices by Adam on the squared error after the LayerNorm."""
    parameters = FFN(*(p.detach().float().clone().requires_grad_() for p in start))
    scales = [float(p.std()) for p in (start.fc1_weight, start.fc2_weight)]
    rates = [settings.rate * scales[i // 2] for i in range(4)]
    groups = [{"params": [p], "lr": r} for p, r in zip(parameters, rates, strict=True)]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(settings.seed)
    for i, rows in enumerate(batches(tokens, settings)):
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + cos(pi * i / settings.steps)) / 2
        real = {name: tokens[name][own] for name, own in rows.items()}
        place = places(rows, tokens)
        found = task.output(parameters, real, None if beside is None else beside[place])
        loss = (found - wanted[place]).square().mean()
        if settings.between:
            halfway = mixed(real, generator)
            with torch.no_grad():
                answer = task.norm(task.parent(halfway))
            guess = task.output(parameters, halfway)
            loss = loss + settings.between * (guess - answer).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return FFN(*(p.detach() for p in parameters))


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
