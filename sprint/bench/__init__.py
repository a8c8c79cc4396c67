"""Measurements: each prints ratios within one run beside the figures, and names what it compares with."""
