"""Connections of a migration: what carries bytes, how many bytes went, and which connection has which task.

:mod:`.channel` is one stream with its byte count, :mod:`.limiter` its bandwidth, :mod:`.return_path` what the destination
says, :mod:`.closing` its end. :mod:`.connections` makes streams; :mod:`.lobby` and :mod:`.reception` choose among those
that come to a listener, by the first bytes (:mod:`.first_bytes`). The engine is above this package, the transports are
beside the engine.
"""
