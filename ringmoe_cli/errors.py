"""Errors a user can act on: one line that says what, where, and how to fix it."""


class RingmoeError(Exception):
    """Bad input or a failed job; `main()` prints it as one line and exits with 1."""


class OutputExistsError(RingmoeError):
    """A finished output is in the way and `--overwrite` was not given."""

    def __init__(self, path: object) -> None:
        self.path = path
        super().__init__(f"{path} exists; choose another -o, or pass --overwrite to replace it")


class SceneError(RingmoeError):
    """A scene cannot be opened, read or understood."""


class BadBlockError(SceneError):
    """A block of a raster cannot be decoded."""


class StoreError(RingmoeError):
    """A tile store is missing, incomplete or of another kind."""


class LabelError(RingmoeError):
    """Labels cannot be read or do not fit the scene."""


class RecipeError(RingmoeError):
    """A recipe has an unknown key or a value out of range."""


class CheckpointError(RingmoeError):
    """A checkpoint is missing, corrupt, or made for something else."""
