"""Changes of the program that its tests must notice: ``python -m tests.mutate``.

There are two kinds. *Named* changes (:mod:`.named`) are plausible faults, each with the tests that must notice it.
*Random* changes (:mod:`.operators`) turn a comparison, an operator or a constant in the modules in which an error can
lose a guest.

Each change runs in a copy of the tree: the module is changed, the tests of that module run until one fails, and the
module is restored. A change that no test notices is a survivor, printed with its place. A run takes hours, so CI does
not run it; tests/processes/test_mutate.py proves the tool on a program of ten lines and keeps the named changes up to
date.
"""
