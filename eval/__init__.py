"""Everything that measures a model; the one package that times anything.

timing.py      the time of calls: warm-up, cold caches, medians, alternation
latency.py     milliseconds of every (site shape, action), kept on disk
prediction.py  what they and whole models that were timed say of a plan
memory.py      peak memory of a call, in a process of its own
perplexity.py  perplexity and KL of logits
"""
