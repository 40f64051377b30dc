"""Decisions, separate from the tasks that carry them out: plain functions and small objects. Time is an argument."""
