"""The package's own exception."""


class CurvatureError(RuntimeError):
    """The curvature pass could not be done; parameters, gradients and state are as they were before it."""
