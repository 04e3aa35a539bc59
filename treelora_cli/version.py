"""The version of treelora."""

__version__ = "0.1.0"
