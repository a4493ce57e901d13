"""What runs in the worker process beside the learner's code; the only package that imports torch.

`events` and `processes` are also used by the parent and import nothing of torch.
"""
