"""RingMoE on the command line: files and coordinates around the network in `model`."""

__version__ = "0.1.0"
