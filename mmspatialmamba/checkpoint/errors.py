class CheckpointError(RuntimeError):
    """One line about a checkpoint that cannot be used or written."""
