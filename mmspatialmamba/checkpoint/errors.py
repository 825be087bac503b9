class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, told in one line."""
