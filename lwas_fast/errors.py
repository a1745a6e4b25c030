"""The package's own exceptions."""


class CurvatureError(RuntimeError):
    """The curvature pass could not be done; parameters, gradients and state are as they were before it."""


class FailsAgainError(CurvatureError):
    """A measurement that would fail at the next step, too: memory is short, or a loss does not repeat."""
