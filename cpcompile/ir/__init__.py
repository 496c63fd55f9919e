"""The vocabulary of the passes: what is known of a node and of a graph, and how a new node comes into being.

In: nodes. Out: `Placement` (how ranks hold a value), `Annotation` (what one pass tells the next of a node), `Call` (arguments
bound to a schema), `Plan` (what all passes share), new nodes beside old ones, and the nodes that bring a value to another
placement. May import `balance` and below.
"""
