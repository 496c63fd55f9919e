"""What the user says: the options (`Config`), the axis of the mesh (`Axis`) and what tells documents apart (`Source`).

In: names and values as users pass them. Out: values that are right, since each is checked where it is made. May import
`balance` and below.
"""
