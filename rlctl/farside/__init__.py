"""The environment on other machines: what travels with a run, the shell that sets it up, and how it is examined.

A launcher takes `environment.environment_of(order)`: its `lines` set `$python` on a node, and `doctor_line` after them
compares that node with the plan (`examination`, `report`). `rundir.start` packs what must be in the run folder before.
"""
