"""The commands of `cpcompile`, each imported when it is asked for."""
