"""Everything that measures a deployed model's cost; the one package that times anything.

timing.py    the time of calls: warm-up, cold caches, medians, alternation
latency.py   milliseconds of every (site shape, action), kept on disk, and what they predict for a plan
"""
