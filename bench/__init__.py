"""Benchmarks: ``python -m bench precopy`` and ``python -m bench cancel``.

Every figure comes from processes that run side by side in one run, so that ratios are valid on a noisy machine. The
method of each figure is described in its module: intervals and order in :mod:`bench.precopy`, CPU time and memory in
:mod:`bench.measure`, kinds of memory and contents in :mod:`bench.memory`, medians and ratios in :mod:`bench.figures`.
"""
