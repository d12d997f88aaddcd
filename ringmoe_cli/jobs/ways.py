"""How a model is run: whole or from disk, compiled, in which numbers."""

from dataclasses import dataclass

from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.machine import chosen_device


@dataclass(frozen=True)
class Ways:
    """What the user chose; nothing: in memory, in the checkpoint's own precision."""

    streamed: bool = False
    """Blocks stay on disk until they are called."""
    compiled: bool = False
    """torch.compile."""
    bf16: bool = False
    """The encoder computes in bfloat16, as it does on a GPU anyway."""
    int8: bool = False
    """The experts are 8-bit integers."""

    @property
    def alone(self) -> bool:
        """Whether a model run so must work on one batch at a time."""
        return self.streamed or self.compiled

    def device(self, name: str) -> str:
        """The device meant by `--device`: what only a CPU does goes there, unless another is named.

        Raises:
            RingmoeError: for a device that this machine lacks.
        """
        on_cpu = name == "auto" and (self.streamed or self.int8)
        return chosen_device("cpu" if on_cpu else name)

    def check(self, device: str) -> None:
        """Refuse what excludes each other, and what this machine cannot do.

        Raises:
            RingmoeError: naming the options.
        """
        import torch

        from model import fused, int8

        refusals = {
            "--stream keeps the model on disk and works on the CPU; leave --device": (
                self.streamed and device != "cpu"
            ),
            "--stream changes the model's weights all the time; leave --compile": (
                self.streamed and self.compiled
            ),
            "--stream takes weights as they are on disk; leave --bf16": (
                self.streamed and self.bf16
            ),
            f"--int8 works on the CPU, not on {device}; leave --device": (
                self.int8 and device != "cpu"
            ),
            "--int8 lays weights out in memory; leave --stream and --compile": (
                self.int8 and self.alone
            ),
            "this processor has no 8-bit products (VNNI); leave --int8": (
                self.int8 and not int8.runs()
            ),
            "this processor has no bfloat16 products; leave --bf16": (
                self.bf16 and device == "cpu" and not fused.runs(torch.empty(0).bfloat16())
            ),
        }
        for words, refused in refusals.items():
            if refused:
                raise RingmoeError(words)


AS_STORED = Ways()
"""In memory, in the checkpoint's own precision."""
