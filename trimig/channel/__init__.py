"""Connections of a migration: their streams, their byte counts, and the task of each connection.

:mod:`.channel` is one stream with its byte count. :mod:`.limiter` limits its bandwidth. :mod:`.return_path` reads the
messages of the destination. :mod:`.closing` closes a connection. :mod:`.connections` has the functions that open streams.
:mod:`.lobby` and :mod:`.reception` choose among the connections that a listener accepts, by their first bytes
(:mod:`.first_bytes`). The engine uses this package. So do the transports, which stand beside the engine.
"""
