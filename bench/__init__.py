"""Benchmarks: ``python -m bench precopy`` and ``python -m bench cancel``.

Every figure comes from processes started side by side in one run, so that ratios mean something on a noisy machine.
How each figure is taken is said where it is taken: intervals and order in :mod:`bench.precopy`, CPU time and memory in
:mod:`bench.measure`, kinds of memory and contents in :mod:`bench.memory`, medians and ratios in :mod:`bench.figures`.
"""
