"""The doctor: everything that can be known to go wrong before a run starts, one small function a subject.

`registry` is the table of checks, `case` what they look at, `examine` runs them under their time limits.
`rlctl doctor` shows all findings; `rlctl launch` runs the ones marked for it first.
"""
