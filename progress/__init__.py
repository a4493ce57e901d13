"""The store of what the learner did."""
