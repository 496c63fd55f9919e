"""The commands of `cpcompile`, each imported when it is asked for.

In: a command line. Out: what it asked for, printed or as a file. May import `train` and below.
"""
