"""Mutation checks: known one-line bugs, and whether the tests that ought to see them do."""
