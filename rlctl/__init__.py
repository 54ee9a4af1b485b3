"""The front desk: the command line, presets, launchers and run folders."""

__version__ = "0.1.0"
