"""Few-shot episodes: the same fine-tuning from several draws of K labelled windows per class."""

from dataclasses import replace
from math import sqrt
from statistics import mean, stdev
from typing import Any

from model.checkpoint import write_text
from model.json_file import read_json
from model.tasks import TASKS
from ringmoe_cli import console
from ringmoe_cli.jobs.finetuning import SCORES, FinetuneRequest, finetune
from ringmoe_cli.jobs.scores import as_text, plain

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
"""Student's t at 97.5 % for 1, 2, … degrees of freedom."""


def few_shot(request: FinetuneRequest, shots: int, episodes: int) -> dict[str, Any]:
    """Run the episodes that are not there yet, each in a folder of its own.

    Returns:
        Mean and 95 % interval of the task's score over the draws, and the single scores.
    """
    key = TASKS[request.data.task].score
    found: list[float] = []
    for episode in range(episodes):
        folder = request.output / f"episode-{episode}"
        scores = folder / SCORES
        if not scores.is_file() or request.overwrite:
            console.say(f"episode {episode + 1} of {episodes}, {shots} labelled windows per class")
            data = replace(request.data, shots=shots, draw=episode)
            finetune(replace(request, data=data, output=folder))
        found.append(float(read_json(scores)[key]))
    middle, margin = interval(found)
    summary = {
        "task": request.data.task,
        "shots": shots,
        "episodes": episodes,
        key: middle,
        f"{key}_margin95": margin,
        f"{key}_per_episode": found,
    }
    write_text(request.output / SCORES, as_text(plain(summary)))
    return summary


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half width of its 95 % interval (Student's t); nan for a single value."""
    if len(values) < 2:
        return mean(values), float("nan")
    freedom = len(values) - 1
    t = T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.5 / freedom
    return mean(values), t * stdev(values) / sqrt(len(values))
