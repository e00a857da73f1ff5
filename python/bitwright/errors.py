"""What is raised on purpose; its text is one sentence for the user. Taken from bitwright.spec."""

from __future__ import annotations


class BitwrightError(Exception):
    """Base of every error raised on purpose; its text is one sentence for the user."""


class InputError(BitwrightError, ValueError):
    """The input cannot be used: says what was wanted, what came and where."""


class DiskError(InputError):
    """A file could not be written (disk full, read-only, quota); what is finished stays there."""


class DeviceError(InputError):
    """A GPU has no memory left; what is finished stays there."""


class RefusedError(BitwrightError, ValueError):
    """A format or method cannot hold or do what was asked, and says what would work."""


class NumericalError(BitwrightError, ArithmeticError):
    """A computation broke down; the text lists what was tried."""


class VerificationError(BitwrightError):
    """What was written does not read back as what was meant."""
