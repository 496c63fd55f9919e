"""What commands are made of: the target that they are given, and the command `verify`.

Modules that `cli` imports import nothing heavy before a command runs, so that `--help` answers at once.
"""
