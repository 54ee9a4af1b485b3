"""Explaining the keys of a resolved run: who set a value, what rules it, what else it could be, what would follow.

leaves.py        a key as this run has it          rules.py    type, bounds and relations in words
alternatives.py  values it could have instead      effects.py  the run planned again with one of them
origins.py       who set it, and what that beat    answer.py   all of it for one key, or for every key of a run
"""
