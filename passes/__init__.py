"""The passes, in the order in which they run."""

if __name__ != "cpcompile.passes":
    raise ImportError("import this package as cpcompile.passes")
