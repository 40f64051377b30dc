"""Guests whose code runs in a worker process: messages, the control socket, and what such guests share.

The protocol is on the page protocol/worker.md.
"""
