"""Writes: what operators in place do, in the terms of operators without: aliases, functional forms, views undone."""
