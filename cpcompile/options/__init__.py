"""What the user says: the options (`Config`), the axis of the mesh (`Axis`) and what tells documents apart (`Source`).

Each is checked where it is made, so that what is below reads values that are right. May import `runtime`, `balance`, `errors`
and `_torch`.
"""
