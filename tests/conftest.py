"""Fixtures shared by all tests."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def same_chance() -> None:
    """Random weights and inputs are the same in every run: what fails once fails again."""
    torch.manual_seed(0)


def folder_of(variable: str) -> Path:
    path = os.environ.get(variable)
    if not path or not Path(path).is_dir():
        pytest.skip(f"set {variable} to the folder to run this test")
    return Path(path)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real scenes and labelled sets."""
    return folder_of("RINGMOE_DATA")


@pytest.fixture(scope="session")
def oracle_dir() -> Path:
    """Inputs, weights and outputs of the released blocks."""
    return folder_of("RINGMOE_ORACLE")


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[Callable[..., Any]]:
    """What a call gives in another process, to which the call and its arguments travel."""
    with ProcessPoolExecutor(1, get_context("spawn")) as other:
        yield lambda call, *values: other.submit(call, *values).result(60)
