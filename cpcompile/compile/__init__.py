"""From a captured graph to a callable: the passes in order, then the inner compiler.

In: the graph that Dynamo hands over, options and an axis. Out: `Transformed`, which holds the graph before and after with
every decision, and a callable that runs this rank's part. May import `passes` and below.
"""
