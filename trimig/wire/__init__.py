"""Bytes <-> events of QEMU's migration stream. No I/O, no clock, no trio.

Everything here works on buffers that somebody else fills and empties, so that it can be tested at every split and
fuzzed without a run loop. RAM moves in batches: arrays of page offsets and buffers of pages, never page by page.
"""
