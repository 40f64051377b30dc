"""The trio tasks of a migration.

:mod:`.source` and :mod:`.destination` are the two roles. Each is one function with one nursery, which scopes everything
that it starts. :mod:`.ram` moves pages. What both roles need has one subject each: :mod:`.guest_calls` (calls into the
guest's code), :mod:`.shield` (around the commit), :mod:`.outcome` (groups of exceptions become one error), :mod:`.order`
(which command is legal where), :mod:`.device_writer` and :mod:`.device_tail` (what stands around the pages).
"""
