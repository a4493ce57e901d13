"""What runs in the worker process beside the learner's code; the only package that imports torch."""
