"""``trimig demo``: one process that supervises two hosts."""
