"""Changes of the program that its tests must notice: ``python -m tests.mutate``.

Two kinds. *Named* changes (:mod:`.named`) are faults that somebody might make, each with the tests that must notice it.
*Random* ones (:mod:`.operators`) turn a comparison, an operator or a constant in the modules where a slip costs a guest.

Each runs in a copy of the tree: the module is changed, the tests of that module run until one fails, and the module is put
back. What no test notices is a survivor, printed with its place. It takes hours, so CI does not run it;
tests/test_mutate.py proves the tool on a program of ten lines and keeps the named changes up to date.
"""
