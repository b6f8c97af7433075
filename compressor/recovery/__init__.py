"""What brings a student back towards its teacher after pruning and quantization, on the grids that are deployed.

reconstruct.py   in closed form, sub-layer by sub-layer
distill.py       by training: the loop, and imitation of the teacher on given text
trained.py       what is trained of a student
cache.py         the teacher's likeliest tokens, kept on disk
relations.py     of the last attention, which may be imitated, too
on_policy.py     an actor-critic on the student's own text
reinforce.py     towards a reward, on a leash to the teacher
reward.py        the rewards
rollouts.py      what a student writes, and what the teacher says of it
"""
