"""Report: a plan as one HTML file that needs nothing else: no network, no other file."""

from cpcompile.inspect.report.page import page

__all__ = ["page"]
