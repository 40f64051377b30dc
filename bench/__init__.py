"""Benchmarks: ``python -m bench precopy``, ``postcopy``, ``transports``, ``encodings``, ``scale``, ``cancel``, ``parking``.

Every figure comes from processes that run side by side in one run, so that ratios are valid on a noisy machine. The
load average stands beside it (:mod:`bench.load`), and the processor time of each side. The method of each figure is
described in its module: intervals and order in :mod:`bench.precopy`, CPU time and memory in :mod:`bench.measure`, kinds
of memory and contents in :mod:`bench.memory`, the figures to reach in :mod:`bench.goals`. ``python -m bench goals``
puts the verdicts of several runs into one table.
"""
