"""What the control path raises: one class, whose text says what was asked, what is wrong, what to do."""

from __future__ import annotations


class ClusterError(OSError):
    """A cluster could not do what it was asked to; the message is for a person."""
