"""Compiling for accelerators that are not attached, and reading what the compiler reports."""
