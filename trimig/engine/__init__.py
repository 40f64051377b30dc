"""The trio tasks of a migration.

:mod:`.source` and :mod:`.destination` are the two roles. Each role is one function with one nursery, in which all its
tasks run. :mod:`.ram` moves pages. Both roles use :mod:`.guest_calls` (calls into the guest's code), :mod:`.shield` (no
cancellation during the commit), :mod:`.outcome` (a group of exceptions becomes one error), :mod:`.order` (the names of the
stream's elements), :mod:`.device_writer` and :mod:`.device_tail` (device sections, in front of the pages and after them).
"""
