"""Workers hold the environments and act with a frozen policy for a round, while the learner
updates.
"""
