"""The Windows side, on a Linux machine: CPython for Windows under Wine. See `build`."""
