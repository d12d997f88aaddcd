"""A dense layer fitted to what a mixture really does with real tokens.

Merged weights (KS, KA, KC) ignore the GELU, the gates and the order of neurons. Here one FFN is
regressed on the RMoE layer's own outputs, measured after the block's second LayerNorm, where a
per-token scale no longer counts: the second matrix by ridge regression, then both by L-BFGS on
whitened tokens. The parent answers for any input, so that tokens near the real ones serve as well.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

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
CHECKED = 1 / 8
"""Share of the tokens that only check."""
ROUND = 25
"""Steps between two checks."""
PATIENCE = 2
"""Checks without a smaller error before a descent ends."""
NEAR = 0.3
"""How far a made-up token is from a real one, over the distance of two real ones."""
WEIGHT = 0.5
"""Of a made-up token; a real one has 1."""
FLOOR = 1e-4
"""Smallest variance that whitening makes 1, over the largest."""
HISTORY = 20
"""Steps that L-BFGS remembers, if they fit into `MEMORY` bytes."""
MEMORY = 1 << 30
ACTIVATIONS = 1 << 27
"""Largest number of activations between the matrices in a step."""


@dataclass(frozen=True)
class FitSettings:
    """How long and on how much."""

    steps: int = 150
    """Of L-BFGS at most, per layer."""
    tokens: int = 16384
    """Of a step; more real ones are sampled, fewer are joined by made-up ones."""
    copies: int = 2
    """Made-up tokens of a real one, at most."""
    seed: int = 0
    """Of the choice of tokens."""


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
    let_go: Callable[[], None] = lambda: None
    """Called when `parent` will not be asked again."""

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
    tokens, width = x_TF.shape
    few = tokens < width  # then the Gram matrix of the tokens is the smaller one
    gram = (x_TF @ x_TF.T if few else x_TF.T @ x_TF).double()
    gram.diagonal().add_(penalty * float(x_TF.square().sum()) / width)
    right = (outputs_TD if few else x_TF.T @ outputs_TD).double()
    found = torch.cholesky_solve(right, torch.linalg.cholesky(gram)).to(x_TF.dtype)
    solution = x_TF.T @ found if few else found
    return solution[:-1].T.contiguous(), solution[-1]


def refitted(ffn: FFN, tokens: Tokens, task: Task) -> FFN:
    """The FFN with its second matrix replaced by ridge regression on the parent's outputs."""
    x_TD, y_TD = joined(tokens), task.parent(tokens)
    if task.kept is not None:
        y_TD = y_TD - task.kept(tokens)
    return FFN(ffn.fc1_weight, ffn.fc1_bias, *ridge(hidden(ffn, x_TD, task.gelu), y_TD))


def fit(
    starts: Iterable[FFN],
    tokens: Tokens,
    wanted: Tensor,
    task: Task,
    settings: FitSettings,
) -> FFN:
    """The dense FFN that imitates a layer on its tokens.

    The last tokens of each modality (chips of their own) are not learnt from: they say which start
    is the best after the ridge regression, and when the descent has gone far enough.

    Args:
        starts: candidates for the first matrix; one is held at a time, besides the best.
        tokens: modality -> (T, D), as the student sees them.
        wanted: (ΣT, D), what the layer should say after the LayerNorm.
        task: the layer.
        settings: how long and on how much.
    """
    with torch.no_grad():
        learnt, unseen = split(tokens, wanted, task)
        refits = (refitted(ffn, learnt.tokens, task) for ffn in starts)
        best = min(refits, key=lambda ffn: unseen.error(ffn, task))
        most = min(settings.tokens, ACTIVATIONS // len(best.fc1_bias))
        lesson = enlarged(sampled(learnt, most, settings.seed), task, most, settings)
    task.let_go()
    return descend(best, lesson, unseen, task, settings.steps)


@dataclass(frozen=True)
class Lesson:
    """Tokens and what the layer should say about them."""

    tokens: Tokens
    """Modality -> (T, D)."""
    wanted: Tensor
    """(ΣT, D) after the LayerNorm."""
    beside: Tensor | None
    """(ΣT, D) from the experts that stay."""
    weights: Tensor
    """(ΣT, 1), how much each token counts."""

    def error(self, ffn: FFN, task: Task) -> float:
        """Feature error of a dense layer on these tokens."""
        return feature_error(task.output(ffn, self.tokens, self.beside), self.wanted)

    def part(self, rows: Mapping[str, Tensor]) -> "Lesson":
        """Some tokens of each modality."""
        places, first = [], 0
        for name, tokens in self.tokens.items():
            places.append(rows[name] + first)
            first += len(tokens)
        place = torch.cat(places)
        beside = None if self.beside is None else self.beside[place]
        own = {name: tokens[rows[name]] for name, tokens in self.tokens.items()}
        return Lesson(own, self.wanted[place], beside, self.weights[place])


def split(tokens: Tokens, wanted: Tensor, task: Task) -> tuple[Lesson, Lesson]:
    """Tokens to learn from, and the last ones of each modality to check with."""
    beside = None if task.kept is None else task.kept(tokens)
    whole = Lesson(tokens, wanted, beside, wanted.new_ones(len(wanted), 1))
    cuts = {m: max(1, len(t) - round(CHECKED * len(t))) for m, t in tokens.items()}
    first = {m: torch.arange(cut) for m, cut in cuts.items()}
    last = {m: torch.arange(cuts[m], len(t)) for m, t in tokens.items()}
    last = {m: rows if len(rows) else first[m] for m, rows in last.items()}
    return whole.part(first), whole.part(last)


def sampled(lesson: Lesson, most: int, seed: int) -> Lesson:
    """At most so many tokens, all modalities in their shares."""
    generator = torch.Generator().manual_seed(seed)
    share = min(1.0, most / len(lesson.wanted))
    return lesson.part(
        {
            name: torch.randperm(len(x), generator=generator)[: max(1, round(share * len(x)))]
            for name, x in lesson.tokens.items()
        }
    )


def enlarged(lesson: Lesson, task: Task, most: int, settings: FitSettings) -> Lesson:
    """With made-up tokens near the real ones, about which the parent is asked anew."""
    generator = torch.Generator().manual_seed(settings.seed)
    copies = min(settings.copies, most // len(lesson.wanted) - 1)
    if copies < 1:
        return lesson
    new = {
        name: torch.cat([neighbours(x, generator) for _ in range(copies)])
        for name, x in lesson.tokens.items()
    }
    answers = task.norm(task.parent(new))
    asked = Lesson(
        new,
        answers,
        None if task.kept is None else task.kept(new),
        answers.new_full((len(answers), 1), WEIGHT),
    )
    return together([lesson, asked])


def together(lessons: list[Lesson]) -> Lesson:
    """Several lessons as one, which need not keep modalities apart."""
    besides = [lesson.beside for lesson in lessons if lesson.beside is not None]
    return Lesson(
        {"": torch.cat([joined(lesson.tokens) for lesson in lessons])},
        torch.cat([lesson.wanted for lesson in lessons]),
        torch.cat(besides) if besides else None,
        torch.cat([lesson.weights for lesson in lessons]),
    )


def neighbours(x_TD: Tensor, generator: torch.Generator) -> Tensor:
    """A token near each real one, off it in the direction between two others."""
    one, other = (torch.randperm(len(x_TD), generator=generator) for _ in range(2))
    far = NEAR * torch.randn(len(x_TD), 1, generator=generator)
    return x_TD + far * (x_TD[one] - x_TD[other])


@dataclass(frozen=True)
class Coordinates:
    """Tokens of unit variance in all directions: z = (x - mean)·narrow."""

    mean: Tensor
    """(D,)."""
    wide: Tensor
    """(D, D), root of the covariance."""
    narrow: Tensor
    """(D, D), its inverse."""
    scale: float
    """Of the second matrix, so that both have entries of like size."""

    @classmethod
    def of(cls, x_TD: Tensor, ffn: FFN) -> "Coordinates":
        """Those of some tokens."""
        mean = x_TD.mean(0)
        off = x_TD - mean
        values, turn = torch.linalg.eigh((off.T @ off).double() / len(x_TD))
        roots = values.clamp(min=FLOOR * float(values[-1])).sqrt()
        wide, narrow = ((turn * r) @ turn.T for r in (roots, 1 / roots))
        wide = wide.to(x_TD.dtype)
        scale = float(ffn.fc2_weight.std() / (ffn.fc1_weight @ wide).std())
        return cls(mean, wide, narrow.to(x_TD.dtype), scale)

    def into(self, ffn: FFN) -> FFN:
        """The same function of z, its second matrix scaled."""
        w1, b1, w2, b2 = ffn
        return FFN(w1 @ self.wide, b1 + w1 @ self.mean, w2 / self.scale, b2 / self.scale)

    def scaled(self, ffn: FFN) -> FFN:
        """A function of z, its second matrix as it is."""
        return FFN(*ffn[:2], *(p * self.scale for p in ffn[2:]))

    def back(self, ffn: FFN) -> FFN:
        """The function of x again."""
        w1 = ffn.fc1_weight @ self.narrow
        return self.scaled(ffn)._replace(fc1_weight=w1, fc1_bias=ffn.fc1_bias - w1 @ self.mean)


def descend(start: FFN, learnt: Lesson, unseen: Lesson, task: Task, steps: int) -> FFN:
    """Both matrices by L-BFGS on the squared error after the LayerNorm; the best on `unseen`."""
    x_TD = joined(learnt.tokens)
    frame = Coordinates.of(x_TD, start)
    lesson = replace(learnt, tokens={"": (x_TD - frame.mean) @ frame.narrow})
    parameters = FFN(*(p.detach().clone().requires_grad_() for p in frame.into(start)))
    optimiser = quasi_newton(parameters, min(steps, ROUND))

    def closure() -> float:
        optimiser.zero_grad()
        error = miss(frame.scaled(parameters), lesson, task)
        torch.autograd.backward(error)
        return float(error.detach())

    with torch.no_grad():
        best, least, worse = start, unseen.error(start, task), 0
    for _ in range(0, steps, ROUND):
        optimiser.step(closure)
        with torch.no_grad():
            found = frame.back(parameters)
            error = unseen.error(found, task)
        if error < least:
            best, least, worse = found, error, 0
        else:
            worse += 1
        if worse == PATIENCE:
            break
    return best


def quasi_newton(parameters: FFN, steps: int) -> torch.optim.LBFGS:
    """L-BFGS over both matrices, so many steps at a time, with what history memory allows."""
    size = 2 * sum(p.nbytes for p in parameters)
    return torch.optim.LBFGS(
        list(parameters),
        max_iter=steps,
        max_eval=2 * steps,
        history_size=max(2, min(HISTORY, MEMORY // size)),
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=0,
    )


def miss(ffn: FFN, lesson: Lesson, task: Task) -> Tensor:
    """Squared error over the spread of what is wanted, each token with its weight."""
    off = task.output(ffn, lesson.tokens, lesson.beside) - lesson.wanted
    spread = (lesson.wanted - lesson.wanted.mean(0)).square().sum()
    return (off.square() * lesson.weights).sum() / spread
