"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


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
