"""Batches on their way through a network: in order, and only a few of them in memory at a time."""

import pytest
import torch

from model.batch import Batch, Prediction
from ringmoe_cli.jobs.answers import Settings, forward
from ringmoe_cli.scene.maps.strips import Windows

SIDE = 256


class Quick:
    """Answers 1 MB to every window, at once."""

    def predict(self, batch: Batch) -> Prediction:
        return Prediction(dense=torch.zeros(len(batch.images["ms"]), 4, SIDE, SIDE))


def test_few_batches_are_in_memory_however_many_empty_ones_went_before():
    drawn, ahead = 0, []
    full = Batch(images={"ms": torch.zeros(1, 1, 1, SIDE, SIDE)})

    def batches():
        nonlocal drawn
        for drawn in range(1, 401):
            empty = drawn <= 100
            yield Windows([(0, drawn)], [] if empty else [0], None if empty else full, {})

    answers = forward(Quick(), batches(), Settings.of(SIDE, batch=1))
    for number, (some, dense) in enumerate(answers, 1):
        assert some.places == [(0, number)]
        assert (dense is None) == (number <= 100)
        ahead.append(drawn - number)
    assert len(ahead) == 400
    assert max(ahead) < 64


class Fails:
    """Has no answer to images of one brightness."""

    def __init__(self, brightness: int) -> None:
        self.brightness = brightness

    def predict(self, batch: Batch) -> Prediction:
        image = batch.images["ms"][:, 0]
        if image.max() == self.brightness:
            raise ValueError("no answer")
        return Prediction(dense=image)


@pytest.mark.parametrize("failing", [0, 1, 2, 5, 20])
def test_what_was_answered_before_a_failure_is_handed_out(failing):
    images = (torch.full((1, 1, 1, 8, 8), float(n)) for n in range(100))
    batches = (Windows([(0, n)], [0], Batch({"ms": x}), {}) for n, x in enumerate(images))
    answers, seen = forward(Fails(failing), batches, Settings.of(8, batch=1)), []
    with pytest.raises(ValueError, match="no answer"):
        seen.extend((some.places, dense.max()) for some, dense in answers)
    assert seen == [([(0, n)], n) for n in range(failing)]
