"""The trio tasks of a migration.

:mod:`.source` and :mod:`.destination` are the two roles, each one function with one nursery that scopes everything it
starts. Around them, one subject each: :mod:`.channel` (the stream, and who may write it), :mod:`.ram_out` and
:mod:`.ram_in` (pages in batches), :mod:`.reader` (the return path), :mod:`.limiter` (bandwidth), :mod:`.handover` (the
shield around the decision), :mod:`.teardown` (everything that must happen on every way out), :mod:`.boundary` (groups of
exceptions become one error).
"""
