"""Placeholder until the real module is merged."""


def foreign(path: str) -> bool:
    """Say whether a path lies on a file system of another kernel."""
    return False
