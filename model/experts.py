"""The RMoE layer: specialised, collaborative and shared experts (RingMoE Eq. 3).

Shapes: T tokens, D width, F hidden width, E experts of a branch, N tokens assigned to experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.router import Assignment, LayerRouting, Router


class Stacked(nn.Module):
    """The same linear layer of E experts, stacked: weight (E, out, in), bias (E, out)."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(experts, outputs))


class ExpertBank(nn.Module):
    """E feed-forward networks of equal shape: D -> F -> D with GELU between."""

    def __init__(self, experts: int, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = Stacked(experts, width, config.mlp_ratio * width)
        self.fc2 = Stacked(experts, config.mlp_ratio * width, width)
        self.gelu = config.gelu

    def __len__(self) -> int:
        return len(self.fc1.weight)

    def forward(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        """Each token's experts, weighted and summed: (T, D) -> (T, D)."""
        inputs = x_TD[assignment.rows_N].split(assignment.counts)
        weights = zip(
            self.fc1.weight.unbind(0), self.fc1.bias.unbind(0),
            self.fc2.weight.unbind(0), self.fc2.bias.unbind(0), strict=True,
        )  # fmt: skip
        outputs = [
            F.linear(gelu(F.linear(x, w1, b1), self.gelu), w2, b2)
            for x, (w1, b1, w2, b2) in zip(inputs, weights, strict=True)
        ]
        y_ND = torch.cat(outputs) * assignment.gate_N[:, None]
        y_TD = torch.zeros(x_TD.shape, dtype=y_ND.dtype, device=y_ND.device)
        return y_TD.index_add(0, assignment.rows_N, y_ND)

    def apply_all(self, x_TD: Tensor) -> Tensor:
        """The first expert on every token: the shared branch."""
        hidden = gelu(F.linear(x_TD, self.fc1.weight[0], self.fc1.bias[0]), self.gelu)
        return F.linear(hidden, self.fc2.weight[0], self.fc2.bias[0])


def gelu(x: Tensor, form: str) -> Tensor:
    """GELU in its `tanh` or `erf` form."""
    return F.gelu(x, approximate="tanh" if form == "tanh" else "none")


class RMoE(nn.Module):
    """y = Σ g·specialised(x) + Σ g·collaborative(x) + shared(x) (RingMoE Eq. 3)."""

    def __init__(self, config: ModelConfig, stage: int, block: int) -> None:
        super().__init__()
        width = config.widths[stage]
        self.router = nn.ModuleDict()
        kept = config.experts_of(stage, block, "collaborative")
        if kept:
            self.collaborative = ExpertBank(len(kept), width, config)
            self.router["collaborative"] = Router(config.collaborative, width, kept, config)
        self.specialised = nn.ModuleDict()
        routers = nn.ModuleDict()
        for name in config.modalities:
            kept = config.experts_of(stage, block, f"specialised.{name}")
            if kept:
                self.specialised[name] = ExpertBank(len(kept), width, config)
                routers[name] = Router(config.specialised, width, kept, config)
        if routers:
            self.router["specialised"] = routers
        if config.shared:
            self.shared = ExpertBank(config.shared, width, config)

    def forward(self, x_TD: Tensor, tokens: dict[str, int]) -> tuple[Tensor, LayerRouting]:
        """Run the layer.

        Args:
            x_TD: tokens, those of each modality together.
            tokens: modality -> its number of tokens, in the order of `x_TD`.

        Returns:
            (T, D) outputs and the routing statistics.
        """
        y_TD = self.shared.apply_all(x_TD) if hasattr(self, "shared") else 0
        branches = {}
        if "collaborative" in self.router:
            assignment, branches["collaborative"] = self.router["collaborative"](x_TD)
            y_TD = y_TD + self.collaborative(x_TD, assignment)
        if self.specialised:
            parts = []
            for (name, _), part_TD in zip(
                tokens.items(), x_TD.split(list(tokens.values())), strict=True
            ):
                if name in self.specialised:
                    assignment, branches[f"specialised.{name}"] = self.router["specialised"][name](
                        part_TD
                    )
                    parts.append(self.specialised[name](part_TD, assignment))
                else:
                    parts.append(torch.zeros_like(part_TD))
            y_TD = y_TD + torch.cat(parts)
        return y_TD, LayerRouting(branches)
